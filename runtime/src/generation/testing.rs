//! A model for tests: its logits are a hash of all tokens that the paged cache holds for the sequence.
//!
//! A wrong block table, position, length or a page shared by two sequences changes the hash, hence the tokens.
//! Every step is checked against the limits.

use std::collections::BTreeSet;

use millrace_ir::Result;

use super::{ModelLimits, StepInputs, StepModel};

/// Limits of a small model.
pub(crate) fn limits() -> ModelLimits {
    ModelLimits {
        vocab_size: 23,
        max_batch_size: 4,
        max_input_len: 64,
        max_seq_len: 96,
        max_num_tokens: 32,
        max_logit_rows: 32,
        tokens_per_block: 4,
        pages: 128,
        eos: vec![2],
        bos: Some(1),
    }
}

/// Logits after `history`, in [-4, 4).
pub(crate) fn hash_logits(history: &[u32], vocab: usize) -> Vec<f32> {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    let mut step = |x: u64| {
        hash = (hash ^ x).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23);
        hash
    };
    history.iter().for_each(|id| _ = step(u64::from(*id) + 1));
    (0..vocab as u64).map(|v| (step(v) >> 32) as f32 / (1u64 << 29) as f32 - 4.0).collect()
}

/// See the module.
pub(crate) struct HashModel {
    pub(crate) limits: ModelLimits,
    /// Token in each slot of each page; never cleared, so that stale slots are there to be read by mistake.
    cache: Vec<Option<u32>>,
    /// The inputs of every step.
    pub(crate) log: Vec<StepInputs>,
}

impl HashModel {
    pub(crate) fn new(limits: ModelLimits) -> Self {
        let cache = vec![None; limits.pages * limits.tokens_per_block];
        HashModel { limits, cache, log: Vec::new() }
    }
}

impl StepModel for HashModel {
    fn limits(&self) -> ModelLimits {
        self.limits.clone()
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut Vec<f32>) -> Result<()> {
        inputs.check(&self.limits)?;
        self.log.push(inputs.clone());
        let tokens_per_block = self.limits.tokens_per_block;
        let slot = |s: usize, position: usize| {
            let page = inputs.block_table[s * inputs.pages_per_seq + position / tokens_per_block];
            page as usize * tokens_per_block + position % tokens_per_block
        };
        let mut pages = BTreeSet::new();
        let mut sequence_of_row = Vec::new();
        for s in 0..inputs.sequences() {
            for x in (0..inputs.kv_lens[s] as usize).step_by(tokens_per_block) {
                assert!(pages.insert(slot(s, x)), "a page belongs to two sequences or twice to one");
            }
            for row in inputs.seq_starts[s]..inputs.seq_starts[s + 1] {
                let at = slot(s, inputs.positions[row as usize] as usize);
                self.cache[at] = Some(inputs.token_ids[row as usize] as u32);
                sequence_of_row.push(s);
            }
        }
        logits.clear();
        for &row in &inputs.logit_rows {
            let (s, last) = (sequence_of_row[row as usize], inputs.positions[row as usize] as usize);
            let history: Vec<u32> =
                (0..=last).map(|x| self.cache[slot(s, x)].expect("an unwritten slot is read")).collect();
            logits.extend(hash_logits(&history, self.limits.vocab_size));
        }
        Ok(())
    }
}
