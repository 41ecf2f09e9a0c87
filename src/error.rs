//! One table: kind of error → may it be tried again? → what the operator should do → exit code.

use std::fmt;

/// A result with fhirlake's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What kind of trouble it is. Everything else about an error follows from this.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    /// The command line or the pipeline file is wrong.
    Config,
    /// The server could not be reached, or the connection broke, after all retries.
    Network,
    /// The server refused who we are.
    Auth,
    /// The server answered, but refused or broke the protocol.
    Server,
    /// A table, a staged file or the source folder could not be read or written.
    Storage,
    /// An existing table cannot be written by this version.
    Table,
    /// State, journal or reports could not be read or written.
    State,
    /// Another run holds the pipeline.
    Locked,
    /// The run ended, but at least one resource type failed.
    Partial,
    /// The input was too bad to go on.
    Data,
    /// The server asks to come back later.
    Throttled,
    /// The user asked to stop.
    Interrupted,
    /// A fault of fhirlake.
    Internal,
}

impl ErrorKind {
    /// Every kind, for the table in the documentation and its test.
    pub const ALL: [ErrorKind; 13] = [
        Self::Internal,
        Self::Config,
        Self::Network,
        Self::Auth,
        Self::Server,
        Self::Storage,
        Self::Table,
        Self::State,
        Self::Locked,
        Self::Partial,
        Self::Data,
        Self::Throttled,
        Self::Interrupted,
    ];

    /// (exit code, may a scheduler simply run it again, hint for the operator)
    const fn row(self) -> (u8, bool, &'static str) {
        match self {
            Self::Internal => (1, false, "this is a fault of fhirlake: please report it with the log"),
            Self::Config => (2, false, "correct what is named above"),
            Self::Network => (3, true, "check that the server is up and reachable from here, then run again"),
            Self::Auth => (4, false, "check the client id, its key and the scopes that the server grants"),
            Self::Server => (5, true, "read the server's own words above; its administrator may have to help"),
            Self::Storage => (6, true, "check free space, permissions and credentials of the named place, then run again"),
            Self::Table => (7, false, "point `tables` elsewhere, or bring the table into a form that fhirlake writes"),
            Self::State => (8, true, "check free space and permissions of the `state` folder"),
            Self::Locked => (9, true, "wait for the other run to end"),
            Self::Partial => (10, true, "types that succeeded are committed; the next run tries the others again"),
            Self::Data => (11, false, "look at the quarantine; raise `max_bad_lines` only if the loss is known"),
            Self::Throttled => (
                12,
                true,
                "run again after that time; until then nothing is asked of the server (`fhirlake jobs cancel PIPELINE.yaml --all` forgets it, and cancels exports in flight)",
            ),
            Self::Interrupted => (130, true, "run again: what was committed is kept, and what is staged is gone on with"),
        }
    }
    /// The process's exit code for an error of this kind.
    pub const fn exit_code(self) -> u8 {
        self.row().0
    }
    /// Whether running the same command again can succeed without anybody changing anything.
    pub const fn may_retry(self) -> bool {
        self.row().1
    }
    /// What the operator should do.
    pub const fn hint(self) -> &'static str {
        self.row().2
    }
}

/// An error: what happened, to what, and (by its kind) what to do. Never holds patient data or
/// secrets: ids of files, line numbers and counts only.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    /// From the inside out: "line 7", "type Patient", "pipeline hospital".
    places: Vec<String>,
    hint: Option<&'static str>,
    /// The status of the HTTP answer that it is about.
    status: Option<u16>,
    /// Whether it stays until somebody changes something, though its kind may pass.
    is_lasting: bool,
}

impl Error {
    /// An error of `kind`; `message` says what happened.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), places: Vec::new(), hint: None, status: None, is_lasting: false }
    }
    /// Names the place where it happened; call from the inside out. A place that was just named is not named again.
    pub fn at(mut self, place: impl Into<String>) -> Self {
        let place = place.into();
        if self.places.last() != Some(&place) {
            self.places.push(place);
        }
        self
    }
    /// Says what the operator should do, where the kind's own hint would mislead.
    pub fn with_hint(mut self, hint: &'static str) -> Self {
        self.hint = Some(hint);
        self
    }
    /// The same, unless it has a hint of its own already.
    pub fn or_hint(self, hint: &'static str) -> Self {
        if self.hint.is_some() { self } else { self.with_hint(hint) }
    }
    /// Notes the status of the HTTP answer that it is about.
    pub fn with_status(mut self, status: u16) -> Self {
        self.status = Some(status);
        self
    }
    /// Notes that it stays until somebody changes something: it is not tried again.
    pub fn lasting(mut self) -> Self {
        self.is_lasting = true;
        self
    }
    /// Whether the same may succeed a little later, by itself.
    pub fn passes(&self) -> bool {
        self.kind == ErrorKind::Network && !self.is_lasting
    }
    /// The status of the HTTP answer that it is about.
    pub fn status(&self) -> Option<u16> {
        self.status
    }
    /// What the operator should do.
    pub fn hint(&self) -> &'static str {
        self.hint.unwrap_or(self.kind.hint())
    }
    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for place in self.places.iter().rev() {
            write!(f, "{place}: ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}

/// Turns a foreign error into ours, with the place where it happened.
pub trait Context<T> {
    /// `kind` of trouble while doing `what`.
    fn context(self, kind: ErrorKind, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: fmt::Display> Context<T> for std::result::Result<T, E> {
    fn context(self, kind: ErrorKind, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error::new(kind, format!("{what}: {error}")))
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

    #[test]
    fn places_read_from_the_outside_in() {
        let error = Error::new(ErrorKind::Data, "not JSON").at("line 7").at("Patient.ndjson");
        assert_eq!(error.to_string(), "Patient.ndjson: line 7: not JSON");
    }
}
