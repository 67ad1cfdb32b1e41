use std::sync::{Arc, Mutex};

use bulkhead_fuzz::{Unstructured, arbitrary};

use super::super::device::QUEUE_FEATURES;
use super::super::test_driver::{BUFFERS, Driver, HIGH_RAM, RAM_SIZE, memory, reg};
use super::*;

#[derive(Default)]
struct Life {
    activations: u32,
    resets: u32,
    running: bool,
    layouts: Vec<Layout>,
    signal: Option<Signal>,
    fail: bool,
}

struct Probe {
    life: Arc<Mutex<Life>>,
    config: [u8; 6],
}

impl VirtioDevice for Probe {
    fn id(&self) -> u32 {
        42
    }
    fn name(&self) -> &'static str {
        "probe"
    }
    fn features(&self) -> u64 {
        QUEUE_FEATURES | 1 << 3
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 8]
    }
    fn config(&self) -> &[u8] {
        &self.config
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut life = self.life.lock().unwrap();
        assert!(!life.running, "activated twice without a reset");
        if life.fail {
            let error = std::io::Error::other("no");
            return Err(ActivateError::Host(Box::new(error)));
        }
        life.activations += 1;
        life.running = true;
        life.layouts = activation
            .queues
            .iter()
            .flatten()
            .map(VirtQueue::layout)
            .collect();
        life.signal = Some(activation.signal);
        Ok(())
    }
    fn reset(&mut self) {
        let mut life = self.life.lock().unwrap();
        life.resets += 1;
        life.running = false;
        life.signal = None;
    }
}

fn probe() -> (Driver, Arc<Mutex<Life>>) {
    let life = Arc::<Mutex<Life>>::default();
    let config = [1, 2, 3, 4, 5, 6];
    let probe = Probe {
        life: life.clone(),
        config,
    };
    (Driver::new(probe, memory()), life)
}

#[test]
fn the_fixed_registers_say_what_the_specification_wants() {
    let (mut driver, _) = probe();
    assert_eq!(driver.read(0x00), 0x7472_6976);
    assert_eq!(driver.read(0x04), 2);
    assert_eq!(driver.read(0x08), 42);
    assert_eq!(driver.offered(), QUEUE_FEATURES | 8);
    // No shared memory regions, no queue reset.
    for register in [0xb0, 0xb4, 0xb8, 0xbc] {
        assert_eq!(driver.read(register), u32::MAX);
    }
    assert_eq!(driver.read(0xc0), 0);
    driver.write(reg::QUEUE_SEL, 2);
    assert_eq!(driver.read(reg::QUEUE_NUM_MAX), 0);
}

#[test]
fn a_handshake_activates_once_with_the_driver_s_queues() {
    let (mut driver, life) = probe();
    driver.start();
    let life = life.lock().unwrap();
    assert_eq!((life.activations, life.layouts.len()), (1, 2));
    assert_eq!(life.layouts[1].table, driver.queues[1].table);
    assert_eq!(driver.notices.faults.snapshot().len(), 0);
}

#[test]
fn status_steps_that_jump_or_go_back_are_refused() {
    let (mut driver, life) = probe();
    for jump in [2, 3, 4, 8, 0xf, 0xb, 0x100, u32::MAX] {
        driver.write(reg::STATUS, jump);
        assert_eq!(driver.read(reg::STATUS), 0, "{jump:#x}");
    }
    driver.negotiate(QUEUE_FEATURES);
    for back in [1, 3, 9, 0xa, 0x1b] {
        driver.write(reg::STATUS, back);
        assert_eq!(driver.read(reg::STATUS), 0xb, "{back:#x}");
    }
    assert_eq!(life.lock().unwrap().activations, 0);
    assert!(driver.notices.count("probe.status") > 0);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let (mut driver, _) = probe();
    assert_eq!(driver.negotiate(QUEUE_FEATURES | 1 << 5), 3);
    assert_eq!(driver.negotiate(QUEUE_FEATURES | 1 << 63), 3);
    // VERSION_1 is a must for a version 2 transport.
    assert_eq!(driver.negotiate(1 << 3), 3);
    assert_eq!(driver.negotiate(1 << 32), 0xb);
    driver.write(reg::STATUS, 0);
    driver.write(reg::STATUS, 1);
    driver.write(reg::STATUS, 3);
    driver.write(reg::DRIVER_FEATURES_SEL, 1);
    driver.write(reg::DRIVER_FEATURES, 1);
    driver.write(reg::DRIVER_FEATURES_SEL, 2);
    driver.write(reg::DRIVER_FEATURES, 1);
    driver.write(reg::STATUS, 0xb);
    assert_eq!(driver.read(reg::STATUS), 3, "a bit past the 64th");
}

