//! Millrace compiler.
