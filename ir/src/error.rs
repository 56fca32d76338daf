//! The one error type of the workspace: what happened, where, whose fault, what to do next.
//!
//! Every library function that can fail on input returns [`Error`]. It carries a stable `code`
//! (a slug such as `engine/truncated`, greppable in docs and tests), a [`Kind`] that fixes the process
//! exit code, the message, the place (file, line, tensor, node) and the next step. Libraries never print.

use std::fmt;

/// Whose fault it is, and thereby the exit code of the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The caller used the interface wrongly (exit code 1).
    Usage,
    /// A file or value the user gave is wrong (exit code 2).
    BadInput,
    /// The input is right but this version cannot do it (exit code 3).
    Unsupported,
    /// Memory or disk space does not suffice (exit code 4).
    OutOfMemory,
    /// The engine does not fit this runtime, device or weights (exit code 5).
    Incompatible,
    /// A device or driver failed or is absent (exit code 6).
    Device,
    /// A comparison found a difference (exit code 7).
    Mismatch,
    /// A defect of Millrace itself: please report it (exit code 70).
    Internal,
}

impl Kind {
    /// The process exit code of this kind.
    pub fn exit_code(self) -> i32 {
        match self {
            Kind::Usage => 1,
            Kind::BadInput => 2,
            Kind::Unsupported => 3,
            Kind::OutOfMemory => 4,
            Kind::Incompatible => 5,
            Kind::Device => 6,
            Kind::Mismatch => 7,
            Kind::Internal => 70,
        }
    }
}

/// What went wrong, where, and what to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(Box<Body>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Body {
    kind: Kind,
    code: &'static str,
    message: String,
    place: Option<String>,
    hint: Option<String>,
}

/// Result with the workspace's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A new error of `kind` with a stable `code` slug (`area/what`).
    pub fn new(kind: Kind, code: &'static str, message: impl Into<String>) -> Self {
        Error(Box::new(Body { kind, code, message: message.into(), place: None, hint: None }))
    }

    /// Adds the place: a file, a line, a tensor, a node. An inner place is kept and prefixed.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.0.place = Some(match self.0.place.take() {
            Some(inner) => format!("{place}: {inner}"),
            None => place.to_string(),
        });
        self
    }

    /// Adds the next step. The innermost hint wins, as it knows most.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.0.hint.get_or_insert_with(|| hint.into());
        self
    }

    /// Whose fault it is.
    pub fn kind(&self) -> Kind {
        self.0.kind
    }

    /// The stable slug.
    pub fn code(&self) -> &'static str {
        self.0.code
    }

    /// What happened, without place and hint.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// Where it happened.
    pub fn place(&self) -> Option<&str> {
        self.0.place.as_deref()
    }

    /// What to do next.
    pub fn next_step(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// An I/O failure of `action` (for example "read"); a full disk is [`Kind::OutOfMemory`].
    pub fn io(action: &str, path: &std::path::Path, source: &std::io::Error) -> Self {
        let full =
            matches!(source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded);
        let error = if full {
            Error::new(Kind::OutOfMemory, "io/disk-full", format!("cannot {action}: {source}"))
                .hint("free disk space or write to another folder; the old file, if any, is unchanged")
        } else {
            Error::new(Kind::BadInput, "io/failed", format!("cannot {action}: {source}"))
                .hint("check that the path exists and that you may access it")
        };
        error.at(path.display())
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error[{}]", self.0.code)?;
        if let Some(place) = &self.0.place {
            write!(f, " {place}")?;
        }
        write!(f, ": {}", self.0.message)?;
        if let Some(hint) = &self.0.hint {
            write!(f, "\n  next: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shows_code_place_message_and_next_step() {
        let error = Error::new(Kind::BadInput, "x/y", "it broke").at("inner").at("outer").hint("a").hint("b");
        assert_eq!(error.to_string(), "error[x/y] outer: inner: it broke\n  next: a");
        assert_eq!(error.kind().exit_code(), 2);
    }
}
