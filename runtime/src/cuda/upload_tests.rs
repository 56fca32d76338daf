use millrace_ir::Id;
use millrace_ir::weights::WeightReader;

use super::super::testing::{engine, stored};
use super::*;

#[test]
fn chunks_of_any_size_hold_the_same_bytes() {
    let engine = engine("cuda", &[]);
    let (layout, whole) = image(&engine, usize::MAX >> 1).unwrap();
    assert_eq!(layout.offsets, [0, 16640, 33280]);
    assert_eq!((layout.bytes, layout.weights), (49920, 3 * 16396));
    assert_eq!(whole[..16396], stored());
    let mut reader = WeightReader::new(engine.module());
    for (id, at) in layout.ids.iter().zip(&layout.offsets).skip(1) {
        let mut expected = vec![0; 16396];
        reader.read(*id, 0, &mut expected).unwrap();
        let at = *at as usize;
        assert_eq!(whole[at..at + 16396], expected, "{id}");
        assert!(whole[at + 16396..(at + 16640).min(whole.len())].iter().all(|b| *b == 0));
    }
    for chunk in [1, 100, 256, 16396, 16640, 20000] {
        assert_eq!(image(&engine, chunk).unwrap().1, whole, "{chunk}");
    }
}

#[test]
fn ranges_lie_in_the_block() {
    let engine = engine("cuda", &[]);
    let layout = Layout::of(&engine).unwrap();
    let ranges = layout.ranges(3, Range { base: 0x1000, len: layout.bytes });
    let expected = Range { base: 0x1000 + 16640, len: 16396 };
    assert_eq!(ranges[WeightId::from_index(1).index()], Some(expected));
    assert!(layout.ranges(3, Range::EMPTY).iter().all(Option::is_none));
}

#[test]
fn shared_work_is_done_once_and_stops_at_an_error() {
    let seen: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
    let count = |(): &mut (), index: usize| -> Result<()> {
        seen[index].fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    share(seen.len(), 4, || Ok(()), count, |()| Ok(())).unwrap();
    assert!(seen.iter().all(|n| n.load(Ordering::Relaxed) == 1));
    let fail = |(): &mut (), index: usize| match index {
        50 => Err(Error::new(Kind::Internal, "cuda/load-thread", "no")),
        _ => Ok(()),
    };
    assert!(share(100, 4, || Ok(()), fail, |()| Ok(())).is_err());
}
