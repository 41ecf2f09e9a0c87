//! Two processes and one store, and a store whose answers are lost.

use std::collections::VecDeque;

use futures::stream::BoxStream;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, PutMultipartOptions, PutOptions,
    PutPayload, PutResult,
};

use super::files::PART;
use super::*;

pub(in super::super) fn folder(store: &Arc<dyn ObjectStore>, expiry: u64) -> Arc<ObjectFolder> {
    Arc::new(ObjectFolder::new("s3://lake/state", Duration::from_millis(expiry), store.clone()).unwrap())
}

fn in_memory() -> Arc<dyn ObjectStore> {
    Arc::new(object_store::memory::InMemory::new())
}

// Breaks if a document, a removal or a big file is not in the store when the call returns, or scratch is.
#[test]
fn what_one_writes_another_reads() {
    let store = in_memory();
    let (one, other) = (folder(&store, 60_000), folder(&store, 60_000));
    let keys = one.local("staged/a.keys").unwrap();
    assert!(!keys.exists());
    std::fs::create_dir_all(keys.parent().unwrap()).unwrap();
    std::fs::create_dir_all(one.scratch()).unwrap();
    std::fs::write(one.scratch().join("x"), b"x").unwrap();
    let big: Vec<u8> = (0..PART * 2 + 77).map(|at| (at % 251) as u8).collect();
    std::fs::write(&keys, &big).unwrap();
    assert_eq!(one.list("staged").unwrap(), ["staged/a.keys"], "not put, but written");
    assert!(other.list("staged").unwrap().is_empty() && one.list("").unwrap().is_empty());
    one.publish("staged/a.keys").unwrap();
    one.replace("staged/index.json", b"{}", Protection::ByLease).unwrap();
    assert_eq!(std::fs::read(other.local("staged/a.keys").unwrap()).unwrap(), big);
    assert_eq!(other.list("staged").unwrap(), ["staged/a.keys", "staged/index.json"]);
    one.remove(&["staged/a.keys".to_owned(), "never".to_owned()]).unwrap();
    assert!(!other.local("staged/a.keys").unwrap().exists());
    assert_eq!(other.list("staged").unwrap(), ["staged/index.json"]);
    assert_eq!(one.location("runs/r.json"), "s3://lake/state/runs/r.json");
}

/// A store whose next answers are lost, or whose next puts fail before they count.
#[derive(Debug)]
struct Flaky {
    inner: Arc<dyn ObjectStore>,
    next: Mutex<VecDeque<Fate>>,
}

/// Fate of a put.
#[derive(Debug, Clone, Copy)]
enum Fate {
    AnswerLost,
    Fails,
    Denied,
}

fn flaky_folder(inner: &Arc<dyn ObjectStore>, expiry: u64) -> (Arc<Flaky>, Arc<ObjectFolder>) {
    let flaky = Arc::new(Flaky { inner: inner.clone(), next: Mutex::default() });
    let store: Arc<dyn ObjectStore> = flaky.clone();
    (flaky, folder(&store, expiry))
}

impl std::fmt::Display for Flaky {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "flaky {}", self.inner)
    }
}

#[async_trait::async_trait]
impl ObjectStore for Flaky {
    async fn put_opts(
        &self,
        to: &ObjectPath,
        payload: PutPayload,
        options: PutOptions,
    ) -> object_store::Result<PutResult> {
        let next = self.next.lock().pop_front();
        let lost = || object_store::Error::Generic { store: "flaky", source: "connection reset".into() };
        match next {
            None => self.inner.put_opts(to, payload, options).await,
            Some(Fate::AnswerLost) => self.inner.put_opts(to, payload, options).await.and_then(|_| Err(lost())),
            Some(Fate::Fails) => Err(lost()),
            Some(Fate::Denied) => {
                Err(object_store::Error::PermissionDenied { path: to.to_string(), source: "read only".into() })
            }
        }
    }