#[test]
fn features_freeze_at_features_ok() {
    let (mut driver, life) = probe();
    driver.write(reg::DRIVER_FEATURES, 8);
    driver.start_with(QUEUE_FEATURES);
    driver.write(reg::DRIVER_FEATURES_SEL, 0);
    driver.write(reg::DRIVER_FEATURES, u32::MAX);
    assert_eq!(driver.transport.accepted, QUEUE_FEATURES);
    assert!(life.lock().unwrap().running);
    assert_eq!(driver.notices.count("probe.frozen"), 2);
}

/// CVE-2026-5747's class: a queue that moves under a running device.
#[test]
fn queue_registers_freeze_at_driver_ok() {
    let (mut driver, _) = probe();
    driver.start();
    let before = driver.transport.queues[0].layout;
    driver.write(reg::QUEUE_SEL, 0);
    for register in [
        reg::QUEUE_NUM,
        reg::QUEUE_READY,
        reg::QUEUE_DESC,
        reg::QUEUE_DESC + 4,
        reg::QUEUE_AVAIL,
        reg::QUEUE_AVAIL + 4,
        reg::QUEUE_USED,
        reg::QUEUE_USED + 4,
    ] {
        driver.write(register, 0);
        driver.write(register, 0xffff_fff0);
    }
    assert_eq!(driver.transport.queues[0].layout, before);
    assert_eq!(driver.read(reg::QUEUE_READY), 1);
    assert_eq!(driver.notices.count("probe.frozen"), 16);
}

#[test]
fn queue_registers_are_closed_before_features_ok_and_while_ready() {
    let (mut driver, _) = probe();
    assert!(!driver.place(0));
    driver.negotiate(QUEUE_FEATURES);
    assert!(driver.place(0));
    driver.write(reg::QUEUE_NUM, 2);
    assert_eq!(driver.transport.queues[0].layout.size, 16);
    driver.write(reg::QUEUE_READY, 0);
    driver.write(reg::QUEUE_NUM, 2);
    assert_eq!(driver.transport.queues[0].layout.size, 2);
}

#[test]
fn queues_with_a_bad_size_or_address_do_not_become_ready() {
    let (mut driver, _) = probe();
    driver.negotiate(QUEUE_FEATURES);
    driver.write(reg::QUEUE_SEL, 0);
    let good = Layout {
        size: 16,
        table: 0x1000,
        available: 0x2000,
        used: 0x3000,
    };
    let mut try_layout = |size: u32, table: u64, available: u64, used: u64| {
        driver.write(reg::QUEUE_READY, 0);
        driver.write(reg::QUEUE_NUM, size);
        for (register, address) in [
            (reg::QUEUE_DESC, table),
            (reg::QUEUE_AVAIL, available),
            (reg::QUEUE_USED, used),
        ] {
            driver.write(register, address as u32);
            driver.write(register + 4, (address >> 32) as u32);
        }
        driver.write(reg::QUEUE_READY, 1);
        driver.read(reg::QUEUE_READY) == 1
    };
    assert!(try_layout(16, good.table, good.available, good.used));
    for size in [0, 3, 15, 32, 0x10010, u32::MAX] {
        assert!(
            !try_layout(size, good.table, good.available, good.used),
            "size {size}"
        );
    }
    assert!(!try_layout(16, good.table + 8, good.available, good.used));
    assert!(!try_layout(16, good.table, good.available + 1, good.used));
    assert!(!try_layout(16, good.table, good.available, good.used + 2));
    // Past RAM, into the hole, at the very end, wrapping, and zero.
    for bad in [
        RAM_SIZE - 16,
        RAM_SIZE,
        HIGH_RAM - 16,
        HIGH_RAM + RAM_SIZE,
        u64::MAX - 15,
        0,
    ] {
        assert!(!try_layout(16, bad, good.available, good.used), "{bad:#x}");
        assert!(!try_layout(16, good.table, bad, good.used), "{bad:#x}");
        assert!(
            !try_layout(16, good.table, good.available, bad & !3),
            "{bad:#x}"
        );
    }
    assert!(try_layout(16, HIGH_RAM, good.available, good.used));
    assert!(try_layout(16, RAM_SIZE - 256, good.available, good.used));
}

