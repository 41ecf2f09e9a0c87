//! Names of the counters that a [`Client`](crate::Client) moves on its [`Counters`](flow::Counters).

/// Requests that were retried. Its label is [`NO_LABEL`].
pub const RETRIES: &str = "fhirlake.http.retries";
/// Deviations of the server from the Bulk Data IG. Its label says which.
pub const DEVIATIONS: &str = "fhirlake.server.deviations";
/// The label of a counter that has none.
pub const NO_LABEL: &str = "(none)";
