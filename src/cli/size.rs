//! Sizes on the command line: a number with a unit. A bare number is an error, because people mean different things
//! by it.

use millrace::{Error, Result};

use super::usage;

/// Bytes from `512MiB`, `8GB`, `1024B`.
///
/// # Errors
/// `usage/size` without a unit, for an unknown unit, or beyond 64 bits.
pub fn parse(text: &str) -> Result<u64> {
    let bad = |message: &str| -> Error {
        usage("usage/size", format!("`{text}` {message}")).hint("write sizes as 512MiB, 8GiB, 2GB or 4096B")
    };
    let split = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).ok_or_else(|| bad("has no unit"))?;
    let (number, unit) = text.split_at(split);
    let factor: u64 = match unit.trim() {
        "B" => 1,
        "kB" | "KB" => 1000,
        "MB" => 1000 * 1000,
        "GB" => 1000 * 1000 * 1000,
        "TB" => 1000u64.pow(4),
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(bad("has an unknown unit")),
    };
    let number: f64 = number.parse().map_err(|_| bad("is no number"))?;
    let bytes = number * factor as f64;
    if bytes.is_finite() && bytes < 2f64.powi(63) { Ok(bytes as u64) } else { Err(bad("is too large")) }
}

/// Bytes with a readable unit.
pub fn show(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_need_units() {
        assert_eq!(parse("8GiB").unwrap(), 8 << 30);
        assert_eq!(parse("1.5kB").unwrap(), 1500);
        assert_eq!(parse("100").unwrap_err().code(), "usage/size");
        assert_eq!(parse("5 parsecs").unwrap_err().code(), "usage/size");
        assert_eq!(show(1536), "1.50 KiB");
    }
}
