//! `fhirlake auth check` and `fhirlake keygen`

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use super::PipelineArgs;
use super::output::Output;
use crate::error::{Context, Error, ErrorKind, Result};
use crate::topology;
use bulk_data_client::{KeyAlgorithm, generate_key, shown};
use flow::{Cancellation, Counters};
use foundation::secure_fs::private_new;

#[derive(Debug, Args)]
pub(super) struct AuthArgs {
    #[command(subcommand)]
    command: AuthCommand,
}

#[derive(Debug, Subcommand)]
enum AuthCommand {
    /// Request an access token and print its scopes and lifetime (never the token).
    #[command(after_help = examples!("fhirlake auth check hospital.yaml"))]
    Check {
        #[command(flatten)]
        file: PipelineArgs,
    },
}

pub(super) async fn auth(args: AuthArgs, output: &Output) -> Result<()> {
    let AuthCommand::Check { file } = args.command;
    let plan = file.plan()?;
    let Some(client) = topology::client(&plan, &Counters::default(), &Cancellation::default())? else {
        return output.line("a folder needs no authentication");
    };
    let Some(granted) = client.check_auth().await? else {
        let is_bearer = matches!(
            &plan.source,
            crate::topology::SourcePlan::Server { auth: bulk_data_client::AuthSettings::Bearer(_), .. }
        );
        return output.line(match is_bearer {
            true => "a bearer token is set, so no token is requested; the kick-off will show if the server accepts it",
            false => "no token is requested: source.auth is not set",
        });
    };
    let line = |name: &str, value: &str| output.line(&format!("{name:<18}{value}"));
    let listed = |list: &[String]| if list.is_empty() { "not stated".to_owned() } else { list.join(", ") };
    if let Some(endpoint) = &granted.endpoint {
        line("token endpoint", &shown(endpoint))?;
    }
    if let Some(server) = granted.server.as_ref().filter(|server| server.token_endpoint.is_some()) {
        line("auth methods", &listed(&server.methods))?;
        line("algorithms", &listed(&server.algorithms))?;
        line("scopes supported", &listed(&server.scopes))?;
        line("capabilities", &listed(&server.capabilities))?;
        if server.skew != 0 {
            line("clock", &format!("the server's clock is {} s ahead; assertions follow it", server.skew))?;
        }
    }
    if let Some((algorithm, kid)) = &granted.key {
        line("key", &format!("{algorithm}, kid {}", kid.as_deref().unwrap_or("none")))?;
    }
    line("scope requested", &granted.requested)?;
    line("scope granted", granted.granted.as_deref().unwrap_or("not stated"))?;
    line("token lifetime", &format!("{} s", granted.life.as_secs()))?;
    if granted.missing.is_empty() {
        return output.check(true, "the token was granted");
    }
    let why = format!("the granted scope does not cover: {}", granted.missing.join(", "));
    Err(Error::new(ErrorKind::Auth, why))
}

#[derive(Debug, Args)]
pub(super) struct KeygenArgs {
    /// File for the private key (JWK), readable by its owner only. An existing file is not replaced.
    #[arg(value_name = "FILE")]
    private: PathBuf,
    /// Algorithm of the key. Servers must accept both.
    #[arg(long, value_enum, default_value = "es384")]
    algorithm: Algorithm,
    /// File for the JWKS with the public key [default: stdout].
    #[arg(long, value_name = "FILE")]
    jwks: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Algorithm {
    Es384,
    Rs384,
}

pub(super) fn keygen(args: &KeygenArgs, output: &Output) -> Result<()> {
    let algorithm = match args.algorithm {
        Algorithm::Es384 => KeyAlgorithm::Es384,
        Algorithm::Rs384 => KeyAlgorithm::Rs384,
    };
    let (private, public) = generate_key(algorithm)?;
    private_new(&args.private, format!("{private:#}\n").as_bytes())?;
    let public = format!("{public:#}\n");
    match &args.jwks {
        Some(path) => {
            std::fs::write(path, &public).context(ErrorKind::Config, format!("{} cannot be written", path.display()))?
        }
        None => output.raw(public.as_bytes())?,
    }
    output.remark(&format!(
        "private key: {}; register the JWKS with the server, and set\n  auth: \
            {{ client_id: …, private_key: \"${{file:{}}}\" }}",
        args.private.display(),
        args.private.display()
    ));
    Ok(())
}
