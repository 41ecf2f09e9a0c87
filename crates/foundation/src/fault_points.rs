//! Points at which a test kills the process: before and after every durable step. Nothing at all without the cargo
//! feature `fault-points`, which no release has.
//!
//! `FHIRLAKE_FAULT_POINT=NAME:N` kills the process (SIGKILL) when it comes to the point NAME the Nth time;
//! `FHIRLAKE_FAULT_POINTS_SEEN=FILE` writes each point's name down that is reached.

/// The process is at the point `name`.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn reached(_name: &str) {}

/// A file is about to be replaced, or was: the point is named after it, without what is another in each run.
#[cfg(not(feature = "fault-points"))]
#[inline(always)]
pub fn reached_file(_when: &str, _path: &std::path::Path) {}

#[cfg(feature = "fault-points")]
pub use with_points::{reached, reached_file};

#[cfg(feature = "fault-points")]
mod with_points {
    use std::collections::HashMap;
    use std::io::Write;
    use std::path::Path;
    use std::sync::{LazyLock, Mutex, PoisonError};

    struct Points {
        kill_at: Option<(String, u64)>,
        seen: Option<std::path::PathBuf>,
        counts: Mutex<HashMap<String, u64>>,
    }

    static POINTS: LazyLock<Points> = LazyLock::new(|| {
        #[expect(clippy::disallowed_methods, reason = "no release has these points")]
        let said = |name: &str| std::env::var(name).ok();
        let kill_at = said("FHIRLAKE_FAULT_POINT").and_then(|text| {
            let (name, count) = text.rsplit_once(':')?;
            Some((name.to_owned(), count.parse().ok()?))
        });
        Points { kill_at, seen: said("FHIRLAKE_FAULT_POINTS_SEEN").map(Into::into), counts: Mutex::default() }
    });

    /// The process is at the point `name`.
    pub fn reached(name: &str) {
        let points = &*POINTS;
        if points.kill_at.is_none() && points.seen.is_none() {
            return;
        }
        let mut counts = points.counts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(name.to_owned()).or_default();
        *count += 1;
        if let Some(seen) = &points.seen
            && let Ok(mut file) = std::fs::OpenOptions::new().create(true).append(true).open(seen)
        {
            let _ = writeln!(file, "{name}");
        }
        if points.kill_at.as_ref().is_some_and(|(at, number)| at == name && number == count) {
            let _ = std::process::Command::new("kill").args(["-9", &std::process::id().to_string()]).status();
            loop {
                std::thread::park();
            }
        }
    }

    /// A file is about to be replaced, or was: the point is named after it, without what is another in each run.
    pub fn reached_file(when: &str, path: &Path) {
        let folder = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let name = match &*folder {
            "runs" | "quarantine" | "export-logs" => folder.into_owned(),
            _ => path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        };
        reached(&format!("{when} {name}"));
    }
}
