//! Tables on object stores, against stand-ins on the loopback (`tests/stores.py`).
//!
//! `FHIRLAKE_STORES` names a Python that has `tests/stores.txt`, `FHIRLAKE_AZURITE` Azurite's `azurite-blob`. Without
//! them, or without the store's cargo feature, a test is skipped.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use bulk_data_server::{DEMO_TYPES, DemoServer, Faults, Population};
use futures::TryStreamExt;

use super::support::until;

/// A store, and how the binary reaches it: by its environment, as on the clouds.
struct Store {
    process: Child,
    tables: String,
    environment: HashMap<&'static str, String>,
    folder: tempfile::TempDir,
}

impl Drop for Store {
    fn drop(&mut self) {
        // Its input ends, and so does it.
        drop(self.process.stdin.take());
        self.process.wait().unwrap();
    }
}

fn skipped(why: &str) -> Option<Store> {
    #[expect(clippy::disallowed_macros, reason = "a skipped test must be seen")]
    {
        eprintln!("SKIPPED: {why}, so no table is written to it");
    }
    None
}

fn store(kind: &str) -> Option<Store> {
    let (built_in, scheme) = match kind {
        "s3" => (cfg!(feature = "s3"), "s3"),
        "azure" => (cfg!(feature = "azure"), "az"),
        _ => (cfg!(feature = "gcs"), "gs"),
    };
    if !built_in {
        return skipped(&format!("the feature {kind} is not built in"));
    }
    let named = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    let Some(python) = named("FHIRLAKE_STORES") else {
        return skipped("FHIRLAKE_STORES names no Python with tests/stores.txt");
    };
    if kind == "azure" && named("FHIRLAKE_AZURITE").is_none() {
        return skipped("FHIRLAKE_AZURITE names no azurite-blob");
    }
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stores.py");
    let mut process = Command::new(python)
        .arg(script)
        .args([kind, &port.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = String::new();
    BufReader::new(process.stdout.take().unwrap()).read_line(&mut said).unwrap();
    assert_eq!(said.trim(), "ready", "the stand-in for {kind} did not start");
    let folder = tempfile::tempdir().unwrap();
    let address = format!("http://127.0.0.1:{port}");
    let environment = match kind {
        "s3" => vec![
            ("AWS_ENDPOINT_URL", address),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_REGION", "us-east-1".into()),
            ("AWS_ACCESS_KEY_ID", "test".into()),
            ("AWS_SECRET_ACCESS_KEY", "test".into()),
        ],
        "azure" => vec![("AZURE_STORAGE_USE_EMULATOR", "true".into()), ("AZURITE_BLOB_STORAGE_URL", address)],
        _ => {
            let key = folder.path().join("key.json");
            let text = format!(
                r#"{{"gcs_base_url":"{address}","disable_oauth":true,"client_email":"","private_key":"","private_key_id":""}}"#
            );
            std::fs::write(&key, text).unwrap();
            vec![
                ("GOOGLE_SERVICE_ACCOUNT", key.display().to_string()),
                ("GOOGLE_ALLOW_HTTP", "true".into()),
                ("GOOGLE_SKIP_SIGNATURE", "true".into()),
            ]
        }
    };
    Some(Store {
        process,
        tables: format!("{scheme}://lake/fhir"),
        environment: environment.into_iter().collect(),
        folder,
    })
}

impl Store {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_fhirlake"));
        // The emulator's address is read by deltalake's environment only for http that is allowed.
        command.args(arguments).envs(&self.environment).env_remove("FHIRLAKE_LOG").env("AZURE_ALLOW_HTTP", "true");
        command
    }
    /// Runs the binary; it must succeed.
    fn fhirlake(&self, arguments: &[&str]) -> Output {
        let output = tokio::task::block_in_place(|| self.command(arguments).output().unwrap());
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        output
    }
    /// A pipeline file of this name with a state of its own.
    fn pipeline(&self, name: &str, source: &str, rest: &str) -> String {
        let file = self.folder.path().join(format!("{name}.yaml"));
        let state = self.folder.path().join(name);
        let yaml = format!(
            "version: 1\nname: {name}\nsource: {source}\ntables: {}\nstate: {}\n{rest}",
            self.tables,
            state.display()
        );
        std::fs::write(&file, yaml).unwrap();
        file.display().to_string()
    }
    /// Version by id, as `fhirlake query` says.
    fn versions(&self, resource_type: &str) -> BTreeMap<String, String> {
        let question = format!("SELECT id, meta['versionId'] AS v FROM {resource_type}");
        let output = self.fhirlake(&["query", "--tables", &self.tables, "--output", "csv", &question]);
        let text = String::from_utf8(output.stdout).unwrap();
        let mut found = BTreeMap::new();
        for line in text.lines().skip(1) {
            let (id, version) = line.split_once(',').unwrap();
            assert!(found.insert(id.to_owned(), version.to_owned()).is_none(), "{resource_type}/{id} stands twice");
        }
        found
    }
    /// The store at a URL, as deltalake has it.
    fn at(&self, url: &str) -> deltalake::DeltaTable {
        let mut options: HashMap<String, String> =
            self.environment.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        options.insert("allow_http".into(), "true".into());
        if let Some(address) = self.environment.get("AZURITE_BLOB_STORAGE_URL") {
            // What the emulator's switch stands for, whose address only the environment can say.
            options.clear();
            options.insert("allow_http".into(), "true".into());
            options.insert("azure_storage_account_name".into(), "devstoreaccount1".into());
            let key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==";
            options.insert("azure_storage_account_key".into(), key.into());
            options.insert("azure_storage_endpoint".into(), format!("{address}/devstoreaccount1"));
        }
        let url = url::Url::parse(url).unwrap();
        deltalake::DeltaTableBuilder::from_url(url).unwrap().with_storage_options(options).build().unwrap()
    }
    /// Objects of a type's table that are no log, and those that its newest version names.
    async fn objects(&self, resource_type: &str) -> (Vec<String>, Vec<String>) {
        let mut table = self.at(&format!("{}/{resource_type}.parquet", self.tables));
        let there: Vec<object_store::ObjectMeta> =
            table.log_store().object_store(None).list(None).try_collect().await.unwrap();
        let there =
            there.into_iter().map(|object| object.location.to_string()).filter(|path| !path.starts_with("_delta_log"));
        let named = if table.verify_deltatable_existence().await.unwrap() {
            table.load().await.unwrap();
            table.snapshot().unwrap().log_data().iter().map(|file| file.path().into_owned()).collect()
        } else {
            Vec::new()
        };
        (there.collect(), named)
    }
}

async fn state(kind: &str) {
    let Some(store) = store(kind) else { return };
    let types = ["Patient", "Observation"];
    let server = DemoServer::start(Population::new(9, 30), 0, 5).await.unwrap();
    let copies = tempfile::tempdir().unwrap();
    let place = store.tables.replace("/fhir", "/state");
    let yaml = format!(
        "version: 1\nname: away\nsource: {{ url: \"{}\", types: [{}], delete_export: never }}\ntables: {}\nstate: \
            {place}\n\
         lock_expiry: 5s\nstages: \
         {{ download: {{ concurrency: 1 }}, encode: {{ row_group: 64KiB }}, merge: {{ checkpoint: 100ms, checkpoint_size: 1KiB }} }}\n",
        server.base(),
        types.join(", "),
        store.tables
    );
    let file = store.folder.path().join("away.yaml").display().to_string();
    std::fs::write(&file, yaml).unwrap();
    let command = |arguments: &[&str]| {
        let mut command = store.command(arguments);
        command.env("TMPDIR", copies.path());
        command
    };
    let run = |arguments: &[&str]| tokio::task::block_in_place(|| command(arguments).output().unwrap());
    let said = |output: &Output| {
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
    };
    server.set_faults(Faults { slow: Some(Duration::from_millis(250)), ..Faults::default() });
    for after in [200, 900] {
        let mut killed = command(&["run", &file]).stderr(Stdio::null()).spawn().unwrap();
        // Before its export is written down a kill would lose it.
        let is_under_way = |status: &str| status.contains("running: process") && status.contains("in flight");
        until("a run that is under way", || {
            assert!(killed.try_wait().unwrap().is_none(), "{kind}: the run ended by itself");
            is_under_way(&said(&run(&["status", &file])))
        })
        .await;
        tokio::time::sleep(Duration::from_millis(after)).await;
        killed.kill().unwrap();
        killed.wait().unwrap();
        // Nobody gives the lock back.
        let refused = run(&["run", &file]);
        assert_eq!(refused.status.code(), Some(9), "{kind}: {}", said(&refused));
        assert!(said(&refused).contains(&format!("{place}/lock")), "{}", said(&refused));
        assert!(said(&run(&["status", &file])).contains("running: process"), "{kind}");
        tokio::time::sleep(Duration::from_millis(7_500)).await;
    }
    server.set_faults(Faults::default());
    // Of two that come at the same time one runs; what the killed ones had staged and asked for is known to whoever it
    // is.
    let both = [(); 2].map(|()| command(&["run", &file]).stderr(Stdio::piped()).spawn().unwrap());
    let both = both.map(|run| tokio::task::block_in_place(|| run.wait_with_output().unwrap()));
    let mut codes = both.each_ref().map(|output| output.status.code().unwrap());
    codes.sort_unstable();
    assert!(codes == [0, 9] || codes == [0, 0], "{kind}: {codes:?} {}", said(&both[0]));
    let first_kickoffs = server.seen().kickoffs.len();
    assert!(first_kickoffs <= codes.iter().filter(|code| **code == 0).count(), "{kind}: {first_kickoffs} kick-offs");
    for name in types {
        assert_eq!(store.versions(name), expected(&server.population(), name), "{kind}: {name}");
        let (there, named) = store.objects(name).await;
        let orphans: Vec<&String> =
            there.iter().filter(|path| path.ends_with(".parquet") && !named.contains(path)).collect();
        assert!(orphans.is_empty(), "{kind}: {name}: {orphans:?}");
    }
    // Another machine goes on from there: a bad line, its quarantine, and the watermark.
    server.step(10, 5, 1);
    server.set_faults(Faults {
        junk: [("Patient".to_owned(), b"{\"resourceType\":\"Patient\",\n".to_vec())].into(),
        ..Faults::default()
    });
    let brought = run(&["run", &file]);
    assert_eq!(brought.status.code(), Some(0), "{kind}: {}", said(&brought));
    assert!(said(&brought).contains(&format!("{place}/quarantine/")), "{kind}: {}", said(&brought));
    server.set_faults(Faults::default());
    let listed = run(&["quarantine", "list", &file]);
    assert!(!listed.stdout.is_empty(), "{kind}");
    assert!(run(&["quarantine", "dismiss", &file, "--all"]).status.success());
    assert!(said(&run(&["quarantine", "list", &file])).to_lowercase().contains("no line"), "{kind}");
    let status = said(&run(&["status", &file]));
    assert!(status.contains(&place) && status.contains("succeeded") && status.contains("idle"), "{kind}: {status}");
    for name in types {
        assert_eq!(store.versions(name), expected(&server.population(), name), "{kind}: {name}");
    }
    // What killed processes left is private; others leave nothing.
    use std::os::unix::fs::PermissionsExt;
    let left: Vec<_> = std::fs::read_dir(copies.path()).unwrap().map(|entry| entry.unwrap()).collect();
    assert!(left.len() <= 2, "{left:?}");
    assert!(left.iter().all(|copy| copy.metadata().unwrap().permissions().mode() & 0o077 == 0), "{left:?}");
}

// Breaks if a state in a store is not what one in a folder is: two runs at once, an export begun twice, rows staged and
// forgotten, or patient data left on a machine.
#[tokio::test(flavor = "multi_thread")]
async fn state_on_s3() {
    state("s3").await;
}

// As on S3.
#[tokio::test(flavor = "multi_thread")]
async fn state_on_azure() {
    state("azure").await;
}

// As on S3.
#[tokio::test(flavor = "multi_thread")]
async fn state_on_google_cloud() {
    state("gcs").await;
}

/// What the population holds now.
fn expected(population: &Population, name: &str) -> BTreeMap<String, String> {
    let kind = DEMO_TYPES.iter().position(|known| *known == name).unwrap();
    let mut found = BTreeMap::new();
    for patient in 0..population.patients() {
        population.for_each(kind, patient, |number, fate| {
            if !fate.deleted {
                let mut line = String::new();
                population.write(kind, patient, number, fate, &mut line);
                let resource: serde_json::Value = serde_json::from_str(&line).unwrap();
                let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
                found.insert(text(&resource["id"]), text(&resource["meta"]["versionId"]));
            }
        });
    }
    found
}

async fn everything(kind: &str) {
    let Some(store) = store(kind) else { return };
    let types = ["Patient", "Observation", "Claim"];
    let server = DemoServer::start(Population::new(9, 30), 0, 5).await.unwrap();
    let source = format!("{{ url: \"{}\", types: [{}] }}", server.base(), types.join(", "));
    let same = |when: &str| {
        for name in types {
            assert_eq!(store.versions(name), expected(&server.population(), name), "{kind}, {when}: {name}");
        }
    };
    let file = store.pipeline("main", &source, "stages: { encode: { row_group: 64KiB } }\n");
    // Killed while files are staged, and again.
    server.set_faults(Faults { slow: Some(Duration::from_millis(20)), ..Faults::default() });
    for after in [250, 450, 650] {
        let mut run = store.command(&["run", &file]).stderr(Stdio::null()).spawn().unwrap();
        tokio::time::sleep(Duration::from_millis(after)).await;
        run.kill().unwrap();
        run.wait().unwrap();
    }
    server.set_faults(Faults::default());
    store.fhirlake(&["validate", &file]);
    store.fhirlake(&["run", &file]);
    same("after the first run");
    for name in types {
        let (there, named) = store.objects(name).await;
        let orphans: Vec<&String> =
            there.iter().filter(|path| path.ends_with(".parquet") && !named.contains(path)).collect();
        assert!(orphans.is_empty(), "{kind}: {name}: {orphans:?}");
    }
    // Vectors, then copies without them, then one file of all.
    server.step(80, 40, 3);
    store.fhirlake(&["run", &file]);
    same("after what changed");
    server.step(80, 40, 3);
    let rewrites = store.pipeline("rewrites", &source, "stages: { merge: { deletion_vectors: false } }\n");
    store.fhirlake(&["run", &rewrites]);
    same("by another pipeline");
    store.fhirlake(&["optimize", "--cluster", &file]);
    let before = store.objects("Observation").await.0.len();
    store.fhirlake(&["vacuum", &file, "--retention", "0s", "--force", "--delete"]);
    let (there, named) = store.objects("Observation").await;
    assert!(there.len() < before && there.len() == named.len(), "{kind}: {there:?} for {named:?}");
    same("after optimize and vacuum");
    store.fhirlake(&["status", &file]);
    // Two that merge into the same tables at the same time: each commit is a conditional put.
    let bring = |name: &str, round: usize| {
        let folder = store.folder.path().join(format!("{name}-{round}"));
        std::fs::create_dir(&folder).unwrap();
        let lines: String =
            (0..20).map(|id| format!("{{\"resourceType\":\"Device\",\"id\":\"{name}-{round}-{id}\"}}\n")).collect();
        std::fs::write(folder.join("Device.ndjson"), lines).unwrap();
        store.pipeline(name, &format!("{{ url: \"file://{}\" }}", folder.display()), "")
    };
    for round in 0..5 {
        let files = [bring("one", round), bring("two", round)];
        let runs = files.map(|file| store.command(&["run", &file]).stderr(Stdio::piped()).spawn().unwrap());
        for run in runs {
            let output = tokio::task::block_in_place(|| run.wait_with_output().unwrap());
            assert!(output.status.success(), "{kind}: {}", String::from_utf8_lossy(&output.stderr));
        }
    }
    assert_eq!(store.versions("Device").len(), 200, "{kind}: what two writers brought");
    // NDJSON from the store itself, in two files of which one is packed.
    let ndjson = store.tables.replace("/fhir", "/ndjson");
    let objects = store.at(&ndjson).log_store().object_store(None);
    let lines = |from: u32| -> Vec<u8> {
        (from..from + 500)
            .map(|id| format!("{{\"resourceType\":\"Location\",\"id\":\"l{id}\"}}\n"))
            .collect::<String>()
            .into_bytes()
    };
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut packer, &lines(500)).unwrap();
    use object_store::ObjectStoreExt;
    objects.put(&"Location.1.ndjson".into(), lines(0).into()).await.unwrap();
    objects.put(&"Location.2.ndjson.gz".into(), packer.finish().unwrap().into()).await.unwrap();
    let from_store = store.pipeline("ndjson", &format!("{{ url: \"{ndjson}\" }}"), "");
    store.fhirlake(&["validate", &from_store]);
    store.fhirlake(&["run", &from_store]);
    assert_eq!(store.versions("Location").len(), 1000, "{kind}: NDJSON from the store");
}

