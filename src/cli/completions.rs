//! `fhirlake completions SHELL`

use clap::{Args, CommandFactory};

use super::output::Output;
use crate::error::Result;

#[derive(Debug, Args)]
pub(super) struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    shell: clap_complete::Shell,
}

pub(super) fn completions(args: &CompletionsArgs, output: &Output) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "fhirlake", &mut script);
    output.raw(&script)
}
