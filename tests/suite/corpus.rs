//! What fuzzers found worth keeping (`fuzz/corpus`), and bytes that nobody thought of, through every target of the
//! fuzzers.

use std::path::Path;

use fhirlake::fuzzing::TARGETS;
use proptest::prelude::*;

// Breaks if an input that a fuzzer found goes wrong again.
#[tokio::test(flavor = "multi_thread")]
async fn the_fuzzers_corpora() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    for (name, target) in TARGETS {
        let mut inputs = 0;
        for entry in std::fs::read_dir(corpus.join(name)).unwrap_or_else(|error| panic!("{name}: {error}")) {
            target(&std::fs::read(entry.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs >= 3, "{name} has {inputs} inputs");
    }
}

/// An input of the corpus that is cut, doubled, or has other bytes in some places.
fn changed() -> impl Strategy<Value = (usize, Vec<u8>)> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let mut inputs = Vec::new();
    for (at, (name, _)) in TARGETS.iter().enumerate() {
        let entries = std::fs::read_dir(corpus.join(name)).unwrap();
        inputs.extend(entries.map(|entry| (at, std::fs::read(entry.unwrap().path()).unwrap())));
    }
    inputs.sort();
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0..4u8), 1..6);
    (prop::sample::select(inputs), changes).prop_map(|((target, mut bytes), changes)| {
        for (index, byte, what) in changes {
            if bytes.is_empty() {
                bytes.push(byte);
            }
            let at = index.index(bytes.len());
            match what {
                0 => bytes[at] = byte,
                1 => bytes.insert(at, byte),
                2 => bytes.truncate(at),
                _ => bytes.extend_from_within(at..),
            }
            bytes.truncate(1 << 16);
        }
        (target, bytes)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]
    // Breaks if damaged bytes lead to a panic.
    #[test]
    fn damaged_inputs((target, bytes) in changed()) {
        // Some libraries want a runtime around them.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _entered = runtime.enter();
        TARGETS[target].1(&bytes);
    }
}
