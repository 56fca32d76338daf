//! Small tokenizers of the kinds that models use.

use serde_json::{Value, json};

use super::Tokenizer;

fn from_value(json: &Value) -> Tokenizer {
    Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap()
}

fn special(id: u32, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true})
}

/// Words with [CLS] and [SEP] around a text, as BERT has them; the file asks for padding and truncation.
pub(crate) fn word_piece() -> Tokenizer {
    from_value(&word_piece_json())
}

/// The file of [`word_piece`].
pub(crate) fn word_piece_json() -> Value {
    let (cls, sep) = ("[CLS]", "[SEP]");
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "[UNK]"},
        "added_tokens": [special(0, "[UNK]"), special(1, cls), special(2, sep)],
        "normalizer": null,
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": cls, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": sep, "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {cls: {"id": cls, "ids": [1], "tokens": [cls]},
                sep: {"id": sep, "ids": [2], "tokens": [sep]}}},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
            "vocab": {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "hello": 3, "world": 4, "##ly": 5, ".": 6, "'": 7}}
    })
}

/// The decoder of SentencePiece models with byte fallback (Llama 2, Mistral): `▁` is a space, the first one
/// falls away, unknown characters are byte tokens.
pub(crate) fn sentence_piece() -> Tokenizer {
    from_value(&sentence_piece_json())
}

/// The file of [`sentence_piece`].
pub(crate) fn sentence_piece_json() -> Value {
    let mut vocab = serde_json::Map::new();
    for piece in ["<unk>", "<s>", "</s>"] {
        vocab.insert(piece.to_owned(), json!(vocab.len()));
    }
    for byte in 0..=255u8 {
        vocab.insert(format!("<0x{byte:02X}>"), json!(vocab.len()));
    }
    for piece in ["▁", "▁▁", "▁hello", "▁world", "ly", ".", "é"] {
        vocab.insert(piece.to_owned(), json!(vocab.len()));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": []}
    })
}

/// The byte-level tokenizer of the example model.
pub(crate) fn byte_level() -> Tokenizer {
    Tokenizer::from_bytes(include_bytes!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/models/baker-street-6m/tokenizer.json"
    )))
    .unwrap()
}
