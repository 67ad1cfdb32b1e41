//! Generates the messages of `cri/pod.proto`, without protoc, and a `mod.rs` with them.

fn main() {
    println!("cargo:rerun-if-changed=cri/pod.proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .out_dir(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"))
        .include("cri")
        .input("cri/pod.proto")
        .run()
        .expect("pod.proto is valid");
}
