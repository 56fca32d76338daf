//! The panel order of matmul weights.

/// First source row and number of rows of each panel of a weight whose rows fall into `segments`.
pub fn packed_panels(segments: &[usize], panel: usize) -> impl Iterator<Item = (usize, usize)> + '_ {
    let panel = panel.max(1);
    segments
        .iter()
        .scan(0usize, |start, n| {
            let first = *start;
            *start += n;
            Some((first, *n))
        })
        .flat_map(move |(first, n)| {
            (0..n.div_ceil(panel)).map(move |p| (first + p * panel, panel.min(n - p * panel)))
        })
}

/// Packs `rows` contiguous rows of `columns` elements into one panel: element `(j, i)` of the rows goes to place
/// `i * panel + j`; places of missing rows are zero.
pub fn pack_panel(source: &[u8], rows: usize, columns: usize, element: usize, panel: usize, out: &mut [u8]) {
    match element {
        1 => pack::<1>(source, rows, columns, panel, out),
        2 => pack::<2>(source, rows, columns, panel, out),
        4 => pack::<4>(source, rows, columns, panel, out),
        8 => pack::<8>(source, rows, columns, panel, out),
        _ => {}
    }
}

fn pack<const E: usize>(source: &[u8], rows: usize, columns: usize, panel: usize, out: &mut [u8]) {
    let source = source.as_chunks::<E>().0;
    let out = out.as_chunks_mut::<E>().0;
    // Column blocks keep the written lines of the panel in the first-level cache.
    const BLOCK: usize = 64;
    for start in (0..columns).step_by(BLOCK) {
        let end = columns.min(start + BLOCK);
        for j in 0..panel {
            if j < rows {
                let row = &source[j * columns + start..j * columns + end];
                for (i, value) in row.iter().enumerate() {
                    out[(start + i) * panel + j] = *value;
                }
            } else {
                for i in start..end {
                    out[i * panel + j] = [0; E];
                }
            }
        }
    }
}
