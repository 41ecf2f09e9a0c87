//! Looking at what a pipeline depends on and what it has made.

use super::connect::{client, source_folder};
use super::prepare::{app_id, check_table};
use super::{RunPlan, SourcePlan};
use crate::error::{Error, ErrorKind, Result};
use crate::jobs::ExportJobs;
use crate::jobs::checkpoint::CheckpointStore;
use crate::messages::{ResourceType, has_table, instant_text};
use crate::stages::export::folder::place_of;
use crate::state::StateFile;
use delta_upsert::Tables;
use flow::{Cancellation, Counters};

/// State of a table.
#[derive(Debug, Clone)]
pub struct TableState {
    /// Its type.
    pub resource_type: ResourceType,
    /// Its version.
    pub version: u64,
    /// Its rows, where statistics tell.
    pub rows: Option<u64>,
    /// This pipeline's watermark in it.
    pub watermark: Option<String>,
}

/// Returns the states of a plan's tables.
pub async fn table_states(plan: &RunPlan) -> Result<Vec<TableState>> {
    let tables = Tables::at(&plan.tables)?;
    let app_id = app_id(plan);
    let mut states = Vec::new();
    for name in tables.existing(has_table).await? {
        let table = tables.open(&name).await?;
        let Some(version) = table.version() else { continue };
        let watermark = table.transaction(&app_id).await?.map(instant_text);
        states.push(TableState { resource_type: name, version, rows: table.row_count(), watermark });
    }
    Ok(states)
}

/// One thing that a run depends on, and how it stands.
#[derive(Debug)]
pub struct Dependency {
    /// Its name.
    pub name: String,
    /// `Ok` with what was found, or what is wrong.
    pub outcome: Result<String>,
}

/// Looks at everything that a run of `plan` depends on.
pub async fn check_dependencies(plan: &RunPlan) -> Vec<Dependency> {
    let mut found = Vec::new();
    let mut add = |name: String, outcome: Result<String>| {
        found.push(Dependency { name, outcome });
    };
    match client(plan, &Counters::default(), &Cancellation::default()) {
        Ok(None) => {
            if let SourcePlan::Folder(url) = &plan.source {
                add("source folder".into(), source_folder(url).map(|_| place_of(url)));
            }
        }
        Ok(Some(client)) => {
            let said = client.capabilities().await.map(|capabilities| match &plan.source {
                SourcePlan::Server { level, options, .. } => {
                    let software = capabilities.software().map(|name| format!(" ({name})")).unwrap_or_default();
                    let remarks = capabilities.remarks(level, options);
                    let remarks = remarks.into_iter().map(|remark| format!("; {remark}")).collect::<String>();
                    format!("{} answers{software}{remarks}", client.base().as_str())
                }
                SourcePlan::Folder(_) => client.base().as_str().to_owned(),
            });
            add("server metadata".into(), said);
            let token = match &plan.source {
                SourcePlan::Server { auth: bulk_data_client::AuthSettings::None, .. } => {
                    Ok("not checked: no source.auth is set".into())
                }
                _ => client.check_auth().await.and_then(|granted| match granted {
                    Some(granted) if granted.missing.is_empty() => {
                        Ok(granted.granted.unwrap_or_else(|| "granted".into()))
                    }
                    Some(granted) => Err(Error::new(
                        ErrorKind::Auth,
                        format!(
                            "the granted scope ({}) does not let {} be read",
                            granted.granted.unwrap_or_default(),
                            granted.missing.join(", ")
                        ),
                    )),
                    None => Ok("a bearer token is set; whether the server takes it shows at the kick-off".into()),
                }),
            };
            add("token".into(), token);
        }
        Err(error) => add("token".into(), Err(error)),
    }
    add("tables writable".into(), writable_tables(plan).await);
    let state = super::connect::state_of(plan).and_then(|state| {
        state
            .acquire_lease()
            .map(drop)
            .or_else(|error| if error.kind() == ErrorKind::Locked { Ok(()) } else { Err(error) })?;
        state.read::<StateFile>()?;
        state.read::<ExportJobs>()?;
        CheckpointStore::of(&state).read()?;
        state.retryable()?;
        Ok(state.location())
    });
    add("state readable and writable".into(), state);
    found
}

async fn writable_tables(plan: &RunPlan) -> Result<String> {
    let tables = Tables::at(&plan.tables)?;
    tables.check_writable().await?;
    let mut existing = 0;
    for name in tables.existing(has_table).await? {
        let table = tables.open(&name).await?;
        check_table(&table, plan)?;
        existing += 1;
    }
    Ok(format!("{} ({existing} tables there)", tables.display()))
}
