//! Thousands of damaged and forged engines: every one is a typed error, none a panic.

use super::tests::{entry_at, forge_section, reseal, sample};
use super::*;

/// splitmix64: small, seeded, good enough to choose mutations.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A value that stresses arithmetic: near zero, near a power of two, near the maximum, or any.
    fn edge(&mut self) -> u64 {
        let small = self.next() % 9;
        match self.below(4) {
            0 => small,
            1 => (1u64 << self.below(64)).wrapping_add(small).wrapping_sub(4),
            2 => u64::MAX - small,
            _ => self.next(),
        }
    }
}

/// `None` if the mutation leaves the engine as it was.
fn mutate(original: &[u8], random: &mut Random) -> Option<(String, Vec<u8>)> {
    let mut bytes = original.to_vec();
    let len = bytes.len();
    let what = match random.below(6) {
        0 => {
            let (at, bit) = (random.below(len), random.below(8));
            bytes[at] ^= 1 << bit;
            format!("bit {bit} of byte {at}")
        }
        1 => {
            bytes.truncate(random.below(len));
            format!("cut to {}", bytes.len())
        }
        2 => {
            let more = 1 + random.below(5000);
            let fill = random.next() as u8;
            bytes.extend(std::iter::repeat_n(fill, more));
            format!("{more} more bytes")
        }
        3 => {
            let (from, to) = (random.below(len), random.below(len));
            let count = 1 + random.below(len - from.max(to));
            bytes.copy_within(from..from + count, to);
            format!("{count} bytes from {from} to {to}")
        }
        4 => {
            // Take bytes out or put bytes in, so that all that follows moves.
            let (at, count) = (random.below(len), 1 + random.below(300));
            if random.below(2) == 0 {
                bytes.drain(at..len.min(at + count));
            } else {
                bytes.splice(at..at, std::iter::repeat_n(0, count));
            }
            format!("{count} bytes moved at {at}")
        }
        _ => {
            // A field with a meaning, under a right hash.
            let value = random.edge().to_le_bytes();
            let kinds = [
                SectionKind::Manifest,
                SectionKind::Ir,
                SectionKind::Kernels,
                SectionKind::Weights,
                SectionKind::WeightIndex,
                SectionKind::Tokenizer,
                SectionKind::Unknown(4711),
                SectionKind::Provenance,
            ];
            let entry = entry_at(&bytes, kinds[random.below(kinds.len())]);
            let fields = [
                (8, 4),
                (12, 4),
                (16, 8),
                (24, 8),
                (32, 4),
                (36, 4),
                (40, 8),
                (entry + 4, 4),
                (entry + 8, 8),
                (entry + 16, 8),
                (entry + 24, 4),
                (entry + 28, 4),
                (entry + 96, 8),
            ];
            let (at, width) = fields[random.below(fields.len())];
            bytes[at..at + width].copy_from_slice(&value[..width]);
            if bytes == original {
                return None;
            }
            reseal(&mut bytes);
            format!("{width} bytes forged at {at}")
        }
    };
    (bytes != original).then_some((what, bytes))
}

#[test]
fn every_mutation_is_an_error() {
    let original = sample();
    assert!(EngineFile::from_bytes(original.clone(), Verify::Full).is_ok());
    let mut random = Random(0x5eed);
    let mut codes = std::collections::BTreeMap::new();
    let mut tried = 0;
    while tried < 12_000 {
        let Some((what, bytes)) = mutate(&original, &mut random) else { continue };
        tried += 1;
        match EngineFile::from_bytes(bytes, Verify::Full) {
            Ok(_) => panic!("mutation {tried} was accepted: {what}"),
            Err(error) => {
                assert!(
                    error.code().starts_with("engine/") && error.next_step().is_some(),
                    "{what}: {error}"
                );
                *codes.entry(error.code()).or_insert(0) += 1;
            }
        }
    }
    // The mutations reach deep: hashes do not hide the other checks.
    for code in ["engine/padding", "engine/section-hash", "engine/weight-hash", "engine/section-overlap"] {
        assert!(codes.contains_key(code), "{codes:?}");
    }
}

#[test]
fn prefixes_of_other_engines_do_not_join() {
    let first = sample();
    let mut second = first.clone();
    forge_section(&mut second, SectionKind::Ir, |ir| ir[0] = b'M');
    assert!(EngineFile::from_bytes(second.clone(), Verify::Full).is_ok());
    let mut random = Random(7);
    for _ in 0..500 {
        let at = random.below(first.len());
        let joined = [&first[..at], &second[at..]].concat();
        if joined != first && joined != second {
            assert!(EngineFile::from_bytes(joined, Verify::Full).is_err(), "joined at {at}");
        }
    }
}

/// Forged weight indexes under right hashes may be legal; they must never panic, and what they give must be in range.
#[test]
fn forged_weight_indexes_stay_in_range() {
    let original = sample();
    let mut random = Random(11);
    let mut accepted = 0;
    for _ in 0..3000 {
        let mut bytes = original.clone();
        forge_section(&mut bytes, SectionKind::WeightIndex, |index| {
            for _ in 0..1 + random.below(2) {
                let width = 1 << random.below(4);
                let at = random.below(index.len() - width);
                index[at..at + width].copy_from_slice(&random.edge().to_le_bytes()[..width]);
            }
        });
        if let Ok(engine) = EngineFile::from_bytes(bytes, Verify::Metadata) {
            accepted += 1;
            let (_, len) = engine.weights_range().unwrap();
            for weight in engine.weight_index() {
                assert!(weight.offset + weight.len <= len);
                engine.read_weight_at(weight, 0, &mut vec![0; weight.len as usize]).unwrap();
            }
        }
    }
    assert!(accepted > 0, "some forgeries only rename");
}
