//! Millrace facade.
