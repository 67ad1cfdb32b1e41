//! Generates the messages of `cri/cri.proto` and of the shim's `pod.proto`, without protoc, and a `mod.rs` with them.

fn main() {
    println!("cargo:rerun-if-changed=cri/cri.proto");
    println!("cargo:rerun-if-changed=../shim/cri/pod.proto");
    protobuf_codegen::Codegen::new()
        .pure()
        .out_dir(std::env::var("OUT_DIR").expect("cargo sets OUT_DIR"))
        .include("cri")
        .include("../shim/cri")
        .input("cri/cri.proto")
        .input("../shim/cri/pod.proto")
        .run()
        .expect("the messages are valid");
}
