//! The machine's size follows its containers' limits.

use std::sync::{Arc, atomic::Ordering};

use serde_json::json;
use ttrpc::Code;

use super::{
    Kind, Op,
    world::{LIMITS_MIB, World, container},
};
use crate::pod::{
    Size,
    testing::{Guest, last_guest},
};

/// What a pod without limits is booted with.
const BOOT_MIB: u64 = 512;

/// MiB of a machine whose containers may use so many.
fn machine(limits_mib: u64) -> u64 {
    limits_mib + limits_mib.div_ceil(64) + 64
}

async fn done(world: &mut World, op: Op) {
    let reply = world.call(op).await;
    assert_eq!(reply.code, Code::OK, "{op:?}: {}", reply.text);
}

async fn boot(world: &mut World) -> Arc<Guest> {
    done(world, Op::Create(0, None)).await;
    let guest = last_guest().expect("it has booted");
    assert_eq!((plugged(&guest), size(world).memory_mib), (0, BOOT_MIB));
    guest
}

fn plugged(guest: &Guest) -> u64 {
    guest.plugged.load(Ordering::Relaxed)
}

fn size(world: &World) -> Size {
    world.tasks.pod().expect("it runs").size()
}

async fn update(world: &World, c: u8, mib: i64) -> Result<(), String> {
    let limits = json!({"memory": {"limit": if mib < 0 { mib } else { mib << 20 }}}).to_string();
    let updated = world.tasks.update(&container(c), limits.as_bytes()).await;
    updated.map_err(|error| crate::error::line(&error))
}

#[test]
fn memory_comes_with_containers_and_limits_and_goes_with_them() {
    let [_, one, two] = LIMITS_MIB;
    World::run(Kind::Pause, async |world| {
        let guest = boot(world).await;
        let holds = |world: &World, mib: u64| {
            assert_eq!(size(world).memory_mib, mib);
            assert_eq!(plugged(&guest), (mib - BOOT_MIB).next_multiple_of(2));
        };
        done(world, Op::Create(1, None)).await;
        holds(world, BOOT_MIB.max(machine(one)));
        done(world, Op::Create(2, None)).await;
        holds(world, BOOT_MIB.max(machine(one + two)));
        for c in [1, 2] {
            done(world, Op::Start((c, None), None)).await;
        }
        update(world, 1, 1000).await.unwrap();
        holds(world, machine(1000 + two));
        // A limit that is not named stays, and one that is lifted asks for nothing.
        let time = br#"{"cpu": {"quota": 50000, "period": 100000}}"#;
        world.tasks.update("c1", time).await.unwrap();
        holds(world, machine(1000 + two));
        update(world, 1, -1).await.unwrap();
        holds(world, BOOT_MIB.max(machine(two)));
        update(world, 1, 700).await.unwrap();
        holds(world, machine(700 + two));
        world.call(Op::Kill((1, None), libc::SIGKILL)).await;
        // What has ended uses nothing, however long it stays.
        world.call(Op::Wait((1, None))).await;
        world.settle().await;
        holds(world, BOOT_MIB.max(machine(two)));
        world.call(Op::Delete((1, None))).await;
        holds(world, BOOT_MIB.max(machine(two)));
    });
}

#[test]
fn what_the_guest_does_not_plug_is_an_error_and_changes_nothing() {
    World::run(Kind::Pause, async |world| {
        let guest = boot(world).await;
        done(world, Op::Create(2, None)).await;
        guest.pluggable.store(7, Ordering::Relaxed);
        for _ in 0..200 {
            let reply = world.call(Op::Create(1, None)).await;
            assert!(
                reply.text.contains("the guest has plugged 7 of the"),
                "{}",
                reply.text
            );
            assert_eq!((plugged(&guest), size(world).memory_mib), (0, BOOT_MIB));
        }
        guest.pluggable.store(u64::MAX, Ordering::Relaxed);
        done(world, Op::Create(1, None)).await;
        done(world, Op::Start((1, None), None)).await;
        let before = (plugged(&guest), size(world));
        guest.pluggable.store(before.0 + 1, Ordering::Relaxed);
        let error = update(world, 1, 1000).await.unwrap_err();
        assert!(error.contains("MiB that its containers need"), "{error}");
        assert_eq!((plugged(&guest), size(world)), before);
        update(world, 1, 50).await.unwrap();
        let mib = machine(50 + LIMITS_MIB[2]);
        assert_eq!(
            (plugged(&guest), size(world).memory_mib),
            (mib - BOOT_MIB, mib)
        );
    });
}

/// The guest uses what it is to let go: the call succeeds, since the container's own limit holds,
/// and the machine is smaller when the guest can make it so.
#[test]
fn what_the_guest_keeps_is_its_own_until_it_lets_go() {
    World::run(Kind::Pause, async |world| {
        let guest = boot(world).await;
        done(world, Op::Create(1, None)).await;
        update(world, 1, 1000).await.unwrap();
        guest.kept.store(300, Ordering::Relaxed);
        update(world, 1, 50).await.unwrap();
        assert_eq!(size(world).memory_mib, BOOT_MIB + 300);
        // It is asked for more than it has been asked for last, although it has enough.
        update(world, 1, 500).await.unwrap();
        let requested = guest.requested.load(Ordering::Relaxed);
        assert_eq!(requested, (machine(500) - BOOT_MIB).next_multiple_of(2));
        update(world, 1, 50).await.unwrap();
        guest.kept.store(0, Ordering::Relaxed);
        tokio::time::sleep(std::time::Duration::from_secs(70)).await;
        assert_eq!((plugged(&guest), size(world).memory_mib), (0, BOOT_MIB));
    });
}

#[test]
fn processors_follow_the_sum_of_the_quotas() {
    World::run(Kind::Pause, async |world| {
        let guest = boot(world).await;
        let online = || guest.processors.load(Ordering::Relaxed);
        for c in [1, 2] {
            done(world, Op::Create(c, None)).await;
        }
        let time = async |world: &World, c, quota: i64| {
            let limits = json!({"cpu": {"quota": quota, "period": 100_000}}).to_string();
            let updated = world.tasks.update(&container(c), limits.as_bytes()).await;
            updated.map_err(|error| crate::error::line(&error))
        };
        time(world, 1, 50_000).await.unwrap();
        time(world, 2, 50_000).await.unwrap();
        assert_eq!((online(), size(world).vcpus), (0, 1));
        time(world, 2, 150_000).await.unwrap();
        assert_eq!((online(), size(world).vcpus), (2, 2));
        let error = time(world, 1, 250_000).await.unwrap_err();
        assert!(error.contains("spare_vcpus"), "{error}");
        let error = time(world, 1, 350_000).await.unwrap_err();
        assert!(error.contains("max_vcpus"), "{error}");
        assert_eq!((online(), size(world).vcpus), (2, 2));
        time(world, 2, -1).await.unwrap();
        assert_eq!((online(), size(world).vcpus), (1, 1));
    });
}
