//! The nearest of known names, for hints.

/// The candidate with the smallest edit distance to `name`, if it is close enough to be a slip.
pub fn nearest<'a>(name: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // The distance takes quadratic time, and nobody mistypes a name this long.
    if name.len() > 256 {
        return None;
    }
    let limit = (name.chars().count() / 3).clamp(1, 8);
    candidates
        .into_iter()
        .filter(|c| c.len().abs_diff(name.len()) <= limit)
        .map(|c| (distance(name, c), c))
        .filter(|(d, _)| *d <= limit)
        .min()
        .map(|(_, c)| c)
}

/// Levenshtein distance in characters.
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replace = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_slips_and_not_strangers() {
        assert_eq!(nearest("rms_nrom", ["softmax", "rms_norm", "layer_norm"]), Some("rms_norm"));
        assert_eq!(nearest("conv3d", ["softmax", "conv2d"]), Some("conv2d"));
        assert_eq!(nearest("frobnicate", ["softmax", "conv2d"]), None);
    }
}
