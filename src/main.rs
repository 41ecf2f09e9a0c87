//! Arguments → telemetry → command → exit code.

use std::process::ExitCode;

/// Makes files from here on, also those of libraries, the user's alone: they are about patients. Where a group reads
/// the tables, FHIRLAKE_UMASK says so, as `027`; the state stays the user's alone.
fn private_files() {
    let requested =
        fhirlake::config::environment("FHIRLAKE_UMASK").and_then(|text| libc::mode_t::from_str_radix(&text, 8).ok());
    // SAFETY: umask cannot fail, and is called before any other thread exists.
    #[cfg(unix)]
    #[expect(unsafe_code, reason = "umask has no safe form")]
    unsafe {
        libc::umask(requested.unwrap_or(0o077) | 0o007);
    }
}

fn main() -> ExitCode {
    private_files();
    fhirlake::heap::bound();
    fhirlake::cli::main()
}