#[test]
fn a_reset_restores_the_initial_state_from_any_state() {
    let (mut driver, life) = probe();
    driver.start();
    life.lock().unwrap().signal.as_ref().unwrap().used_buffer();
    driver.notify(0);
    driver.write(reg::STATUS, 0);
    assert!(!life.lock().unwrap().running);
    assert_eq!(driver.read(reg::STATUS), 0);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 0);
    assert_eq!(driver.read(reg::QUEUE_READY), 0);
    assert!(
        driver.transport.queues[0].kick.read().is_err(),
        "an old kick"
    );
    // Linux takes its queues away after the reset, which is no fault.
    driver.write(reg::QUEUE_READY, 0);
    assert!(driver.notices.faults.snapshot().is_empty());
    driver.start();
    assert_eq!(life.lock().unwrap().activations, 2);
    driver.write(reg::STATUS, 0x8f);
    driver.write(reg::STATUS, 0xf);
    assert_eq!(
        driver.read(reg::STATUS),
        0x8f,
        "FAILED is left by reset only"
    );
    driver.start();
    assert_eq!(life.lock().unwrap().activations, 3);
}

#[test]
fn a_configuration_change_stays_until_it_is_acknowledged_and_used_buffers_always() {
    let (mut driver, life) = probe();
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 0);
    driver.start();
    let signal = life.lock().unwrap().signal.clone().unwrap();
    signal.used_buffer();
    assert_eq!(
        (driver.interrupts(), driver.read(reg::INTERRUPT_STATUS)),
        (1, 1)
    );
    signal.fault(Fault::ChainLoop);
    signal.fault(Fault::ChainLoop);
    assert_eq!(
        (driver.interrupts(), driver.read(reg::INTERRUPT_STATUS)),
        (1, 3)
    );
    assert_eq!(driver.read(reg::STATUS), 0x4f);
    driver.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 3);
    driver.write(reg::INTERRUPT_ACK, u32::MAX);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 1);
    assert_eq!(driver.notices.count("probe.chain_loop"), 2);
    // A driver that adds FAILED to what it has read.
    driver.write(reg::STATUS, 0xcf);
    assert_eq!(driver.read(reg::STATUS), 0xcf);
}

#[test]
fn a_device_that_cannot_start_asks_for_a_reset() {
    let (mut driver, life) = probe();
    life.lock().unwrap().fail = true;
    driver.negotiate(QUEUE_FEATURES);
    driver.write(reg::STATUS, 0xf);
    assert!(driver.needs_reset());
    assert_eq!(*driver.notices.failures.lock().unwrap(), ["no"]);
    life.lock().unwrap().fail = false;
    driver.start();
    assert!(!driver.needs_reset());
}

#[test]
fn odd_widths_and_offsets_read_bytes_and_write_nothing() {
    let (mut driver, _) = probe();
    for width in [1, 2, 8] {
        let mut data = vec![0; width];
        driver.transport.read(0, &mut data);
        assert_eq!(data, b"virt\x02\0\0\0"[..width]);
        driver.transport.write(reg::STATUS, &vec![1; width]);
    }
    driver.transport.write(reg::STATUS + 1, &[1, 0, 0, 0]);
    assert_eq!(driver.read(reg::STATUS), 0);
    assert_eq!(driver.notices.count("probe.register"), 4);
}

