//! Whole images: where they are, what they must be, who keeps and removes them.

use super::*;

#[test]
fn layers_lie_over_each_other() {
    let world = World::new();
    let lower = layer(&[
        (DIRECTORY, "./", "", 0o755),
        (DIRECTORY, "etc/", "", 0o750),
        (FILE, "etc/kept", "kept", 0o640),
        (FILE, "etc/gone", "gone", 0o644),
        (FILE, "etc/changed", "old", 0o644),
        (DIRECTORY, "opaque", "", 0o755),
        (FILE, "opaque/lower", "lower", 0o644),
        (DIRECTORY, "tree/deep", "", 0o755),
        (FILE, "tree/deep/file", "x", 0o644),
        (FILE, "becomes-a-directory", "x", 0o644),
        (LINK, "bin", "usr/bin", 0o777),
        (FILE, "usr/bin/tool", "tool", 0o4755),
    ]);
    let upper = layer(&[
        (DIRECTORY, "etc/", "", 0o750),
        (FILE, "etc/.wh.gone", "", 0),
        (FILE, "etc/changed", "new", 0o600),
        (FILE, "opaque/upper", "upper", 0o644),
        (FILE, "opaque/.wh..wh..opq", "", 0),
        (FILE, ".wh.tree", "", 0),
        (FILE, ".wh.never-was", "", 0),
        (DIRECTORY, "becomes-a-directory", "", 0o700),
        (FILE, "becomes-a-directory/in", "in", 0o644),
        (FILE, "bin/by-the-link", "linked", 0o755),
        (HARD, "etc/hard", "etc/kept", 0),
    ]);
    Parts::plain(&[gzip(&lower), zstd(&upper)]).into_directory(&world.path("layout"));
    let image = world.image("layout").unwrap();
    let root = &image.root;
    let there = |name: &str| root.join(name).symlink_metadata().is_ok();
    assert_eq!(text(root.join("etc/kept")), "kept");
    assert_eq!(text(root.join("etc/changed")), "new");
    assert!(!there("etc/gone") && !there("etc/.wh.gone") && !there("tree"));
    assert!(!there("opaque/lower") && there("opaque/upper") && !there("opaque/.wh..wh..opq"));
    assert_eq!(text(root.join("becomes-a-directory/in")), "in");
    assert_eq!(text(root.join("usr/bin/by-the-link")), "linked");
    assert_eq!(
        fs::read_link(root.join("bin")).unwrap(),
        Path::new("usr/bin")
    );
    let data = |name: &str| root.join(name).metadata().unwrap();
    assert_eq!(data("etc/hard").ino(), data("etc/kept").ino());
    assert_eq!(data("etc").permissions().mode() & 0o7777, 0o750);
    assert_eq!(data("usr/bin/tool").permissions().mode() & 0o7777, 0o4755);
    // Also of directories, whose entries came later.
    assert_eq!(
        (data("etc").mtime(), data("etc/kept").mtime()),
        (1_000_000_000, 1_000_000_000)
    );
    assert_eq!(world.kept().len(), 2, "image and lock: {:?}", world.kept());
}

