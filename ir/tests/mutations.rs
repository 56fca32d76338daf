//! Mutated texts: parsing and verifying never panics and never takes long, and what verifies survives printing.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use millrace_ir::text::{parse, print};
use millrace_ir::verify::{report, verify};

/// Mutants over all seeds.
const MUTANTS: usize = 12_000;

/// SplitMix64 (Steele, Lea and Flood 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }
}

/// Runs of letters and digits, and single other characters; joined they are the text.
fn pieces(text: &str) -> Vec<&str> {
    let mut pieces = Vec::new();
    let mut start = 0;
    let mut in_word = false;
    for (at, c) in text.char_indices() {
        let word = c.is_alphanumeric() || c == '_';
        if at > start && !(word && in_word) {
            pieces.push(&text[start..at]);
            start = at;
        }
        in_word = word;
    }
    pieces.push(&text[start..]);
    pieces
}

const NUMBERS: [&str; 14] = [
    "0",
    "1",
    "2",
    "3",
    "64",
    "-1",
    "65",
    "1024",
    "2147483648",
    "4294967296",
    "70368744177664",
    "9223372036854775807",
    "9223372036854775808",
    "18446744073709551616",
];

const TOKENS: [&str; 34] = [
    "$t",
    "$q",
    "%0",
    "%1",
    "%99999",
    "@kv.k",
    "@norm",
    "ceildiv($t, 3)",
    "max($t, $b)",
    "min($t, 4)",
    "-",
    "+",
    "*",
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
    "\\u{41}",
    "nan",
    "-inf",
    "1e999",
    "state",
    "out[0]",
    "via k0",
    "loc(\"\")",
    "exp",
    "return",
    "é",
];

fn mutate(seed: &str, random: &mut Random) -> String {
    match random.below(6) {
        0 => {
            let mut bytes = seed.as_bytes().to_vec();
            let at = random.below(bytes.len());
            bytes[at] ^= 1 << random.below(8);
            String::from_utf8_lossy(&bytes).into_owned()
        }
        1 => {
            let mut lines: Vec<&str> = seed.lines().collect();
            let (from, to) = (random.below(lines.len()), random.below(lines.len()));
            match random.below(3) {
                0 => lines.insert(to, lines[from]),
                1 => drop(lines.remove(from)),
                _ => lines.swap(from, to),
            }
            lines.join("\n") + "\n"
        }
        kind => {
            let mut parts = pieces(seed);
            let (at, other) = (random.below(parts.len()), random.below(parts.len()));
            let numbers: Vec<usize> =
                (0..parts.len()).filter(|i| parts[*i].starts_with(|c: char| c.is_ascii_digit())).collect();
            match kind {
                2 => parts.swap(at, other),
                3 => drop(parts.remove(at)),
                4 if !numbers.is_empty() => parts[random.pick(&numbers)] = random.pick(&NUMBERS),
                _ => parts.insert(at, random.pick(&TOKENS)),
            }
            parts.concat()
        }
    }
}

fn seeds() -> Vec<String> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/modules");
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|p| fs::read_to_string(p).unwrap()).collect()
}

/// Whether the mutant parsed and whether it verified.
fn check(text: &str) -> (bool, bool) {
    let Ok(module) = parse(text) else { return (false, false) };
    let printed = print(&module);
    let verified = match verify(&module) {
        Ok(_) => true,
        Err(violations) => {
            report(&module, &violations);
            false
        }
    };
    if verified {
        let again = parse(&printed).unwrap_or_else(|e| panic!("{e}\n{printed}"));
        assert_eq!(print(&again), printed);
        // A float that is not a number differs from itself.
        assert!(again == module || printed.contains("nan"), "{printed}");
        assert!(verify(&again).is_ok(), "{printed}");
    }
    (true, verified)
}

#[test]
fn mutants_neither_panic_nor_linger() {
    let seeds = seeds();
    let mut random = Random(20_240_601);
    let (mut parsed, mut verified) = (0, 0);
    for round in 0..MUTANTS {
        let mut text = mutate(&seeds[round % seeds.len()], &mut random);
        for _ in 0..random.below(3) {
            text = mutate(&text, &mut random);
        }
        let started = Instant::now();
        let result = std::panic::catch_unwind(|| check(&text));
        let (parses, verifies) = result.unwrap_or_else(|_| panic!("mutant {round} panics:\n{text}"));
        assert!(started.elapsed() < Duration::from_secs(5), "mutant {round} lingers:\n{text}");
        parsed += usize::from(parses);
        verified += usize::from(verifies);
    }
    // Mutants that all fail at the first token would test nothing.
    assert!(parsed > MUTANTS / 20 && verified > MUTANTS / 50, "{parsed} parsed, {verified} verified");
}