#[test]
fn the_configuration_space_is_bounded_at_any_width() {
    let (mut driver, _) = probe();
    let mut data = [0; 8];
    driver.transport.read(0x104, &mut data);
    assert_eq!(data, [5, 6, 0, 0, 0, 0, 0, 0]);
    driver.transport.read(0x106, &mut data[..1]);
    driver.transport.read(0xff8, &mut data);
    driver.transport.write(0x105, &[9]);
    driver.transport.write(0x105, &[7, 7]);
    driver.transport.write(0xffc, &[7; 4]);
    let mut data = [0; 2];
    driver.transport.read(0x104, &mut data);
    assert_eq!(data, [5, 6]);
    assert_eq!(driver.notices.count("probe.register"), 3);
}

#[test]
fn kicks_reach_only_running_queues() {
    let (mut driver, _) = probe();
    driver.notify(0);
    driver.start();
    driver.notify(1);
    driver.notify(2);
    driver.notify(u32::MAX);
    let events = driver.transport.queue_events().unwrap();
    assert!(events[0].read().is_err());
    assert_eq!(events[1].read().unwrap(), 1);
}

/// Any accesses, after the handshake or in the midst of it: nothing panics, and a device that runs
/// is what it was at DRIVER_OK.
fn registers(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let (mut driver, life) = probe();
    match input.arbitrary::<u8>().unwrap_or(0) % 3 {
        0 => {}
        1 => drop(driver.negotiate(QUEUE_FEATURES)),
        _ => driver.start(),
    }
    while let Ok((write, at, bytes)) = access(&mut input) {
        let transport = &driver.transport;
        let running = transport.status & DRIVER_OK != 0;
        let before = setups(transport);
        let (status, accepted) = (transport.status, transport.accepted);
        if write {
            driver.transport.write(at, &bytes);
        } else {
            driver.transport.read(at, &mut bytes.clone());
        }
        let transport = &driver.transport;
        // Either reset, or no status bit was cleared and what was frozen is the same.
        if transport.status != 0 {
            assert_eq!(transport.status & status, status);
            if running {
                assert_eq!(before, setups(transport));
            }
            if status & FEATURES_OK != 0 {
                assert_eq!(transport.accepted, accepted);
            }
        }
        let runs = transport.status & DRIVER_OK != 0;
        assert_eq!(life.lock().unwrap().running, runs);
        for queue in &transport.queues {
            assert!(!queue.ready || queue.layout.is_valid(&transport.memory, queue.max_size));
        }
        if input.is_empty() {
            break;
        }
    }
}

fn setups(transport: &MmioTransport) -> Vec<(Layout, bool)> {
    let queues = transport.queues.iter();
    queues.map(|queue| (queue.layout, queue.ready)).collect()
}

/// Mostly real registers with plausible values, so that scripts get past the handshake.
fn access(input: &mut Unstructured<'_>) -> arbitrary::Result<(bool, u64, Vec<u8>)> {
    let kind: u8 = input.arbitrary()?;
    let at = match input.arbitrary::<u8>()? {
        0xff => u64::from(input.arbitrary::<u16>()?) % 0x1000,
        register => u64::from(register % 0x40) * 4,
    };
    let word = |value: u32| value.to_le_bytes().to_vec();
    Ok(match kind % 8 {
        0 => (
            false,
            at,
            vec![0; usize::from(input.arbitrary::<u8>()? % 8) + 1],
        ),
        1 => (
            true,
            reg::STATUS,
            word(*input.choose(&[0, 1, 3, 0xb, 0xf, 0x8f])?),
        ),
        2 | 3 => (true, at, word(input.arbitrary::<u8>()?.into())),
        4 => (
            true,
            at,
            word(*input.choose(&[0x1000, 0x2000, 0x3000, BUFFERS as u32])?),
        ),
        5 | 6 => (true, at, word(input.arbitrary()?)),
        _ => {
            let width = usize::from(input.arbitrary::<u8>()? % 8) + 1;
            (true, at, input.bytes(width.min(input.len()))?.to_vec())
        }
    })
}

