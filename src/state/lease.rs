//! The lease, which keeps two runs off one pipeline.
//!
//! In a folder it is a file lock of the operating system: it goes with the process, however that ends, so there is no
//! heartbeat to miss and no stale lock to break. In an object store it is an object with an owner and an expiry.

use std::fmt::Debug;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::error::{Context, Error, ErrorKind, Result};

/// A lease; released when dropped or, in a folder, when the process ends.
#[derive(Debug)]
pub struct Lease {
    _held: Box<dyn Debug + Send + Sync>,
}

impl Lease {
    /// One that dropping `held` releases.
    pub(super) fn new(held: impl Debug + Send + Sync + 'static) -> Self {
        Self { _held: Box::new(held) }
    }
}

/// A lock on a file.
#[derive(Debug)]
pub(super) struct FileLock {
    _file: File,
}

/// Returns who this process is, for those who find the lease taken.
pub(super) fn owner() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { String::new() } else { format!(" on {}", host.trim()) };
    format!("process {}{host}, since {}", std::process::id(), chrono::Utc::now().format("%Y-%m-%dT%H:%M:%SZ"))
}

impl FileLock {
    pub(super) fn holder(path: &Path) -> Option<String> {
        let mut file = File::open(path).ok()?;
        match file.try_lock_shared() {
            Err(std::fs::TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // Who it is, is only a help.
                let _ = file.read_to_string(&mut owner);
                Some(owner.trim().to_owned())
            }
            _ => None,
        }
    }

    pub(super) fn take(path: &Path, owner: &str) -> Result<Self> {
        let failed = || format!("{} cannot be locked", path.display());
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).context(ErrorKind::State, failed())?;
        let mut taken = file.try_lock();
        for _ in 0..10 {
            // `status` looks at a lock by sharing it for a moment.
            if !matches!(taken, Err(std::fs::TryLockError::WouldBlock)) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
            taken = file.try_lock();
        }
        match taken {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                let mut owner = String::new();
                // Who it is, is only a help.
                let _ = file.read_to_string(&mut owner);
                let owner = owner.trim();
                let owner = if owner.is_empty() { String::new() } else { format!(" ({owner})") };
                return Err(Error::new(
                    ErrorKind::Locked,
                    format!("another run holds this pipeline{owner}: {}", path.display()),
                ));
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(error).context(ErrorKind::State, failed()),
        }
        let owner = format!("{owner}\n");
        file.set_len(0).context(ErrorKind::State, failed())?;
        file.rewind().context(ErrorKind::State, failed())?;
        file.write_all(owner.as_bytes()).context(ErrorKind::State, failed())?;
        Ok(Self { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if a second run could start, or if the lock outlived its owner.
    #[test]
    fn one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        assert_eq!(FileLock::holder(&path), None);
        let first = FileLock::take(&path, &owner()).unwrap();
        assert!(FileLock::holder(&path).unwrap().contains("process"));
        let error = FileLock::take(&path, &owner()).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("process"), "{error}");
        drop(first);
        FileLock::take(&path, &owner()).unwrap();
    }
}
