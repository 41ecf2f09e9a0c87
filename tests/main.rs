//! The one integration binary: everything runs against the embedded server, or against data that the reader
//! can see in the test.

mod suite;
