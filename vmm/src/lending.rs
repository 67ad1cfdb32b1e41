//! What the VMM and the fs process say to each other about pages that a template lends to the pod.
//!
//! ```text
//! VMM ── runs: what is lent ──────────────────────────────► fs process    once, before it shares memory
//! VMM ◄── question: whole pages ─────────────────────────── fs process
//! VMM ── ANSWER: each of them is the pod's own from now on ► fs process
//! ```
//!
//! Each is a packet of a `SOCK_SEQPACKET` socketpair; numbers are little-endian. A VMM that cannot
//! answer closes its end or says something else.

use crate::arch::x86_64::layout::PAGE;

pub mod lender;

/// Most runs in a list.
pub const MAX_RUNS: usize = 4096;

/// Bytes of the longest list.
pub const MAX_LIST: usize = COUNT + MAX_RUNS * RUN;

/// What the VMM answers.
pub const ANSWER: u8 = 1;

/// Bytes of a question.
pub const QUESTION: usize = RUN;

/// Most that is asked for at once: the lent pages of a block that begins at a multiple of this. Each question stops the guest,
/// and the neighbours of a page that its driver has taken are those that it takes next.
pub const BLOCK: u64 = 64 << 10;

/// Bytes of the number of runs.
const COUNT: usize = size_of::<u64>();

/// Bytes of a guest physical address and a length.
const RUN: usize = 2 * size_of::<u64>();

/// The list of runs: the guest physical address and the length in bytes of each.
pub fn encode_runs(runs: &[(u64, u64)]) -> Vec<u8> {
    let mut packet = (runs.len() as u64).to_le_bytes().to_vec();
    packet.extend(
        runs.iter()
            .flat_map(|&(start, length)| encode_question(start, length)),
    );
    packet
}

/// The runs of a list that is well-formed: whole pages, sorted, none twice, [`MAX_RUNS`] at most.
pub fn decode_runs(packet: &[u8]) -> Option<Vec<(u64, u64)>> {
    let (count, rest) = packet.split_first_chunk::<COUNT>()?;
    let (runs, rest) = rest.as_chunks::<RUN>();
    if !rest.is_empty() || runs.len() > MAX_RUNS || runs.len() as u64 != u64::from_le_bytes(*count)
    {
        return None;
    }
    let runs: Option<Vec<_>> = runs.iter().map(|run| decode_run(run)).collect();
    // No end wraps: each was looked at.
    runs.filter(|runs| runs.is_sorted_by(|before, after| before.0 + before.1 <= after.0))
}

/// The question for a range of whole pages.
pub fn encode_question(start: u64, length: u64) -> [u8; QUESTION] {
    let mut packet = [0; QUESTION];
    packet[..8].copy_from_slice(&start.to_le_bytes());
    packet[8..].copy_from_slice(&length.to_le_bytes());
    packet
}

/// Guest physical address and length of a question that is well-formed: whole pages, at least one,
/// [`BLOCK`] at most.
pub fn decode_question(packet: &[u8]) -> Option<(u64, u64)> {
    decode_run(packet).filter(|&(_, length)| length <= BLOCK)
}

fn decode_run(packet: &[u8]) -> Option<(u64, u64)> {
    let (numbers, []) = packet.as_chunks::<8>() else {
        return None;
    };
    let &[start, length] = numbers else {
        return None;
    };
    let (start, length) = (u64::from_le_bytes(start), u64::from_le_bytes(length));
    let whole = start.is_multiple_of(PAGE) && length.is_multiple_of(PAGE) && length > 0;
    (whole && start.checked_add(length).is_some()).then_some((start, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn of(count: u64, runs: &[(u64, u64)]) -> Vec<u8> {
        let mut packet = encode_runs(runs);
        packet[..COUNT].copy_from_slice(&count.to_le_bytes());
        packet
    }

    #[test]
    fn a_list_is_what_was_said() {
        let longest: Vec<_> = (0..MAX_RUNS as u64)
            .map(|at| (at * 2 * PAGE, PAGE))
            .collect();
        let touching = vec![(PAGE, PAGE), (2 * PAGE, 5 * PAGE), (1 << 40, 1 << 30)];
        for runs in [Vec::new(), touching, longest] {
            let packet = encode_runs(&runs);
            assert!(packet.len() <= MAX_LIST);
            assert_eq!(decode_runs(&packet), Some(runs));
        }
        assert_eq!(
            decode_question(&encode_question(PAGE, 3 * PAGE)),
            Some((PAGE, 3 * PAGE))
        );
    }

    #[test]
    fn lists_that_are_wrong_are_refused() {
        let too_many: Vec<_> = (0..=MAX_RUNS as u64).map(|at| (at * PAGE, PAGE)).collect();
        for (what, packet) in [
            ("nothing", Vec::new()),
            ("half a count", vec![0; 7]),
            ("more than it says", of(1, &[(0, PAGE), (PAGE, PAGE)])),
            ("less than it says", of(2, &[(0, PAGE)])),
            ("a count that wraps", of(1 << 60, &[])),
            (
                "bytes behind the last",
                [encode_runs(&[(0, PAGE)]), vec![0]].concat(),
            ),
            ("too many", encode_runs(&too_many)),
            ("not sorted", encode_runs(&[(4 * PAGE, PAGE), (0, PAGE)])),
            ("the same twice", encode_runs(&[(0, PAGE), (0, PAGE)])),
            ("an overlap", encode_runs(&[(0, 2 * PAGE), (PAGE, PAGE)])),
            ("an address within a page", encode_runs(&[(1, PAGE)])),
            ("a part of a page", encode_runs(&[(0, PAGE - 1)])),
            ("no page", encode_runs(&[(0, 0)])),
            (
                "an end that wraps",
                encode_runs(&[(0u64.wrapping_sub(PAGE), 2 * PAGE)]),
            ),
            (
                "all there is, and more",
                encode_runs(&[(PAGE, 0u64.wrapping_sub(PAGE))]),
            ),
        ] {
            assert_eq!(decode_runs(&packet), None, "{what}");
        }
    }

    #[test]
    fn questions_that_are_wrong_are_refused() {
        for packet in [&[0; 15][..], &[0; 17], &[0; 16], &[0; 24], &[]] {
            assert_eq!(decode_question(packet), None);
        }
        let last = 0u64.wrapping_sub(PAGE);
        for (start, length) in [(1, PAGE), (0, 1), (0, 0), (last, PAGE), (0, BLOCK + PAGE)] {
            assert_eq!(decode_question(&encode_question(start, length)), None);
        }
    }

    proptest! {
        #[test]
        fn no_packet_is_too_much(packet in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(runs) = decode_runs(&packet) {
                prop_assert_eq!(encode_runs(&runs), packet);
            }
        }
    }
}
