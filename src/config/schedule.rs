//! `schedule:` and `health:` of the pipeline file: when `fhirlake serve` runs a pipeline, and when it is thought ill.

use std::str::FromStr;
use std::time::Duration;

use chrono::{DateTime, Local, Utc};
use croner::Cron;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::values::Span;

/// Times at which `fhirlake serve` runs the pipeline.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// A cron expression: minute, hour, day of month, month, day of week; seconds may stand before.
    pub cron: String,
    /// True if that run asks for everything.
    #[serde(default)]
    pub full_refresh: bool,
    /// Time zone of the expression, such as `Europe/Berlin`. Default: the machine's own, as with cron.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_zone: Option<String>,
    /// A run begins up to so much later, at random: so that many pipelines do not ask one server at once.
    #[serde(default = "defaults::jitter")]
    pub jitter: Span,
    /// Number of retries of a run that failed for a transient reason before the next one is due.
    #[serde(default = "defaults::retries")]
    pub retries: u32,
    /// Pause after its failure.
    #[serde(default = "defaults::retry_delay")]
    pub retry_delay: Span,
}

/// Bounds of health checks.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct HealthSection {
    /// `/health` says `unhealthy` when the last successful run completed longer ago.
    pub max_age: Span,
}

impl Default for HealthSection {
    fn default() -> Self {
        // The recipe's.
        Self { max_age: Span(Duration::from_secs(2 * 3600)) }
    }
}

mod defaults {
    use super::{Duration, Span};

    pub(crate) fn jitter() -> Span {
        Span(Duration::ZERO)
    }
    /// The recipe's Airflow DAG: two, five minutes after the failure.
    pub(crate) fn retries() -> u32 {
        2
    }
    pub(crate) fn retry_delay() -> Span {
        Span(Duration::from_secs(300))
    }
}

/// The machine's zone by its name, where that can be found out: local times alone do not tell the two hours apart that
/// a clock shows twice in autumn.
fn machines_zone() -> Option<chrono_tz::Tz> {
    let named = crate::values::environment("TZ").filter(|zone| !zone.is_empty());
    let of_path = |path: &str| Some(path.split_once("zoneinfo/")?.1.to_owned());
    let name = match named {
        Some(zone) => {
            let zone = zone.trim_start_matches(':').to_owned();
            of_path(&zone).unwrap_or(zone)
        }
        None => std::fs::read_link("/etc/localtime")
            .ok()
            .and_then(|link| of_path(&link.to_string_lossy()))
            .or_else(|| Some(std::fs::read_to_string("/etc/timezone").ok()?.trim().to_owned()))?,
    };
    name.parse().ok()
}

/// A schedule that was read.
#[derive(Debug, Clone)]
pub struct SchedulePlan {
    cron: Cron,
    zone: Option<chrono_tz::Tz>,
    /// Its text and the zone: a name that is the same for the same.
    pub name: String,
    /// True if its runs ask for everything.
    pub full_refresh: bool,
    /// Up to so much later.
    pub jitter: Duration,
    /// Number of retries of a failed run.
    pub retries: u32,
    /// Pause after its failure.
    pub retry_delay: Duration,
}

/// 2026-01-01 as seconds, and how many times from there on a schedule is judged by.
const JUDGED_FROM: i64 = 1_767_225_600;
const JUDGED: usize = 100;

impl SchedulePlan {
    /// Reads a schedule; `Err` are the keys that are wrong, and what is wrong with each.
    pub fn read(schedule: &Schedule) -> Result<Self, Vec<(&'static str, String)>> {
        let cron = Cron::from_str(&schedule.cron).map_err(|error| ("cron", format!("not a cron expression: {error}")));
        let zone = match schedule.time_zone.as_deref() {
            None => Ok(machines_zone()),
            Some(name) => name
                .parse()
                .map(Some)
                .map_err(|_| ("time_zone", format!("`{name}` is not a time zone such as Europe/Berlin"))),
        };
        let (cron, zone) = match (cron, zone) {
            (Ok(cron), Ok(zone)) => (cron, zone),
            (cron, zone) => return Err(cron.err().into_iter().chain(zone.err()).collect()),
        };
        let kind = if schedule.full_refresh { ", full" } else { "" };
        let read = Self {
            cron,
            zone,
            name: format!(
                "{}{}{kind}",
                schedule.cron,
                schedule.time_zone.as_ref().map_or(String::new(), |zone| format!(" {zone}"))
            ),
            full_refresh: schedule.full_refresh,
            jitter: schedule.jitter.0,
            retries: schedule.retries,
            retry_delay: schedule.retry_delay.0,
        };
        // From one instant on, so that a file is not good at one hour and bad at another.
        let first = DateTime::from_timestamp(JUDGED_FROM, 0).and_then(|from| read.after(from));
        if first.is_none() {
            return Err(vec![("cron", "there is no such day".to_owned())]);
        }
        if read.jitter.is_zero() {
            return Ok(read);
        }
        // Runs would be passed over without a word.
        let times: Vec<DateTime<Utc>> = std::iter::successors(first, |time| read.after(*time)).take(JUDGED).collect();
        let pause = times.windows(2).filter_map(|pair| (pair[1] - pair[0]).to_std().ok()).min();
        match pause {
            Some(pause) if read.jitter > pause => {
                Err(vec![("jitter", format!("longer than from one run to the next ({} s)", pause.as_secs()))])
            }
            _ => Ok(read),
        }
    }

