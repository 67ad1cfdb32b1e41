//! Containers after one another and at once.

use bulkhead_tests::Bundle;

use crate::pod::{Pod, all, create};

fn saying(word: &str) -> Bundle {
    Bundle::busybox().script(&format!(
        "echo {word}; cat /proc/sys/kernel/hostname; exit 7"
    ))
}

#[test]
fn one_after_the_other_under_one_id() {
    let mut pod = Pod::start(256);
    for word in ["first", "second", "third"] {
        let bundle = saying(word);
        let output = pod.run("again", &Pod::plan(&bundle, "again"));
        assert_eq!(pod.wait("again").exit_status, 7);
        assert!(output.text().starts_with(word));
        pod.remove("again").expect("it has exited");
        assert_eq!(pod.shared_mounts(), (0, 0));
    }
    pod.end();
}

/// config.json's word reaches the host's kernel, for as long as its container is there.
#[test]
fn the_hosts_kernel_takes_a_pod_as_readily_as_its_containers_want() {
    let mut pod = Pod::start(256);
    let fs_pid = pod.fs_pid();
    let score = || {
        let path = format!("/proc/{fs_pid}/oom_score_adj");
        let text = std::fs::read_to_string(path).expect("it runs");
        text.trim().to_owned()
    };
    assert_eq!(score(), "0");
    for (id, own, all) in [
        ("low", -500, "-500"),
        ("high", 789, "789"),
        ("none", 0, "789"),
    ] {
        let bundle = saying("x").edit(|config| {
            config["process"]["oomScoreAdj"] = serde_json::json!(own);
        });
        let plan = Pod::plan(&bundle, id);
        pod.block_on(async |sandbox| sandbox.place_container(id, &plan).await)
            .expect("placed");
        assert_eq!(score(), all, "{id}");
    }
    for (id, all) in [("high", "0"), ("none", "-500"), ("low", "0")] {
        pod.remove(id).expect("it was never made");
        assert_eq!(score(), all, "without {id}");
    }
    pod.end();
}

#[test]
fn a_running_container_is_not_removed() {
    let mut pod = Pod::start(256);
    let bundle = Bundle::busybox().args(&["/bin/sleep", "1000"]);
    let plan = Pod::plan(&bundle, "runs");
    let _output = pod.run("runs", &plan);
    let error = pod.remove("runs").expect_err("it runs");
    assert!(
        error.to_string().contains("runs is still running"),
        "{error}"
    );
    let error = pod
        .block_on(async |sandbox| sandbox.place_container("runs", &plan).await)
        .expect_err("the id is taken");
    assert!(error.to_string().contains("container runs"), "{error}");
    assert_eq!(pod.shared_mounts(), (1, 1), "nothing has changed");
    pod.kill("runs");
    pod.remove("runs").expect("it has exited");
    pod.remove("runs").expect("removing again is no error");
    // One that is placed and never made goes too.
    pod.block_on(async |sandbox| sandbox.place_container("never", &plan).await)
        .expect("placed");
    pod.remove("never").expect("nothing stands in the way");
    assert_eq!(pod.shared_mounts(), (0, 0));
    pod.end();
}

#[test]
fn a_container_that_cannot_be_made_leaves_nothing_in_the_pod() {
    let mut pod = Pod::start(256);
    let volume = tempfile::TempDir::new().expect("a directory");
    let gone = volume.path().join("gone");
    std::fs::create_dir(&gone).expect("a directory");
    let bundle = Bundle::busybox()
        .bind(volume.path(), "/volume", &["rbind"])
        .bind(&gone, "/gone", &["rbind"]);
    let plan = Pod::plan(&bundle, "broken");
    std::fs::remove_dir(&gone).expect("empty");
    let error = pod
        .block_on(async |sandbox| sandbox.place_container("broken", &plan).await)
        .expect_err("a source is missing");
    assert!(error.to_string().contains("gone"), "{error}");
    assert_eq!(pod.shared_mounts(), (0, 0));
    pod.end();
}

#[test]
fn twenty_at_once() {
    const COUNT: usize = 20;
    let mut pod = Pod::start(512);
    let ids: Vec<String> = (0..COUNT).map(|number| format!("c{number}")).collect();
    let bundles: Vec<Bundle> = (0..COUNT)
        .map(|number| Bundle::busybox().script(&format!("echo {number}; exit {number}")))
        .collect();
    let plans: Vec<_> = ids
        .iter()
        .zip(&bundles)
        .map(|(id, bundle)| Pod::plan(bundle, id))
        .collect();
    let (outputs, exits) = pod.block_on(async |sandbox| {
        for (id, plan) in ids.iter().zip(&plans) {
            let placed = sandbox.place_container(id, plan).await;
            placed.unwrap_or_else(|e| panic!("{id}: {e}"));
        }
        let mut outputs = Vec::new();
        let mut stdio = Vec::new();
        for _ in &ids {
            let (stdout_port, stream) = sandbox.stream().await.expect("a stream");
            outputs.push(crate::pod::Output::read(stream));
            stdio.push(bulkhead_agent_protocol::agent::Stdio {
                stdout_port,
                ..Default::default()
            });
        }
        let sandbox = &*sandbox;
        let made = ids
            .iter()
            .zip(&plans)
            .zip(stdio)
            .map(|((id, plan), stdio)| sandbox.create_container(id, plan.container.clone(), stdio));
        for (id, made) in ids.iter().zip(all(made.collect()).await) {
            made.unwrap_or_else(|e| panic!("{id}: {e}"));
        }
        let agent = sandbox.agent();
        for started in all(ids.iter().map(|id| agent.start(id)).collect()).await {
            started.expect("it starts");
        }
        let exits = all(ids.iter().map(|id| agent.wait(id)).collect()).await;
        (outputs, exits)
    });
    for (number, (output, exit)) in outputs.into_iter().zip(exits).enumerate() {
        assert_eq!(exit.expect("an exit").exit_status as usize, number);
        assert_eq!(output.text().trim(), number.to_string());
    }
    assert_eq!(pod.shared_mounts(), (COUNT, COUNT));
    for id in &ids {
        pod.remove(id).expect("it has exited");
    }
    assert_eq!(pod.shared_mounts(), (0, 0));
    pod.end();
}

#[test]
fn two_at_once_end_each_with_its_own_status() {
    let mut pod = Pod::start(256);
    let bundles = [3, 4]
        .map(|status| Bundle::busybox().script(&format!("sleep 1; echo {status}; exit {status}")));
    let plans = [
        Pod::plan(&bundles[0], "three"),
        Pod::plan(&bundles[1], "four"),
    ];
    let exits = pod.block_on(async |sandbox| {
        for (id, plan) in ["three", "four"].into_iter().zip(&plans) {
            let placed = sandbox.place_container(id, plan).await;
            placed.expect("placed");
            drop(create(sandbox, id, plan).await);
        }
        let agent = sandbox.agent();
        agent.start("three").await.expect("it starts");
        agent.start("four").await.expect("it starts");
        all(vec![agent.wait("three"), agent.wait("four")]).await
    });
    let statuses: Vec<u32> = exits
        .into_iter()
        .map(|exit| exit.expect("an exit").exit_status)
        .collect();
    assert_eq!(statuses, [3, 4]);
    pod.end();
}
