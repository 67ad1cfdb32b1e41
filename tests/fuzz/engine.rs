//! libFuzzer as a function: it calls the target until its time is over, and ends the process.

use std::env;
use std::ffi::{CString, c_char, c_int};
use std::ptr;
use std::sync::OnceLock;

static BODY: OnceLock<fn(&[u8])> = OnceLock::new();

// libFuzzer's own interface (FuzzerInterface.h); libfuzzer-sys brings it, and knows only its main.
unsafe extern "C" {
    fn LLVMFuzzerRunDriver(
        argc: *mut c_int,
        argv: *mut *mut *mut c_char,
        callback: extern "C" fn(*const u8, usize) -> c_int,
    ) -> c_int;
}

/// What libfuzzer-sys' `fuzz_target!` would make; its main is not linked, but names it.
#[unsafe(no_mangle)]
#[allow(improper_ctypes_definitions)] // As libfuzzer-sys declares it.
extern "C" fn rust_fuzzer_test_input(input: &[u8]) -> c_int {
    (BODY.get().expect("run has set it"))(input);
    0
}

extern "C" fn call(data: *const u8, size: usize) -> c_int {
    let input = match size {
        0 => &[],
        // SAFETY: libFuzzer passes its buffer, which lives and is not written during the call.
        _ => unsafe { std::slice::from_raw_parts(data, size) },
    };
    rust_fuzzer_test_input(input)
}

/// Fuzzes with the words of libFuzzer's command line.
pub(crate) fn run(words: &str, body: fn(&[u8])) -> ! {
    BODY.set(body).expect("one target a process");
    // A panic aborts, so that libFuzzer has the input.
    libfuzzer_sys::initialize(ptr::null(), ptr::null());
    let program = env::var("BULKHEAD_FUZZ_PROGRAM").unwrap_or_else(|_| "fuzz".into());
    let words = std::iter::once(program.as_str()).chain(words.split_whitespace());
    let words: Vec<CString> = words
        .map(|word| CString::new(word).expect("words have no NUL"))
        .collect();
    let mut pointers: Vec<*mut c_char> =
        words.iter().map(|word| word.as_ptr().cast_mut()).collect();
    pointers.push(ptr::null_mut());
    let mut count = c_int::try_from(words.len()).expect("few words");
    let mut argv = pointers.as_mut_ptr();
    // SAFETY: argv is an array of `count` C strings and a null, and lives until the process ends.
    let code = unsafe { LLVMFuzzerRunDriver(&raw mut count, &raw mut argv, call) };
    std::process::exit(code);
}
