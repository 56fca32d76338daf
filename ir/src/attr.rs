//! Attributes: the one syntax in which every op writes and reads its parameters, `{axis = 1, eps = 1e-5}`.

use std::fmt;

use crate::dim::Dim;
use crate::dtype::DType;
use crate::list::List;

/// A parameter of an op.
#[derive(Clone, Debug, PartialEq)]
pub enum Attr {
    /// `1`, `$t + 1`.
    Dim(Dim),
    /// `1e-5`; always printed with a point or an exponent.
    Float(f64),
    /// `"text"`.
    Str(String),
    /// A word: `true`, `half`, `f32`.
    Word(String),
    /// `llama3(8.0, 1.0)`.
    Call(String, Vec<Attr>),
    /// `[1, 2]`.
    List(Vec<Attr>),
}

impl From<Dim> for Attr {
    fn from(value: Dim) -> Self {
        Attr::Dim(value)
    }
}
impl From<usize> for Attr {
    fn from(value: usize) -> Self {
        Attr::Dim(Dim::from(value))
    }
}
impl From<i64> for Attr {
    fn from(value: i64) -> Self {
        Attr::Dim(Dim::from(value))
    }
}
impl From<f64> for Attr {
    fn from(value: f64) -> Self {
        Attr::Float(value)
    }
}
impl From<bool> for Attr {
    fn from(value: bool) -> Self {
        Attr::Word(value.to_string())
    }
}
impl From<&str> for Attr {
    fn from(value: &str) -> Self {
        Attr::Word(value.to_string())
    }
}
impl From<DType> for Attr {
    fn from(value: DType) -> Self {
        Attr::Word(value.name().to_string())
    }
}
impl<T: Into<Attr> + Clone> From<List<T>> for Attr {
    fn from(value: List<T>) -> Self {
        value.into_vec().into()
    }
}
impl<T: Into<Attr>> From<Vec<T>> for Attr {
    fn from(value: Vec<T>) -> Self {
        Attr::List(value.into_iter().map(Into::into).collect())
    }
}

impl Attr {
    /// Shows `visit` every dim in the attribute. Ops bound how deep their attributes nest.
    pub fn visit_dims(&self, visit: &mut dyn FnMut(&Dim)) {
        match self {
            Attr::Dim(dim) => visit(dim),
            Attr::Float(_) | Attr::Str(_) | Attr::Word(_) => {}
            Attr::Call(_, items) | Attr::List(items) => items.iter().for_each(|item| item.visit_dims(visit)),
        }
    }
}

/// Writes a float so that it reads back exactly and is told from an integer.
pub fn write_float(f: &mut fmt::Formatter<'_>, value: f64) -> fmt::Result {
    if value.is_nan() {
        f.write_str("nan")
    } else if value.is_infinite() {
        f.write_str(if value < 0.0 { "-inf" } else { "inf" })
    } else {
        write!(f, "{value:?}")
    }
}

impl fmt::Display for Attr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |f: &mut fmt::Formatter<'_>, items: &[Attr]| {
            for (i, item) in items.iter().enumerate() {
                write!(f, "{}{item}", if i == 0 { "" } else { ", " })?;
            }
            Ok(())
        };
        match self {
            Attr::Dim(dim) => write!(f, "{dim}"),
            Attr::Float(value) => write_float(f, *value),
            Attr::Str(text) => write!(f, "{}", Quoted(text)),
            Attr::Word(word) => f.write_str(word),
            Attr::Call(name, args) => {
                write!(f, "{name}(")?;
                list(f, args)?;
                f.write_str(")")
            }
            Attr::List(items) => {
                f.write_str("[")?;
                list(f, items)?;
                f.write_str("]")
            }
        }
    }
}

/// A string in quotes, with `\"`, `\\`, `\n`, `\r`, `\t` and `\u{..}` escaped.
pub struct Quoted<'a>(pub &'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("\"")?;
        for c in self.0.chars() {
            match c {
                '"' => f.write_str("\\\"")?,
                '\\' => f.write_str("\\\\")?,
                '\n' => f.write_str("\\n")?,
                '\r' => f.write_str("\\r")?,
                '\t' => f.write_str("\\t")?,
                c if c.is_control() => write!(f, "\\u{{{:x}}}", c as u32)?,
                c => write!(f, "{c}")?,
            }
        }
        f.write_str("\"")
    }
}

/// The attributes of one node, in the order the op writes them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attrs(pub Vec<(String, Attr)>);

impl Attrs {
    /// Appends `key = value`.
    pub fn set(&mut self, key: &str, value: impl Into<Attr>) {
        self.0.push((key.to_string(), value.into()));
    }

    /// Appends `key = value` unless it is the default.
    pub fn set_unless<T: PartialEq + Into<Attr>>(&mut self, key: &str, value: T, default: T) {
        if value != default {
            self.set(key, value);
        }
    }
}

/// Reads attributes by name and complains about what is missing, mistyped or left over.
pub struct AttrReader<'a> {
    attrs: &'a Attrs,
    taken: Vec<bool>,
}

