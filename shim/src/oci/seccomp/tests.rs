//! The compiled programs, run by an interpreter of classic BPF over `struct seccomp_data`.

use serde_json::{Value, json};

use super::*;

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const ALLOW: u32 = 0x7fff_0000;
const KILL_THREAD: u32 = 0;
const KILL_PROCESS: u32 = 0x8000_0000;
const TRAP: u32 = 0x0003_0000;
const ERRNO: u32 = 0x0005_0000;
const TRACE: u32 = 0x7ff0_0000;
const LOG: u32 = 0x7ffc_0000;

/// What the kernel's interpreter does (kernel.org, networking/filter), for the opcodes that seccomp allows.
fn run(program: &[u8], arch: u32, number: u32, args: [u64; 6]) -> u32 {
    let mut data = Vec::new();
    data.extend(number.to_ne_bytes());
    data.extend(arch.to_ne_bytes());
    data.extend(0u64.to_ne_bytes());
    args.iter().for_each(|arg| data.extend(arg.to_ne_bytes()));
    let (mut pc, mut a, mut x) = (0usize, 0u32, 0u32);
    let mut memory = [0u32; 16];
    loop {
        let raw = &program[pc * 8..pc * 8 + 8];
        let code = u16::from_ne_bytes([raw[0], raw[1]]);
        let (if_true, if_false) = (usize::from(raw[2]), usize::from(raw[3]));
        let k = u32::from_ne_bytes(raw[4..8].try_into().unwrap());
        pc += 1;
        let operand = if code & 0x08 != 0 { x } else { k };
        let mut branch = |condition: bool| pc += if condition { if_true } else { if_false };
        match code {
            0x20 => {
                let at = k as usize;
                a = u32::from_ne_bytes(data[at..at + 4].try_into().unwrap());
            }
            0x00 => a = k,
            0x01 => x = k,
            0x60 => a = memory[k as usize],
            0x61 => x = memory[k as usize],
            0x02 => memory[k as usize] = a,
            0x03 => memory[k as usize] = x,
            0x07 => x = a,
            0x87 => a = x,
            0x54 | 0x5c => a &= operand,
            0x44 | 0x4c => a |= operand,
            0x05 => pc += k as usize,
            0x15 | 0x1d => branch(a == operand),
            0x25 | 0x2d => branch(a > operand),
            0x35 | 0x3d => branch(a >= operand),
            0x45 | 0x4d => branch(a & operand != 0),
            0x06 => return k,
            0x16 => return a,
            other => panic!("opcode {other:#x} at {}", pc - 1),
        }
    }
}

fn compiled(profile: Value) -> agent::Seccomp {
    compile(&serde_json::from_value(profile).unwrap()).unwrap()
}

fn refused(profile: Value) -> String {
    let profile = serde_json::from_value(profile).unwrap();
    compile(&profile).unwrap_err().to_string()
}

fn number(name: &str) -> u32 {
    ScmpSyscall::from_name(name).unwrap().as_raw_syscall() as u32
}

fn call(filter: &agent::Seccomp, name: &str, args: &[u64]) -> u32 {
    let mut all = [0; 6];
    all[..args.len()].copy_from_slice(args);
    run(&filter.program, X86_64, number(name), all)
}

#[test]
fn every_action_in_one_program() {
    let rule = |name: &str, action: &str| json!({"names": [name], "action": action});
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            rule("read", "SCMP_ACT_KILL"),
            rule("write", "SCMP_ACT_KILL_PROCESS"),
            rule("open", "SCMP_ACT_KILL_THREAD"),
            rule("close", "SCMP_ACT_TRAP"),
            {"names": ["stat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["fstat"], "action": "SCMP_ACT_TRACE", "errnoRet": 7},
            rule("lstat", "SCMP_ACT_ERRNO"),
            rule("poll", "SCMP_ACT_LOG"),
            rule("lseek", "SCMP_ACT_ALLOW"),
        ],
    }));
    for (name, expected) in [
        ("read", KILL_THREAD),
        ("write", KILL_PROCESS),
        ("open", KILL_THREAD),
        ("close", TRAP),
        ("stat", ERRNO | 38),
        ("fstat", TRACE | 7),
        ("lstat", ERRNO | 1),
        ("poll", LOG),
        ("lseek", ALLOW),
        ("mmap", ALLOW),
    ] {
        assert_eq!(call(&filter, name, &[]), expected, "{name}");
    }
}

#[test]
fn every_operator_compares_all_64_bits() {
    const LARGE: u64 = 0x1_0000_0005;
    type Holds = fn(u64) -> bool;
    let truth: [(&str, Holds); 6] = [
        ("SCMP_CMP_NE", |v| v != LARGE),
        ("SCMP_CMP_LT", |v| v < LARGE),
        ("SCMP_CMP_LE", |v| v <= LARGE),
        ("SCMP_CMP_EQ", |v| v == LARGE),
        ("SCMP_CMP_GE", |v| v >= LARGE),
        ("SCMP_CMP_GT", |v| v > LARGE),
    ];
    for (operator, holds) in truth {
        for index in 0..6 {
            let filter = compiled(json!({
                "defaultAction": "SCMP_ACT_ERRNO",
                "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                              "args": [{"index": index, "value": LARGE, "op": operator}]}],
            }));
            for value in [0, 5, LARGE - 1, LARGE, LARGE + 1, 0x2_0000_0000, u64::MAX] {
                let mut args = [0; 6];
                args[index] = value;
                let expected = if holds(value) { ALLOW } else { ERRNO | 1 };
                assert_eq!(
                    call(&filter, "read", &args),
                    expected,
                    "{operator} {index} {value:#x}"
                );
            }
        }
    }
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "syscalls": [{"names": ["clone"], "action": "SCMP_ACT_ALLOW",
                      "args": [{"index": 0, "value": 0xff00u64, "valueTwo": 0x1200, "op": "SCMP_CMP_MASKED_EQ"}]}],
    }));
    assert_eq!(call(&filter, "clone", &[0x1234]), ALLOW);
    assert_eq!(call(&filter, "clone", &[0x1334]), ERRNO | 1);
}

