//! The pipeline file: as written (`file`), its values (`values`), what is wrong with it (`tree`, `check`), and
//! the plan that it resolves to (`plan`).

mod check;
mod file;
mod plan;
mod profiles;
mod schedule;
mod source;
mod tree;
mod values;
#[cfg(feature = "keyvault")]
mod vault;

pub use check::{Problem, Read, read_pipeline};
pub use file::{
    AttachmentsSection, Bad, DownloadSection, EncodeSection, FileColumns, MaxBad, MergeSection, Mode, OptimizeSection,
    ParseSection, Percent, PipelineFile, SchemaEvolution, ShortFile, Stages, TelemetrySection, VacuumSection,
    pipeline_json_schema,
};
pub use plan::{MemorySplit, Plan, Since, SourcePlan, default_state_folder};
pub use profiles::PROFILES;
pub use schedule::{HealthSection, Schedule, SchedulePlan};
pub use source::{
    AuthSection, DeleteExport, ExportErrors, LevelName, ListStyle, MethodName, OneOrMore, ProfileName, SecretPlace, SourceSection,
};
pub use values::{ByteSize, Instant, Span, Text, environment, warn_if_loose};
