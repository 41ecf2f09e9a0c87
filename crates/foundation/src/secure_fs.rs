//! Folders and files that only the user can read: they hold patient data.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Context, ErrorKind, Result};
use crate::fault_points::reached_file;

/// A folder that only the user can read: it holds patient data.
pub fn private_dir(path: &Path) -> Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(path).context(ErrorKind::Storage, format!("{} cannot be made", path.display()))
}

/// A core dump would hold patient data and secrets: there is none from here on, neither as a file nor through a pipe,
/// and another process of the same user, a debugger too, cannot look into this one.
pub fn no_core_dumps() -> std::io::Result<()> {
    // SAFETY: both only set properties of this process.
    #[cfg(unix)]
    #[expect(unsafe_code, reason = "setrlimit and prctl have no safe form")]
    unsafe {
        let of = |code| if code == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) };
        let limited = of(libc::setrlimit(libc::RLIMIT_CORE, &libc::rlimit { rlim_cur: 0, rlim_max: 0 }));
        // The flag counts where the limit does not, so one that fails is no reason to leave out the other.
        #[cfg(target_os = "linux")]
        let limited = of(libc::prctl(libc::PR_SET_DUMPABLE, 0)).and(limited);
        limited
    }
    #[cfg(not(unix))]
    Ok(())
}

/// A file that only the user can read, for appending.
pub fn private_append(path: &Path) -> Result<File> {
    let mut options = std::fs::OpenOptions::new();
    options.create(true).append(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path).context(ErrorKind::Storage, format!("{} cannot be written", path.display()))
}

/// A new file that only the user can read; one that is there is not replaced.
pub fn private_new(path: &Path, content: &[u8]) -> Result<()> {
    let failed = || format!("{} cannot be written", path.display());
    let mut options = std::fs::OpenOptions::new();
    options.create_new(true).write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).context(ErrorKind::Config, failed())?;
    file.write_all(content).and_then(|()| file.sync_all()).context(ErrorKind::Storage, failed())
}

/// A file without a name in `folder`: it goes with the process.
pub fn unnamed_file(folder: &Path) -> Result<File> {
    private_dir(folder)?;
    tempfile::tempfile_in(folder)
        .context(ErrorKind::Storage, format!("no temporary file can be created in {}", folder.display()))
}

/// An empty private file that is to take the place of `path`, and where it is until then.
pub fn new_beside(path: &Path) -> Result<(PathBuf, File)> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    // What a killed run left would keep its own permissions.
    let _ = std::fs::remove_file(&beside);
    let file = private_append(&beside)?;
    Ok((beside, file))
}

/// Replaces a file by its whole new content, or not at all, whenever the machine stops.
pub fn write_atomically(path: &Path, content: &[u8]) -> Result<()> {
    let failed = || format!("{} cannot be written", path.display());
    reached_file("before writing", path);
    let (beside, mut file) = new_beside(path)?;
    file.write_all(content).context(ErrorKind::Storage, failed())?;
    file.sync_all().context(ErrorKind::Storage, failed())?;
    reached_file("before replacing", path);
    std::fs::rename(&beside, path).context(ErrorKind::Storage, failed())?;
    reached_file("replaced", path);
    if let Some(folder) = path.parent().and_then(|folder| File::open(folder).ok()) {
        // The rename itself; a file system that cannot sync a folder has done what it can.
        let _ = folder.sync_all();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    // A limit of 0 is for dumps into files; where the system pipes them to a program, only the flag counts.
    #[cfg(target_os = "linux")]
    #[test]
    fn the_process_cannot_be_dumped() {
        no_core_dumps().unwrap();
        let mut limit = libc::rlimit { rlim_cur: 1, rlim_max: 1 };
        // SAFETY: both only read properties of this process.
        #[expect(unsafe_code, reason = "getrlimit and prctl have no safe form")]
        let dumpable = unsafe {
            libc::getrlimit(libc::RLIMIT_CORE, &raw mut limit);
            libc::prctl(libc::PR_GET_DUMPABLE)
        };
        assert_eq!((dumpable, limit.rlim_cur, limit.rlim_max), (0, 0, 0));
    }
}
