//! Collects what is wrong with a checkpoint, so that one run shows all of it.

use crate::error::{Error, Result};

/// Number of problems shown; the rest is counted.
const SHOWN: usize = 20;

/// Errors in the order in which they were found.
#[derive(Debug, Default)]
pub(super) struct Problems {
    shown: Vec<Error>,
    total: usize,
}

impl Problems {
    pub(super) fn add(&mut self, error: Error) {
        self.total += 1;
        if self.shown.len() < SHOWN {
            self.shown.push(error);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.total == 0
    }

    /// `Ok` without problems. One problem is returned as it is; several become one error with the kind, code and hint
    /// of the first and a message that lists them.
    pub(super) fn finish(mut self) -> Result<()> {
        let first = match self.shown.first() {
            None => return Ok(()),
            Some(_) if self.total == 1 => return Err(self.shown.remove(0)),
            Some(first) => first,
        };
        let mut message = format!("{} problems:", self.total);
        for problem in &self.shown {
            let place = problem.place().unwrap_or("checkpoint");
            message.push_str(&format!("\n  {} {place}: {}", problem.code(), problem.message()));
        }
        if self.total > self.shown.len() {
            message.push_str(&format!("\n  and {} more", self.total - self.shown.len()));
        }
        let error = Error::new(first.kind(), first.code(), message);
        Err(match first.next_step() {
            Some(hint) => error.hint(hint),
            None => error,
        })
    }
}
