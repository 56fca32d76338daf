//! Broken texts: whatever happens to a module's text, reading it ends in a module or an error, never in a panic,
//! and what is read prints to a text that reads back the same.

mod common;

use std::panic::{AssertUnwindSafe, catch_unwind};

use common::Random;
use millrace_ir::text::{parse, print};
use millrace_ir::verify::{report, verify};
use millrace_ir::{Kind, Module};

/// Numbers at the edges of what the types behind them hold.
const FORGERIES: [&str; 18] = [
    "0",
    "1",
    "-1",
    "255",
    "65537",
    "2147483648",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551615",
    "18446744073709551616",
    "999999999999999999999999999999",
    "1e308",
    "1e999",
    "-0.0",
    "nan",
    "inf",
];

/// Pieces that open something, end something or mean something else elsewhere.
const PIECES: [&str; 35] = [
    "$t",
    "$q",
    "%0",
    "%99999",
    "@norm",
    "ceildiv($t, 3)",
    "max($t, $b)",
    "min($t, 4)",
    "state",
    "out[0]",
    " via k0",
    " loc(\"\")",
    "return",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    ",",
    ":",
    "=",
    "\"",
    "@",
    "%",
    "$",
    "//",
    "..=",
    "->",
    "max(",
    "ceildiv(",
    "- ",
    "\\u{",
    "\u{85}",
    "\u{1f600}",
];

/// Words, numbers, strings' parts and single characters, blanks included, in order.
fn tokens(text: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let wordy = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '.');
        let len =
            if wordy(first) { rest.find(|c| !wordy(c)).unwrap_or(rest.len()) } else { first.len_utf8() };
        tokens.push(&rest[..len]);
        rest = &rest[len..];
    }
    tokens
}

/// One change to `text`; `other` is a text to borrow from.
fn mutate(text: &str, other: &str, random: &mut Random) -> String {
    match random.below(11) {
        0 => {
            let mut bytes = text.as_bytes().to_vec();
            if !bytes.is_empty() {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        }
        1 => edit_tokens(text, |tokens| {
            let (a, b) = (random.below(tokens.len()), random.below(tokens.len()));
            tokens.swap(a, b);
        }),
        2 => edit_tokens(text, |tokens| {
            let start = random.below(tokens.len());
            let end = (start + 1 + random.below(6)).min(tokens.len());
            tokens.drain(start..end);
        }),
        3 => edit_lines(text, |lines| {
            let (from, to) = (random.below(lines.len()), random.below(lines.len()));
            lines.insert(to, lines[from]);
        }),
        4 => edit_lines(text, |lines| {
            let at = random.below(lines.len());
            lines.remove(at);
        }),
        5 => edit_lines(text, |lines| {
            let (a, b) = (random.below(lines.len()), random.below(lines.len()));
            lines.swap(a, b);
        }),
        6 | 7 => edit_tokens(text, |tokens| {
            let numbers: Vec<usize> =
                (0..tokens.len()).filter(|i| tokens[*i].starts_with(|c: char| c.is_ascii_digit())).collect();
            if let Some(at) = numbers.get(random.below(numbers.len())) {
                tokens[*at] = FORGERIES[random.below(FORGERIES.len())];
            }
        }),
        8 => {
            let borrowed = tokens(other);
            edit_tokens(text, |tokens| {
                let at = random.below(tokens.len());
                tokens[at] = borrowed[random.below(borrowed.len())];
            })
        }
        9 => {
            let piece = PIECES[random.below(PIECES.len())].repeat([1, 1, 1, 2, 40, 400][random.below(6)]);
            edit_tokens(text, |tokens| tokens.insert(random.below(tokens.len()), &piece))
        }
        _ => edit_tokens(text, |tokens| tokens.truncate(random.below(tokens.len()))),
    }
}

fn edit_tokens<'a>(text: &'a str, edit: impl FnOnce(&mut Vec<&'a str>)) -> String {
    let mut tokens = tokens(text);
    if !tokens.is_empty() {
        edit(&mut tokens);
    }
    tokens.concat()
}

fn edit_lines<'a>(text: &'a str, edit: impl FnOnce(&mut Vec<&'a str>)) -> String {
    let mut lines: Vec<&str> = text.split('\n').collect();
    edit(&mut lines);
    lines.join("\n")
}

/// What reading came to; panics if a promise of the text form is broken.
fn read(text: &str) -> Option<Module> {
    let module = match parse(text) {
        Ok(module) => module,
        Err(error) => {
            assert_eq!((error.kind(), error.code()), (Kind::BadInput, "ir/syntax"));
            let place = error.place().unwrap();
            let (line, column) = place.split_once(':').unwrap();
            let line: usize = line.parse().unwrap();
            assert!(line >= 1 && line <= text.lines().count().max(1), "line {line}");
            assert!(column.parse::<usize>().unwrap() >= 1);
            return None;
        }
    };
    let bounds = [
        module.weights.bound(),
        module.states.bound(),
        module.arenas.bound(),
        module.kernels.bound(),
        module.graph.nodes.bound(),
        module.graph.values.bound(),
    ];
    assert!(bounds.iter().all(|b| *b <= text.len()), "{bounds:?} slots for {} bytes", text.len());
    let printed = print(&module);
    let again = parse(&printed).unwrap_or_else(|e| panic!("printed text does not read back: {e}\n{printed}"));
    assert_eq!(print(&again), printed);
    // NaN is unequal to itself; its modules are compared as text only.
    if !printed.contains("nan") {
        assert!(again == module, "the module read back differs\n{printed}");
    }
    Some(module)
}

/// Whether the module is legal; if not, its report has a line for every violation.
fn judge(module: &Module) -> bool {
    let Err(violations) = verify(module) else { return true };
    assert!(report(module, &violations).lines().count() >= violations.len());
    false
}

#[test]
fn broken_texts_never_panic_and_survivors_read_back_the_same() {
    let seeds = common::modules();
    let mut random = Random(1);
    let (mut parsed, mut legal) = (0, 0);
    for round in 0..30_000 {
        let (name, text) = &seeds[round % seeds.len()];
        let mut text = text.clone();
        for _ in 0..1 + random.below(6) / 3 {
            let other = random.below(seeds.len());
            text = mutate(&text, &seeds[other].1, &mut random);
        }
        let outcome = catch_unwind(AssertUnwindSafe(|| read(&text).map(|module| judge(&module))));
        match outcome {
            Ok(None) => {}
            Ok(Some(sound)) => {
                parsed += 1;
                legal += usize::from(sound);
            }
            Err(_) => panic!("round {round}, a mutation of {name}:\n{text}"),
        }
    }
    // Mutations that never get past the lexer, or that change nothing, would test little.
    assert!(parsed > 1000, "only {parsed} texts were read");
    assert!(legal > 100 && legal < parsed, "{legal} of {parsed} modules were legal");
}
