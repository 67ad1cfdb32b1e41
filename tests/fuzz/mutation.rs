//! Changed inputs for a replay, the same ones each time.

/// Longest input that is made.
const LONGEST: usize = 4096;
/// Numbers at which bounds lie.
const EDGES: [u64; 12] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0xfff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];

/// Makes inputs out of others.
pub(crate) struct Mutator(u64);

impl Mutator {
    /// Each target has its own sequence.
    pub(crate) fn new(name: &str) -> Mutator {
        // FNV-1a: any number will do that is the same tomorrow.
        let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3)
        });
        Mutator(hash | 1)
    }

    /// xorshift64*.
    fn random(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.random() >> 16) as usize % end
    }

    pub(crate) fn next(&mut self, inputs: &[Vec<u8>]) -> Vec<u8> {
        let mut input = inputs[self.below(inputs.len())].clone();
        for _ in 0..=self.below(6) {
            self.change(&mut input, inputs);
        }
        input.truncate(LONGEST);
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, inputs: &[Vec<u8>]) {
        let at = self.below(input.len() + 1);
        let rest = input.len() - at;
        match self.below(6) {
            0 if rest > 0 => input[at] ^= 1 << self.below(8),
            1 if rest > 0 => input[at] = self.random() as u8,
            2 => {
                let edge = EDGES[self.below(EDGES.len())].to_le_bytes();
                let width = [1, 2, 4, 8][self.below(4)].min(rest);
                input[at..at + width].copy_from_slice(&edge[..width]);
            }
            3 => drop(input.drain(at..at + self.below(rest + 1).min(64))),
            4 => {
                let other = &inputs[self.below(inputs.len())];
                let from = self.below(other.len() + 1);
                input.truncate(at);
                input.extend_from_slice(&other[from..]);
            }
            _ => {
                let count = 1 + self.below(16);
                let bytes: Vec<u8> = (0..count).map(|_| self.random() as u8).collect();
                input.splice(at..at, bytes);
            }
        }
    }
}