#[test]
fn every_form_is_the_same_image() {
    let world = World::new();
    let only = layer(&[(FILE, "hello", "hello", 0o644)]);
    let parts = || Parts::plain(&[gzip(&only)]);
    parts().into_directory(&world.path("layout"));
    fs::write(world.path("archive.tar"), parts().archive()).unwrap();
    fs::write(world.path("archive.tar.gz"), gzip(&parts().archive())).unwrap();
    fs::write(world.path("archive.tar.zst"), zstd(&parts().archive())).unwrap();
    let key = world.image("layout").unwrap().key;
    for name in ["archive.tar", "archive.tar.gz", "archive.tar.zst"] {
        assert_eq!(world.image(name).unwrap().key, key, "{name}");
    }
    // `docker save`: no digests but those of the contents, and a layer that is a link to another.
    let sum_of_it = &format!("sha256:{}", sum(&only));
    let config = json!({"architecture": "amd64", "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [sum_of_it, sum_of_it]}});
    let manifest = json!([{"Config": "c.json", "RepoTags": ["some/name:tag"], "Layers": ["a/layer.tar", "b/layer.tar"]}]);
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in [
        ("c.json", serde_json::to_vec(&config).unwrap()),
        ("manifest.json", serde_json::to_vec(&manifest).unwrap()),
        ("a/layer.tar", only.clone()),
    ] {
        let mut header = Header::new_gnu();
        header.set_size(bytes.len() as u64);
        archive
            .append_data(&mut header, name, bytes.as_slice())
            .unwrap();
    }
    let mut header = Header::new_gnu();
    header.set_entry_type(LINK);
    header.set_size(0);
    archive
        .append_link(&mut header, "b/layer.tar", "../a/layer.tar")
        .unwrap();
    fs::write(world.path("saved.tar"), archive.into_inner().unwrap()).unwrap();
    for name in ["saved.tar", "saved.tar:some/name:tag", "saved.tar:tag"] {
        let image = world.image(name).unwrap();
        assert_eq!(text(image.root.join("hello")), "hello", "{name}");
    }
    // A directory is a layout or none: its manifest would name files of this host.
    fs::create_dir(world.path("directory")).unwrap();
    fs::write(world.path("directory/manifest.json"), b"[]").unwrap();
    assert!(matches!(world.image("directory"), Err(Error::NoImage(_))));
    let error = world.image("saved.tar:other").unwrap_err().to_string();
    assert!(error.contains("some/name:tag"), "{error}");
    // Once unpacked each.
    assert_eq!(world.store.list().unwrap().len(), 2);
}

#[test]
fn the_wrong_contents_are_refused_and_nothing_is_left() {
    let only = layer(&[(FILE, "hello", "hello", 0o644)]);
    let other = layer(&[(FILE, "hello", "evil!", 0o644)]);
    let refused = |parts: Parts, why: &str| {
        let world = World::new();
        parts.into_directory(&world.path("layout"));
        let error = world.image("layout").unwrap_err();
        let told = format!("{error}: {:?}", std::error::Error::source(&error));
        assert!(told.contains(why), "{why}: {told}");
        assert_eq!(world.kept(), Vec::<String>::new(), "{told}");
    };
    // A layer, a configuration, a manifest that is another.
    let mut parts = Parts::plain(std::slice::from_ref(&only));
    *parts.part(&format!("blobs/sha256/{}", sum(&only))) = other.clone();
    refused(parts, "layer 1 of the image is damaged");
    for nth in [2, 3] {
        let mut parts = Parts::plain(std::slice::from_ref(&only));
        parts.0[nth].1.push(b' ');
        refused(parts, "is damaged");
    }
    let mut parts = Parts::plain(std::slice::from_ref(&only));
    parts.0.remove(1);
    refused(parts, "lacks its layer");
    let mut parts = Parts::plain(std::slice::from_ref(&only));
    parts.0.pop();
    refused(parts, "is no image");
    let mut parts = Parts::plain(std::slice::from_ref(&only));
    parts.part("index.json").truncate(30);
    refused(parts, "cannot be read");
    let platform = Parts::of(std::slice::from_ref(&only), |_, config| {
        config["architecture"] = "arm64".into()
    });
    refused(platform, "this machine is linux/amd64");
    let too_few = Parts::of(std::slice::from_ref(&only), |_, config| {
        config["rootfs"]["diff_ids"] = json!([]);
    });
    refused(too_few, "contents of 0 layers");
    let kind = Parts::of(std::slice::from_ref(&only), |manifest, _| {
        manifest["layers"][0]["mediaType"] = "application/wasm".into();
    });
    refused(kind, "application/wasm");
    let digest = Parts::of(std::slice::from_ref(&only), |manifest, _| {
        manifest["layers"][0]["digest"] = format!("sha256:{}", "../".repeat(21) + "x").into();
    });
    refused(digest, "cannot be read");
    for bytes in [
        &only[..700],
        &b"no archive at all, but some words of text"[..],
    ] {
        refused(Parts::plain(&[bytes.to_vec()]), "");
    }
    let mut cut = gzip(&only);
    cut.truncate(cut.len() / 2);
    let mut parts = Parts::plain(&[gzip(&only)]);
    *parts.part(&format!("blobs/sha256/{}", sum(&gzip(&only)))) = cut;
    refused(parts, "layer 1");
    let bzip2 = Parts::of(&[only], |_, _| {});
    let mut bzip2 = bzip2;
    bzip2.0[1].1 = b"BZh91AY&SY".to_vec();
    refused(bzip2, "bzip2");
}

#[test]
fn of_several_images_one_is_named() {
    let world = World::new();
    let mut both = Parts(Vec::new());
    let mut entries = Vec::new();
    for name in ["one", "two"] {
        let only = layer(&[(FILE, "name", name, 0o644)]);
        let mut parts = Parts::plain(&[only]);
        let index: Value = serde_json::from_slice(parts.part("index.json")).unwrap();
        let mut entry = index["manifests"][0].clone();
        entry["annotations"] = json!({"org.opencontainers.image.ref.name": name});
        entries.push(entry);
        parts.0.pop();
        both.0.extend(parts.0);
    }
    let index = json!({"schemaVersion": 2, "manifests": entries});
    both.0
        .push(("index.json".into(), serde_json::to_vec(&index).unwrap()));
    both.into_directory(&world.path("layout"));
    let error = world.image("layout").unwrap_err().to_string();
    assert!(error.contains("one, two"), "{error}");
    let two = world.image("layout:two").unwrap();
    assert_eq!(text(two.root.join("name")), "two");
    let error = world.image("layout:three").unwrap_err().to_string();
    assert!(error.contains("one, two"), "{error}");
}

#[test]
fn an_index_in_an_index_leads_to_this_machines_image() {
    let world = World::new();
    let mut parts = Parts::plain(&[layer(&[(FILE, "hello", "hello", 0o644)])]);
    let index: Value = serde_json::from_slice(parts.part("index.json")).unwrap();
    let mut ours = index["manifests"][0].clone();
    ours["platform"] = json!({"os": "linux", "architecture": "amd64"});
    let mut other = ours.clone();
    other["platform"] = json!({"os": "linux", "architecture": "arm64"});
    let inner =
        serde_json::to_vec(&json!({"schemaVersion": 2, "manifests": [other, ours]})).unwrap();
    let entry = json!({"mediaType": "application/vnd.oci.image.index.v1+json", "size": inner.len(),
        "digest": parts.blob(inner)});
    let index = json!({"schemaVersion": 2, "manifests": [entry]});
    *parts.part("index.json") = serde_json::to_vec(&index).unwrap();
    parts.into_directory(&world.path("layout"));
    assert_eq!(
        text(world.image("layout").unwrap().root.join("hello")),
        "hello"
    );
}

#[test]
fn images_in_use_stay_and_the_halves_of_the_dead_go() {
    let world = World::new();
    let only = layer(&[(FILE, "hello", "hello", 0o644)]);
    fs::write(world.path("a.tar"), Parts::plain(&[only]).archive()).unwrap();
    let image = world.image("a.tar").unwrap();
    assert!(world.store.list().unwrap()[0].in_use);
    assert!(matches!(
        world.store.remove(&image.key),
        Err(Error::InUse(_))
    ));
    let scratch = world.store.scratch("c", &image).unwrap();
    assert!(world.store.scratch("c", &image).is_err(), "it runs");
    let options = scratch.overlay(&image).join(",");
    assert!(
        options.starts_with("lowerdir=") && options.contains("upperdir="),
        "{options}"
    );
    assert!(world.store.sweep(false).unwrap().is_empty());
    let key = image.key.clone();
    drop((scratch, image));
    assert_eq!(
        fs::read_dir(world.path("data/containers")).unwrap().count(),
        0
    );
    // What a kill -9 leaves: what was written, half of an image, a lock.
    fs::create_dir_all(world.path("data/containers/c/upper/d")).unwrap();
    let half = world.path(&format!("data/images/{key}.tmp-1"));
    fs::create_dir_all(half.join("root")).unwrap();
    let lone = "0".repeat(64);
    File::create(world.path(&format!("data/images/{lone}.lock"))).unwrap();
    let dry = world.store.sweep(true).unwrap();
    assert_eq!(dry.len(), 3, "{dry:?}");
    assert!(half.exists());
    let swept = world.store.sweep(false).unwrap();
    assert_eq!(swept.len(), 3, "{swept:?}");
    assert!(swept.iter().all(|one| one.left.is_none()), "{swept:?}");
    assert!(world.store.sweep(false).unwrap().is_empty());
    assert_eq!(world.store.remove(&key[..8]).unwrap(), key);
    assert!(world.store.list().unwrap().is_empty());
    assert_eq!(world.kept(), Vec::<String>::new());
    assert!(matches!(
        world.store.remove("nobody"),
        Err(Error::NotKept(_))
    ));
}

#[test]
fn users_are_those_of_the_image() {
    let world = World::new();
    let only = layer(&[
        (
            FILE,
            "etc/passwd",
            "root:x:0:0::/root:/bin/sh\n# a word\nwww:x:33:34::/var/www:\nbroken\n",
            0o644,
        ),
        (
            FILE,
            "etc/group",
            "root:x:0:\nwww:x:34:\nweb:x:40:root,www\n",
            0o644,
        ),
    ]);
    Parts::plain(&[only]).into_directory(&world.path("layout"));
    let image = world.image("layout").unwrap();
    let user = |word: &str| {
        let user = image.user(word)?;
        Ok::<_, Error>((user.uid, user.gid, user.groups, user.home))
    };
    assert_eq!(user("").unwrap(), (0, 0, vec![40], "/root".into()));
    assert_eq!(user("www").unwrap(), (33, 34, vec![40], "/var/www".into()));
    assert_eq!(user("33").unwrap(), (33, 34, vec![40], "/var/www".into()));
    assert_eq!(
        user("www:web").unwrap(),
        (33, 40, vec![], "/var/www".into())
    );
    assert_eq!(user("1000").unwrap(), (1000, 0, vec![], "/".into()));
    assert_eq!(user("1000:2000").unwrap(), (1000, 2000, vec![], "/".into()));
    assert_eq!(user("www:").unwrap(), (33, 34, vec![40], "/var/www".into()));
    // The last number is "no change" to the kernel.
    for word in [
        "nobody",
        "www:nobody",
        "-1",
        "4294967295",
        "1:4294967295",
        "4294967296",
    ] {
        assert!(user(word).is_err(), "{word}");
    }
    // A list that is a link to this host's is none.
    let world = World::new();
    let secret = world.path("secret");
    fs::write(&secret, "www:x:7:7::/:\n").unwrap();
    let link = layer(&[(LINK, "etc/passwd", secret.to_str().unwrap(), 0o777)]);
    Parts::plain(&[link]).into_directory(&world.path("layout"));
    assert!(world.image("layout").unwrap().user("www").is_err());
}

#[test]
fn words_are_images_or_containers() {
    let dir = tempfile::tempdir().unwrap();
    let archive = dir.path().join("a.tar");
    fs::write(&archive, "").unwrap();
    let archive = archive.to_str().unwrap();
    let odd = dir.path().join("with:colon");
    fs::write(&odd, "").unwrap();
    symlink(archive, dir.path().join("link.tar")).unwrap();
    for word in ["./x", "podman:alpine", archive] {
        assert!(Reference::is_one(word), "{word}");
    }
    assert!(!Reference::is_one("a-container.1"));
    let file = |path: &str, name: Option<&str>| Reference::File(path.into(), name.map(Into::into));
    for (word, means) in [
        (archive.to_owned(), file(archive, None)),
        (format!("docker-archive:{archive}"), file(archive, None)),
        (
            format!("oci-archive:{archive}:a/b:c"),
            file(archive, Some("a/b:c")),
        ),
        (format!("{archive}:latest"), file(archive, Some("latest"))),
        (
            odd.to_str().unwrap().into(),
            file(odd.to_str().unwrap(), None),
        ),
    ] {
        assert_eq!(Reference::parse(&word).unwrap(), means, "{word}");
    }
    for word in [
        "",
        "oci:",
        "podman:",
        "docker:--help",
        "podman:-x",
        "quay.io/some/image:1",
        "localhost/image",
        "docker://image",
    ] {
        assert!(Reference::parse(word).is_err(), "{word}");
    }
}

#[test]
fn who_waits_for_an_image_does_not_wait_for_its_containers() {
    let world = World::new();
    let files: Vec<(String, String)> = (0..500)
        .map(|n| (format!("f{n}"), "x".repeat(999)))
        .collect();
    let lines: Vec<Line<'_>> = files
        .iter()
        .map(|(name, text)| (FILE, name.as_str(), text.as_str(), 0o644))
        .collect();
    fs::write(
        world.path("a.tar"),
        Parts::plain(&[layer(&lines)]).archive(),
    )
    .unwrap();
    // Each keeps it until the last has it.
    let barrier = std::sync::Barrier::new(4);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let image = world.image("a.tar").unwrap();
                barrier.wait();
                drop(image);
            });
        }
    });
    assert_eq!(world.kept().len(), 2);
}

/// Any bytes are an archive with an image, or an error.
#[test]
fn fuzz_image_archive() {
    bulkhead_fuzz::run("image_archive", |bytes| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("archive");
        fs::write(&path, &bytes[..bytes.len().min(1 << 20)]).unwrap();
        let store = Store::at(&dir.path().join("data"));
        if store.image(path.to_str().unwrap(), &|_| {}).is_err() {
            let left = fs::read_dir(dir.path().join("data/images")).unwrap();
            assert_eq!(left.count(), 0);
        }
    });
}