#[test]
fn conditions_on_different_arguments_conjoin_and_on_the_same_one_are_alternatives() {
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 13,
        "syscalls": [
            {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [
                {"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}, {"index": 1, "value": 2, "op": "SCMP_CMP_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [
                {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]},
        ],
    }));
    assert_eq!(call(&filter, "socket", &[1, 2]), ALLOW);
    assert_eq!(call(&filter, "socket", &[1, 3]), ERRNO | 13);
    assert_eq!(call(&filter, "personality", &[0]), ALLOW);
    assert_eq!(call(&filter, "personality", &[8]), ALLOW);
    assert_eq!(call(&filter, "personality", &[9]), ERRNO | 13);
}

#[test]
fn newer_calls_do_not_exist_and_older_ones_are_forbidden() {
    let profile = |default: &str| {
        json!({"defaultAction": default, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
               "syscalls": [{"names": ["read", "openat2", "no_such_call"], "action": "SCMP_ACT_ALLOW"}]})
    };
    let filter = compiled(profile("SCMP_ACT_ERRNO"));
    let enosys = ERRNO | libc::ENOSYS as u32;
    let last = number("openat2");
    assert_eq!(run(&filter.program, X86_64, last, [0; 6]), ALLOW);
    assert_eq!(run(&filter.program, X86_64, last + 1, [0; 6]), enosys);
    assert_eq!(
        run(&filter.program, X86_64, number("write"), [0; 6]),
        ERRNO | 1
    );
    assert_eq!(run(&filter.program, I386, 3, [0; 6]), ALLOW, "read of i386");
    assert_eq!(
        run(&filter.program, I386, 4, [0; 6]),
        ERRNO | 1,
        "write of i386"
    );
    assert_eq!(run(&filter.program, I386, 5000, [0; 6]), enosys);
    assert_eq!(
        run(&filter.program, X86_64, 0x4000_0000, [0; 6]),
        ALLOW,
        "read of x32"
    );
    assert_eq!(run(&filter.program, X86_64, 0x4000_1000, [0; 6]), enosys);
    for lenient in ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG"] {
        let filter = compiled(profile(lenient));
        assert_ne!(run(&filter.program, X86_64, last + 1, [0; 6]), enosys);
    }
    let killer = compiled(profile("SCMP_ACT_KILL"));
    assert_eq!(
        run(&killer.program, X86_64, number("write"), [0; 6]),
        KILL_THREAD
    );
    assert_eq!(run(&killer.program, X86_64, last + 1, [0; 6]), enosys);
}

#[test]
fn an_architecture_that_is_not_listed_is_killed() {
    let filter = compiled(
        json!({"defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_AARCH64"],
        "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]}),
    );
    assert_eq!(run(&filter.program, X86_64, number("read"), [0; 6]), ALLOW);
    assert_eq!(run(&filter.program, I386, 3, [0; 6]), KILL_THREAD);
    assert_eq!(
        run(&filter.program, X86_64, 0x4000_0000, [0; 6]),
        KILL_THREAD,
        "x32"
    );
}

#[test]
fn a_profile_of_three_hundred_calls_keeps_each_of_them() {
    // Every call of x86_64 that has a name, every fourth forbidden: as large as the engines' default profiles.
    let names: Vec<String> = (0..400)
        .filter_map(|number| ScmpSyscall::from_raw_syscall(number).get_name().ok())
        .collect();
    assert!(names.len() > 330, "libseccomp knows {} calls", names.len());
    let allowed: Vec<&String> = names
        .iter()
        .enumerate()
        .filter(|(i, _)| i % 4 != 0)
        .map(|(_, n)| n)
        .collect();
    let filter = compiled(json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"],
        "syscalls": [
            {"names": allowed, "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38, "comment": "an unknown field"},
        ],
    }));
    assert_eq!(filter.flags, 7);
    assert!(filter.program.len() / 8 < 4096);
    for (index, name) in names.iter().enumerate() {
        if name == "clone3" {
            continue;
        }
        let got = call(&filter, name, &[]);
        if index % 4 != 0 {
            assert_eq!(got, ALLOW, "{name}");
        } else {
            assert!(got & 0xffff_0000 == ERRNO, "{name}: {got:#x}");
        }
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_by_name() {
    let notify = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]});
    assert!(refused(notify).contains("SCMP_ACT_NOTIFY"));
    let path = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/s"});
    assert!(refused(path).contains("listenerPath"));
    let flag = json!({"defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"]});
    assert!(refused(flag).contains("WAIT_KILLABLE_RECV"));
    let errno = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_KILL", "errnoRet": 1}]});
    assert!(refused(errno).contains("errnoRet"));
    let argument = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_KILL", "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]});
    assert!(refused(argument).contains("argument 6"));
}
