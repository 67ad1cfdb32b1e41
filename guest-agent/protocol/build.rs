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
    // The generated files begin with inner attributes, which include! does not take.
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let path = Path::new(&out).join(name);
        let text = fs::read_to_string(&path).expect("the generator wrote it");
        let kept: Vec<&str> = text
            .lines()
            .filter(|line| !line.starts_with("#![") && !line.starts_with("//!"))
            .collect();
        fs::write(&path, kept.join("\n")).expect("OUT_DIR is writable");
    }
}
