use std::{fs, os::unix::fs::symlink, process::Command};

use super::*;
use crate::netns::Redirect;

fn state() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().canonicalize().unwrap().join("state");
    (dir, state)
}

/// Lets go of the lock as death does, without giving anything back.
fn die(ledger: Ledger) {
    drop(ledger);
}

#[test]
fn an_id_is_taken_once() {
    let (_dir, state) = state();
    let first = Ledger::create(&state, "default", "a").unwrap();
    let error = Ledger::create(&state, "default", "a").unwrap_err();
    assert!(
        error.to_string().contains("sandbox a exists already"),
        "{error}"
    );
    let other = Ledger::create(&state, "k8s.io", "a").unwrap();
    assert!(first.teardown().is_empty());
    Ledger::create(&state, "default", "a").unwrap().teardown();
    assert!(other.teardown().is_empty());
    assert!(!state.exists(), "nothing is left behind");
}

#[test]
fn a_living_owner_is_left_alone() {
    let (_dir, state) = state();
    let ledger = Ledger::create(&state, "default", "a").unwrap();
    assert!(collect(&state, false).unwrap().is_empty());
    die(ledger);
    let collected = collect(&state, true).unwrap();
    assert_eq!(collected.len(), 1);
    assert_eq!(collected[0].owner, Some(std::process::id() as i32));
    assert!(
        state.join("default/a").exists(),
        "a dry run removes nothing"
    );
    assert_eq!(collect(&state, false).unwrap().len(), 1);
    assert!(!state.exists());
}

#[test]
fn replay_gives_back_what_exists_and_forgives_what_does_not() {
    let (_dir, state) = state();
    let mut ledger = Ledger::create(&state, "default", "a").unwrap();
    let top = ledger.directory().to_path_buf();
    let path = |name: &str| top.join(name);
    ledger
        .take(Resource::Directory { path: path("made") })
        .unwrap();
    fs::create_dir(path("made")).unwrap();
    ledger
        .take(Resource::File {
            path: path("made/socket"),
        })
        .unwrap();
    std::os::unix::net::UnixListener::bind(path("made/socket")).unwrap();
    ledger
        .take(Resource::Directory {
            path: path("never"),
        })
        .unwrap();
    ledger
        .take(Resource::Mount {
            path: path("never"),
        })
        .unwrap();
    ledger
        .take(Resource::Cgroup {
            path: "/sys/fs/cgroup/bulkhead-none/x".into(),
            shared: false,
        })
        .unwrap();
    let mut child = Command::new("sleep").arg("100").spawn().unwrap();
    let id = ProcessId::of(child.id() as i32).unwrap();
    ledger
        .take(Resource::Process {
            id,
            role: "sleeper".into(),
        })
        .unwrap();
    let recycled = ProcessId {
        start: 1,
        ..ProcessId::own()
    };
    ledger
        .take(Resource::Process {
            id: recycled,
            role: "us".into(),
        })
        .unwrap();
    assert!(ledger.claim("uid-7", "default/a").unwrap());
    die(ledger);
    let collected = collect(&state, false).unwrap();
    assert!(collected[0].left.is_empty(), "{:?}", collected[0].left);
    assert_eq!(collected[0].held.len(), 8);
    assert!(!state.exists());
    assert!(!id.exists() || child.wait().is_ok());
}

#[test]
fn a_directory_with_content_is_reported_and_kept() {
    let (_dir, state) = state();
    let mut ledger = Ledger::create(&state, "default", "a").unwrap();
    let made = ledger.directory().join("made");
    let other = ledger.directory().join("other");
    for path in [&other, &made] {
        ledger
            .take(Resource::Directory { path: path.clone() })
            .unwrap();
        fs::create_dir(path).unwrap();
    }
    fs::write(made.join("precious"), "data").unwrap();
    let left = ledger.teardown();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].resource, Resource::Directory { path: made.clone() });
    assert!(!other.exists(), "an error does not stop the rest");
    assert_eq!(fs::read(made.join("precious")).unwrap(), b"data");
    fs::remove_file(made.join("precious")).unwrap();
    let collected = collect(&state, false).unwrap();
    assert_eq!(
        collected[0].held.len(),
        1,
        "what was given back is not held any more"
    );
    assert!(!state.exists());
}

#[test]
fn a_symbolic_link_does_not_redirect_a_removal() {
    let (dir, state) = state();
    let victim = dir.path().join("victim");
    fs::create_dir_all(victim.join("empty")).unwrap();
    fs::write(victim.join("file"), "data").unwrap();
    let mut ledger = Ledger::create(&state, "default", "a").unwrap();
    let link = ledger.directory().join("link");
    ledger
        .take(Resource::Directory {
            path: link.join("empty"),
        })
        .unwrap();
    ledger
        .take(Resource::File {
            path: link.join("file"),
        })
        .unwrap();
    symlink(&victim, &link).unwrap();
    assert_eq!(ledger.teardown().len(), 2);
    assert!(victim.join("empty").exists() && victim.join("file").exists());
}

fn redirect(network: &str, index: u32, tap: &str) -> Resource {
    Resource::Redirect(Redirect {
        network: network.into(),
        inode: 4026532000,
        interface: "eth0".into(),
        index,
        tap: tap.into(),
        ingress: true,
        groups: false,
    })
}

