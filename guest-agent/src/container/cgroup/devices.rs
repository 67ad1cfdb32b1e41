//! Device rules as a BPF program.
//!
//! Meaning: each access bit that is asked for (mknod, read, write) is decided by the last rule that matches the device
//! and has that bit; the access is granted when every bit is. So "deny write" after "allow all" also stops an open for
//! reading and writing. Before the rules stands a list of devices that any container may use. A rule that denies
//! everything (`runc spec` begins with one) means "nothing but those", as every engine takes it.
//!
//! ```text
//!   for each bit of mknod, read, write:           (R1 = struct bpf_cgroup_dev_ctx)
//!     next bit unless it is asked for
//!     for each rule with the bit, last to first:
//!       next rule unless kind, major and minor match, each loaded anew
//!       allow: next bit        deny: return 0
//!     return 0
//!   return 1
//! ```
//!
//! The verifier follows every path through a program. Loading each value anew, and keeping nothing from one rule to the
//! next, makes all paths to a rule look alike, so that it follows one of them: its work is linear in the rules, where a
//! program that collects the bits still undecided in a register was too much for it at 1,000 rules.

use bulkhead_agent_protocol::agent::DeviceRule;

use crate::bpf::{self, code};

/// BPF_DEVCG_ACC_MKNOD.
pub(super) const MKNOD: u32 = 1;
/// BPF_DEVCG_ACC_READ.
pub(super) const READ: u32 = 2;
/// BPF_DEVCG_ACC_WRITE.
pub(super) const WRITE: u32 = 4;
const ALL: u32 = MKNOD | READ | WRITE;

/// BPF_DEVCG_DEV_BLOCK.
const BLOCK: u32 = 1;
/// BPF_DEVCG_DEV_CHAR.
const CHAR: u32 = 2;

/// The verifier keeps at most 8,192 branches for later (BPF_COMPLEXITY_LIMIT_JMP_SEQ), and jumps are 16 bits wide; real
/// lists have fewer than 50 rules.
pub(super) const MAX_RULES: usize = 1024;

/// A rule with everything checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rule {
    pub allow: bool,
    /// `None`: block and character devices.
    pub kind: Option<u32>,
    pub major: Option<u32>,
    pub minor: Option<u32>,
    pub access: u32,
}

impl Rule {
    const fn allowed(kind: u32, major: Option<u32>, minor: Option<u32>, access: u32) -> Self {
        Self {
            allow: true,
            kind: Some(kind),
            major,
            minor,
            access,
        }
    }

    /// Whether it matches every device.
    fn is_unconditional(&self) -> bool {
        self.kind.is_none() && self.major.is_none() && self.minor.is_none()
    }

    fn is_blanket_deny(&self) -> bool {
        !self.allow && self.is_unconditional() && self.access == ALL
    }
}

/// Making any node is harmless, opening it is what counts; then the devices of OCI config-linux.md#default-devices.
pub(super) const DEFAULTS: [Rule; 11] = [
    Rule::allowed(CHAR, None, None, MKNOD),
    Rule::allowed(BLOCK, None, None, MKNOD),
    Rule::allowed(CHAR, Some(1), Some(3), ALL), // null
    Rule::allowed(CHAR, Some(1), Some(5), ALL), // zero
    Rule::allowed(CHAR, Some(1), Some(7), ALL), // full
    Rule::allowed(CHAR, Some(1), Some(8), ALL), // random
    Rule::allowed(CHAR, Some(1), Some(9), ALL), // urandom
    Rule::allowed(CHAR, Some(5), Some(0), ALL), // tty
    Rule::allowed(CHAR, Some(5), Some(1), ALL), // console
    Rule::allowed(CHAR, Some(5), Some(2), ALL), // ptmx
    Rule::allowed(CHAR, Some(136), None, ALL),  // terminals of the container's own devpts
];

/// Why a rule cannot be honoured.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RuleError {
    /// Not 'a', 'b' or 'c'.
    #[error("device rule {index}: kind {kind} is none of a, b, c")]
    Kind {
        /// Its place in the list, from 0.
        index: usize,
        /// What came.
        kind: u32,
    },
    /// A number that no device has.
    #[error("device rule {index}: device {major}:{minor} does not exist, numbers are -1 to {max}", max = u32::MAX)]
    Number {
        /// Its place in the list, from 0.
        index: usize,
        /// What came.
        major: i64,
        /// What came.
        minor: i64,
    },
    /// No access at all, or bits besides mknod, read and write.
    #[error("device rule {index}: access {access:#x} is not a choice of mknod, read and write")]
    Access {
        /// Its place in the list, from 0.
        index: usize,
        /// What came.
        access: u32,
    },
    /// More rules than can be compiled.
    #[error("{count} device rules, at most {MAX_RULES} are possible")]
    TooMany {
        /// How many came.
        count: usize,
    },
}

