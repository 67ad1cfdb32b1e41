//! Generates the messages of `cri/cri.proto` and of the shim's `pod.proto`, without protoc.

use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=cri/cri.proto");
    println!("cargo:rerun-if-changed=../shim/cri/pod.proto");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    protobuf_codegen::Codegen::new()
        .pure()
        .out_dir(&out)
        .include("cri")
        .include("../shim/cri")
        .input("cri/cri.proto")
        .input("../shim/cri/pod.proto")
        .run()
        .expect("the messages are valid");
    // The generated files begin with inner attributes, which include! does not take.
    for name in ["cri.rs", "pod.rs"] {
        let path = Path::new(&out).join(name);
        let text = fs::read_to_string(&path).expect("the generator wrote it");
        let kept: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .collect();
        fs::write(&path, kept.join("\n")).expect("OUT_DIR is writable");
    }
}
