use millrace_ir::weights::WeightReader;

use super::super::testing::{engine, stored};
use super::*;

/// The bytes of a load, filled in chunks.
fn image(engine: &Engine, load: &Load, chunk: usize) -> Vec<u8> {
    let sources = Sources::of(engine, None).unwrap();
    let mut filler = sources.filler();
    let mut bytes = vec![0xaa; load.bytes as usize];
    for (index, out) in bytes.chunks_mut(chunk).enumerate() {
        filler.fill(load, (index * chunk) as u64, out).unwrap();
    }
    bytes
}

fn all(engine: &Engine) -> Load {
    let reader = WeightReader::new(engine.module());
    let sizes = engine.module().used_weights().into_iter().map(|id| reader.len(id).unwrap());
    Load::packed(sizes.enumerate()).unwrap()
}

#[test]
fn chunks_of_any_size_hold_the_same_bytes() {
    let engine = engine("cuda", &[]);
    let load = all(&engine);
    let whole = image(&engine, &load, usize::MAX >> 1);
    assert_eq!(load.pieces.iter().map(|p| p.to).collect::<Vec<_>>(), [0, 16640, 33280]);
    assert_eq!(load.bytes, 49920);
    assert_eq!(whole[..16396], stored());
    let mut reader = WeightReader::new(engine.module());
    let ids = engine.module().used_weights();
    for (id, piece) in ids.iter().zip(&load.pieces).skip(1) {
        let mut expected = vec![0; 16396];
        reader.read(*id, 0, &mut expected).unwrap();
        let at = piece.to as usize;
        assert_eq!(whole[at..at + 16396], expected, "{id}");
        assert!(whole[at + 16396..(at + 16640).min(whole.len())].iter().all(|b| *b == 0));
    }
    for chunk in [1, 100, 256, 16396, 16640, 20000] {
        assert_eq!(image(&engine, &load, chunk), whole, "{chunk}");
    }
}

#[test]
fn parts_of_weights_are_read() {
    let engine = engine("cuda", &[]);
    let load = Load { pieces: vec![Piece { index: 0, from: 400, len: 1000, to: 24 }], bytes: 1280 };
    let mut out = vec![0xaa; 1280];
    Sources::of(&engine, None).unwrap().read(vec![(&load, &mut out)], 2).unwrap();
    assert_eq!(out[24..1024], stored()[400..1400]);
    assert!(out[..24].iter().chain(&out[1024..]).all(|b| *b == 0));
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