/// Checks the spec's rules and puts the default devices before them.
pub(super) fn rules(spec: &[DeviceRule]) -> Result<Vec<Rule>, RuleError> {
    if spec.len() > MAX_RULES {
        return Err(RuleError::TooMany { count: spec.len() });
    }
    let mut rules = DEFAULTS.to_vec();
    for (index, rule) in spec.iter().enumerate() {
        let rule = parse(index, rule)?;
        if rule.is_blanket_deny() {
            rules.truncate(DEFAULTS.len());
        } else {
            rules.push(rule);
        }
    }
    Ok(rules)
}

fn parse(index: usize, rule: &DeviceRule) -> Result<Rule, RuleError> {
    let kind = match u8::try_from(rule.kind) {
        Ok(b'a') => None,
        Ok(b'b') => Some(BLOCK),
        Ok(b'c') => Some(CHAR),
        _ => {
            return Err(RuleError::Kind {
                index,
                kind: rule.kind,
            });
        }
    };
    let number = |number: i64| match number {
        -1 => Ok(None),
        number => u32::try_from(number)
            .map(Some)
            .map_err(|_| RuleError::Number {
                index,
                major: rule.major,
                minor: rule.minor,
            }),
    };
    if rule.access == 0 || rule.access & !ALL != 0 {
        return Err(RuleError::Access {
            index,
            access: rule.access,
        });
    }
    Ok(Rule {
        allow: rule.allow,
        kind,
        major: number(rule.major)?,
        minor: number(rule.minor)?,
        access: rule.access,
    })
}

/// The register of the result.
const RESULT: u8 = 0;
/// The register of the context's address.
const CONTEXT: u8 = 1;
/// The register that everything is compared in.
const VALUE: u8 = 2;

/// Offsets in struct bpf_cgroup_dev_ctx; the first word is the access bits << 16 | the kind of device.
const ACCESS_AND_KIND: u32 = 0;
const MAJOR: u32 = 4;
const MINOR: u32 = 8;

/// An instruction that ends at most `offset` instructions further.
fn instruction(code: u8, destination: u8, source: u8, offset: usize, immediate: u32) -> u64 {
    let offset = i16::try_from(offset).expect("MAX_RULES keeps every jump within 16 bits");
    bpf::instruction(code, destination, source, offset, immediate)
}

fn load(offset: u32) -> u64 {
    instruction(code::LOAD_WORD, VALUE, CONTEXT, offset as usize, 0)
}

fn and(mask: u32) -> u64 {
    instruction(code::AND_IMMEDIATE, VALUE, 0, 0, mask)
}

fn returning(value: u32) -> [u64; 2] {
    [
        instruction(code::MOVE_IMMEDIATE, RESULT, 0, 0, value),
        instruction(code::EXIT, 0, 0, 0, 0),
    ]
}

/// The program that grants what `rules` grant.
pub(super) fn compile(rules: &[Rule]) -> Vec<u64> {
    let mut program: Vec<u64> = [MKNOD, READ, WRITE]
        .into_iter()
        .flat_map(|bit| compile_bit(rules, bit))
        .collect();
    program.extend(returning(1));
    program
}

/// The part for one access bit. It is left at its end when the bit is granted or not asked for.
fn compile_bit(rules: &[Rule], bit: u32) -> Vec<u64> {
    // From the end to the beginning, so that the length of what follows is known to each jump.
    let speaking: Vec<&Rule> = rules
        .iter()
        .rev()
        .filter(|rule| rule.access & bit != 0)
        .collect();
    // What follows a rule for every device cannot be reached, which the verifier does not take.
    let reached = speaking.iter().position(|rule| rule.is_unconditional());
    let (speaking, mut part) = match reached {
        Some(last) => (&speaking[..=last], Vec::new()),
        None => (&speaking[..], returning(0).to_vec()),
    };
    for rule in speaking.iter().rev() {
        let mut compiled = compile_rule(rule, part.len());
        compiled.append(&mut part);
        part = compiled;
    }
    let mut whole = vec![
        load(ACCESS_AND_KIND),
        and(bit << 16),
        instruction(code::JUMP_IF_EQUAL, VALUE, 0, part.len(), 0),
    ];
    whole.append(&mut part);
    whole
}

/// One rule; `following` instructions come between it and the end of its bit's part.
fn compile_rule(rule: &Rule, following: usize) -> Vec<u64> {
    let mut compiled = match rule.allow {
        true => vec![instruction(code::JUMP, 0, 0, following, 0)],
        false => returning(0).to_vec(),
    };
    let tests = [
        (rule.kind, vec![load(ACCESS_AND_KIND), and(0xffff)]),
        (rule.major, vec![load(MAJOR)]),
        (rule.minor, vec![load(MINOR)]),
    ];
    for (wanted, mut test) in tests.into_iter().rev() {
        if let Some(wanted) = wanted {
            // To the first instruction after this rule.
            test.push(instruction(
                code::JUMP_IF_NOT_EQUAL,
                VALUE,
                0,
                compiled.len(),
                wanted,
            ));
            test.append(&mut compiled);
            compiled = test;
        }
    }
    compiled
}

#[cfg(test)]
#[path = "devices_tests.rs"]
mod tests;
