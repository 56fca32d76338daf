//! The scheduler against a loop without batches, pages or chunks.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;
use crate::generation::testing::{HashModel, hash_logits, limits};
use crate::generation::{StepInputs, StepModel};

/// What a request must give, from its definition.
fn alone(request: &Request, limits: &ModelLimits) -> Completion {
    let mut history = request.prompt_ids.clone();
    let mut sampler = Sampler::new(request.sampling, request.sequence).unwrap();
    let mut token_ids = Vec::new();
    while token_ids.len() < request.max_new_tokens && history.len() < limits.max_seq_len {
        let token = sampler.sample(&hash_logits(&history, limits.vocab_size)).unwrap();
        history.push(token);
        token_ids.push(token);
        if request.stop_at_eos && limits.eos.contains(&token) {
            return Completion { token_ids, finish: FinishReason::Eos };
        }
    }
    let all = token_ids.len() == request.max_new_tokens;
    Completion { token_ids, finish: if all { FinishReason::MaxNewTokens } else { FinishReason::MaxSeqLen } }
}

fn prompt(len: usize, salt: u32) -> Vec<u32> {
    (0..len as u32).map(|i| (i * 7 + salt) % 23).collect()
}

fn run(limits: ModelLimits, requests: &[Request]) -> (Result<Vec<Completion>>, HashModel) {
    let mut model = HashModel::new(limits);
    let result = Generator::new(&mut model).unwrap().generate(requests, |_, _| {});
    (result, model)
}

fn any_request() -> impl Strategy<Value = Request> {
    let sampling = (prop_oneof![Just(0.0f32), 0.2f32..2.0], 0usize..6, 0.3f32..=1.0, any::<u64>());
    (prop::collection::vec(0u32..23, 1..24), 0usize..14, sampling, 0u64..3, any::<bool>()).prop_map(
        |(prompt_ids, max_new_tokens, (temperature, top_k, top_p, seed), sequence, stop_at_eos)| Request {
            prompt_ids,
            max_new_tokens,
            sampling: SamplingParams { temperature, top_k, top_p, seed },
            sequence,
            stop_at_eos,
        },
    )
}

fn any_limits() -> impl Strategy<Value = ModelLimits> {
    (
        1usize..6,
        1usize..40,
        1usize..8,
        1usize..9,
        0usize..30,
        24usize..40,
        prop::collection::vec(0u32..23, 0..3),
    )
        .prop_map(
            |(max_batch_size, max_num_tokens, max_logit_rows, tokens_per_block, spare, max_seq_len, eos)| {
                let pages = max_seq_len.div_ceil(tokens_per_block) + spare;
                let max_input_len = 24;
                ModelLimits {
                    max_batch_size,
                    max_num_tokens,
                    max_logit_rows,
                    tokens_per_block,
                    pages,
                    max_seq_len,
                    max_input_len,
                    eos,
                    ..limits()
                }
            },
        )
}

/// The answers to `requests`, whose tokens came one by one as they stand there.
fn completed(model: &mut impl StepModel, requests: &[Request]) -> (Vec<Completion>, GenerationStats) {
    let mut streamed = vec![Vec::new(); requests.len()];
    let mut generator = Generator::new(model).unwrap();
    let completions = generator.generate(requests, |r, token| streamed[r].push(token)).unwrap();
    assert!(streamed.iter().zip(&completions).all(|(s, c)| *s == c.token_ids));
    (completions, generator.stats())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// The model checks every step; a leaked page is an error of `generate` itself.
    #[test]
    fn every_batch_gives_what_each_request_gives_alone(
        limits in any_limits(),
        requests in prop::collection::vec(any_request(), 0..10),
    ) {
        let mut model = HashModel::new(limits.clone());
        let (completions, stats) = completed(&mut model, &requests);
        let expected: Vec<Completion> = requests.iter().map(|r| alone(r, &limits)).collect();
        prop_assert_eq!(&completions, &expected);
        prop_assert!(stats.peak_pages <= limits.pages);
        prop_assert_eq!(stats.steps, model.log.len() as u64);

        // A second run, over a used cache, takes the very same steps.
        let first = std::mem::take(&mut model.log);
        let again = Generator::new(&mut model).unwrap().generate(&requests, |_, _| {}).unwrap();
        prop_assert_eq!(again, expected);
        prop_assert!(first == model.log);
    }
}

