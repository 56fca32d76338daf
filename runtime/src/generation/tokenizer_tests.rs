//! Tokenizers and streams against the example model's reference and against whole decodes.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::fixtures::{byte_level, sentence_piece, sentence_piece_json, word_piece, word_piece_json};
use super::*;

fn reference() -> Value {
    let json = include_str!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../examples/models/baker-street-6m/reference.json"
    ));
    serde_json::from_str(json).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// All pieces of a stream, checked one by one, then joined.
fn streamed(tokenizer: &Tokenizer, tokens: &[u32], skip_special: bool) -> String {
    let mut stream = tokenizer.stream(skip_special);
    let mut text = String::new();
    for &token in tokens {
        let piece = stream.push(token).unwrap();
        assert_ne!(piece.as_deref(), Some(""));
        text += &piece.unwrap_or_default();
    }
    text + &stream.finish().unwrap()
}

#[test]
fn the_reference_prompts_and_answers() {
    let tokenizer = byte_level();
    assert_eq!(tokenizer.vocab_size(), 4096);
    let reference = reference();
    let prompts = reference["prompts"].as_array().unwrap();
    assert_eq!(prompts.len(), 5);
    for prompt in prompts {
        let text = prompt["prompt"].as_str().unwrap();
        assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&prompt["input_ids"]));
        let answer = ids(&prompt["greedy_ids"]);
        assert_eq!(streamed(&tokenizer, &answer, true), prompt["greedy_text"].as_str().unwrap());
    }
}

/// The reference perplexity scores the first 64 of the 78 whole windows of the held-out text.
#[test]
fn the_held_out_text_fills_the_windows_of_the_reference() {
    let text =
        include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/models/baker-street-6m/heldout.txt"));
    let perplexity = &reference()["perplexity"];
    let tokens = byte_level().encode(text, false).unwrap();
    let whole = tokens.len() as u64 / perplexity["window_tokens"].as_u64().unwrap();
    assert_eq!((whole, perplexity["windows"].as_u64()), (78, Some(64)));
}

#[test]
fn padding_and_truncation_of_the_file_are_off() {
    let tokenizer = word_piece();
    let text = "hello world hello world hello";
    assert_eq!(tokenizer.encode(text, true).unwrap(), [1, 3, 4, 3, 4, 3, 2]);
    assert_eq!(tokenizer.encode(text, false).unwrap(), [3, 4, 3, 4, 3]);
    assert_eq!(tokenizer.encode_truncated(text, 4).unwrap(), [1, 3, 4, 2]);
    assert_eq!(tokenizer.encode_truncated(text, 7).unwrap().len(), 7);
    assert_eq!(tokenizer.encode_truncated(text, 2).unwrap(), [1, 2]);
    assert_eq!(tokenizer.encode_truncated(text, 1).unwrap_err().code(), "tokenizer/max-length");
}

#[test]
fn names_of_tokens() {
    let tokenizer = byte_level();
    assert_eq!(tokenizer.token_to_id("<|end_of_text|>"), Some(1));
    assert_eq!(tokenizer.id_to_token(0).as_deref(), Some("<|begin_of_text|>"));
    assert_eq!(tokenizer.id_to_token(4096), None);
    assert!(tokenizer.is_special("<|end_of_text|>") && !tokenizer.is_special("the"));
}

#[test]
fn malformed_files_are_errors() {
    for json in [&b""[..], b"{}", b"[1]", b"\xff"] {
        assert_eq!(Tokenizer::from_bytes(json).unwrap_err().code(), "tokenizer/malformed");
    }
}

