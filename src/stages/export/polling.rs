//! Decision after each poll, without waiting and without asking: [`Polls`] is told of an answer and says what comes
//! next.

use std::time::{Duration, Instant};

use crate::error::Error;
use bulk_data_client::{HttpSettings, Manifest, PollStatus};

/// Answers in a row that say that there is no such export, or that it failed, before that is believed.
const MAX_NOT_FOUND: u32 = 3;

/// Longest pause between polls that is our own choice.
const OUR_LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// The first pause where the server asks for a longer one: servers ask for minutes of an export that takes seconds.
const EARLY_POLL: Duration = Duration::from_secs(5);

/// Next step.
#[derive(Debug)]
pub(super) enum Next {
    /// The manifest, or this page of it, is complete.
    Done(Box<Manifest>),
    /// Files that are final already; then the next poll after the pause, unless it names a next page.
    Partial(Box<Manifest>, Duration),
    /// The server works on it: the next poll after the pause.
    Working {
        /// The server's words on its progress.
        progress: Option<String>,
        /// True if it lists files that nobody asked for, for the first time.
        is_unrequested: bool,
        /// The pause.
        pause: Duration,
    },
    /// The poll failed for a transient reason, or may: the next one after the pause.
    Retry(Error, Retry, Duration),
    /// Polls fail for longer than requests are retried.
    Fail {
        /// The last failure.
        error: Error,
        /// True if it is the server's word on the export, and no trouble on the way.
        is_of_server: bool,
    },
    /// The server gave the export up.
    Failed(Error),
    /// The server has no such export.
    Gone(Error),
}

/// Why a poll is retried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Retry {
    /// A transient failure, or throttling.
    Transient,
    /// The server says that the export failed, which some say of a poll that failed.
    SaidFailed,
    /// The server does not find it: some answer so before they know the job.
    NotFound,
}

/// The polls of one page of a manifest.
#[derive(Debug)]
pub(super) struct Polls<'a> {
    settings: &'a HttpSettings,
    /// True if partial manifests were requested.
    takes_partial: bool,
    /// True if the first pause may be shortened.
    is_early: bool,
    pause: Duration,
    failing_since: Option<Instant>,
    missing_since: Option<Instant>,
    not_found_count: u32,
    has_warned: bool,
}

impl<'a> Polls<'a> {
    /// No poll yet. Only the first page of a manifest is looked at early.
    pub(super) fn new(settings: &'a HttpSettings, takes_partial: bool, is_first_page: bool) -> Self {
        Self {
            settings,
            takes_partial,
            is_early: is_first_page,
            pause: settings.min_pause,
            failing_since: None,
            missing_since: None,
            not_found_count: 0,
            has_warned: false,
        }
    }

    /// Returns what comes next after an answer at `now`.
    pub(super) fn on(&mut self, answer: PollStatus, now: Instant) -> Next {
        if !matches!(answer, PollStatus::NotFound { .. } | PollStatus::Failed(_)) {
            (self.missing_since, self.not_found_count) = (None, 0);
        }
        match answer {
            PollStatus::Done(manifest) => Next::Done(manifest),
            PollStatus::InProgress { partial: Some(manifest), wait, .. } if self.takes_partial => {
                self.failing_since = None;
                Next::Partial(manifest, self.pause_of(wait, Duration::ZERO))
            }
            PollStatus::InProgress { progress, wait, partial } => {
                self.failing_since = None;
                let is_unrequested = partial.is_some() && !std::mem::replace(&mut self.has_warned, true);
                Next::Working { progress, is_unrequested, pause: self.pause_of(wait, Duration::ZERO) }
            }
            PollStatus::Transient { error, wait, throttled } => {
                let since = *self.failing_since.get_or_insert(now);
                if !throttled && now.duration_since(since) > self.settings.retry_for {
                    let is_of_server = error.status().is_some_and(|status| status < 500);
                    return Next::Fail { error, is_of_server };
                }
                // Too often: not at once again, whatever it says.
                let least = if throttled { self.settings.min_pause } else { Duration::ZERO };
                Next::Retry(error, Retry::Transient, self.pause_of(wait, least))
            }
            PollStatus::Failed(error) if self.not_found_count + 1 < MAX_NOT_FOUND => {
                self.not_found_count += 1;
                Next::Retry(error, Retry::SaidFailed, self.pause_of(None, Duration::ZERO))
            }
            PollStatus::Failed(error) => Next::Failed(error),
            PollStatus::NotFound { error, definitive } => {
                // A gateway may not find its server for a while.
                let since = *self.missing_since.get_or_insert(now);
                self.not_found_count += 1;
                if now.duration_since(since) > self.settings.retry_for
                    || (definitive && self.not_found_count >= MAX_NOT_FOUND)
                {
                    return Next::Gone(error);
                }
                Next::Retry(error, Retry::NotFound, self.pause_of(None, Duration::ZERO))
            }
        }
    }

