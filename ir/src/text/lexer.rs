//! Tokens of the text form.

use super::is_bare;
use crate::attr::Quoted;
use crate::error::{Error, Kind, Result};

/// A token with its place.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Token<'a> {
    pub kind: Tok<'a>,
    pub line: u32,
    pub column: u32,
}

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Tok<'a> {
    /// `matmul.fused`, `f32`; letters, digits, `_`, `.`, `-` after a letter or `_`.
    Word(&'a str),
    /// `"..."`, unescaped.
    Str(String),
    /// `12`
    Int(u64),
    /// `1.5`, `1e-5`
    Float(f64),
    /// `%7`
    Value(u64),
    /// `@name`
    At(String),
    /// `$t`
    Sym(&'a str),
    /// One of `{ } [ ] ( ) , : = + - * .. ..= ::  ->`
    Punct(&'static str),
    End,
}

impl Tok<'_> {
    /// The token as a message shows it: as written, cut after 60 characters.
    pub(super) fn show(&self) -> String {
        let cut = |text: &str| match text.char_indices().nth(60) {
            Some((end, _)) => format!("{}..", &text[..end]),
            None => text.to_string(),
        };
        match self {
            Tok::Word(w) => format!("`{}`", cut(w)),
            Tok::Str(s) => Quoted(&cut(s)).to_string(),
            Tok::Int(i) => format!("`{i}`"),
            Tok::Float(v) => format!("`{v:?}`"),
            Tok::Value(v) => format!("`%{v}`"),
            Tok::At(n) if is_bare(n) => format!("`@{}`", cut(n)),
            Tok::At(n) => format!("`@{}`", Quoted(&cut(n))),
            Tok::Sym(s) => format!("`${}`", cut(s)),
            Tok::Punct(p) => format!("`{p}`"),
            Tok::End => "the end of the text".to_string(),
        }
    }
}

const PUNCTUATION: [&str; 17] =
    ["..=", "..", "::", "->", "{", "}", "[", "]", "(", ")", ",", ":", "=", "+", "-", "*", "@"];

/// Splits `text` into tokens; the last one is [`Tok::End`].
pub(super) fn lex(text: &str) -> Result<Vec<Token<'_>>> {
    let mut tokens = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let number = number as u32 + 1;
        lex_line(line, number, &mut tokens)?;
    }
    let line = text.lines().count() as u32;
    tokens.push(Token { kind: Tok::End, line: line.max(1), column: 1 });
    Ok(tokens)
}

fn lex_line<'a>(line: &'a str, number: u32, tokens: &mut Vec<Token<'a>>) -> Result<()> {
    let (mut rest, mut before, mut column) = (line, line, 1u32);
    loop {
        rest = rest.trim_start();
        if rest.is_empty() || rest.starts_with("//") || rest.starts_with('#') {
            return Ok(());
        }
        // Columns count characters; each is counted once.
        column += before[..before.len() - rest.len()].chars().count() as u32;
        before = rest;
        let fail = |message: String| {
            Error::new(Kind::BadInput, "ir/syntax", message).at(format!("{number}:{column}"))
        };
        let (kind, used) = lex_one(rest).map_err(fail)?;
        tokens.push(Token { kind, line: number, column });
        rest = &rest[used..];
    }
}

fn word_len(text: &str, extra: fn(char) -> bool) -> usize {
    text.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || extra(c))).unwrap_or(text.len())
}

fn lex_one(text: &str) -> std::result::Result<(Tok<'_>, usize), String> {
    let first = text.chars().next().unwrap_or(' ');
    let name_char = |c: char| matches!(c, '.' | '-');
    match first {
        '"' => quoted(text).map(|(s, used)| (Tok::Str(s), used)),
        '%' => {
            let len = word_len(&text[1..], |_| false);
            let id = text[1..1 + len]
                .parse()
                .map_err(|_| format!("{} is no value", Tok::Word(&text[..1 + len]).show()))?;
            Ok((Tok::Value(id), 1 + len))
        }
        '$' => {
            let len = word_len(&text[1..], |_| false);
            Ok((Tok::Sym(&text[1..1 + len]), 1 + len))
        }
        '@' if text[1..].starts_with('"') => quoted(&text[1..]).map(|(s, used)| (Tok::At(s), 1 + used)),
        '@' => {
            let rest = &text[1..];
            if !rest.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_') {
                return Ok((Tok::Punct("@"), 1));
            }
            let len = word_len(rest, name_char);
            Ok((Tok::At(rest[..len].to_string()), 1 + len))
        }
        c if c.is_ascii_alphabetic() || c == '_' => {
            let len = word_len(text, name_char);
            Ok((Tok::Word(&text[..len]), len))
        }
        c if c.is_ascii_digit() => number(text),
        _ => PUNCTUATION
            .iter()
            .find(|p| text.starts_with(**p))
            .map(|p| (Tok::Punct(p), p.len()))
            .ok_or_else(|| format!("`{first}` starts no token")),
    }
}

fn number(text: &str) -> std::result::Result<(Tok<'_>, usize), String> {
    let digits = |at: usize| text[at..].bytes().take_while(u8::is_ascii_digit).count();
    let mut len = digits(0);
    let mut float = false;
    // A range such as `1..=8` is no decimal point.
    if text[len..].starts_with('.') && !text[len..].starts_with("..") {
        float = true;
        len += 1;
        len += digits(len);
    }
    if text[len..].starts_with(['e', 'E']) {
        let sign = usize::from(text[len + 1..].starts_with(['+', '-']));
        let exponent = digits(len + 1 + sign);
        if exponent > 0 {
            float = true;
            len += 1 + sign + exponent;
        }
    }
    let spelled = &text[..len];
    let token = if float { spelled.parse().map(Tok::Float).ok() } else { spelled.parse().map(Tok::Int).ok() };
    token.map(|t| (t, len)).ok_or_else(|| format!("{} is out of range", Tok::Word(spelled).show()))
}

fn quoted(text: &str) -> std::result::Result<(String, usize), String> {
    let mut out = String::new();
    let mut chars = text.char_indices().skip(1);
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((out, at + 1)),
            '\\' => match chars.next().map(|(_, c)| c) {
                Some('n') => out.push('\n'),
                Some('r') => out.push('\r'),
                Some('t') => out.push('\t'),
                Some(c @ ('"' | '\\')) => out.push(c),
                Some('u') => {
                    let rest = text.get(at + 2..).unwrap_or("");
                    let hex =
                        rest.strip_prefix('{').and_then(|r| r.split_once('}')).map_or("", |(hex, _)| hex);
                    let code = if hex.len() <= 8 { u32::from_str_radix(hex, 16).ok() } else { None };
                    let c = code.and_then(char::from_u32);
                    out.push(c.ok_or_else(|| "an escape `\\u{..}` names no character".to_string())?);
                    // The escape is ASCII: its braces and digits are one byte each.
                    chars.by_ref().take(hex.len() + 2).for_each(drop);
                }
                _ => return Err("unknown escape in a string".to_string()),
            },
            c => out.push(c),
        }
    }
    Err("a string does not end on its line".to_string())
}