    /// Returns its next time after `time`; `None` where it never is.
    pub fn after(&self, time: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self.zone {
            Some(zone) => Some(self.cron.find_next_occurrence(&time.with_timezone(&zone), false).ok()?.to_utc()),
            None => Some(self.cron.find_next_occurrence(&time.with_timezone(&Local), false).ok()?.to_utc()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(cron: &str, zone: Option<&str>) -> Result<SchedulePlan, Vec<(&'static str, String)>> {
        let zone = zone.map(|zone| format!(", time_zone: {zone}")).unwrap_or_default();
        SchedulePlan::read(&serde_saphyr::from_str(&format!("{{ cron: \"{cron}\"{zone} }}")).unwrap())
    }

    fn wrong(cron: &str, zone: Option<&str>) -> Vec<&'static str> {
        schedule(cron, zone).unwrap_err().into_iter().map(|(key, _)| key).collect()
    }

    fn after(schedule: &SchedulePlan, time: &str) -> String {
        schedule.after(DateTime::parse_from_rfc3339(time).unwrap().to_utc()).unwrap().to_rfc3339()
    }

    // The recipe's schedules, in a zone whose clocks change.
    #[test]
    fn the_recipes_schedules() {
        let hourly = schedule("15 * * * *", Some("UTC")).unwrap();
        assert_eq!(after(&hourly, "2026-11-23T10:14:59Z"), "2026-11-23T10:15:00+00:00");
        assert_eq!(after(&hourly, "2026-11-23T10:15:00Z"), "2026-11-23T11:15:00+00:00", "strictly after");
        let sunday = schedule("0 3 * * SUN", Some("Europe/Berlin")).unwrap();
        assert_eq!(after(&sunday, "2026-07-01T00:00:00Z"), "2026-07-05T01:00:00+00:00");
        assert_eq!(after(&sunday, "2026-12-01T00:00:00Z"), "2026-12-06T02:00:00+00:00");
    }

    // Breaks if the hour that comes twice is run in once, or the one that never comes is waited for.
    #[test]
    fn when_clocks_change() {
        let hourly = schedule("15 * * * *", Some("Europe/Berlin")).unwrap();
        assert_eq!(after(&hourly, "2026-10-25T00:15:00Z"), "2026-10-25T01:15:00+00:00");
        assert_eq!(after(&hourly, "2026-10-25T01:15:00Z"), "2026-10-25T02:15:00+00:00");
        assert_eq!(after(&hourly, "2026-03-29T00:15:00Z"), "2026-03-29T01:15:00+00:00");
    }

    #[test]
    fn what_is_no_schedule_says_which_key() {
        assert_eq!(wrong("61 * * * *", None), ["cron"]);
        assert_eq!(wrong("hourly", None), ["cron"]);
        assert_eq!(wrong("* * * * *", Some("Berlin")), ["time_zone"]);
        assert_eq!(wrong("61 * * * *", Some("Berlin")), ["cron", "time_zone"]);
        assert_eq!(wrong("0 0 30 2 *", None), ["cron"], "no such day");
        assert!(schedule("0 0 29 2 *", None).is_ok());
        assert_eq!(wrong("*/10 * * * * *", Some("UTC, jitter: 25s")), ["jitter"]);
        assert!(schedule("*/10 * * * * *", Some("UTC, jitter: 10s")).is_ok());
        assert_eq!(wrong("0 8,10 * * *", Some("UTC, jitter: 5h")), ["jitter"], "whatever the hour is now");
    }
}
