//! Names whose numbers grow by a constant from layer to layer.

/// A name for each layer: `layers.3.q`, `layers.4.q` and so on.
#[derive(Debug)]
pub(super) struct Names<'a>(Vec<Piece<'a>>);

#[derive(Debug)]
enum Piece<'a> {
    Text(&'a str),
    /// The number in the first name, and how much it grows.
    Number(i64, i64),
}

/// The pieces of a name: stretches of digits that spell a number without leading zeros, and the rest.
fn pieces(name: &str) -> impl Iterator<Item = (&str, Option<i64>)> {
    let mut rest = name;
    std::iter::from_fn(move || {
        let first = rest.as_bytes().first()?.is_ascii_digit();
        let end = rest.bytes().position(|b| b.is_ascii_digit() != first).unwrap_or(rest.len());
        let (piece, after) = rest.split_at(end);
        rest = after;
        let number = first && piece.len() <= 15 && (piece == "0" || !piece.starts_with('0'));
        Some((piece, if number { piece.parse().ok() } else { None }))
    })
}

impl<'a> Names<'a> {
    /// The names that begin with these two.
    pub(super) fn of(first: &'a str, second: &str) -> Option<Names<'a>> {
        let mut others = pieces(second);
        let mut list = Vec::new();
        for (piece, number) in pieces(first) {
            let (other, other_number) = others.next()?;
            list.push(match (number, other_number) {
                (Some(a), Some(b)) if a != b => Piece::Number(a, b - a),
                _ if piece == other => Piece::Text(piece),
                _ => return None,
            });
        }
        others.next().is_none().then_some(Names(list))
    }

    /// Name number `at`, from 0.
    pub(super) fn name(&self, at: usize) -> Option<String> {
        use std::fmt::Write;
        // Texts as they are, and room for numbers of six digits.
        let length = |piece: &Piece<'_>| if let Piece::Text(text) = piece { text.len() } else { 6 };
        let mut name = String::with_capacity(self.0.iter().map(length).sum());
        for piece in &self.0 {
            match piece {
                Piece::Text(text) => name.push_str(text),
                Piece::Number(first, step) => {
                    let number = first.checked_add(step.checked_mul(i64::try_from(at).ok()?)?)?;
                    // Writing to a string cannot fail.
                    let _ = write!(name, "{}", u64::try_from(number).ok()?);
                }
            }
        }
        Some(name)
    }

    /// Whether `name` is name number `at`.
    pub(super) fn is(&self, name: &str, at: usize) -> bool {
        let mut found = pieces(name);
        let equal = |piece: &Piece<'_>| {
            let Some((text, number)) = found.next() else { return false };
            match piece {
                Piece::Text(wanted) => text == *wanted,
                Piece::Number(first, step) => number == Some(first + step * at as i64),
            }
        };
        self.0.iter().all(equal) && found.next().is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_differ_grow() {
        let names = Names::of("h.9.q.pack32+kv9", "h.10.q.pack32+kv11").unwrap();
        assert_eq!(names.name(0).unwrap(), "h.9.q.pack32+kv9");
        assert_eq!(names.name(3).unwrap(), "h.12.q.pack32+kv15");
        assert!(names.is("h.10.q.pack32+kv11", 1));
        assert!(!names.is("h.10.q.pack32+kv11", 2));
        assert!(!names.is("h.10.q.pack32+kv11.2", 1));
    }

    #[test]
    fn other_differences_are_none_of_a_layer() {
        assert!(Names::of("h.1.q", "h.2.k").is_none());
        assert!(Names::of("h.1", "h.1.2").is_none());
        assert!(Names::of("h.01", "h.02").is_none());
        assert!(Names::of("h.2", "h.1").unwrap().name(3).is_none());
    }
}
