use bulkhead_agent_protocol::agent::Resources;
use proptest::prelude::*;
use protobuf::Message as _;

use super::*;

/// What the rules mean, said directly: each bit by the last rule that speaks about it.
fn granted(rules: &[Rule], kind: u32, major: u32, minor: u32, access: u32) -> bool {
    [MKNOD, READ, WRITE]
        .into_iter()
        .filter(|bit| access & bit != 0)
        .all(|bit| {
            rules
                .iter()
                .rfind(|rule| {
                    rule.kind.is_none_or(|k| k == kind)
                        && rule.major.is_none_or(|m| m == major)
                        && rule.minor.is_none_or(|m| m == minor)
                        && rule.access & bit != 0
                })
                .is_some_and(|rule| rule.allow)
        })
}

/// An interpreter of the instructions used, after the instruction set's document and not after the compiler.
fn run(program: &[u64], kind: u32, major: u32, minor: u32, access: u32) -> u64 {
    let context = [access << 16 | kind, major, minor];
    let mut registers = [None::<u64>; 11];
    // A number that no rule has: using it as anything but the context's address gives a wrong answer.
    registers[1] = Some(u64::MAX);
    let mut pc: i64 = 0;
    for _ in 0..program.len() + 1 {
        let word = program[usize::try_from(pc).expect("never before the program")];
        let destination = usize::from((word >> 8) as u8 & 0xf);
        let source = usize::from((word >> 12) as u8 & 0xf);
        let offset = i64::from((word >> 16) as u16 as i16);
        let immediate = (word >> 32) as u32;
        let read = |register: usize| registers[register].expect("read after write");
        pc += 1;
        match word as u8 {
            0x61 => {
                assert_eq!(source, 1, "only the context is memory");
                assert_eq!(offset % 4, 0);
                let value = context[usize::try_from(offset / 4).expect("in the context")];
                registers[destination] = Some(value.into());
            }
            0xb4 => registers[destination] = Some(immediate.into()),
            0x54 => registers[destination] = Some(u64::from(read(destination) as u32 & immediate)),
            0x05 => pc += offset,
            0x16 if read(destination) as u32 == immediate => pc += offset,
            0x56 if read(destination) as u32 != immediate => pc += offset,
            0x16 | 0x56 => {}
            0x95 => return read(0),
            other => panic!("unknown instruction {other:#x}"),
        }
    }
    panic!("the program does not end");
}

fn spec_rule(allow: bool, kind: u8, major: i64, minor: i64, access: u32) -> DeviceRule {
    DeviceRule {
        allow,
        kind: kind.into(),
        major,
        minor,
        access,
        ..DeviceRule::default()
    }
}

fn verdict(spec: &[DeviceRule], kind: u32, major: u32, minor: u32, access: u32) -> bool {
    let rules = rules(spec).expect("valid rules");
    let by_program = run(&compile(&rules), kind, major, minor, access) == 1;
    assert_eq!(by_program, granted(&rules, kind, major, minor, access));
    by_program
}

#[test]
fn without_rules_only_the_default_devices_open() {
    assert!(verdict(&[], CHAR, 1, 3, READ | WRITE), "null");
    assert!(verdict(&[], CHAR, 136, 7, READ | WRITE), "a terminal");
    assert!(verdict(&[], BLOCK, 8, 0, MKNOD), "mknod alone is allowed");
    assert!(!verdict(&[], BLOCK, 8, 0, READ), "a disk");
    assert!(!verdict(&[], CHAR, 1, 1, READ), "/dev/mem");
    assert!(!verdict(&[], BLOCK, 1, 3, READ), "block 1:3 is not null");
}

#[test]
fn denying_everything_leaves_the_default_devices() {
    let deny_all = spec_rule(false, b'a', -1, -1, ALL);
    let spec = [spec_rule(true, b'b', 8, 0, ALL), deny_all];
    assert!(verdict(&spec, CHAR, 1, 3, READ | WRITE));
    assert!(
        !verdict(&spec, BLOCK, 8, 0, READ),
        "an earlier rule is gone"
    );
}

#[test]
fn denied_write_after_allowed_all_also_stops_read_and_write() {
    let spec = [
        spec_rule(true, b'a', -1, -1, ALL),
        spec_rule(false, b'b', 8, 0, WRITE),
    ];
    assert!(verdict(&spec, BLOCK, 8, 0, READ));
    assert!(!verdict(&spec, BLOCK, 8, 0, WRITE));
    assert!(!verdict(&spec, BLOCK, 8, 0, READ | WRITE));
    assert!(verdict(&spec, BLOCK, 8, 1, READ | WRITE));
}

