//! Errors that say what happened, to what, and what to do about it.

use std::fmt;

/// A result with an [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The kind of an error. The application derives its exit code, and its hint where the error has none, from it.
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
    /// True if it stays until somebody changes something, though its kind may pass.
    is_permanent: bool,
    source: Option<Source>,
}

type Source = Box<dyn std::error::Error + Send + Sync>;

impl Error {
    /// An error of `kind`; `message` says what happened.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            places: Vec::new(),
            hint: None,
            status: None,
            is_permanent: false,
            source: None,
        }
    }
    fn described(mut self, what: impl fmt::Display) -> Self {
        if let Some(source) = &self.source {
            self.message = format!("{what}: {source}");
        }
        self
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
    /// Notes that it stays until somebody changes something: it is not retried.
    pub fn permanent(mut self) -> Self {
        self.is_permanent = true;
        self
    }
    /// Returns true if the same may succeed a little later, by itself.
    pub fn is_transient(&self) -> bool {
        self.kind == ErrorKind::Network && !self.is_permanent
    }
    /// The status of the HTTP answer that it is about.
    pub fn status(&self) -> Option<u16> {
        self.status
    }
    /// Returns what to do about this error, where its kind's hint would mislead.
    pub fn hint(&self) -> Option<&'static str> {
        self.hint
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

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// Turns a foreign error into an [`Error`], which keeps it as its source.
pub trait Context<T> {
    /// Describes the operation that failed by `what`. The message is `what` and the foreign error's.
    fn context(self, kind: ErrorKind, what: impl fmt::Display) -> Result<T>;
}

impl<T, E: Into<Source>> Context<T> for std::result::Result<T, E> {
    fn context(self, kind: ErrorKind, what: impl fmt::Display) -> Result<T> {
        self.map_err(|error| {
            let source = error.into();
            Error { source: Some(source), ..Error::new(kind, String::new()) }.described(what)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_read_from_the_outside_in() {
        let error = Error::new(ErrorKind::Data, "not JSON").at("line 7").at("Patient.ndjson");
        assert_eq!(error.to_string(), "Patient.ndjson: line 7: not JSON");
    }

    // Breaks if a foreign error cannot be got at any more, or if its text is lost.
    #[test]
    fn a_foreign_error_is_kept_as_the_source() {
        use std::error::Error as _;
        let failed: std::result::Result<(), _> = Err(std::io::Error::from_raw_os_error(28));
        let error = failed.context(ErrorKind::Storage, "a.ndjson cannot be written").unwrap_err();
        let source = error.source().and_then(|source| source.downcast_ref::<std::io::Error>()).unwrap();
        assert_eq!(source.raw_os_error(), Some(28));
        assert_eq!(error.to_string(), format!("a.ndjson cannot be written: {source}"));
    }
}