// Breaks if a table on the store is not what it would be in a folder: a killed run's objects stay, rows are lost to a
// writer who comes at the same time, or maintenance changes what a query answers.
#[tokio::test(flavor = "multi_thread")]
async fn tables_on_s3() {
    everything("s3").await;
}

// As on S3.
#[tokio::test(flavor = "multi_thread")]
async fn tables_on_azure() {
    everything("azure").await;
}

// As on S3.
#[tokio::test(flavor = "multi_thread")]
async fn tables_on_google_cloud() {
    everything("gcs").await;
}

// Breaks if a store that is not built in, a scheme that is none, or a key in the URL is found out by a library.
#[test]
fn a_place_that_cannot_be_is_said_with_line_and_column() {
    let folder = tempfile::tempdir().unwrap();
    let mut cases = vec![
        ("ftp://lake/fhir", "ftp:// is not supported for tables"),
        #[cfg(feature = "s3")]
        ("s3://key:secret@lake/fhir", "the URL of the tables must not have keys"),
        #[cfg(feature = "azure")]
        ("az://lake/fhir?sig=secret", "the URL of the tables must not have a query"),
    ];
    if cfg!(not(feature = "gcs")) {
        cases.push((
            "gs://lake/fhir",
            "gs:// is not in this build; build it with `cargo build --release --features gcs`",
        ));
    }
    for (tables, expected) in cases {
        let file = folder.path().join("p.yaml");
        let state = folder.path().join("state");
        std::fs::write(
            &file,
            format!(
                "version: 1\nname: x\nsource: {{ url: \"file:///nowhere\" }}\ntables: {tables}\nstate: {}\n",
                state.display()
            ),
        )
        .unwrap();
        let output = Command::new(env!("CARGO_BIN_EXE_fhirlake")).arg("run").arg(&file).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(said.contains(expected) && said.contains(":4:1: tables: ") && !said.contains("secret"), "{said}");
    }
}
