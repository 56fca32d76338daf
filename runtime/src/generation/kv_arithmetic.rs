//! How many tokens a KV cache holds in given memory.
//!
//! ```text
//! bytes per token = sum over local layers of local_kv_heads x 2 x head_dim x bytes per element
//! tokens          = floor(free x fraction / bytes per token), at most max_tokens if that is given
//! blocks          = ceil(tokens / tokens_per_block)
//! ```
//! Local means of this rank; over several ranks the smallest result counts. The ceiling gives a partly
//! affordable block in full, so the cache may exceed `free x fraction` by less than one block: fractions
//! below 1 leave room for it.

use millrace_ir::{Error, Kind, Result};

/// A sized KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvCapacity {
    /// Pages of `tokens_per_block` tokens.
    pub blocks: u64,
    /// Tokens in all blocks.
    pub tokens: u64,
    /// Bytes of all blocks.
    pub bytes: u64,
}

/// Bytes that one token takes in the KV cache: K and V of every layer. `kv_heads_by_layer` holds the KV heads
/// of each layer of this rank, `head_dim` is in elements. Error `generation/kv-size` on overflow.
pub fn bytes_per_token(kv_heads_by_layer: &[u64], head_dim: u64, bytes_per_element: u64) -> Result<u64> {
    let per_head = head_dim.checked_mul(bytes_per_element).and_then(|b| b.checked_mul(2));
    per_head
        .and_then(|per_head| {
            kv_heads_by_layer
                .iter()
                .try_fold(0u64, |sum, heads| heads.checked_mul(per_head).and_then(|b| sum.checked_add(b)))
        })
        .ok_or_else(too_large)
}

/// The cache that fits `fraction` (in (0, 1]) of `free_bytes`, for at most `max_tokens` tokens if given.
///
/// Errors: `generation/kv-fraction` for a bad fraction, `generation/kv-size` for a size of zero or beyond
/// 64 bits.
pub fn kv_capacity(
    free_bytes: u64,
    fraction: f64,
    max_tokens: Option<u64>,
    bytes_per_token: u64,
    tokens_per_block: u64,
) -> Result<KvCapacity> {
    if !(fraction > 0.0 && fraction <= 1.0) {
        let message = format!("free_gpu_memory_fraction {fraction} is not in (0, 1]");
        return Err(Error::new(Kind::Usage, "generation/kv-fraction", message).hint("the default is 0.9"));
    }
    if bytes_per_token == 0 || tokens_per_block == 0 {
        let message =
            format!("{bytes_per_token} bytes per token, {tokens_per_block} tokens per block: none may be 0");
        return Err(Error::new(Kind::BadInput, "generation/kv-size", message));
    }
    let share = (free_bytes as f64 * fraction).floor() as u64;
    let tokens = (share / bytes_per_token).min(max_tokens.unwrap_or(u64::MAX));
    let blocks = tokens.div_ceil(tokens_per_block);
    let tokens = blocks.checked_mul(tokens_per_block).ok_or_else(too_large)?;
    let bytes = tokens.checked_mul(bytes_per_token).ok_or_else(too_large)?;
    Ok(KvCapacity { blocks, tokens, bytes })
}

/// Blocks that a sequence of `max_seq_len` tokens takes; 0 tokens per block count as 1.
pub fn blocks_per_sequence(max_seq_len: u64, tokens_per_block: u64) -> u64 {
    max_seq_len.div_ceil(tokens_per_block.max(1))
}

/// Secondary blocks in host memory: floor(host_bytes / bytes per token / tokens_per_block); a zero counts as 1.
pub fn host_blocks(host_bytes: u64, bytes_per_token: u64, tokens_per_block: u64) -> u64 {
    host_bytes / bytes_per_token.max(1) / tokens_per_block.max(1)
}

fn too_large() -> Error {
    Error::new(Kind::BadInput, "generation/kv-size", "the size of the KV cache exceeds 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: f64 = 1_073_741_824.0;

    /// The published example: 70.48 GiB free, fraction 0.9, 32 layers of 16 local KV heads of 128, fp16.
    #[test]
    fn published_example() {
        let per_token = bytes_per_token(&[16; 32], 128, 2).unwrap();
        assert_eq!(per_token, 262_144);
        let capacity = kv_capacity((70.48 * GIB) as u64, 0.9, None, per_token, 64).unwrap();
        assert_eq!((capacity.blocks, capacity.tokens), (4060, 259_840));
        assert_eq!(format!("{:.2}", capacity.bytes as f64 / GIB), "63.44");
        assert_eq!(blocks_per_sequence(2048, 64), 32);
    }

    #[test]
    fn limits_and_host_blocks() {
        let capacity = kv_capacity(1 << 20, 1.0, Some(33), 1024, 32).unwrap();
        assert_eq!(capacity, KvCapacity { blocks: 2, tokens: 64, bytes: 65_536 });
        assert_eq!(kv_capacity(1023, 1.0, None, 1024, 32).unwrap().blocks, 0);
        assert_eq!(blocks_per_sequence(65, 64), 2);
        assert_eq!(host_blocks(1 << 20, 1024, 100), 10);
        assert_eq!(bytes_per_token(&[1, 2, 0], 10, 4).unwrap(), 240);
    }

    #[test]
    fn bad_arguments_are_errors() {
        for fraction in [0.0, -0.5, 1.5, f64::NAN] {
            assert_eq!(kv_capacity(1, fraction, None, 1, 1).unwrap_err().code(), "generation/kv-fraction");
        }
        assert_eq!(kv_capacity(1, 0.9, None, 0, 1).unwrap_err().code(), "generation/kv-size");
        assert_eq!(kv_capacity(1, 0.9, None, 1, 0).unwrap_err().code(), "generation/kv-size");
        assert_eq!(
            kv_capacity(u64::MAX, 1.0, None, 1, u64::MAX - 1).unwrap_err().code(),
            "generation/kv-size"
        );
        assert_eq!(bytes_per_token(&[u64::MAX, 1], 1, 1).unwrap_err().code(), "generation/kv-size");
    }
}