    /// Returns the pause before the next poll: what the server asks for, within limits, or our own, which grows.
    fn pause_of(&mut self, requested: Option<Duration>, least: Duration) -> Duration {
        // "At once" is not meant: it would be a busy loop.
        let requested = requested.filter(|wait| *wait >= self.settings.min_pause);
        let pause = requested.unwrap_or(self.pause).max(least).min(self.settings.max_pause);
        let is_quiet = least.is_zero() && self.missing_since.is_none() && self.failing_since.is_none();
        let pause = if std::mem::take(&mut self.is_early) && is_quiet { pause.min(EARLY_POLL) } else { pause };
        self.pause = (self.pause * 2).min(self.settings.max_pause).min(OUR_LONGEST_PAUSE);
        pause
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn working(wait: Option<u64>) -> PollStatus {
        PollStatus::InProgress { progress: None, wait: wait.map(Duration::from_secs), partial: None }
    }

    fn error(status: u16) -> Error {
        Error::new(ErrorKind::Server, "refused").with_status(status)
    }

    fn pause(next: Next) -> Duration {
        match next {
            Next::Working { pause, .. } | Next::Retry(_, _, pause) => pause,
            other => panic!("{other:?}"),
        }
    }

    // Breaks if a server's two minutes are waited for before the first look, or ignored after it, or if our own pause
    // does not grow to its limit.
    #[test]
    fn pauses() {
        let settings = HttpSettings::default();
        let mut polls = Polls::new(&settings, false, true);
        let now = Instant::now();
        let pauses: Vec<u64> = [Some(120), Some(120), Some(5), None, None, None, None, None]
            .map(|wait| pause(polls.on(working(wait), now)).as_millis() as u64)
            .to_vec();
        assert_eq!(pauses, [5_000, 60_000, 5_000, 4_000, 8_000, 16_000, 32_000, 60_000]);
        let mut later = Polls::new(&settings, false, false);
        assert_eq!(
            pause(later.on(working(Some(120)), now)),
            Duration::from_secs(60),
            "a later page is not looked at early"
        );
    }

    // Breaks if one 404 ends an export, if many never do, or if one that is found again starts from the first absence.
    #[test]
    fn an_absence_is_believed_after_three_polls() {
        let settings = HttpSettings::default();
        let mut polls = Polls::new(&settings, false, true);
        let now = Instant::now();
        let missing = |definitive| PollStatus::NotFound { error: error(404), definitive };
        assert!(matches!(polls.on(missing(true), now), Next::Retry(_, Retry::NotFound, _)));
        polls.on(working(None), now);
        assert!(matches!(polls.on(missing(true), now), Next::Retry(..)));
        assert!(matches!(polls.on(missing(true), now), Next::Retry(..)));
        assert!(matches!(polls.on(missing(true), now), Next::Gone(_)));
        // A gateway's word is believed after `retry_for` only.
        let mut polls = Polls::new(&settings, false, true);
        (0..9).for_each(|_| assert!(matches!(polls.on(missing(false), now), Next::Retry(..))));
        assert!(matches!(polls.on(missing(false), now + settings.retry_for * 2), Next::Gone(_)));
    }

    // Breaks if throttling ends an export, or if the server's own refusal is taken for trouble on the way.
    #[test]
    fn failures_end_after_retry_for() {
        let settings = HttpSettings::default();
        let now = Instant::now();
        let late = now + settings.retry_for * 2;
        for (status, is_server) in [(400, true), (503, false)] {
            let mut polls = Polls::new(&settings, false, true);
            let transient = |throttled| PollStatus::Transient { error: error(status), wait: None, throttled };
            assert!(matches!(polls.on(transient(false), now), Next::Retry(_, Retry::Transient, _)));
            assert!(matches!(polls.on(transient(true), late), Next::Retry(..)), "throttling is no failure");
            assert!(
                matches!(polls.on(transient(false), late), Next::Fail { is_of_server, .. } if is_of_server == is_server)
            );
        }
    }
}
