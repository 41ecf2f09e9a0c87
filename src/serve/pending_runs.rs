//! Pending runs of a pipeline.

use std::time::Duration;

use chrono::{DateTime, TimeDelta, Utc};

use crate::config::SchedulePlan;

/// Schedules that are due, and when the first of them was.
#[derive(Debug, Clone)]
pub(super) struct PendingRun {
    pub time: DateTime<Utc>,
    pub full: bool,
    pub schedules: Vec<SchedulePlan>,
    /// Number of earlier runs that failed.
    pub tried: u32,
}

/// A run that failed and is made again.
#[derive(Debug, Clone)]
pub(super) struct Retry {
    /// Time at which it was made last.
    pub since: DateTime<Utc>,
    pub due: PendingRun,
}

impl PendingRun {
    pub(crate) fn has(&self, schedule: &SchedulePlan) -> bool {
        self.schedules.iter().any(|own| own.name == schedule.name)
    }

    /// Returns the number of retries, and the pause before each.
    pub(crate) fn retries(&self) -> (u32, Duration) {
        self.schedules.iter().map(|schedule| (schedule.retries, schedule.retry_delay)).max().unwrap_or_default()
    }

    /// This or `other`, whichever is due first; what is due together is one run, which asks for everything if one of
    /// them does.
    pub(crate) fn or(mut self, other: Option<Self>, now: DateTime<Utc>) -> Self {
        match other {
            Some(other) if other.time <= now && self.time <= now => {
                self.time = self.time.min(other.time);
                self.full |= other.full;
                self.tried = self.tried.max(other.tried);
                self.schedules.extend(other.schedules);
                self
            }
            Some(other) if other.time <= self.time => other,
            _ => self,
        }
    }
}

impl Retry {
    /// The same by a clock that shows `now`, which may have been set back since.
    pub(crate) fn by(mut self, now: DateTime<Utc>) -> Self {
        let delay = TimeDelta::from_std(self.due.retries().1).unwrap_or_default();
        self.since = self.since.min(now);
        self.due.time = self.due.time.min(now + delay);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Schedule;

    fn due(name: &str, time: DateTime<Utc>, full: bool) -> PendingRun {
        let schedule = Schedule {
            cron: format!("{name} * * * *"),
            full_refresh: full,
            time_zone: Some("UTC".into()),
            jitter: "0s".to_owned().try_into().unwrap(),
            retries: 2,
            retry_delay: "5m".to_owned().try_into().unwrap(),
        };
        PendingRun { time, full, schedules: vec![SchedulePlan::read(&schedule).unwrap()], tried: 0 }
    }

    // Breaks if what is due later takes the place of what is due now, or if what is due together is two runs.
    #[test]
    fn what_is_due_together_is_one_run() {
        let now = Utc::now();
        let at = |minutes: i64| now + TimeDelta::minutes(minutes);
        let both = due("1", at(-3), false).or(Some(due("2", at(-9), true)), now);
        assert_eq!((both.time, both.full, both.schedules.len()), (at(-9), true, 2));
        for (one, other) in [(-3, 5), (5, -3), (3, 5), (5, 3)] {
            let first = due("1", at(one), false).or(Some(due("2", at(other), true)), now);
            assert_eq!((first.time, first.schedules.len()), (at(one.min(other)), 1));
        }
    }

    // Breaks if a clock that is set back keeps a run from being made again, or its schedule from being due.
    #[test]
    fn a_retry_by_a_clock_that_was_set_back() {
        let now = Utc::now();
        let ahead = now + TimeDelta::hours(2);
        let retry = Retry { since: ahead, due: due("1", ahead + TimeDelta::minutes(5), false) }.by(now);
        assert_eq!((retry.since, retry.due.time), (now, now + TimeDelta::minutes(5)));
        let untouched = Retry { since: now, due: due("1", now + TimeDelta::minutes(2), false) }.by(now);
        assert_eq!(untouched.due.time, now + TimeDelta::minutes(2));
    }
}
