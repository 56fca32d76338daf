//! The parser's state and the tokens it takes one by one.

use std::collections::HashMap;

use super::super::lexer::{Tok, Token};
use crate::error::{Error, Kind, Result};
use crate::graph::*;

/// Where the parser stands and which names it knows.
pub(super) struct Parser<'a> {
    pub(super) tokens: Vec<Token<'a>>,
    pub(super) at: usize,
    /// Ids are below the length of the text, so that arenas stay proportional to it.
    pub(super) limit: u64,
    /// Every declared weight and state: expressions may name later ones.
    pub(super) weights: HashMap<String, WeightId>,
    pub(super) states: HashMap<String, StateId>,
    pub(super) arenas: HashMap<String, ArenaId>,
}

impl<'a> Parser<'a> {
    pub(super) fn peek(&self) -> &Tok<'a> {
        &self.tokens[self.at.min(self.tokens.len() - 1)].kind
    }

    pub(super) fn next(&mut self) -> Tok<'a> {
        let token = self.peek().clone();
        self.at += 1;
        token
    }

    pub(super) fn error_at(&self, at: usize, message: impl Into<String>) -> Error {
        let token = &self.tokens[at.min(self.tokens.len() - 1)];
        Error::new(Kind::BadInput, "ir/syntax", message).at(format!("{}:{}", token.line, token.column))
    }

    pub(super) fn unexpected<T>(&self, expected: &str) -> Result<T> {
        Err(self.error_at(self.at, format!("expected {expected}, found {}", self.peek().show())))
    }

    pub(super) fn is(&self, punct: &str) -> bool {
        matches!(self.peek(), Tok::Punct(p) if *p == punct)
    }

    pub(super) fn take(&mut self, punct: &str) -> bool {
        let found = self.is(punct);
        self.at += usize::from(found);
        found
    }

    pub(super) fn expect(&mut self, punct: &str) -> Result<()> {
        if self.take(punct) { Ok(()) } else { self.unexpected(&format!("`{punct}`")) }
    }

    pub(super) fn take_word(&mut self, word: &str) -> bool {
        let found = matches!(self.peek(), Tok::Word(w) if *w == word);
        self.at += usize::from(found);
        found
    }

    pub(super) fn expect_word(&mut self, word: &str) -> Result<()> {
        if self.take_word(word) { Ok(()) } else { self.unexpected(&format!("`{word}`")) }
    }

    pub(super) fn expect_end(&mut self) -> Result<()> {
        if *self.peek() == Tok::End { Ok(()) } else { self.unexpected("the end of the text") }
    }

    pub(super) fn word(&mut self, what: &str) -> Result<&'a str> {
        match *self.peek() {
            Tok::Word(w) => {
                self.at += 1;
                Ok(w)
            }
            _ => self.unexpected(what),
        }
    }

    pub(super) fn at_name(&mut self, what: &str) -> Result<String> {
        match self.peek() {
            Tok::At(name) => {
                let name = name.clone();
                self.at += 1;
                Ok(name)
            }
            _ => self.unexpected(what),
        }
    }

    /// A bare or quoted name.
    pub(super) fn name(&mut self, what: &str) -> Result<String> {
        match self.peek().clone() {
            Tok::Word(w) => {
                self.at += 1;
                Ok(w.to_string())
            }
            Tok::Str(s) => {
                self.at += 1;
                Ok(s)
            }
            _ => self.unexpected(what),
        }
    }

    pub(super) fn string(&mut self, what: &str) -> Result<String> {
        match self.peek().clone() {
            Tok::Str(s) => {
                self.at += 1;
                Ok(s)
            }
            _ => self.unexpected(what),
        }
    }

    pub(super) fn int(&mut self) -> Result<u64> {
        match *self.peek() {
            Tok::Int(i) => {
                self.at += 1;
                Ok(i)
            }
            _ => self.unexpected("a non-negative integer"),
        }
    }

    pub(super) fn usize(&mut self) -> Result<usize> {
        let at = self.at;
        usize::try_from(self.int()?).map_err(|_| self.error_at(at, "the number is too large"))
    }

    pub(super) fn float(&mut self) -> Result<f64> {
        let at = self.at;
        let attr = self.attr(0)?;
        crate::attr::as_float("value", &attr).map_err(|m| self.error_at(at, m))
    }

    /// `first`, then more after commas, until `close`.
    pub(super) fn list<T>(
        &mut self,
        close: &str,
        mut item: impl FnMut(&mut Self) -> Result<T>,
    ) -> Result<Vec<T>> {
        let mut items = Vec::new();
        if self.take(close) {
            return Ok(items);
        }
        loop {
            items.push(item(self)?);
            if !self.take(",") {
                self.expect(close)?;
                return Ok(items);
            }
        }
    }

    pub(super) fn key(&mut self, key: &str) -> Result<()> {
        self.expect_word(key)?;
        self.expect("=")
    }

    pub(super) fn usize_list(&mut self) -> Result<Vec<usize>> {
        self.expect("[")?;
        self.list("]", Self::usize)
    }
}
