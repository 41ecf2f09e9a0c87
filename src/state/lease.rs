//! Keeps two runs off one pipeline.
//!
//! For a local folder the operating system's file lock does it: it goes with the process, however that
//! ends, so there is no heartbeat to miss and no stale lock to break. For one in an object store a [`crate::mirror`] does.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

use crate::error::{Context, Error, ErrorKind, Result};
use crate::mirror::MirrorLock;

/// The lock; released when dropped or when the process ends.
#[derive(Debug)]
pub struct Lock {
    _held: Held,
}

#[derive(Debug)]
enum Held {
    File { _file: File },
    Remote { _lock: MirrorLock },
}

/// Who takes a lock, for those who find it taken.
pub(super) fn owner() -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host = if host.trim().is_empty() { String::new() } else { format!(" on {}", host.trim()) };
    format!("process {}{host}, since {}", std::process::id(), chrono::Utc::now().format("%Y-%m-%dT%H:%M:%SZ"))
}

impl Lock {
    /// One in an object store.
    pub(super) fn remote(lock: MirrorLock) -> Self {
        Self { _held: Held::Remote { _lock: lock } }
    }

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

    pub(super) fn take(path: &Path) -> Result<Self> {
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
                return Err(Error::new(ErrorKind::Locked, format!("another run holds this pipeline{owner}: {}", path.display())));
            }
            Err(std::fs::TryLockError::Error(error)) => return Err(error).context(ErrorKind::State, failed()),
        }
        let owner = format!("{}\n", owner());
        file.set_len(0).context(ErrorKind::State, failed())?;
        file.rewind().context(ErrorKind::State, failed())?;
        file.write_all(owner.as_bytes()).context(ErrorKind::State, failed())?;
        Ok(Self { _held: Held::File { _file: file } })
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
        assert_eq!(Lock::holder(&path), None);
        let first = Lock::take(&path).unwrap();
        assert!(Lock::holder(&path).unwrap().contains("process"));
        let error = Lock::take(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert!(error.to_string().contains("process"), "{error}");
        drop(first);
        Lock::take(&path).unwrap();
    }
}
