//! The order of matmul weights in cores: blocks of eight rows by eight columns, a panel of eight rows after the other.

/// First source row and number of rows of panel `index`; none beyond the last. With `alternate`, the panels of two equal
/// segments take turns.
pub fn core_panels(segments: &[usize], alternate: bool, index: usize) -> Option<(usize, usize)> {
    let (mut first, mut panel) = (0usize, index);
    if alternate && let [rows, _] = segments {
        let at = index / 2 * 8;
        return (at < *rows).then(|| (index % 2 * rows + at, 8.min(rows - at)));
    }
    for rows in segments {
        let panels = rows.div_ceil(8);
        if panel < panels {
            return Some((first + panel * 8, 8.min(rows - panel * 8)));
        }
        panel -= panels;
        first += rows;
    }
    None
}

/// Place of each source row: eight times its panel plus its row in the panel.
pub fn core_rows(segments: &[usize], alternate: bool) -> Vec<usize> {
    let panels: usize = segments.iter().map(|s| s.div_ceil(8)).sum();
    let mut places = vec![0; segments.iter().sum()];
    for panel in 0..panels {
        if let Some((first, rows)) = core_panels(segments, alternate, panel) {
            (0..rows).for_each(|r| places[first + r] = panel * 8 + r);
        }
    }
    places
}

/// Cuts rows of `row` bytes into pieces of `piece` bytes: piece `b` of row `r` goes to place `8 b + r`. Rows beyond the
/// source are left as they are.
pub(super) fn cut(source: &[u8], row: usize, piece: usize, out: &mut [u8]) {
    for (r, bytes) in source.chunks_exact(row.max(1)).take(8).enumerate() {
        for (b, from) in bytes.chunks_exact(piece.max(1)).enumerate() {
            let to = (b * 8 + r) * piece;
            out[to..to + piece].copy_from_slice(from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_fill_whole_panels() {
        let panels: Vec<_> = (0..4).map(|p| core_panels(&[10, 3], false, p)).collect();
        assert_eq!(panels, [Some((0, 8)), Some((8, 2)), Some((10, 3)), None]);
        assert_eq!(core_rows(&[10, 3], false)[8..], [8, 9, 16, 17, 18]);
    }

    #[test]
    fn gated_panels_alternate() {
        let panels: Vec<_> = (0..5).map(|p| core_panels(&[12, 12], true, p)).collect();
        assert_eq!(panels, [Some((0, 8)), Some((12, 8)), Some((8, 4)), Some((20, 4)), None]);
    }

    #[test]
    fn a_core_holds_eight_rows_of_eight_columns() {
        // Two rows of sixteen one-byte elements.
        let source: Vec<u8> = (0..32).collect();
        let mut out = vec![255; 128];
        cut(&source, 16, 8, &mut out);
        assert_eq!(out[..8], source[..8]);
        assert_eq!(out[8..16], source[16..24]);
        assert_eq!(out[64..72], source[8..16]);
        assert_eq!(out[72..80], source[24..32]);
        assert_eq!(out[16], 255);
    }
}
