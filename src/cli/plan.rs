//! `millrace plan`: the activation planner on its own, for a list of buffers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Instant;

use millrace::ir::plan::{Effort, Item, check_packing, pack_with};
use millrace::{Error, Kind, Result};
use serde_json::json;

use super::{print, print_json};

/// Pack buffers with lifetimes into one arena.
///
/// The file is CSV with the columns id, lower, upper, size and, if there, alignment, in any order. A buffer lives from
/// instant lower up to, not including, upper.
#[derive(clap::Args)]
pub struct Args {
    /// A CSV file of buffers
    buffers: PathBuf,
    /// Stop at a plan of at most this many bytes; without it, look for the smallest
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    capacity: Option<u64>,
    /// How hard to search, in steps of about half a microsecond
    #[arg(long, default_value_t = 4_000_000)]
    steps: u64,
    /// Report as JSON
    #[arg(long)]
    json: bool,
}

/// The buffers of a file, with their ids.
fn read(path: &Path) -> Result<(Vec<String>, Vec<Item>)> {
    let bad = |line: u64, message: String| {
        Error::new(Kind::BadInput, "plan/bad-buffers", message)
            .at(format!("{}:{line}", path.display()))
            .hint("columns are id,lower,upper,size and optionally alignment")
    };
    let file = std::fs::File::open(path).map_err(|e| Error::io("read", path, &e))?;
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_reader(file);
    let header = reader.headers().map_err(|e| bad(1, e.to_string()))?.clone();
    let column = |name: &str| header.iter().position(|h| h == name);
    let [id, lower, upper, size] = ["id", "lower", "upper", "size"]
        .map(|name| column(name).ok_or_else(|| bad(1, format!("there is no column `{name}`"))));
    let (id, lower, upper, size, alignment) = (id?, lower?, upper?, size?, column("alignment"));
    let (mut ids, mut items) = (Vec::new(), Vec::new());
    let mut seen = BTreeSet::new();
    for (row, record) in reader.records().enumerate() {
        let record = record.map_err(|e| bad(row as u64 + 2, e.to_string()))?;
        let line = record.position().map_or(row as u64 + 2, csv::Position::line);
        let number = |column: usize, name: &str| -> Result<u64> {
            let text = record.get(column).unwrap_or("");
            text.parse().map_err(|_| bad(line, format!("{name} `{text}` is no whole number")))
        };
        let name = record.get(id).unwrap_or("").to_string();
        if !seen.insert(name.clone()) {
            return Err(bad(line, format!("id `{name}` is listed twice")));
        }
        let instant = |column: usize, name: &str| -> Result<usize> {
            usize::try_from(number(column, name)?).map_err(|_| bad(line, format!("{name} is too large")))
        };
        let align = alignment.map_or(Ok(1), |column| number(column, "alignment"))?;
        let item = Item {
            size: number(size, "size")?,
            start: instant(lower, "lower")?,
            end: instant(upper, "upper")?,
            align,
        };
        if item.start > item.end {
            return Err(bad(line, format!("lower {} is above upper {}", item.start, item.end)));
        }
        if item.size > 1 << 46 || align > 1 << 46 {
            return Err(bad(line, "sizes and alignments end at 2^46 bytes".to_string()));
        }
        ids.push(name);
        items.push(item);
    }
    Ok((ids, items))
}

/// Runs the verb.
pub fn main(args: &Args) -> Result<()> {
    let (ids, items) = read(&args.buffers)?;
    let start = Instant::now();
    let packing = pack_with(&items, Effort { capacity: args.capacity.unwrap_or(0), steps: args.steps });
    let seconds = start.elapsed().as_secs_f64();
    check_packing(&items, &packing.offsets, packing.peak).map_err(|(a, b, why)| {
        Error::new(Kind::Internal, "plan/bad-packing", format!("buffers {} and {} {why}", ids[a], ids[b]))
            .hint("please report this with the file")
    })?;
    if args.json {
        let offsets: serde_json::Map<String, serde_json::Value> =
            ids.iter().zip(&packing.offsets).map(|(id, offset)| (id.clone(), json!(offset))).collect();
        print_json(&json!({
            "peak": packing.peak,
            "lower_bound": packing.lower_bound,
            "seconds": seconds,
            "offsets": offsets,
        }))?;
    } else {
        let mut text = String::from("id,lower,upper,size,offset\n");
        for ((id, item), offset) in ids.iter().zip(&items).zip(&packing.offsets) {
            text.push_str(&format!("{id},{},{},{},{offset}\n", item.start, item.end, item.size));
        }
        print(&text)?;
        eprintln!(
            "{} buffers, peak {} bytes, lower bound {} bytes, {seconds:.3} s",
            items.len(),
            packing.peak,
            packing.lower_bound
        );
    }
    match args.capacity {
        Some(capacity) if packing.peak > capacity => {
            let message = if packing.lower_bound > capacity {
                format!("no plan fits {capacity} bytes: {} are alive at once", packing.lower_bound)
            } else {
                format!("no plan of {capacity} bytes was found; the smallest takes {}", packing.peak)
            };
            Err(Error::new(Kind::OutOfMemory, "plan/over-capacity", message)
                .at(args.buffers.display())
                .hint("raise --capacity, or --steps to search longer"))
        }
        _ => Ok(()),
    }
}