#[test]
fn long_prompts_are_fed_in_chunks_beside_decodes() {
    let limits = ModelLimits { max_num_tokens: 8, eos: vec![], ..limits() };
    let requests = [Request::greedy(prompt(4, 1), 4), Request::greedy(prompt(20, 2), 2)];
    let (result, model) = run(limits, &requests);
    assert_eq!(result.unwrap().iter().map(|c| c.token_ids.len()).collect::<Vec<_>>(), [4, 2]);
    // Step 1 takes the first prompt and 4 tokens of the second; then one decode and 7 of the second; ...
    let shapes: Vec<&[i32]> = model.log.iter().map(|s| s.seq_starts.as_slice()).collect();
    assert_eq!(shapes, [&[0, 4, 8][..], &[0, 1, 8], &[0, 1, 8], &[0, 1, 3], &[0, 1]]);
    let rows: Vec<&[i32]> = model.log.iter().map(|s| s.logit_rows.as_slice()).collect();
    assert_eq!(rows, [&[3][..], &[0], &[0], &[0, 2], &[0]]);
    assert_eq!(model.log[1].positions, [4, 4, 5, 6, 7, 8, 9, 10]);
}

#[test]
fn a_step_without_wanted_logits_names_its_last_row() {
    let limits = ModelLimits { max_num_tokens: 3, ..limits() };
    let (result, model) = run(limits, &[Request::greedy(prompt(7, 0), 1)]);
    assert_eq!(result.unwrap()[0].token_ids.len(), 1);
    let rows: Vec<&[i32]> = model.log.iter().map(|s| s.logit_rows.as_slice()).collect();
    assert_eq!(rows, [[2], [2], [0]]);
}

#[test]
fn requests_wait_for_pages_and_take_over_in_order() {
    // Each request stores 4 + 4 tokens: two pages of four. The pool holds two requests.
    let limits = ModelLimits { pages: 5, eos: vec![], ..limits() };
    let requests: Vec<Request> = (0..5).map(|i| Request::greedy(prompt(4, i), 5)).collect();
    let mut model = HashModel::new(limits.clone());
    let mut order = Vec::new();
    let mut generator = Generator::new(&mut model).unwrap();
    let completions = generator.generate(&requests, |r, _| order.push(r)).unwrap();
    assert_eq!(completions, requests.iter().map(|r| alone(r, &limits)).collect::<Vec<_>>());
    let expected = GenerationStats { steps: 15, prefill_tokens: 20, decode_tokens: 20, peak_pages: 4 };
    assert_eq!(generator.stats(), expected);
    order.dedup();
    assert_eq!(order.iter().position(|r| *r == 2), Some(10));
    assert!(model.log.iter().all(|step| step.sequences() <= 2));
}

#[test]
fn eos_is_a_token_but_no_text() {
    let request = |stop_at_eos| Request { stop_at_eos, ..Request::greedy(prompt(3, 5), 6) };
    let free = alone(&request(false), &limits());
    let limits = ModelLimits { eos: vec![22, free.token_ids[2]], ..limits() };
    let end = free.token_ids.iter().position(|t| limits.eos.contains(t)).unwrap();
    let (result, _) = run(limits, &[request(true), request(false)]);
    let completions = result.unwrap();
    assert_eq!(completions[0].finish, FinishReason::Eos);
    assert_eq!(completions[0].token_ids, free.token_ids[..=end]);
    assert_eq!(completions[0].text_ids(), &free.token_ids[..end]);
    assert_eq!(completions[1], free);
    assert_eq!(completions[1].text_ids(), completions[1].token_ids);
}

#[test]
fn max_seq_len_ends_a_sequence() {
    let limits = ModelLimits { max_seq_len: 10, eos: vec![], ..limits() };
    let (result, model) = run(limits, &[Request::greedy(prompt(7, 0), 100)]);
    let completion = &result.unwrap()[0];
    assert_eq!((completion.token_ids.len(), completion.finish), (3, FinishReason::MaxSeqLen));
    assert_eq!(model.log.iter().map(|s| s.kv_lens[0]).max(), Some(9));
    // Both limits at once: the request got all that it asked for.
    let limits = ModelLimits { max_seq_len: 10, eos: vec![], ..crate::generation::testing::limits() };
    let (result, _) = run(limits, &[Request::greedy(prompt(7, 0), 3)]);
    assert_eq!(result.unwrap()[0].finish.to_string(), "max_new_tokens");
}

#[test]
fn nothing_to_draw_takes_no_step() {
    let (result, model) = run(limits(), &[Request::greedy(prompt(3, 0), 0)]);
    assert_eq!(result.unwrap(), [Completion { token_ids: vec![], finish: FinishReason::MaxNewTokens }]);
    assert!(model.log.is_empty());
    assert!(run(limits(), &[]).0.unwrap().is_empty());
}