/// Files that are JSON but no sound tokenizer; most of them make the library panic, each by another component.
#[test]
fn files_that_contradict_themselves_are_errors() {
    let template = |id: &str| {
        json!({"type": "TemplateProcessing", "special_tokens": {},
            "single": [{"SpecialToken": {"id": id, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]})
    };
    let mut second_text = template("[CLS]");
    second_text["single"] = json!([{"Sequence": {"id": "B", "type_id": 0}}]);
    let cases = [
        ("post_processor", template("[CLS]")),
        ("post_processor", second_text),
        ("decoder", json!(7)),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAA"})),
        ("normalizer", json!({"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="})),
        (
            "pre_tokenizer",
            json!({"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}),
        ),
    ];
    for (part, content) in cases {
        let mut file = word_piece_json();
        file[part] = content.clone();
        let result = Tokenizer::from_bytes(file.to_string().as_bytes())
            .and_then(|tokenizer| tokenizer.encode("hello world", true));
        let code = result.unwrap_err().code();
        assert!(["tokenizer/malformed", "tokenizer/encode"].contains(&code), "{part} {content}: {code}");
    }
}

#[test]
fn a_character_of_several_tokens_comes_out_whole() {
    let tokenizer = byte_level();
    let tokens = tokenizer.encode("a 🦀!", false).unwrap();
    let mut stream = tokenizer.stream(true);
    let pieces: Vec<String> = tokens.iter().filter_map(|t| stream.push(*t).unwrap()).collect();
    assert!(tokens.len() > pieces.len(), "the crab should take several tokens");
    assert_eq!(pieces.concat(), "a 🦀!");
    assert!(pieces.iter().all(|piece| !piece.contains('\u{FFFD}')));
    assert_eq!(stream.finish().unwrap(), "");
}

#[test]
fn a_cut_character_comes_out_at_the_end() {
    let tokenizer = byte_level();
    let tokens = tokenizer.encode("🦀", false).unwrap();
    let mut stream = tokenizer.stream(true);
    assert!(tokens[..tokens.len() - 1].iter().all(|t| stream.push(*t).unwrap().is_none()));
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
    assert_eq!(stream.finish().unwrap(), "");
}

#[test]
fn spaces_between_words_survive() {
    let tokenizer = word_piece();
    assert_eq!(streamed(&tokenizer, &[1, 3, 4, 5, 6, 2, 3], true), "hello worldly. hello");
    let tokenizer = sentence_piece();
    let [hello, world] = ["▁hello", "▁world"].map(|piece| tokenizer.token_to_id(piece).unwrap());
    assert_eq!(streamed(&tokenizer, &[1, hello, 2, world, 1, hello], true), "hello world hello");
    assert_eq!(
        streamed(&tokenizer, &[1, hello, 2, world], false),
        tokenizer.decode(&[1, hello, 2, world], false).unwrap()
    );
}

#[test]
fn the_window_stays_short() {
    let tokenizer = byte_level();
    // The first byte of a character, over and over, never completes; neither do skipped tokens.
    let lead = tokenizer.encode("🦀", false).unwrap()[0];
    for tokens in [vec![lead; 300], vec![0; 300], [lead, 0, 1].repeat(100)] {
        for skip_special in [true, false] {
            let mut stream = tokenizer.stream(skip_special);
            let mut text = String::new();
            for &token in &tokens {
                text += &stream.push(token).unwrap().unwrap_or_default();
                assert!(stream.window_len() <= 32, "window of {}", stream.window_len());
            }
            text += &stream.finish().unwrap();
            assert_eq!(text, tokenizer.decode(&tokens, skip_special).unwrap());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn byte_level_streams_equal_decodes(
        random in prop::collection::vec(0u32..4100, 0..60),
        raw in prop::collection::vec(0u32..260, 0..60),
        skip: bool,
    ) {
        // Ids below 258 are the single bytes: mostly malformed text.
        let tokenizer = byte_level_once();
        for tokens in [random, raw] {
            prop_assert_eq!(streamed(tokenizer, &tokens, skip), tokenizer.decode(&tokens, skip).unwrap());
        }
    }

    #[test]
    fn text_survives(text in "\\PC{0,40}") {
        let tokenizer = byte_level_once();
        prop_assert_eq!(streamed(tokenizer, &tokenizer.encode(&text, true).unwrap(), true), text);
    }

    /// Whatever value stands anywhere in a file, the answer is a tokenizer or an error.
    #[test]
    fn damaged_files_never_panic(
        paths in prop::collection::vec((any::<prop::sample::Index>(), 0usize..9), 1..4),
        sentence in any::<bool>(),
        text in "[a-z▁é<>\\[\\] ]{0,20}",
        ids in prop::collection::vec(0u32..270, 0..20),
    ) {
        let mut file = if sentence { sentence_piece_json() } else { word_piece_json() };
        for (path, value) in &paths {
            let values = [json!(null), json!(0), json!(-1), json!(1u64 << 40), json!(""), json!("é"),
                json!([]), json!({}), json!({"type": "Sequence"})];
            let mut pointers = Vec::new();
            collect_pointers(&file, "", &mut pointers);
            *file.pointer_mut(path.get::<String>(&pointers)).unwrap() = values[*value].clone();
        }
        if let Ok(tokenizer) = Tokenizer::from_bytes(file.to_string().as_bytes()) {
            let _ = tokenizer.encode(&text, true);
            let _ = tokenizer.encode_truncated(&text, 3);
            let mut stream = tokenizer.stream(true);
            let _ = ids.iter().try_for_each(|id| stream.push(*id).map(drop));
            let _ = stream.finish();
        }
    }

    #[test]
    fn other_streams_equal_decodes(
        words in prop::collection::vec(0u32..9, 0..40),
        pieces in prop::collection::vec(prop_oneof![0u32..270, 255u32..270], 0..40),
        skip: bool,
    ) {
        let tokenizer = word_piece();
        prop_assert_eq!(streamed(&tokenizer, &words, skip), tokenizer.decode(&words, skip).unwrap());
        let tokenizer = sentence_piece();
        prop_assert_eq!(streamed(&tokenizer, &pieces, skip), tokenizer.decode(&pieces, skip).unwrap());
    }
}

/// JSON pointers to everything in `value` but single vocabulary entries.
fn collect_pointers(value: &Value, at: &str, pointers: &mut Vec<String>) {
    pointers.push(at.to_owned());
    match value {
        Value::Object(map) if !at.ends_with("/vocab") => {
            for (key, inner) in map {
                let key = key.replace('~', "~0").replace('/', "~1");
                collect_pointers(inner, &format!("{at}/{key}"), pointers);
            }
        }
        Value::Array(list) => {
            for (i, inner) in list.iter().enumerate() {
                collect_pointers(inner, &format!("{at}/{i}"), pointers);
            }
        }
        _ => {}
    }
}

fn byte_level_once() -> &'static Tokenizer {
    static TOKENIZER: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    TOKENIZER.get_or_init(byte_level)
}
