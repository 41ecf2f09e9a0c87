//! `fhirlake completions SHELL` and `fhirlake man`

use std::path::PathBuf;

use clap::Args;

use super::output::Output;
use crate::error::{Context, ErrorKind, Result};

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// Shell.
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
pub(super) struct ManArgs {
    /// Folder of the pages, one per command.
    #[arg(long, value_name = "FOLDER")]
    folder: PathBuf,
}

pub(super) fn completions(args: &CompletionsArgs, output: &Output) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::command(), "fhirlake", &mut script);
    output.raw(&script)
}

pub(super) fn man(args: &ManArgs, output: &Output) -> Result<()> {
    let failed = || format!("{} cannot be written", args.folder.display());
    std::fs::create_dir_all(&args.folder).context(ErrorKind::Storage, failed())?;
    clap_mangen::generate_to(super::command(), &args.folder).context(ErrorKind::Storage, failed())?;
    output.line(&format!("the manual pages are in {}", args.folder.display()))
}