#[test]
fn a_redirect_in_a_namespace_that_is_gone_is_no_redirect() {
    let (dir, state) = state();
    let mut ledger = Ledger::create(&state, "default", "a").unwrap();
    // No file; a file that is no namespace; another namespace than the one meant.
    let file = dir.path().canonicalize().unwrap().join("file");
    fs::write(&file, "").unwrap();
    for path in [
        "/nonexistent/x",
        file.to_str().unwrap(),
        "/proc/self/ns/net",
    ] {
        ledger.take(redirect(path, 2, "bulkhead0a1b2c")).unwrap();
    }
    die(ledger);
    let collected = collect(&state, false).unwrap();
    assert_eq!(collected[0].held.len(), 3);
    assert!(collected[0].left.is_empty(), "{:?}", collected[0].left);
}

#[test]
fn only_places_of_a_sandbox_are_recorded_and_replayed() {
    let (_dir, state) = state();
    let mut ledger = Ledger::create(&state, "default", "a").unwrap();
    let own = ledger.directory().to_path_buf();
    for resource in [
        Resource::Directory {
            path: "/etc".into(),
        },
        Resource::Directory {
            path: own.join("../b"),
        },
        Resource::Directory { path: own.clone() },
        Resource::Mount { path: "/".into() },
        Resource::Cgroup {
            path: "/sys/fs/cgroup".into(),
            shared: false,
        },
        Resource::Cgroup {
            path: "/sys/fs/cgroup/../kernel".into(),
            shared: false,
        },
        Resource::Process {
            id: ProcessId { pid: 1, start: 0 },
            role: String::new(),
        },
        Resource::Claim {
            path: own.join("x"),
            holder: String::new(),
        },
        redirect("run/netns/x", 2, "bulkhead0a1b2c"),
        redirect("/run/netns/../x", 2, "bulkhead0a1b2c"),
        redirect("/run/netns/x", 1, "bulkhead0a1b2c"),
        redirect("/run/netns/x", 2, "eth0"),
    ] {
        assert!(
            matches!(ledger.take(resource.clone()), Err(Error::Foreign(_))),
            "{resource}"
        );
        // Even written by somebody else it is not obeyed.
        let line = Line::Take(Entry {
            id: Ticket(99),
            resource,
        });
        let mut text = serde_json::to_string(&line).unwrap();
        text.push('\n');
        ledger.file.write_all(text.as_bytes()).unwrap();
    }
    die(ledger);
    let collected = collect(&state, false).unwrap();
    assert!(collected[0].held.is_empty() && collected[0].left.is_empty());
}

#[test]
fn a_cut_off_line_is_skipped() {
    let (_dir, state) = state();
    let mut ledger = Ledger::create(&state, "default", "a").unwrap();
    let made = ledger.directory().join("made");
    ledger
        .take(Resource::Directory { path: made.clone() })
        .unwrap();
    fs::create_dir(&made).unwrap();
    ledger
        .file
        .write_all(b"{\"take\":{\"id\":2,\"kind\":\"direc")
        .unwrap();
    die(ledger);
    assert!(collect(&state, false).unwrap()[0].left.is_empty());
    assert!(!state.exists());
}

#[test]
fn a_claim_is_exclusive_and_given_up_by_its_holder_only() {
    let (_dir, state) = state();
    let mut first = Ledger::create(&state, "default", "a").unwrap();
    let mut second = Ledger::create(&state, "default", "b").unwrap();
    assert!(first.claim("uid-1", "default/a").unwrap());
    assert!(!second.claim("uid-1", "default/b").unwrap());
    assert!(second.claim("uid-2", "default/b").unwrap());
    // As after a crash between the record and the act.
    let path = state.join(".claims/uid-1");
    second
        .take(Resource::Claim {
            path: path.clone(),
            holder: "default/b".into(),
        })
        .unwrap();
    assert!(second.teardown().is_empty());
    assert_eq!(fs::read_link(&path).unwrap(), Path::new("default/a"));
    assert!(first.teardown().is_empty());
    assert!(!state.exists());
}

#[test]
fn a_ledger_of_much_that_came_and_went_stays_short_and_says_the_same() {
    let (_dir, state) = state();
    let mut ledger = Ledger::create(&state, "default", "a").unwrap();
    let file = ledger.directory().join(FILE_NAME);
    let made = ledger.directory().join("made");
    let stays = Resource::Directory { path: made.clone() };
    ledger.take(stays.clone()).unwrap();
    fs::create_dir(&made).unwrap();
    let mut longest = 0;
    for number in 0..2000 {
        let path = ledger.directory().join(number.to_string());
        let ticket = ledger.take(Resource::Directory { path }).unwrap();
        ledger.undo(ticket).unwrap();
        longest = longest.max(fs::metadata(&file).unwrap().len());
        assert!(
            collect(&state, false).unwrap().is_empty(),
            "its owner lives"
        );
    }
    assert!(longest < 100_000, "{longest} bytes");
    // As a kill in the middle leaves it.
    fs::write(ledger.directory().join(SHORTER), "{\"take").unwrap();
    die(ledger);
    let collected = collect(&state, false).unwrap();
    assert_eq!(collected[0].held, [stays]);
    assert!(collected[0].left.is_empty());
    assert!(!state.exists());
}
