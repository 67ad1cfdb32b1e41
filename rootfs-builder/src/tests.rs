//! From a manifest on disk to an image, the way `main` goes, and each way that it must fail.

use std::fs;
use std::path::PathBuf;

use tempfile::TempDir;

use crate::{Arguments, elf, newc, run};

/// A manifest, an agent and the place for an image, in a directory of their own.
struct Bench {
    directory: TempDir,
}

impl Bench {
    fn new(manifest: &str, agent: &[u8]) -> Self {
        let directory = TempDir::new().expect("a temporary directory");
        fs::write(directory.path().join("manifest.toml"), manifest).expect("writable");
        fs::write(directory.path().join("agent"), agent).expect("writable");
        Self { directory }
    }

    fn arguments(&self) -> Arguments {
        let path = |name: &str| -> PathBuf { self.directory.path().join(name) };
        Arguments {
            manifest: path("manifest.toml"),
            agent: path("agent"),
            output: path("initramfs"),
        }
    }

    fn image(&self) -> Vec<u8> {
        run(&self.arguments()).expect("a good manifest");
        fs::read(self.arguments().output).expect("the image was written")
    }

    /// The whole error as a user sees it; nothing may be left beside the inputs.
    fn failure(&self) -> String {
        let error = run(&self.arguments()).expect_err("a bad input");
        let names = fs::read_dir(self.directory.path())
            .expect("readable")
            .count();
        assert!(names <= 2, "a failure leaves no partial image");
        format!("{error:#}")
    }
}

fn failure_of(manifest: &str) -> String {
    Bench::new(manifest, &elf::tests::static_program()).failure()
}

const PRODUCT: &str = include_str!("../manifest.toml");

#[test]
fn the_product_manifest_holds_the_agent_and_nothing_else_that_is_a_file() {
    let program = elf::tests::static_program();
    let seen = newc::tests::read(&Bench::new(PRODUCT, &program).image());
    let names: Vec<&str> = seen.iter().map(|entry| entry.name.as_str()).collect();
    assert_eq!(
        names,
        ["dev", "dev/console", "init", "proc", "run", "sys", "tmp"]
    );
    let init = &seen[2];
    assert_eq!((init.mode, &init.data), (0o100_755, &program));
    let console = &seen[1];
    assert_eq!((console.mode, console.device), (0o020_600, (5, 1)));
    assert!(seen.iter().all(|entry| entry.owner_and_time == (0, 0, 0)));
}

#[test]
fn same_inputs_same_bytes_whatever_the_order_and_the_time() {
    let program = elf::tests::static_program();
    let first =
        "[[directory]]\npath = '/a'\nmode = 0o755\n[[directory]]\npath = '/b'\nmode = 0o700\n";
    let second =
        "[[directory]]\npath = '/b'\nmode = 0o700\n[[directory]]\npath = '/a'\nmode = 0o755\n";
    assert_eq!(
        Bench::new(first, &program).image(),
        Bench::new(second, &program).image()
    );
    let bench = Bench::new(PRODUCT, &program);
    assert_eq!(bench.image(), bench.image());
}

#[test]
fn missing_binary_is_named() {
    let bench = Bench::new(PRODUCT, b"");
    fs::remove_file(bench.arguments().agent).expect("it was there");
    let message = bench.failure();
    assert!(
        message.contains("/agent for /init: build it first"),
        "{message}"
    );
}

#[test]
fn dynamic_binary_is_refused_with_the_remedy() {
    let message = Bench::new(PRODUCT, &elf::tests::dynamic_program()).failure();
    assert!(
        message.contains("/agent cannot be /init in the guest"),
        "{message}"
    );
    assert!(
        message.contains("ld-linux") && message.contains("+crt-static"),
        "{message}"
    );
}

#[test]
fn script_is_refused() {
    let message = Bench::new(PRODUCT, b"#!/bin/sh\n").failure();
    assert!(message.contains("not an ELF file"), "{message}");
}

#[test]
fn paths_that_could_escape_are_refused() {
    for path in [
        "proc",
        "/a/../b",
        "/./a",
        "/a/",
        "//a",
        "/",
        "",
        "/TRAILER!!!",
    ] {
        let message = failure_of(&format!("[[directory]]\npath = '{path}'\nmode = 0o755\n"));
        assert!(message.contains("must be absolute"), "{path}: {message}");
    }
    let message = failure_of(&format!(
        "[[directory]]\npath = '/{}'\nmode = 0o755\n",
        "x".repeat(4095)
    ));
    assert!(message.contains("longer than 4095"), "{message}");
    let message = failure_of("[[directory]]\npath = \"/a\\u0000b\"\nmode = 0o755\n");
    assert!(message.contains("must be absolute"), "{message}");
}

#[test]
fn duplicate_entry_is_refused() {
    let twice = "[[directory]]\npath = '/a'\nmode = 0o755\n[[device]]\npath = '/a'\nmode = 0o600\nmajor = 1\nminor = 3\n";
    assert_eq!(failure_of(twice), "/a is listed twice in the manifest");
}

#[test]
fn missing_parent_is_refused() {
    let orphan = "[[device]]\npath = '/dev/null'\nmode = 0o666\nmajor = 1\nminor = 3\n";
    let message = failure_of(orphan);
    assert!(message.contains("/dev/null lies in /dev"), "{message}");
    let in_a_file = "[[executable]]\npath = '/init'\nsource = 'agent'\nmode = 0o755\n[[directory]]\npath = '/init/a'\nmode = 0o755\n";
    assert!(failure_of(in_a_file).contains("/init/a lies in /init"));
}

#[test]
fn wrong_modes_keys_and_sources_are_refused() {
    assert!(failure_of("[[directory]]\npath = '/a'\nmode = 0o40755\n").contains("beyond 0o7777"));
    let message = failure_of("[[directroy]]\npath = '/a'\nmode = 0o755\n");
    assert!(
        message.contains("manifest.toml is not valid") && message.contains("directroy"),
        "{message}"
    );
    let message = failure_of("[[directory]]\npath = '/a'\nmode = 0o755\nowner = 'me'\n");
    assert!(message.contains("owner"), "{message}");
    let message = failure_of("[[executable]]\npath = '/a'\nsource = 'shell'\nmode = 0o755\n");
    assert!(
        message.contains("shell") && message.contains("agent"),
        "{message}"
    );
}

#[test]
fn missing_manifest_and_unwritable_output_are_named() {
    let bench = Bench::new(PRODUCT, &elf::tests::static_program());
    let mut arguments = bench.arguments();
    arguments.output = bench.directory.path().join("no-such-directory/initramfs");
    let message = format!("{:#}", run(&arguments).expect_err("no directory"));
    assert!(
        message.contains("cannot write") && message.contains("no-such-directory"),
        "{message}"
    );
    arguments.manifest = bench.directory.path().join("absent.toml");
    let message = format!("{:#}", run(&arguments).expect_err("no manifest"));
    assert!(message.contains("cannot read the manifest"), "{message}");
}
