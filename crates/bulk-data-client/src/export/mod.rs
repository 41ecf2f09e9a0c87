//! An export: kick-off, polls, manifest, the links of its files, and its end.

pub(crate) mod kick_off;
pub(crate) mod links;
pub(crate) mod manifest;
pub(crate) mod options;
pub(crate) mod poll;
pub(crate) mod request;
pub(crate) mod response;
