use super::super::tests::bundle;
use super::super::{Bundle, Launch, Tiles};
use super::*;
use crate::arena::Id;
use crate::dim::Sym;
use crate::graph::{StateId, ValueId, WeightId};

fn value(index: usize) -> Operand {
    Operand::Value(ValueId::from_index(index))
}

fn product() -> Product {
    Product {
        x: value(3),
        weight: Operand::Weight(WeightId::from_index(2)),
        first: 8,
        y: value(4),
        bias: Some(Operand::Weight(WeightId::from_index(5))),
        residual: None,
        rows: Dim::from(Sym::new("t").unwrap()),
        n: 16,
        k: 24,
        dtype: DType::BF16,
        out: DType::F32,
        suggestion: 1,
        at: 64,
    }
}

/// A bundle whose first variant may run by a library, with a launch without tiles in front.
fn with_library() -> Bundle {
    let mut bundle = bundle();
    let variant = &mut bundle.table.steps[0].variants[0];
    let front = Launch { tiles: None, ..variant.launches[0].clone() };
    variant.library = Some(ByLibrary { before: vec![front], products: vec![product(), product()] });
    bundle.table.library_workspace = LIBRARY_WORKSPACE;
    bundle
}

#[test]
fn products_survive_their_bytes() {
    let bundle = with_library();
    assert_eq!(Bundle::decode(&bundle.encode()).unwrap(), bundle);
    assert_eq!(bundle.table.by_library().count(), 1);
    assert_eq!(bundle.table.steps[0].all_launches().count(), 2);
}

#[test]
fn tables_without_products_say_nothing_of_them() {
    let text = bundle().encode();
    let text = String::from_utf8_lossy(&text);
    assert!(!text.contains("library"), "{text}");
}

#[test]
fn bad_products_are_refused() {
    type Change = fn(&mut Bundle);
    fn of(bundle: &mut Bundle) -> &mut ByLibrary {
        bundle.table.steps[0].variants[0].library.as_mut().unwrap()
    }
    let changes: [Change; 18] = [
        |b| b.table.library_workspace = 0,
        |b| b.table.library_workspace = MOST_WORKSPACE + 1,
        |b| b.table.steps[0].variants[0].library = None,
        |b| b.table.steps[0].variants[0].launches.clear(),
        |b| b.table.steps[0].streamed = b.table.steps[0].variants.clone(),
        |b| of(b).products.clear(),
        |b| of(b).products = vec![product(); MOST_PRODUCTS + 1],
        |b| of(b).before[0].kernel = 9,
        |b| of(b).before[0].tiles = Some(Tiles { weight: WeightId::from_index(3), slices: 8, granule: 2 }),
        |b| of(b).products[1].n = 0,
        |b| of(b).products[1].k = 0,
        |b| of(b).products[1].at = 0,
        |b| of(b).products[1].suggestion = MOST_SUGGESTIONS,
        |b| of(b).products[1].rows = Dim::from(super::super::tile_count()),
        |b| of(b).products[1].dtype = DType::I8,
        |b| of(b).products[1].out = DType::F8E4M3,
        |b| of(b).products[1].weight = value(1),
        |b| of(b).products[1].y = Operand::State(StateId::from_index(0)),
    ];
    for (at, change) in changes.into_iter().enumerate() {
        let mut bundle = with_library();
        change(&mut bundle);
        let refused = Bundle::decode(&bundle.encode()).map(|_| ());
        assert_eq!(refused.unwrap_err().code(), "engine/launch-table", "{at}");
    }
}

/// Every byte of the products' text, changed: an error of its kind, or a table that survives its bytes.
#[test]
fn changed_bytes_are_errors_or_tables() {
    let bundle = with_library();
    let bytes = bundle.encode();
    let text = String::from_utf8_lossy(&bytes).into_owned();
    let start = text.find("\"library\"").unwrap();
    let end = text.find("\"library_workspace\"").unwrap();
    for at in start..end {
        for change in [1u8, 0x10, 0x80] {
            let mut bytes = bytes.clone();
            bytes[at] ^= change;
            match Bundle::decode(&bytes) {
                Ok(other) => assert_eq!(Bundle::decode(&other.encode()).unwrap(), other, "{at} {change}"),
                Err(error) => assert_eq!(error.code(), "engine/launch-table", "{at} {change}"),
            }
        }
    }
}