#[test]
fn bad_requests_are_found_before_any_step() {
    let good = Request::greedy(prompt(3, 0), 4);
    let sampling = SamplingParams { top_p: 0.0, ..SamplingParams::GREEDY };
    let cases = [
        ("generation/empty-prompt", Request::greedy(vec![], 1), limits()),
        ("generation/prompt-too-long", Request::greedy(prompt(65, 0), 1), limits()),
        ("generation/token-out-of-range", Request::greedy(vec![23], 1), limits()),
        ("generation/no-room", Request::greedy(prompt(8, 0), 1), ModelLimits { max_seq_len: 8, ..limits() }),
        (
            "generation/kv-cache-too-small",
            Request::greedy(prompt(8, 0), 2),
            ModelLimits { pages: 2, ..limits() },
        ),
        ("generation/bad-top-p", Request { sampling, ..good.clone() }, limits()),
    ];
    for (code, bad, limits) in cases {
        let (result, model) = run(limits, &[Request::greedy(vec![1], 1), bad]);
        let error = result.unwrap_err();
        assert_eq!((error.code(), error.place()), (code, Some("request 1")));
        assert!(model.log.is_empty());
        if code == "generation/prompt-too-long" {
            assert!(error.message().contains("64"));
            assert!(error.next_step().is_some_and(|hint| hint.contains("--max-input-len")));
        }
    }
}

/// A model that writes what the test says.
struct Fixed(Vec<f32>);

impl StepModel for Fixed {
    fn limits(&self) -> ModelLimits {
        ModelLimits { vocab_size: 3, ..limits() }
    }

    fn step(&mut self, _: &StepInputs, logits: &mut Vec<f32>) -> Result<()> {
        logits.clone_from(&self.0);
        Ok(())
    }
}

#[test]
fn faults_of_the_model_are_errors() {
    let run = |logits: &[f32]| {
        let mut model: Box<dyn StepModel> = Box::new(Fixed(logits.to_vec()));
        let result = Generator::new(&mut *model).unwrap().generate(&[Request::greedy(vec![1], 3)], |_, _| {});
        result.map(|c| c[0].token_ids.clone())
    };
    assert_eq!(run(&[0.0, 1.0, 0.5]), Ok(vec![1, 1, 1]));
    assert_eq!(run(&[0.0, f32::NAN, 0.5]).unwrap_err().code(), "generation/nan-logits");
    assert_eq!(run(&[0.0, 1.0]).unwrap_err().code(), "generation/bad-logits");
    struct NoLimits;
    impl StepModel for NoLimits {
        fn limits(&self) -> ModelLimits {
            ModelLimits { max_logit_rows: 0, ..limits() }
        }
        fn step(&mut self, _: &StepInputs, _: &mut Vec<f32>) -> Result<()> {
            unreachable!("the limits are refused before")
        }
    }
    let error = Generator::new(&mut NoLimits).err().unwrap();
    assert_eq!(error.code(), "generation/bad-limits");
}

/// Tells tokens by itself and counts how it was asked.
struct Teller {
    model: HashModel,
    told: usize,
    wrong: Option<Vec<u32>>,
}

impl StepModel for Teller {
    fn limits(&self) -> ModelLimits {
        self.model.limits()
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut Vec<f32>) -> Result<()> {
        self.model.step(inputs, logits)
    }

    fn step_argmax(&mut self, inputs: &StepInputs, tokens: &mut Vec<u32>) -> Result<()> {
        self.told += 1;
        self.model.step_argmax(inputs, tokens)?;
        self.wrong.iter().for_each(|wrong| tokens.clone_from(wrong));
        Ok(())
    }
}

#[test]
fn greedy_steps_ask_for_tokens_and_others_for_logits() {
    let sampled = |seed| SamplingParams { temperature: 1.0, seed, ..SamplingParams::GREEDY };
    let request = |sampling| Request { sampling, ..Request::greedy(prompt(5, 3), 6) };
    let run = |requests: &[Request], wrong: Option<Vec<u32>>| {
        let mut teller = Teller { model: HashModel::new(limits()), told: 0, wrong };
        // By way of a box and a reference, which must pass the question on.
        let mut model: Box<dyn StepModel + '_> = Box::new(&mut teller);
        let result = Generator::new(&mut *model).unwrap().generate(requests, |_, _| {});
        drop(model);
        (result, teller.told, teller.model.log.len())
    };
    let greedy = [request(SamplingParams::GREEDY), request(SamplingParams::GREEDY)];
    let (result, told, steps) = run(&greedy, None);
    assert_eq!(result.unwrap()[0], alone(&greedy[0], &limits()));
    assert!(told == steps && steps > 0);
    let mixed = [request(SamplingParams::GREEDY), request(sampled(1))];
    let (result, told, _) = run(&mixed, None);
    assert_eq!(result.unwrap(), mixed.each_ref().map(|r| alone(r, &limits())));
    assert_eq!(told, 0, "one sequence that draws needs the logits");
    for wrong in [vec![], vec![1, 1], vec![23]] {
        assert_eq!(run(&greedy[..1], Some(wrong)).0.unwrap_err().code(), "generation/bad-logits");
    }
}