impl<'a> AttrReader<'a> {
    /// A reader over `attrs`.
    pub fn new(attrs: &'a Attrs) -> Self {
        AttrReader { attrs, taken: vec![false; attrs.0.len()] }
    }

    /// The raw attribute, marked as read.
    pub fn take(&mut self, key: &str) -> Option<&'a Attr> {
        let index = self.attrs.0.iter().position(|(k, _)| k == key)?;
        self.taken[index] = true;
        Some(&self.attrs.0[index].1)
    }

    fn need(&mut self, key: &str) -> Result<&'a Attr, String> {
        self.take(key).ok_or_else(|| format!("attribute `{key}` is missing"))
    }

    /// A dim.
    pub fn dim(&mut self, key: &str) -> Result<Dim, String> {
        as_dim(key, self.need(key)?)
    }

    /// A non-negative constant.
    pub fn usize(&mut self, key: &str) -> Result<usize, String> {
        as_usize(key, self.need(key)?)
    }

    /// A non-negative constant, or `default` when absent.
    pub fn usize_or(&mut self, key: &str, default: usize) -> Result<usize, String> {
        self.take(key).map_or(Ok(default), |a| as_usize(key, a))
    }

    /// A number.
    pub fn float(&mut self, key: &str) -> Result<f64, String> {
        as_float(key, self.need(key)?)
    }

    /// A number, or `default` when absent.
    pub fn float_or(&mut self, key: &str, default: f64) -> Result<f64, String> {
        self.take(key).map_or(Ok(default), |a| as_float(key, a))
    }

    /// `true` or `false`, false when absent.
    pub fn flag(&mut self, key: &str) -> Result<bool, String> {
        match self.take(key) {
            None => Ok(false),
            Some(Attr::Word(w)) if w == "true" => Ok(true),
            Some(Attr::Word(w)) if w == "false" => Ok(false),
            Some(other) => Err(format!("attribute `{key}` must be true or false, not `{other}`")),
        }
    }

    /// A word.
    pub fn word(&mut self, key: &str) -> Result<&'a str, String> {
        match self.need(key)? {
            Attr::Word(w) => Ok(w),
            other => Err(format!("attribute `{key}` must be a word, not `{other}`")),
        }
    }

    /// An element type.
    pub fn dtype(&mut self, key: &str) -> Result<DType, String> {
        let word = self.word(key)?;
        DType::parse(word).ok_or_else(|| format!("attribute `{key}`: `{word}` is no element type"))
    }

    /// A list.
    pub fn list(&mut self, key: &str) -> Result<&'a [Attr], String> {
        match self.need(key)? {
            Attr::List(items) => Ok(items),
            other => Err(format!("attribute `{key}` must be a list, not `{other}`")),
        }
    }

    /// A list of non-negative constants.
    pub fn usizes(&mut self, key: &str) -> Result<Vec<usize>, String> {
        self.list(key)?.iter().map(|a| as_usize(key, a)).collect()
    }

    /// A list of non-negative constants, or `default` when absent.
    pub fn usizes_or(&mut self, key: &str, default: &[usize]) -> Result<Vec<usize>, String> {
        if self.attrs.0.iter().any(|(k, _)| k == key) { self.usizes(key) } else { Ok(default.to_vec()) }
    }

    /// A list of dims.
    pub fn dims(&mut self, key: &str) -> Result<Vec<Dim>, String> {
        self.list(key)?.iter().map(|a| as_dim(key, a)).collect()
    }

    /// Fails if an attribute was not read.
    pub fn finish(self) -> Result<(), String> {
        match self.taken.iter().position(|t| !t) {
            None => Ok(()),
            Some(index) => Err(format!("unknown or repeated attribute `{}`", self.attrs.0[index].0)),
        }
    }
}

/// The attribute as a dim.
pub fn as_dim(key: &str, attr: &Attr) -> Result<Dim, String> {
    match attr {
        Attr::Dim(dim) => Ok(dim.clone()),
        other => Err(format!("attribute `{key}` must be a dim, not `{other}`")),
    }
}

/// The attribute as a non-negative constant.
pub fn as_usize(key: &str, attr: &Attr) -> Result<usize, String> {
    match attr {
        Attr::Dim(dim) => dim
            .as_const()
            .and_then(|c| usize::try_from(c).ok())
            .ok_or_else(|| format!("attribute `{key}` must be a non-negative constant, not `{dim}`")),
        other => Err(format!("attribute `{key}` must be an integer, not `{other}`")),
    }
}

/// The attribute as a number; integers count.
pub fn as_float(key: &str, attr: &Attr) -> Result<f64, String> {
    match attr {
        Attr::Float(value) => Ok(*value),
        Attr::Dim(dim) if dim.as_const().is_some() => Ok(dim.as_const().unwrap_or(0) as f64),
        Attr::Word(w) if w == "inf" => Ok(f64::INFINITY),
        Attr::Word(w) if w == "nan" => Ok(f64::NAN),
        other => Err(format!("attribute `{key}` must be a number, not `{other}`")),
    }
}
