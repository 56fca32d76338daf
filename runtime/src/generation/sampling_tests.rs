//! Samplers against straightforward definitions and known vectors.

use proptest::prelude::*;

use super::*;

fn params(temperature: f32, top_k: usize, top_p: f32, seed: u64) -> SamplingParams {
    SamplingParams { temperature, top_k, top_p, seed }
}

/// First outputs of SplitMix64 seeded with 1234567, as published with the generator.
#[test]
fn the_generator_is_splitmix64() {
    let outputs: Vec<u64> = (1..=3).map(|i| mix(1_234_567u64.wrapping_add(GOLDEN.wrapping_mul(i)))).collect();
    assert_eq!(outputs, [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]);
    assert_eq!(uniform(1_234_567, 1), (3_203_168_211_198_807_973u64 >> 11) as f64 / 9_007_199_254_740_992.0);
}

#[test]
fn greedy_takes_the_lowest_index_of_equals() {
    let mut sampler = Sampler::new(SamplingParams::GREEDY, 0).unwrap();
    assert_eq!(sampler.sample(&[0.0, 3.0, 3.0, -1.0]).unwrap(), 1);
    assert_eq!(sampler.sample(&[f32::NEG_INFINITY, -5.0]).unwrap(), 1);
}

#[test]
fn bad_rows_and_parameters_are_typed_errors() {
    for temperature in [0.0, 1.0] {
        let mut sampler = Sampler::new(params(temperature, 0, 1.0, 0), 0).unwrap();
        assert_eq!(sampler.sample(&[0.0, f32::NAN]).unwrap_err().code(), "generation/nan-logits");
        assert_eq!(sampler.sample(&[f32::NAN]).unwrap_err().code(), "generation/nan-logits");
        assert_eq!(sampler.sample(&[0.0, f32::INFINITY]).unwrap_err().code(), "generation/infinite-logits");
        assert_eq!(sampler.sample(&[f32::NEG_INFINITY]).unwrap_err().code(), "generation/infinite-logits");
        assert_eq!(sampler.sample(&[]).unwrap_err().code(), "generation/no-logits");
    }
    for temperature in [f32::NAN, -0.1, f32::INFINITY] {
        let error = Sampler::new(params(temperature, 0, 1.0, 0), 0).unwrap_err();
        assert_eq!(error.code(), "generation/bad-temperature");
    }
    for top_p in [f32::NAN, 0.0, -1.0, 1.01] {
        assert_eq!(Sampler::new(params(1.0, 0, top_p, 0), 0).unwrap_err().code(), "generation/bad-top-p");
    }
}

#[test]
fn frequencies_follow_the_softmax() {
    let probabilities = [0.5f64, 0.25, 0.2, 0.05];
    let logits: Vec<f32> = probabilities.iter().map(|p| p.ln() as f32).collect();
    let draws = 20_000;
    let count = |params: SamplingParams| {
        let mut sampler = Sampler::new(params, 3).unwrap();
        let mut counts = [0.0; 4];
        for _ in 0..draws {
            counts[sampler.sample(&logits).unwrap() as usize] += 1.0 / f64::from(draws);
        }
        counts
    };
    let close = |seen: [f64; 4], expected: [f64; 4]| {
        assert!(seen.iter().zip(expected).all(|(a, b)| (a - b).abs() < 0.015), "{seen:?} {expected:?}");
    };
    close(count(params(1.0, 0, 1.0, 1)), probabilities);
    // Temperature 1/2 squares the probabilities.
    let squares: f64 = probabilities.iter().map(|p| p * p).sum();
    close(count(params(0.5, 0, 1.0, 2)), probabilities.map(|p| p * p / squares));
    close(count(params(1.0, 2, 1.0, 3)), [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
    // 0.5 + 0.25 < 0.8 <= 0.5 + 0.25 + 0.2
    close(count(params(1.0, 0, 0.8, 4)), [0.5 / 0.95, 0.25 / 0.95, 0.2 / 0.95, 0.0]);
    close(count(params(1.0, 0, 0.4, 5)), [1.0, 0.0, 0.0, 0.0]);
    // top-k first: within {0.5, 0.25} the first holds 2/3 >= 0.6.
    close(count(params(1.0, 2, 0.6, 6)), [1.0, 0.0, 0.0, 0.0]);
}

#[test]
fn draws_depend_on_seed_sequence_and_step_only() {
    let row = vec![0.0f32; 1000];
    let draws = |seed, sequence| {
        let mut sampler = Sampler::new(params(1.0, 0, 1.0, seed), sequence).unwrap();
        (0..8).map(|_| sampler.sample(&row).unwrap()).collect::<Vec<u32>>()
    };
    assert_eq!(draws(1, 0), draws(1, 0));
    assert_ne!(draws(1, 0), draws(1, 1));
    assert_ne!(draws(1, 0), draws(2, 0));
    assert_ne!(draws(0, 1), draws(1, 0));
}

/// The set that may be drawn, by sorting everything.
fn allowed(logits: &[f32], p: SamplingParams) -> Vec<u32> {
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).unwrap().then(a.cmp(&b)));
    if p.top_k > 0 {
        order.truncate(p.top_k);
    }
    let largest = f64::from(logits[order[0] as usize]);
    let weight = |id: &u32| ((f64::from(logits[*id as usize]) - largest) / f64::from(p.temperature)).exp();
    let total: f64 = order.iter().map(weight).sum();
    let mut sum = 0.0;
    let mut kept = 0;
    // A hair more than top_p, as sums in another order round differently.
    while kept < order.len() && sum < (f64::from(p.top_p) + 1e-9) * total {
        sum += weight(&order[kept]);
        kept += 1;
    }
    order.truncate(kept);
    order
}

proptest! {
    #[test]
    fn draws_stay_in_the_allowed_set(
        logits in prop::collection::vec(-6.0f32..6.0, 1..600),
        temperature in 0.05f32..3.0,
        top_k in 0usize..40,
        top_p in prop_oneof![Just(1.0f32), 0.05f32..1.0],
        seed: u64,
    ) {
        let p = params(temperature, top_k, top_p, seed);
        let set = allowed(&logits, p);
        let mut sampler = Sampler::new(p, 0).unwrap();
        for _ in 0..20 {
            let token = sampler.sample(&logits).unwrap();
            prop_assert!(set.contains(&token), "{} not in {:?}", token, set);
        }
    }
}