#[test]
fn two_rules_together_grant_what_neither_grants_alone() {
    let spec = [
        spec_rule(true, b'b', 8, 0, READ),
        spec_rule(true, b'b', 8, 0, WRITE),
    ];
    assert!(verdict(&spec, BLOCK, 8, 0, READ | WRITE));
}

#[test]
fn a_default_device_can_be_denied_by_name() {
    let spec = [spec_rule(false, b'c', 1, 8, ALL)];
    assert!(!verdict(&spec, CHAR, 1, 8, READ));
    assert!(verdict(&spec, CHAR, 1, 9, READ));
}

#[test]
fn rules_that_mean_nothing_are_refused() {
    let refused = |rule| rules(&[rule]).unwrap_err();
    assert!(matches!(
        refused(spec_rule(true, b'x', 1, 1, 1)),
        RuleError::Kind { .. }
    ));
    assert!(matches!(
        refused(spec_rule(true, b'c', -2, 1, 1)),
        RuleError::Number { .. }
    ));
    assert!(matches!(
        refused(spec_rule(true, b'c', 1, 1 << 32, 1)),
        RuleError::Number { .. }
    ));
    assert!(matches!(
        refused(spec_rule(true, b'c', 1, 1, 0)),
        RuleError::Access { .. }
    ));
    assert!(matches!(
        refused(spec_rule(true, b'c', 1, 1, 8)),
        RuleError::Access { .. }
    ));
    let many = vec![spec_rule(true, b'c', 1, 1, 1); MAX_RULES + 1];
    assert_eq!(
        rules(&many),
        Err(RuleError::TooMany {
            count: MAX_RULES + 1
        })
    );
}

#[test]
fn the_longest_list_ends_within_the_instructions_that_bpf_takes() {
    let many = vec![spec_rule(false, b'c', 1, 1, ALL); MAX_RULES];
    let program = compile(&rules(&many).expect("valid"));
    assert!(program.len() < 1_000_000, "{}", program.len());
    assert_eq!(
        run(&program, BLOCK, 9, 9, ALL),
        0,
        "every jump is within its width"
    );
}

/// Few numbers, so that rules and requests meet.
fn any_rule() -> impl Strategy<Value = DeviceRule> {
    let number = || prop_oneof![Just(-1i64), 0i64..3, Just(i64::from(u32::MAX))];
    let kind = prop_oneof![Just(b'a'), Just(b'b'), Just(b'c')];
    (any::<bool>(), kind, number(), number(), 1u32..8).prop_map(
        |(allow, kind, major, minor, access)| spec_rule(allow, kind, major, minor, access),
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]
    #[test]
    fn the_program_grants_exactly_what_the_rules_grant(
        spec in proptest::collection::vec(any_rule(), 0..24),
        requests in proptest::collection::vec(
            (1u32..3, prop_oneof![0u32..3, Just(5), Just(136), Just(u32::MAX)], prop_oneof![0u32..10, Just(u32::MAX)], 1u32..8),
            32,
        ),
    ) {
        let rules = rules(&spec).expect("the strategy makes valid rules");
        let program = compile(&rules);
        for (kind, major, minor, access) in requests {
            let by_program = run(&program, kind, major, minor, access);
            prop_assert!(by_program <= 1, "the kernel knows 0 and 1 only");
            prop_assert_eq!(by_program == 1, granted(&rules, kind, major, minor, access));
        }
    }
}

/// Limits as they come over the wire: device rules become a program whose jumps stay in it.
fn limits(data: &[u8]) {
    let Ok(resources) = Resources::parse_from_bytes(data) else {
        return;
    };
    let Ok(rules) = rules(&resources.devices) else {
        return;
    };
    let program = compile(&rules);
    for (kind, access) in [(BLOCK, ALL), (CHAR, READ), (CHAR, MKNOD | WRITE)] {
        let answer = run(&program, kind, 1, 3, access);
        assert_eq!(answer == 1, granted(&rules, kind, 1, 3, access));
    }
}

#[test]
fn fuzz_agent_limits() {
    bulkhead_fuzz::run("agent_limits", limits);
}
