//! The forms of the sweep's report.

use millrace::Result;
use serde_json::{Map, Value, json};

use super::profile::Summary;
use crate::cli::{print, print_json, usage};

/// How the report is written.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Aligned columns for a terminal.
    Table,
    /// Markdown.
    Md,
    /// Comma separated values.
    Csv,
    /// An array of objects.
    Json,
}

impl Form {
    /// The form spelled `text`.
    ///
    /// # Errors
    /// `usage/output`.
    pub fn parse(text: &str) -> Result<Form> {
        match text {
            "table" => Ok(Form::Table),
            "md" => Ok(Form::Md),
            "csv" => Ok(Form::Csv),
            "json" => Ok(Form::Json),
            other => {
                Err(usage("usage/output", format!("`{other}` is no form")).hint("use table, md, csv or json"))
            }
        }
    }
}

/// Value by column.
pub type Cells = Vec<(&'static str, Value)>;

/// One row of the sweep.
pub struct Row {
    /// What was run.
    pub title: String,
    /// Every row has the same columns.
    pub cells: Cells,
    /// Where the time went.
    pub profile: Option<Summary>,
}

impl Row {
    fn get(&self, column: &str) -> Option<&Value> {
        self.cells.iter().find(|(name, _)| *name == column).map(|(_, v)| v)
    }

    fn text(&self, column: &str) -> String {
        self.get(column).map_or_else(String::new, cell)
    }

    fn number(&self, column: &str) -> f64 {
        self.get(column).and_then(Value::as_f64).unwrap_or(0.0)
    }

    /// A median with its range.
    fn range(&self, columns: [&str; 3], digits: usize) -> String {
        let [median, min, max] = columns.map(|c| self.number(c));
        format!("{median:.digits$} ({min:.digits$}..{max:.digits$})")
    }
}

fn cell(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_string)
}

/// Writes all rows.
///
/// # Errors
/// Failures of standard output.
pub fn write(form: Form, rows: &[Row]) -> Result<()> {
    match form {
        Form::Json => {
            let objects = rows.iter().map(|row| {
                let mut object: Map<String, Value> =
                    row.cells.iter().map(|(k, v)| (k.to_string(), v.clone())).collect();
                if let Some(profile) = &row.profile {
                    object.insert("profile".to_string(), profile.json());
                }
                Value::Object(object)
            });
            print_json(&json!(objects.collect::<Vec<_>>()))
        }
        Form::Csv => {
            let lines = lines(rows, ",");
            print(&lines.iter().map(|l| format!("{l}\n")).collect::<String>())
        }
        Form::Md => {
            let lines = lines(rows, " | ");
            for (index, line) in lines.iter().enumerate() {
                print(&format!("| {line} |\n"))?;
                if index == 0 {
                    print(&format!("|{}\n", " --- |".repeat(rows[0].cells.len())))?;
                }
            }
            profiles(rows, Summary::markdown)
        }
        Form::Table => {
            table(rows)?;
            profiles(rows, Summary::table)
        }
    }
}

fn profiles(rows: &[Row], show: impl Fn(&Summary) -> String) -> Result<()> {
    for row in rows {
        if let Some(profile) = &row.profile {
            print(&format!("\n{}\n{}", row.title, show(profile)))?;
        }
    }
    Ok(())
}

/// A line of column names, then one line a row.
fn lines(rows: &[Row], separator: &str) -> Vec<String> {
    let Some(first) = rows.first() else { return Vec::new() };
    let names = first.cells.iter().map(|(n, _)| *n).collect::<Vec<_>>().join(separator);
    let cells = |row: &Row| row.cells.iter().map(|(_, v)| cell(v)).collect::<Vec<_>>().join(separator);
    std::iter::once(names).chain(rows.iter().map(cells)).collect()
}

/// Where weights are, for each row.
fn placed(rows: &[Row]) -> Result<()> {
    let mib = |row: &Row, column: &str| row.number(column) / f64::from(1 << 20);
    for row in rows {
        print(&format!(
            "{}: weights {} resident {:.1} MiB, ring {:.1} MiB, {:.1} MiB streamed a step, predicted {:.3} ms of it {:.3} ms stalled\n",
            row.title,
            row.text("weights_budget"),
            mib(row, "resident_bytes"),
            mib(row, "ring_bytes"),
            mib(row, "streamed_bytes_per_step"),
            row.number("predicted_ms"),
            row.number("predicted_stall_ms"),
        ))?;
    }
    Ok(())
}

fn table(rows: &[Row]) -> Result<()> {
    let Some(first) = rows.first() else { return Ok(()) };
    print(&format!("{}, {}\n", first.text("hardware"), first.text("build")))?;
    let streams = rows.iter().any(|row| row.number("ring_bytes") > 0.0);
    if streams {
        placed(rows)?;
    }
    if first.get("step_ms").is_some() {
        print(&format!(
            "{:>6} {:>6} {:>28} {:>12} {:>12}\n",
            "batch", "input", "step ms", "sequences/s", "tokens/s"
        ))?;
        return rows.iter().try_for_each(|row| {
            print(&format!(
                "{:>6} {:>6} {:>28} {:>12.1} {:>12.1}\n",
                row.text("batch_size"),
                row.text("input_len"),
                row.range(["step_ms", "step_ms_min", "step_ms_max"], 3),
                row.number("sequences_per_s"),
                row.number("tokens_per_s"),
            ))
        });
    }
    print(&format!(
        "{:>6} {:>6} {:>6} {:>28} {:>28} {:>10}\n",
        "batch", "input", "output", "prefill ms", "decode ms a step", "tokens/s"
    ))?;
    rows.iter().try_for_each(|row| {
        print(&format!(
            "{:>6} {:>6} {:>6} {:>28} {:>28} {:>10.1}\n",
            row.text("batch_size"),
            row.text("input_len"),
            row.text("output_len"),
            row.range(["prefill_ms", "prefill_ms_min", "prefill_ms_max"], 2),
            row.range(["decode_ms_per_step", "decode_ms_min", "decode_ms_max"], 3),
            row.number("decode_tokens_per_s"),
        ))
    })
}
