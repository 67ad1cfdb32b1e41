use std::fs;

use std::{collections::BTreeSet, fs::File, sync::Arc};

use super::*;
use crate::{
    oci::PodPlan,
    pod::{Order, Pod, testing},
};

fn world(template: config::Template) -> (tempfile::TempDir, Config) {
    testing::forget_guests();
    testing::keep_busy(0);
    let dir = tempfile::tempdir().unwrap();
    let mut config = Config {
        state_dir: dir.path().canonicalize().unwrap().join("state"),
        template,
        libexec_dir: Some(dir.path().into()),
        ..Config::default()
    };
    // What the container runs in which a template is tried.
    fs::write(dir.path().join("bulkhead-vmm"), "").unwrap();
    config.audit.path = Default::default();
    (dir, config)
}

const SIZE: Size = Size {
    vcpus: 1,
    memory_mib: 128,
};

async fn boot(config: &Config, change: impl FnOnce(&mut Request<'_>)) -> Result<Pod, Error> {
    let mut request = Request::plain("default", "pod", SIZE);
    change(&mut request);
    let order = Order {
        parts: &Parts,
        plan: &PodPlan::default(),
        request,
    };
    let nothing = async |_: &mut super::super::Held| Ok::<(), Error>(());
    let booted = Pod::boot(config, order, nothing, std::future::pending()).await;
    booted.map(|(pod, ())| pod)
}

fn plain(config: &Config) -> Shape {
    shape(config, SIZE, Size::default())
}

/// Builds the template of plain machines; the container in which it is tried ends with a status.
async fn made(config: &Config, status: u32) -> Result<Built, Error> {
    let tried = async {
        loop {
            for guest in testing::guests() {
                guest.exit("trial", "", status);
            }
            sleep(LOOK).await;
        }
    };
    tokio::select! {
        built = build(config, plain(config)) => built,
        () = tried => unreachable!("it looks for ever"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_template_on_which_no_container_runs_is_none() {
    let (_dir, config) = world(config::Template::Auto);
    let error = made(&config, 1).await.unwrap_err();
    assert!(matches!(error, Error::Trial(_)), "{error}");
    assert!(error.to_string().contains("status 1"), "{error}");
    assert!(listed(&config).is_empty());
    let left = fs::read_dir(config.state_dir.join(".templates")).unwrap();
    let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
    // What keeps the next pod from trying again at once.
    assert!(
        left.len() == 1 && left[0].to_str().unwrap().ends_with(".lock"),
        "{left:?}"
    );
}

fn listed(config: &Config) -> Vec<Key> {
    let listed = Store::at(&config.state_dir).list().unwrap();
    listed.into_iter().map(|one| one.key).collect()
}

#[tokio::test(start_paused = true)]
async fn a_builder_says_nothing_to_the_agent_that_is_saved_and_leaves_only_the_template() {
    let (_dir, config) = world(config::Template::Auto);
    let built = made(&config, 0).await.unwrap();
    let Built::New(key) = built else {
        panic!("{built:?}")
    };
    // The second goes on from the first one's template.
    let said = |guest: &Arc<testing::Guest>| guest.seeds.lock().unwrap().len();
    let said: Vec<_> = testing::guests().iter().map(said).collect();
    assert_eq!(said, [0, 1], "StartSandbox");
    assert_eq!(listed(&config), std::slice::from_ref(&key));
    let names = fs::read_dir(&config.state_dir).unwrap();
    let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, [".templates"], "its sandbox is given back");
    let again = made(&config, 0).await.unwrap();
    assert!(matches!(again, Built::There(there) if there == key));
    assert_eq!(testing::guests().len(), 2, "nothing is booted for it");
}

#[tokio::test(start_paused = true)]
async fn pods_go_on_from_it_each_with_a_seed_of_its_own() {
    let (_dir, config) = world(config::Template::Required);
    let error = boot(&config, |_| {}).await.unwrap_err();
    assert!(error.to_string().contains("template build"), "{error}");
    assert!(testing::last_guest().is_none() && !config.state_dir.exists());
    made(&config, 0).await.unwrap();
    for id in ["a", "b"] {
        let pod = boot(&config, |request| request.id = id).await.unwrap();
        let held = pod.held().await;
        let sandbox = &held.as_ref().unwrap().sandbox;
        assert!(
            matches!(&sandbox.origin, Origin::Template(key) if [key.clone()] == *listed(&config))
        );
        drop(held);
        pod.destroy().await;
    }
    let seeds: Vec<_> = testing::guests()
        .iter()
        .flat_map(|guest| guest.seeds.lock().unwrap().clone())
        .collect();
    let different: BTreeSet<_> = seeds.iter().collect();
    assert_eq!((seeds.len(), different.len()), (3, 3));
    // Pods of any number of interfaces have one.
    let pod = boot(&config, |request| request.net_slots = 4).await;
    pod.expect("it goes on from the same").destroy().await;
    // Another shape, and a console on which a boot is looked at.
    for change in [
        (|request: &mut Request<'_>| request.size.vcpus = 2) as fn(&mut Request<'_>),
        |request| request.serial = Some(File::open("/dev/null").unwrap().into()),
    ] {
        let error = boot(&config, change).await.unwrap_err();
        assert!(matches!(error, Error::NoTemplate(_)), "{error}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_template_that_the_vmm_refuses_goes_and_the_pod_boots_if_it_may() {
    for required in [false, true] {
        let template = match required {
            true => config::Template::Required,
            false => config::Template::Auto,
        };
        let (_dir, config) = world(template);
        made(&config, 0).await.unwrap();
        testing::refuse_next_template("KVM has no such register");
        let booted = boot(&config, |_| {}).await;
        assert!(listed(&config).is_empty());
        match booted {
            Ok(pod) => {
                assert!(!required);
                pod.destroy().await;
            }
            Err(error) => {
                assert!(
                    required && error.to_string().contains("no such register"),
                    "{error}"
                );
            }
        }
        assert!(!config.state_dir.join("default").exists());
        let basis = Parts.basis(&config, plain(&config)).unwrap();
        let reason = Store::at(&config.state_dir).hold_off(&basis.key()).unwrap();
        assert!(reason.contains("no such register"), "{reason}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_is_never_idle_is_no_template() {
    let (_dir, config) = world(config::Template::Auto);
    testing::keep_busy(IDLE_EXITS);
    let error = made(&config, 0).await.unwrap_err();
    testing::keep_busy(0);
    assert!(
        error.to_string().contains("not idle within 20 s"),
        "{error}"
    );
    assert!(listed(&config).is_empty() && !config.state_dir.join(NAMESPACE).exists());
    let basis = Parts.basis(&config, plain(&config)).unwrap();
    let (origin, _) = Origin::find(&Store::at(&config.state_dir), basis);
    let Origin::Cold { reason, missing } = origin else {
        panic!("{origin:?}")
    };
    assert!(reason.contains("not idle") && missing.is_none(), "{reason}");
}
