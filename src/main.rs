//! millrace binary
fn main() {}
