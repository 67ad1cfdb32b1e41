//! Generates the messages and the ttrpc service from agent.proto, without protoc.
use std::{env, fs, path::Path};

fn main() {
    println!("cargo:rerun-if-changed=agent.proto");
    let out = env::var("OUT_DIR").expect("cargo sets OUT_DIR");
    ttrpc_codegen::Codegen::new()
        .out_dir(&out)
        .inputs(["agent.proto"])
        .include(".")
        .rust_protobuf()
        .customize(ttrpc_codegen::Customize {
            async_all: true,
            ..Default::default()
        })
        .run()
        .expect("agent.proto is valid");
    // The messages' generator lists its own module alone.
    let modules = "pub mod agent;\npub mod agent_ttrpc;\n";
    fs::write(Path::new(&out).join("mod.rs"), modules).expect("OUT_DIR is writable");
}