    async fn put_multipart_opts(
        &self,
        to: &ObjectPath,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &ObjectPath, options: GetOptions) -> object_store::Result<GetResult> {
        self.inner.get_opts(from, options).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, object_store::Result<ObjectPath>>,
    ) -> BoxStream<'static, object_store::Result<ObjectPath>> {
        self.inner.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&ObjectPath>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.inner.list(prefix)
    }

    async fn list_with_delimiter(&self, prefix: Option<&ObjectPath>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &ObjectPath, to: &ObjectPath, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

// Breaks if a put whose answer was lost fails a run, or takes the run's own content for another's.
#[test]
fn a_lost_answer_is_not_a_lost_lease() {
    use Fate::{AnswerLost, Fails};
    let inner = in_memory();
    let (flaky, one) = flaky_folder(&inner, 60_000);
    let lease = one.clone().acquire("one").unwrap();
    for (round, fates) in
        [vec![AnswerLost], vec![Fails], vec![Fails, AnswerLost], vec![AnswerLost, AnswerLost]].into_iter().enumerate()
    {
        flaky.next.lock().extend(fates);
        let content = format!("{{\"round\": {round}}}");
        one.replace("exports.json", content.as_bytes(), Protection::ByLease).unwrap();
        flaky.next.lock().clear();
        assert_eq!(one.read("exports.json").unwrap().unwrap(), content.as_bytes());
        assert_eq!(folder(&inner, 60_000).read("exports.json").unwrap().unwrap(), content.as_bytes());
    }
    one.check().unwrap();
    drop(lease);
}

// Breaks if a run writes after its lease has ended, or tries for minutes what it may not do.
#[test]
fn a_put_ends_with_the_lease_and_one_that_is_denied_at_once() {
    let inner = in_memory();
    let (flaky, one) = flaky_folder(&inner, 2_000);
    let _lease = one.clone().acquire("one").unwrap();
    one.replace("exports.json", b"1", Protection::ByLease).unwrap();
    flaky.next.lock().push_back(Fate::Denied);
    let began = Instant::now();
    assert_eq!(one.replace("exports.json", b"2", Protection::ByLease).unwrap_err().kind(), ErrorKind::State);
    assert!(began.elapsed() < Duration::from_millis(500), "denied at once");
    // From here on nothing is written, the lease's renewal neither.
    flaky.next.lock().extend([Fate::Fails; 1_000]);
    assert_eq!(one.replace("exports.json", b"3", Protection::ByLease).unwrap_err().kind(), ErrorKind::Locked);
    flaky.next.lock().clear();
    assert_eq!(one.replace("exports.json", b"4", Protection::ByLease).unwrap_err().kind(), ErrorKind::Locked);
    assert_eq!(folder(&inner, 2_000).read("exports.json").unwrap().unwrap(), b"1");
}

// Breaks if a run replaces what another has written since, also without having read it, or may commit after that.
#[test]
fn a_document_that_another_replaced_is_not_replaced() {
    let put = |store: &Arc<dyn ObjectStore>, name: &str| {
        futures::executor::block_on(store.put(&ObjectPath::from(name), "another's".into())).unwrap();
    };
    for (name, before) in [("a.json", None), ("exports.json", Some("2"))] {
        let store = in_memory();
        let (one, other) = (folder(&store, 60_000), folder(&store, 60_000));
        assert_eq!(other.read(name).unwrap(), None);
        let lease = one.clone().acquire("one").unwrap();
        if let Some(before) = before {
            one.replace(name, before.as_bytes(), Protection::ByLease).unwrap();
        }
        assert_eq!(one.read(name).unwrap().as_deref(), before.map(str::as_bytes));
        // One that thinks itself the holder still, as after a pause of its machine.
        put(&store, name);
        assert_eq!(one.replace(name, b"3", Protection::ByLease).unwrap_err().kind(), ErrorKind::Locked);
        // From then on it writes, removes and commits nothing, but for what no lease protects.
        assert_eq!(one.check().unwrap_err().kind(), ErrorKind::Locked);
        assert_eq!(one.replace(name, b"4", Protection::ByLease).unwrap_err().kind(), ErrorKind::Locked);
        assert_eq!(one.remove(&[name.to_owned()]).unwrap_err().kind(), ErrorKind::Locked);
        one.replace("schedule.json", b"5", Protection::None).unwrap();
        drop(lease);
        // What was read before the lease was taken counts no more.
        let _lease = folder(&store, 60_000).acquire("third").unwrap();
        assert_eq!(folder(&store, 60_000).read(name).unwrap().unwrap(), b"another's");
    }
}

// Breaks if a local file that somebody removed is empty from then on, or passes for durable.
#[test]
fn a_local_file_that_is_gone_is_read_again() {
    let store = in_memory();
    let one = folder(&store, 60_000);
    let path = one.local("quarantine/deleted.log").unwrap();
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(&path, b"line\n").unwrap();
    one.publish("quarantine/deleted.log").unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(one.publish("quarantine/deleted.log").unwrap_err().kind(), ErrorKind::State);
    let _lease = one.clone().acquire("one").unwrap();
    assert_eq!(std::fs::read(one.local("quarantine/deleted.log").unwrap()).unwrap(), b"line\n");
}
