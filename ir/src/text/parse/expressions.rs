//! Types, dims and attributes: what nests, within [`MAX_NESTING`].

use super::super::lexer::Tok;
use super::cursor::Parser;
use crate::attr::Attr;
use crate::dim::{self, Dim, Sym};
use crate::dtype::DType;
use crate::error::Result;
use crate::nearest::nearest;
use crate::types::TensorType;

/// Deepest nesting of dims and attributes.
const MAX_NESTING: usize = 32;

impl<'a> Parser<'a> {
    pub(super) fn sym(&mut self) -> Result<Sym> {
        match *self.peek() {
            Tok::Sym(name) => match Sym::new(name) {
                Some(sym) => {
                    self.at += 1;
                    Ok(sym)
                }
                None => self.unexpected("a symbol of 1 to 15 letters, digits or `_`"),
            },
            _ => self.unexpected("a symbol such as `$t`"),
        }
    }

    pub(super) fn dtype(&mut self) -> Result<DType> {
        let at = self.at;
        let word = self.word("an element type")?;
        DType::parse(word).ok_or_else(|| {
            let error = self.error_at(at, format!("{} is no element type", Tok::Word(word).show()));
            let names = DType::ALL.map(DType::name);
            match nearest(word, names) {
                Some(close) => error.hint(format!("did you mean `{close}`?")),
                None => error.hint(format!("element types are {}", names.join(", "))),
            }
        })
    }

    pub(super) fn ty(&mut self) -> Result<TensorType> {
        let dtype = self.dtype()?;
        self.expect("[")?;
        let shape = self.list("]", |p| p.dim(0))?;
        Ok(TensorType { dtype, shape: shape.into() })
    }

    pub(super) fn deeper(&self, depth: usize) -> Result<()> {
        if depth < MAX_NESTING {
            Ok(())
        } else {
            Err(self.error_at(self.at, format!("expressions nest deeper than {MAX_NESTING}")))
        }
    }

    /// `product (+ product | - product)*`, perhaps with a sign in front.
    pub(super) fn dim(&mut self, depth: usize) -> Result<Dim> {
        self.deeper(depth)?;
        let negative = self.take("-");
        let mut sum = self.dim_product(depth, negative)?;
        while let Some(negative) = self.take("+").then_some(false).or_else(|| self.take("-").then_some(true))
        {
            sum = sum.add(&self.dim_product(depth, negative)?);
            self.bounded(sum.size())?;
        }
        Ok(sum)
    }

    pub(super) fn bounded(&self, size: usize) -> Result<()> {
        if size <= dim::MAX_SIZE {
            return Ok(());
        }
        Err(self.error_at(self.at, format!("the dim has more than {} terms and factors", dim::MAX_SIZE)))
    }

    pub(super) fn dim_product(&mut self, depth: usize, negative: bool) -> Result<Dim> {
        // The sign belongs to a literal: the smallest integer has no positive counterpart.
        let mut product = match self.peek() {
            Tok::Int(_) => self.literal(negative)?,
            _ if negative => self.dim_atom(depth)?.mul(&Dim::from(-1i64)),
            _ => self.dim_atom(depth)?,
        };
        while self.take("*") {
            let factor = self.dim_atom(depth)?;
            self.bounded(product.term_count() * factor.term_count())?;
            product = product.mul(&factor);
            self.bounded(product.size())?;
        }
        Ok(product)
    }

    pub(super) fn literal(&mut self, negative: bool) -> Result<Dim> {
        let at = self.at;
        let value = i128::from(self.int()?) * if negative { -1 } else { 1 };
        i64::try_from(value)
            .map(Dim::from)
            .map_err(|_| self.error_at(at, format!("`{value}` does not fit in 64 bits")))
    }

    pub(super) fn dim_atom(&mut self, depth: usize) -> Result<Dim> {
        match *self.peek() {
            Tok::Int(_) => self.literal(false),
            Tok::Sym(_) => Ok(Dim::from(self.sym()?)),
            Tok::Punct("(") => {
                self.at += 1;
                let dim = self.dim(depth + 1)?;
                self.expect(")")?;
                Ok(dim)
            }
            Tok::Word("ceildiv") => {
                self.at += 1;
                self.expect("(")?;
                let dim = self.dim(depth + 1)?;
                self.expect(",")?;
                let at = self.at;
                let divisor = i64::try_from(self.int()?).ok().filter(|d| *d > 0);
                let divisor = divisor.ok_or_else(|| self.error_at(at, "a divisor is a positive integer"))?;
                self.expect(")")?;
                Ok(dim.ceil_div(divisor))
            }
            Tok::Word(word @ ("max" | "min")) => {
                self.at += 1;
                self.expect("(")?;
                let args = self.list(")", |p| p.dim(depth + 1))?;
                if args.is_empty() {
                    return self.unexpected("an argument");
                }
                self.bounded(args.iter().map(Dim::size).sum())?;
                Ok(if word == "max" { Dim::max_all(&args) } else { Dim::min_all(&args) })
            }
            _ => self.unexpected("a dim"),
        }
    }

    pub(super) fn attr(&mut self, depth: usize) -> Result<Attr> {
        self.deeper(depth)?;
        match self.peek().clone() {
            Tok::Float(value) => {
                self.at += 1;
                Ok(Attr::Float(value))
            }
            Tok::Punct("-") => match self.tokens.get(self.at + 1).map(|t| t.kind.clone()) {
                Some(Tok::Float(value)) => {
                    self.at += 2;
                    Ok(Attr::Float(-value))
                }
                Some(Tok::Word("inf")) => {
                    self.at += 2;
                    Ok(Attr::Float(f64::NEG_INFINITY))
                }
                _ => Ok(Attr::Dim(self.dim(depth)?)),
            },
            Tok::Str(text) => {
                self.at += 1;
                Ok(Attr::Str(text))
            }
            Tok::Punct("[") => {
                self.at += 1;
                Ok(Attr::List(self.list("]", |p| p.attr(depth + 1))?))
            }
            Tok::Word("inf") => {
                self.at += 1;
                Ok(Attr::Float(f64::INFINITY))
            }
            Tok::Word("nan") => {
                self.at += 1;
                Ok(Attr::Float(f64::NAN))
            }
            // `max(i0, i1)` is a call of a step, `max($a, $b)` a dim.
            Tok::Word("ceildiv") => Ok(Attr::Dim(self.dim(depth)?)),
            Tok::Word("max" | "min") if self.starts_dim_call() => Ok(Attr::Dim(self.dim(depth)?)),
            Tok::Word(word) => {
                self.at += 1;
                if self.take("(") {
                    let args = self.list(")", |p| p.attr(depth + 1))?;
                    Ok(Attr::Call(word.to_string(), args))
                } else {
                    Ok(Attr::Word(word.to_string()))
                }
            }
            _ => Ok(Attr::Dim(self.dim(depth)?)),
        }
    }

    /// Whether the call at hand is a function of dims: steps of an op read words and floats, never these.
    pub(super) fn starts_dim_call(&self) -> bool {
        let after = |n: usize| self.tokens.get(self.at + n).map(|t| &t.kind);
        match after(2) {
            Some(Tok::Int(_) | Tok::Sym(_) | Tok::Punct("(")) => true,
            Some(Tok::Word("ceildiv" | "max" | "min")) => after(3) == Some(&Tok::Punct("(")),
            Some(Tok::Punct("-")) => !matches!(after(3), Some(Tok::Float(_) | Tok::Word("inf"))),
            _ => false,
        }
    }
}
