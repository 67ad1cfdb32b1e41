//! Which mount events pass between the container and the agent.

use super::*;

/// Runs `test` inside the container of `spec`, beside an agent that keeps its own mount namespace.
fn in_container(spec: &Container, test: impl FnOnce(HashMap<String, Line>)) -> String {
    in_child(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("unshare");
        let proc_fd = proc_fd();
        enter(spec);
        test(mountinfo(&proc_fd));
        String::new()
    })
}

#[test]
fn propagation_is_what_the_spec_asks() {
    let image = image();
    let source = image.directory("source");
    let with = |name: &str, calls: &[u64]| {
        let mut mount = bind(&source, name, MS_REC);
        mount.propagation = calls.to_vec();
        mount
    };
    let mounts = || {
        vec![
            with("/default", &[]),
            with("/slave", &[MS_SLAVE | MS_REC]),
            with("/shared", &[MS_SHARED | MS_REC]),
            with("/private", &[MS_PRIVATE | MS_REC]),
            with("/unbindable", &[MS_UNBINDABLE]),
        ]
    };
    let run = |root_propagation: u64, expected: &[(&str, &[&str])]| {
        let mut spec = image.spec(mounts());
        spec.root_propagation = root_propagation;
        in_mount_namespace(|| {
            // The agent's volume is shared, as it has to be for events to pass at all.
            let tmpfs = filesystem::create(&new("tmpfs", "/", 0, ""), None, false).expect("tmpfs");
            let target = RootDir::open(Path::new(&source)).expect("open");
            move_mount(tmpfs.as_fd(), target.as_fd()).expect("mount");
            set_propagation(tmpfs.as_fd(), MS_SHARED, false).expect("shared");
            in_container(&spec, |mounts| {
                for (point, tags) in expected {
                    let found: Vec<&str> = mounts[*point]
                        .propagation
                        .iter()
                        .map(|tag| tag.split(':').next().expect("a name"))
                        .collect();
                    assert_eq!(
                        &found, tags,
                        "{point} with root propagation {root_propagation:#x}"
                    );
                }
            })
        });
    };
    let private: [(&str, &[&str]); 6] = [
        ("/", &[]),
        ("/default", &[]),
        ("/slave", &["master"]),
        ("/shared", &["shared", "master"]),
        ("/private", &[]),
        ("/unbindable", &["unbindable"]),
    ];
    run(0, &private);
    run(MS_PRIVATE | MS_REC, &private);
    run(
        MS_SLAVE | MS_REC,
        &[("/", &[]), ("/default", &["master"]), ("/private", &[])],
    );
    run(
        MS_SHARED | MS_REC,
        &[
            ("/", &["shared"]),
            ("/default", &["shared"]),
            ("/slave", &["master"]),
            ("/shared", &["shared"]),
            ("/private", &[]),
            ("/unbindable", &["unbindable"]),
        ],
    );
    run(MS_UNBINDABLE, &[("/", &["unbindable"]), ("/default", &[])]);
}

#[test]
fn a_shared_volume_of_a_shared_root_passes_mounts_on_and_others_do_not() {
    let image = image();
    let source = image.directory("source/below");
    let source = Path::new(&source).parent().expect("a parent").to_owned();
    for (root_propagation, reaches) in [(MS_SHARED | MS_REC, true), (0, false)] {
        let mut volume = bind(source.to_str().expect("text"), "/volume", MS_REC);
        volume.propagation = vec![MS_SHARED | MS_REC];
        let mut spec = image.spec(vec![volume]);
        spec.root_propagation = root_propagation;
        in_mount_namespace(|| {
            let tmpfs = filesystem::create(&new("tmpfs", "/", 0, ""), None, false).expect("tmpfs");
            let target = RootDir::open(&source).expect("open");
            move_mount(tmpfs.as_fd(), target.as_fd()).expect("mount");
            set_propagation(tmpfs.as_fd(), MS_SHARED, false).expect("shared");
            fs::create_dir(source.join("below")).expect("mkdir");
            let (own, agents) = (proc_fd(), source.join("below"));
            in_container(&spec, |_| {
                let inner =
                    filesystem::create(&new("tmpfs", "/", 0, ""), None, false).expect("tmpfs");
                let below = RootDir::open(Path::new("/volume/below")).expect("open");
                move_mount(inner.as_fd(), below.as_fd()).expect("mount");
            });
            let seen = mountinfo(&own).contains_key(agents.to_str().expect("text"));
            assert_eq!(seen, reaches, "root propagation {root_propagation:#x}");
            String::new()
        });
    }
}
