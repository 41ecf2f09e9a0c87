//! The one table of errors: kind → exit code, may a scheduler run the command again, and what to do.

pub use foundation::error::*;

/// (exit code, may a scheduler simply run it again, hint for the operator)
const fn row(kind: ErrorKind) -> (u8, bool, &'static str) {
    match kind {
        ErrorKind::Internal => (1, false, "this is a fault of fhirlake: please report it with the log"),
        ErrorKind::Config => (2, false, "correct what is named above"),
        ErrorKind::Network => (3, true, "check that the server is up and reachable from here, then run again"),
        ErrorKind::Auth => (4, false, "check the client id, its key and the scopes that the server grants"),
        ErrorKind::Server => (5, true, "read the server's message above; its administrator may have to help"),
        ErrorKind::Storage => {
            (6, true, "check free space, permissions and credentials of the named place, then run again")
        }
        ErrorKind::Table => (7, false, "point `tables` elsewhere, or bring the table into a form that fhirlake writes"),
        ErrorKind::State => (8, true, "check free space and permissions of the `state` folder"),
        ErrorKind::Locked => (9, true, "wait for the other run to end"),
        ErrorKind::Partial => (10, true, "types that succeeded are committed; the next run tries the others again"),
        ErrorKind::Data => (11, false, "look at the quarantine; raise `max_bad_lines` only if the loss is known"),
        ErrorKind::Throttled => (
            12,
            true,
            "run again after that time (`fhirlake jobs cancel PIPELINE.yaml --all` clears the rate limit and cancels \
                exports in flight)",
        ),
        ErrorKind::Interrupted => (130, true, "run again: committed tables are kept, and staged data will be resumed"),
    }
}

/// Meaning of an error to whoever ran the command.
pub trait Advice {
    /// Returns the exit code of the process.
    fn exit_code(&self) -> u8;
    /// Returns true if the same command can succeed later although nobody changes anything.
    fn may_retry(&self) -> bool;
    /// Returns what to do about it.
    fn advice(&self) -> &'static str;
}

impl Advice for ErrorKind {
    fn exit_code(&self) -> u8 {
        row(*self).0
    }
    fn may_retry(&self) -> bool {
        row(*self).1
    }
    fn advice(&self) -> &'static str {
        row(*self).2
    }
}

impl Advice for Error {
    fn exit_code(&self) -> u8 {
        self.kind().exit_code()
    }
    fn may_retry(&self) -> bool {
        self.kind().may_retry()
    }
    fn advice(&self) -> &'static str {
        self.hint().unwrap_or(self.kind().advice())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if two kinds share an exit code: schedulers tell them apart by it.
    #[test]
    fn exit_codes_are_unique() {
        let mut codes: Vec<u8> = ErrorKind::ALL.iter().map(|kind| kind.exit_code()).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), ErrorKind::ALL.len());
        assert!(!codes.contains(&0));
    }
}