#[test]
fn texts_made_to_hurt_are_refused_or_done_quickly() {
    let module = |body: &str| format!("module @m phase imported {{\n{body}\n}}\n");
    let graph = |node: &str| {
        let dims: String = ('a'..='z').map(|c| format!("dim ${c} in 1..=64\n")).collect();
        module(&format!("{dims}graph @g(%0 \"x\": f32[$a]) -> (\"y\": f32[$a]) {{\n{node}\nreturn %1\n}}"))
    };
    let sum: Vec<String> = ('a'..='z').map(|c| format!("${c}")).collect();
    let factor = format!("({})", sum.join(" + "));
    let pairs: Vec<String> =
        ('a'..='y').step_by(2).map(|c| format!("${c} + ${}", (c as u8 + 1) as char)).collect();
    let squares = |n: usize| (0..n).map(|i| format!("{}*$a + $b", i + 2)).collect::<Vec<_>>().join(", ");
    let texts = [
        graph(&format!("%1 = exp %0 : f32[{}$a{}]", "(".repeat(100_000), ")".repeat(100_000))),
        graph(&format!("%1 = reshape %0 {{shape = {}}} : f32[$a]", "[".repeat(100_000))),
        graph(&format!("%1 = pointwise %0 {{body = {}}} : f32[$a]", "f(".repeat(100_000))),
        graph(&format!("%1 = exp %0 : f32[{}]", "max(".repeat(100_000))),
        graph(&format!("%1 = exp %0 : f32[{}]", "-".repeat(100_000))),
        graph(&format!("%1 = exp %0 : f32[{}]", [factor.as_str(); 8].join("*"))),
        graph(&format!("%1 = reshape %0 {{shape = [{}]}} : f32[$a]", pairs.join(", "))),
        graph(&format!("%1 = reshape %0 {{shape = [{}]}} : f32[{}]", pairs.join(", "), pairs.join(", "))),
        graph(&format!("%1 = exp %0 : f32[max({})]", squares(64))),
        graph(&format!("%1 = exp %0 : f32[max({})]", squares(5_000))),
        graph("%4294967295 = exp %0 : f32[$a]"),
        graph("%18446744073709551615 = exp %0 : f32[$a]"),
        graph(&format!("%1 = {} %0 : f32[$a]", "x".repeat(500_000))),
        module(&format!(
            "weight @{0} : f32[1] = splat(1.0)\nweight @b : f32[1] = cast(@{0}b)",
            "a".repeat(300_000)
        )),
        module(
            &(0..20_000)
                .map(|i| format!("weight @w{i} : f32[1] = reshape(@w{})\n", i + 1))
                .collect::<String>(),
        ),
        (0..50_000).map(|_| "\"\\u{").collect(),
        "%".repeat(500_000),
        "é".repeat(300_000),
    ];
    for text in texts {
        let started = Instant::now();
        check(&text);
        assert!(started.elapsed() < Duration::from_secs(5), "lingers: {:.80}", text);
    }
}

#[test]
fn a_long_module_takes_linear_time() {
    let text = |nodes: usize| {
        let mut text = String::from("module @m phase imported {\n  state @s : f32[4, 4, 4, 4]\n");
        text.push_str("  graph @g(%0 \"x\": f32[4, 4, 4], %1 \"starts\": i32[3], %2 \"lens\": i32[2], ");
        text.push_str("%3 \"table\": i32[2, 4]) -> (\"y\": f32[4, 4, 4, 4]) {\n");
        for id in 4..4 + nodes {
            let version = if id == 4 { "@s".to_string() } else { format!("%{}", id - 1) };
            text.push_str(&format!("    %{id} = kv_append {version}, %0, %1, %2, %3 : f32[4, 4, 4, 4]\n"));
        }
        text.push_str(&format!("    return %{}\n  }}\n}}\n", 3 + nodes));
        text
    };
    let time = |nodes: usize| {
        let text = text(nodes);
        let started = Instant::now();
        let module = parse(&text).unwrap();
        assert!(verify(&module).is_ok());
        assert_eq!(print(&module), text);
        started.elapsed()
    };
    time(1_000);
    let (short, long) = (time(5_000), time(40_000));
    // Eight times the nodes; quadratic work would take sixty-four times as long.
    assert!(long < short * 32 + Duration::from_millis(200), "{short:?} and {long:?}");
}
