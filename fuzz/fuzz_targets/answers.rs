#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use tokio::runtime::Runtime;

static RUNTIME: LazyLock<Runtime> = LazyLock::new(|| Runtime::new().unwrap());

fuzz_target!(|data: &[u8]| {
    // Some libraries want a runtime around them.
    let _entered = RUNTIME.enter();
    fhirlake::fuzzing::answers(data);
});