/// Begins steps ahead, and feeds them with its own tokens.
struct Feeder {
    model: HashModel,
    begun: VecDeque<Vec<i32>>,
    fed: usize,
    most: usize,
    /// Tells this for the first row of every step after so many.
    spoiled: Option<(usize, i32)>,
}

impl Feeder {
    fn new(limits: ModelLimits) -> Self {
        Feeder { model: HashModel::new(limits), begun: VecDeque::new(), fed: 0, most: 0, spoiled: None }
    }
}

impl StepModel for Feeder {
    fn limits(&self) -> ModelLimits {
        self.model.limits()
    }

    fn step(&mut self, inputs: &StepInputs, logits: &mut Vec<f32>) -> Result<()> {
        self.begun.clear();
        self.model.step(inputs, logits)
    }

    fn start_argmax(&mut self, inputs: &StepInputs, fed: bool) -> Result<bool> {
        let mut inputs = inputs.clone();
        if fed {
            self.fed += 1;
            inputs.token_ids.clone_from(self.begun.back().expect("a step to feed from"));
            assert_eq!(inputs.token_ids.len(), inputs.sequences());
            // As a device does, whatever the argmax was.
            inputs.token_ids.iter_mut().for_each(|t| *t = (*t).clamp(0, 22));
        } else {
            self.begun.clear();
        }
        let mut tokens = Vec::new();
        self.model.step_argmax(&inputs, &mut tokens)?;
        let mut indices: Vec<i32> = tokens.iter().map(|t| *t as i32).collect();
        if let Some((after, index)) = self.spoiled
            && self.model.log.len() > after
        {
            indices[0] = index;
        }
        self.begun.push_back(indices);
        self.most = self.most.max(self.begun.len());
        assert!(self.begun.len() <= 2);
        Ok(true)
    }

    fn take_argmax(&mut self) -> Result<Vec<i32>> {
        Ok(self.begun.pop_front().expect("a step to take"))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn steps_ahead_change_no_token(
        limits in any_limits(),
        requests in prop::collection::vec(any_request(), 0..10),
        greedy in any::<bool>(),
    ) {
        let cold = |r: Request| Request { sampling: SamplingParams::GREEDY, ..r };
        let requests: Vec<Request> = requests.into_iter().map(|r| if greedy { cold(r) } else { r }).collect();
        let mut model = Feeder::new(limits.clone());
        let (completions, stats) = completed(&mut model, &requests);
        let expected: Vec<Completion> = requests.iter().map(|r| alone(r, &limits)).collect();
        prop_assert_eq!(&completions, &expected);
        // Each end of a sequence can make one step for nothing.
        let eos = completions.iter().filter(|c| c.finish == FinishReason::Eos).count();
        prop_assert!((stats.steps as usize..=stats.steps as usize + eos).contains(&model.model.log.len()));
        let fed_back: usize = completions.iter().map(|c| c.token_ids.len().saturating_sub(1)).sum();
        prop_assert_eq!(stats.decode_tokens as usize, fed_back);
    }
}

#[test]
fn decoding_for_the_same_sequences_is_always_ahead() {
    let limits = ModelLimits { eos: vec![], ..limits() };
    let requests: Vec<Request> = (0..3).map(|i| Request::greedy(prompt(4 + i, i as u32), 9)).collect();
    let mut model = Feeder::new(limits.clone());
    let completions = Generator::new(&mut model).unwrap().generate(&requests, |_, _| {}).unwrap();
    assert_eq!(completions, requests.iter().map(|r| alone(r, &limits)).collect::<Vec<_>>());
    // One prefill, and eight steps that the host never fed.
    assert_eq!((model.model.log.len(), model.fed, model.most), (9, 8, 2));
}

#[test]
fn broken_rows_of_steps_ahead_are_errors() {
    for (index, code) in
        [(-1, "generation/nan-logits"), (-2, "generation/infinite-logits"), (23, "generation/bad-logits")]
    {
        let mut model = Feeder::new(ModelLimits { eos: vec![], ..limits() });
        model.spoiled = Some((2, index));
        let requests = [Request::greedy(prompt(3, 1), 8), Request::greedy(prompt(3, 2), 8)];
        let mut seen = 0;
        let result = Generator::new(&mut model).unwrap().generate(&requests, |_, _| seen += 1);
        let error = result.unwrap_err();
        assert_eq!((error.code(), error.place(), seen), (code, Some("request 0"), 4));
    }
}
