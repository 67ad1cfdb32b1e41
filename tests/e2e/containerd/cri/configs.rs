//! ConfigMaps and secrets.

use std::fs;

use bulkhead_tests::cri::messages::{Empty, NamespaceMode};
use bulkhead_tests::{Engine, Host, KubeletVolume};

use super::{Pod, connect, container, handlers, private_pids};
use crate::{eventually, shims_end};

#[test]
fn config_maps_and_secrets_follow_the_host() {
    let cri = connect();
    for &handler in handlers() {
        let host = Host::now();
        let mut config = KubeletVolume::new(
            "kubernetes.io~configmap",
            &[("key", b"1", 0o644), ("gone", b"1", 0o644)],
        );
        let secret = KubeletVolume::with_group(
            "kubernetes.io~secret",
            Some(1234),
            &[("token", b"secret", 0o400)],
        );
        let [at, secret_at] =
            [&config, &secret].map(|v| v.path().to_str().expect("plain").to_owned());
        let pod = Pod::start(&cri, handler, NamespaceMode::CONTAINER);
        let mounts = [(at.as_str(), "/config"), (&secret_at, "/secret")];
        let ids = [(); 2].map(|()| pod.container("sleep 1000", &mounts));
        for id in &ids {
            let seen = pod.exec(id, "cat /config/key; stat -L -c ' %a %u %g' /secret/token");
            assert_eq!(seen, (0, "1 440 0 1234".into()), "{handler}");
            assert_ne!(pod.exec(id, "echo x > /config/new").0, 0, "{handler}");
        }
        config.write(&[("key", b"2", 0o644), ("new", b"2", 0o600)]);
        let wait = "until cat /config/new; do sleep 0.01; done 2>/dev/null
            until [ ! -L /config/gone ]; do sleep 0.01; done
            cat /config/key; ls /config";
        for id in &ids {
            assert_eq!(pod.exec(id, wait), (0, "22key\nnew".into()), "{handler}");
        }
        if handler == "bulkhead" {
            // What cannot be repeated is told, and followed by what can.
            let logged = Engine::get().log().len();
            let large = vec![0; 17 << 20];
            config.write(&[("large", &large, 0o644)]);
            eventually("the shim tells of it", || {
                let log = Engine::get().log();
                log[logged..].contains("more than 16 MiB")
            });
            assert_eq!(pod.exec(&ids[0], "cat /config/key"), (0, "2".into()));
            config.write(&[("key", b"3", 0o644)]);
            let wait = "until [ $(cat /config/key) = 3 ]; do sleep 0.01; done
                until [ ! -L /config/large ] && [ ! -L /config/new ]; do sleep 0.01; done; ls /config";
            assert_eq!(pod.exec(&ids[0], wait), (0, "key".into()));
        }
        // A restarted container has the volume as it is by then.
        let _: Empty = cri.ok("StopContainer", &container(&ids[0]));
        let _: Empty = cri.ok("RemoveContainer", &container(&ids[0]));
        let again = pod.container("sleep 1000", &mounts);
        assert_eq!(
            pod.exec(&again, "ls /config").1,
            pod.exec(&ids[1], "ls /config").1,
            "{handler}"
        );
        pod.remove();
        shims_end();
        host.assert_nothing_left();
    }
}

/// The kernel says that it dropped events (IN_Q_OVERFLOW), and then the volume is looked at as a whole.
#[test]
fn what_inotify_drops_is_not_lost() {
    const LIMIT: &str = "/proc/sys/fs/inotify/max_queued_events";
    let cri = connect();
    let host = Host::now();
    let first = [("key", &b"0"[..], 0o644)];
    let mut volumes = [(); 3].map(|()| KubeletVolume::new("kubernetes.io~configmap", &first));
    let at: Vec<_> = volumes.iter().map(|v| v.path().to_owned()).collect();
    let mounts: Vec<_> = ["/a", "/b", "/c"]
        .iter()
        .zip(&at)
        .map(|(inside, at)| (at.to_str().expect("plain"), *inside))
        .collect();
    let pod = Pod::start(&cri, "bulkhead", private_pids());
    let usual = fs::read_to_string(LIMIT).expect("Linux");
    // Of an instance that is made now: the pod's.
    fs::write(LIMIT, "1").expect("root may");
    let id = pod.container("sleep 1000", &mounts);
    fs::write(LIMIT, usual).expect("root may");
    for n in 1..=20 {
        let text = n.to_string();
        for volume in &mut volumes {
            volume.write(&[("key", text.as_bytes(), 0o644)]);
        }
    }
    let last = "n=0; until [ $(cat /a/key)$(cat /b/key)$(cat /c/key) = 202020 ]; do
        n=$((n+1)); [ $n -lt 1200 ] || { cat /?/key; exit 1; }; sleep 0.1; done";
    assert_eq!(pod.exec(&id, last), (0, String::new()));
    pod.remove();
    shims_end();
    host.assert_nothing_left();
}
