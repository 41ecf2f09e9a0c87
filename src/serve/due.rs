//! What a keeper has to make, and when.

use std::time::Duration;

use chrono::{DateTime, Utc};

use crate::config::SchedulePlan;

/// Schedules that are due, and when the first of them was.
#[derive(Debug, Clone)]
pub(super) struct Due {
    pub time: DateTime<Utc>,
    pub full: bool,
    pub schedules: Vec<SchedulePlan>,
    /// How often it was made before, and failed.
    pub tried: u32,
}

/// A run that failed and is made again.
#[derive(Debug, Clone)]
pub(super) struct Retry {
    /// When it was made last.
    pub since: DateTime<Utc>,
    pub due: Due,
}

impl Due {
    pub fn has(&self, schedule: &SchedulePlan) -> bool {
        self.schedules.iter().any(|own| own.name == schedule.name)
    }

    pub fn jitter(&self) -> Duration {
        self.schedules.iter().map(|schedule| schedule.jitter).max().unwrap_or_default()
    }

    /// This or `other`, whichever is due first; what is due together is one run, which asks for everything if one of them does.
    pub fn or(mut self, other: Option<Self>, now: DateTime<Utc>) -> Self {
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
