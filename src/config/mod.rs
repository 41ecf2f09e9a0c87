//! The pipeline file: as written (`file`), its values (`values`), what is wrong with it (`tree`, `check`), and
//! .

mod check;
mod file;
mod profiles;
mod schedule;
mod source;
mod tree;
#[cfg(feature = "keyvault")]
mod vault;

pub use check::{Problem, Read, read_pipeline};
pub use file::{OptimizeSection, PipelineFile, TelemetrySection, VacuumSection, pipeline_json_schema};
pub use profiles::PROFILES;
pub use schedule::{HealthSection, Schedule, SchedulePlan};
pub use source::{
    AuthSection, DeleteExport, ExportErrors, LevelName, ProfileName, SecretPlace, SourceSection, TlsSection,
};
#[cfg(feature = "keyvault")]
pub(crate) use vault::secret as vault_secret;

pub use crate::values::{ByteSize, Span, Text, Types, environment, warn_if_loose};
