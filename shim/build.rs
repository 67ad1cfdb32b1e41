//! Generates the messages of `cri/pod.proto`, without protoc.

use std::path::Path;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=cri/pod.proto");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    protobuf_codegen::Codegen::new()
        .pure()
        .out_dir(&out)
        .include("cri")
        .input("cri/pod.proto")
        .run()
        .expect("pod.proto is valid");
    // The generated file begins with inner attributes, which include! does not take.
    let path = Path::new(&out).join("pod.rs");
    let text = fs::read_to_string(&path).expect("the generator wrote it");
    let kept: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
        .collect();
    fs::write(&path, kept.join("\n")).expect("OUT_DIR is writable");
}
