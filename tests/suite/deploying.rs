//! What `docs/deploy` and `docs/alerts.yaml` say, judged by the tools of those that read it: Docker's, Kubernetes',
//! systemd's and Prometheus' own. Where a tool is absent that is said.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What a tool says; `None` where it is not there. Tools of tests/linters.txt are looked for in `FHIRLAKE_LINTERS`
/// first.
fn judged(tool: &str, arguments: &[&str], file: &Path) -> Option<Output> {
    let own = fhirlake::config::environment("FHIRLAKE_LINTERS").map(|folder| PathBuf::from(folder).join(tool));
    let program = own.filter(|program| program.exists()).unwrap_or_else(|| tool.into());
    match Command::new(program).args(arguments).arg(file).output() {
        Ok(output) => Some(output),
        Err(_) => {
            let required = fhirlake::config::environment("FHIRLAKE_REQUIRE_LINTERS").is_some();
            assert!(!required, "{tool} is not there, so it did not judge {}", file.display());
            #[expect(clippy::disallowed_macros, reason = "a skipped test must be seen")]
            {
                eprintln!("SKIPPED: {tool} is not there, so it did not judge {}", file.display());
            }
            None
        }
    }
}

fn assert_passed(output: Option<Output>) {
    let Some(output) = output else { return };
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}");
}

#[test]
fn dockerfile() {
    assert_passed(judged("hadolint", &["--no-color"], &root().join("docs/deploy/Dockerfile")));
}

#[test]
fn kubernetes() {
    for name in ["kubernetes-cronjob.yaml", "kubernetes-deployment.yaml"] {
        assert_passed(judged("kubernetes-validate", &["--strict"], &root().join("docs/deploy").join(name)));
    }
}

#[test]
fn systemd() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["fhirlake.service", "fhirlake-run.service", "fhirlake-run.timer"] {
        let unit = std::fs::read_to_string(root().join("docs/deploy").join(name)).unwrap();
        // It looks whether the program is there.
        let unit = unit.replace("/usr/local/bin/fhirlake", env!("CARGO_BIN_EXE_fhirlake"));
        std::fs::write(folder.path().join(name), unit).unwrap();
    }
    for name in ["fhirlake.service", "fhirlake-run.timer"] {
        let Some(output) = judged("systemd-analyze", &["verify"], &folder.path().join(name)) else { return };
        let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() || !said.trim().is_empty(), "{:?}", output.status);
        // Of other units of this machine it may complain as well.
        let ours = said.lines().filter(|line| line.contains("fhirlake")).collect::<Vec<_>>();
        assert!(ours.is_empty(), "{ours:#?}");
    }
}

// Breaks if an alert is not raised by what it is for, or is by anything else.
#[test]
fn alerts() {
    assert_passed(judged("promtool", &["test", "rules"], &root().join("tests/alerts.yaml")));
}
