//! The stages, one file each. They never import each other: they meet in `messages`.

pub mod attach;
pub mod download;
pub mod encode;
pub mod export;
pub mod folder;
pub mod ledger;
pub mod merge;
pub mod outcome;
pub mod parse;
pub mod replay;
pub mod staging;
