//! How parts of a launch table are spelled in JSON: dims and operands as in IR text.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::arena::Id;
use crate::dim::Dim;
use crate::dtype::DType;
use crate::graph::{Operand, StateId, ValueId, WeightId};

pub(super) mod dim_text {
    use super::*;

    pub fn serialize<S: Serializer>(dim: &Dim, s: S) -> Result<S::Ok, S::Error> {
        match dim.as_const() {
            Some(value) => s.serialize_i64(value),
            None => s.serialize_str(&dim.to_string()),
        }
    }

    #[derive(Deserialize)]
    #[serde(untagged)]
    pub enum Spelling {
        Number(i64),
        Text(String),
    }

    impl Spelling {
        pub fn dim<E: serde::de::Error>(self) -> Result<Dim, E> {
            match self {
                Spelling::Number(value) => Ok(Dim::from(value)),
                Spelling::Text(text) => crate::text::parse_dim(&text).map_err(E::custom),
            }
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Dim, D::Error> {
        Spelling::deserialize(d)?.dim()
    }
}

pub(super) mod dim_list_text {
    use super::*;

    pub fn serialize<S: Serializer>(dims: &[Dim], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(dims.iter().map(ToString::to_string))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Dim>, D::Error> {
        Vec::<dim_text::Spelling>::deserialize(d)?.into_iter().map(dim_text::Spelling::dim).collect()
    }
}

pub(super) mod dims_text {
    use super::*;

    pub fn serialize<S: Serializer>(dims: &[Dim; 3], s: S) -> Result<S::Ok, S::Error> {
        dim_list_text::serialize(dims, s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[Dim; 3], D::Error> {
        let dims = dim_list_text::deserialize(d)?;
        dims.try_into().map_err(|_| serde::de::Error::custom("a grid has three extents"))
    }
}

pub(super) mod dtype_text {
    use super::*;

    pub fn serialize<S: Serializer>(dtype: &DType, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(dtype.name())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<DType, D::Error> {
        let name = String::deserialize(d)?;
        DType::parse(&name).ok_or_else(|| serde::de::Error::custom("unknown element type"))
    }
}

/// Operands as `%7`, `weight#3`, `state#1`: ids, since names may hold anything.
pub(super) mod operand_text {
    use super::*;

    pub fn serialize<S: Serializer>(operand: &Operand, s: S) -> Result<S::Ok, S::Error> {
        match operand {
            Operand::Value(id) => s.collect_str(id),
            Operand::Weight(id) => s.collect_str(id),
            Operand::State(id) => s.collect_str(id),
        }
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Operand, D::Error> {
        let text = String::deserialize(d)?;
        let id =
            |prefix: &str| text.strip_prefix(prefix).and_then(|n| n.parse::<u32>().ok()).map(|n| n as usize);
        let value = id("%").map(|n| Operand::Value(ValueId::from_index(n)));
        let weight = || id("weight#").map(|n| Operand::Weight(WeightId::from_index(n)));
        let state = || id("state#").map(|n| Operand::State(StateId::from_index(n)));
        value
            .or_else(weight)
            .or_else(state)
            .ok_or_else(|| serde::de::Error::custom(format!("`{text}` is no value, weight or state")))
    }
}

/// An operand or none.
pub(super) mod operand_option_text {
    use super::*;

    #[derive(Serialize, Deserialize)]
    struct Text(#[serde(with = "operand_text")] Operand);

    pub fn serialize<S: Serializer>(operand: &Option<Operand>, s: S) -> Result<S::Ok, S::Error> {
        operand.map(Text).serialize(s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Option<Operand>, D::Error> {
        Ok(Option::<Text>::deserialize(d)?.map(|t| t.0))
    }
}

/// A weight, as its operand.
pub(super) mod weight_text {
    use super::*;

    pub fn serialize<S: Serializer>(weight: &WeightId, s: S) -> Result<S::Ok, S::Error> {
        operand_text::serialize(&Operand::Weight(*weight), s)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<WeightId, D::Error> {
        match operand_text::deserialize(d)? {
            Operand::Weight(id) => Ok(id),
            _ => Err(serde::de::Error::custom("only weights are read in parts")),
        }
    }
}