#[test]
fn fuzz_registers() {
    bulkhead_fuzz::run("registers", registers);
}

#[test]
fn a_driver_goes_on_with_another_device_of_the_kind() {
    let (mut driver, _) = probe();
    driver.start_with(QUEUE_FEATURES);
    let (_, life) = probe();
    let next = Probe {
        life: life.clone(),
        config: [0; 6],
    };
    let places: Vec<u64> = driver.queues.iter().map(|queue| queue.table).collect();
    let mut driver = driver.go_on(next).unwrap();
    assert_eq!(driver.read(reg::STATUS), 0xf);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), USED_BUFFER);
    {
        let life = life.lock().unwrap();
        let tables: Vec<u64> = life.layouts.iter().map(|layout| layout.table).collect();
        assert_eq!((life.activations, tables), (1, places));
    }
    driver.write(reg::QUEUE_SEL, 1);
    assert_eq!(driver.read(reg::QUEUE_READY), 1);
    // It can be reset and started anew.
    driver.start();
    assert_eq!(life.lock().unwrap().activations, 2);
}

#[test]
fn a_device_that_nobody_drives_stays_so() {
    let (driver, _) = probe();
    let (_, life) = probe();
    let next = Probe {
        life: life.clone(),
        config: [0; 6],
    };
    let mut driver = driver.go_on(next).unwrap();
    assert_eq!(life.lock().unwrap().activations, 0);
    driver.start();
}

#[test]
fn a_driver_of_something_else_is_refused() {
    let state = |change: fn(&mut TransportState)| {
        let (mut driver, _) = probe();
        driver.start_with(QUEUE_FEATURES);
        let mut state = driver.transport.at_rest().unwrap();
        change(&mut state);
        let (mut other, life) = probe();
        let error = other.transport.resume(&state).unwrap_err();
        assert_eq!(life.lock().unwrap().activations, 0, "{error}");
        error
    };
    let error = state(|state| state.device = 4);
    assert!(matches!(error, ResumeError::Device(4, 2, 42, 2)), "{error}");
    let error = state(|state| state.queues.truncate(1));
    assert!(matches!(error, ResumeError::Device(42, 1, ..)), "{error}");
    for status in [1, 3, 0xb, 0x8f, 0x4f, 0xff] {
        let (mut other, _) = probe();
        let mut state = other.transport.at_rest().unwrap();
        state.status = status;
        let error = other.transport.resume(&state).unwrap_err();
        assert!(matches!(error, ResumeError::Status(_)), "{error}");
    }
    let error = state(|state| state.accepted |= 1 << 5);
    assert!(matches!(error, ResumeError::Features(_)), "{error}");
    for change in [
        (|state| state.queues[1].0.table = HIGH_RAM + RAM_SIZE) as fn(&mut TransportState),
        |state| state.queues[1].0.used = u64::MAX,
        |state| state.queues[1].0.size = 9,
        |state| state.queues[1].0.size = 16,
    ] {
        let error = state(change);
        assert!(matches!(error, ResumeError::Layout(1)), "{error}");
    }
}

#[test]
fn a_device_that_needs_a_reset_is_not_at_rest() {
    let (mut driver, life) = probe();
    for status in [1, 3] {
        driver.write(reg::STATUS, status);
        assert_eq!(driver.transport.at_rest(), None, "status {status}");
    }
    driver.start_with(QUEUE_FEATURES);
    assert!(driver.transport.at_rest().is_some());
    let signal = life.lock().unwrap().signal.clone();
    signal.unwrap().fault(Fault::Ring);
    assert_eq!(driver.transport.at_rest(), None);
}
