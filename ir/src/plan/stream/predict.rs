//! Plays steps against costs until they repeat.

use super::demand::Demand;
use super::place::Placement;

/// Costs in nanoseconds, or in any unit if all agree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Costs {
    /// By node in execution order: computing it with all its weights resident.
    pub nodes: Vec<u64>,
    /// Bytes that the link moves in a thousand nanoseconds.
    pub link: u64,
    /// What each copy costs besides.
    pub copy: u64,
    /// What each launch for a part of a weight costs, beyond a node's first.
    pub launch: u64,
    /// What each step costs besides.
    pub step: u64,
}

impl Costs {
    /// How long the link takes to move `bytes`.
    pub fn transfer(&self, bytes: u64) -> u64 {
        let time = bytes as u128 * 1000 / self.link.max(1) as u128;
        self.copy.saturating_add(u64::try_from(time).unwrap_or(u64::MAX))
    }
}

/// A step of the steady state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prediction {
    /// Its time; the mean over several steps if they never repeat exactly.
    pub time: u64,
    /// Time of its nodes alone.
    pub compute: u64,
    /// Time of its copies alone.
    pub copies: u64,
    /// By node: how long it waited for copies.
    pub stall: Vec<u64>,
}

impl Prediction {
    /// Time spent waiting for copies.
    pub fn stalled(&self) -> u64 {
        self.stall.iter().sum()
    }
}

/// A stretch of a step's timeline, from and to a time since the step began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// What it is.
    pub what: Busy,
    /// When it begins.
    pub start: u64,
    /// When it ends; copies for the next step may end after this one.
    pub end: u64,
}

/// What a device is busy with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// Computing a node, or a part of it.
    Node(usize),
    /// Waiting for this copy.
    Wait(usize),
    /// This copy, on the link.
    Copy(usize),
}

/// Steps that are played before their times are averaged.
const WARM: u64 = 128;
/// Steps that are averaged if none repeats the one before.
const MEAN: u64 = 64;

/// The time of a step that follows others. A node computes with what is resident first and with its tiles as they come;
/// the link brings one copy after the other, each as soon as the kernel of the copy that was in its slot has ended.
pub fn predict(demand: &Demand, placement: &Placement, costs: &Costs) -> Prediction {
    play(demand, placement, costs, None)
}

/// [`predict`], with what processor and link do in a step of the steady state, in the order in which it is enqueued.
pub fn timeline(demand: &Demand, placement: &Placement, costs: &Costs) -> (Prediction, Vec<Span>) {
    let mut spans = Vec::new();
    let told = play(demand, placement, costs, Some(&mut spans));
    (told, spans)
}

fn play(
    demand: &Demand,
    placement: &Placement,
    costs: &Costs,
    mut spans: Option<&mut Vec<Span>>,
) -> Prediction {
    let copies = &placement.copies;
    let lengths: Vec<u64> = copies.iter().map(|c| costs.transfer(c.bytes)).collect();
    let moved = placement.moving().map(|c| costs.transfer(c.bytes)).sum();
    let mut stall = vec![0; demand.nodes];
    let mut arrived = vec![0u64; copies.len()];
    let (mut now, mut link) = (0u64, 0u64);
    let (mut compute, mut time, mut before) = (0, 0, 0);
    // Copies that arrive during the next step, relative to its beginning: all that a step leaves to the next.
    let ahead = |arrived: &[u64], link: u64, now: u64| -> Vec<u64> {
        let first = arrived.iter().take(placement.slots).map(|a| a.saturating_sub(now));
        first.chain([link.saturating_sub(now)]).collect()
    };
    let mut state = ahead(&arrived, link, now);
    for step in 0..WARM + MEAN {
        let begin = now;
        now += costs.step;
        stall.iter_mut().for_each(|s| *s = 0);
        compute = 0;
        if let Some(spans) = &mut spans {
            spans.clear();
        }
        let mut note = |what: Busy, start: u64, end: u64| {
            if let Some(spans) = &mut spans
                && end > start
            {
                spans.push(Span { what, start: start - begin, end: end - begin });
            }
        };
        let (mut next, mut user) = (0, 0);
        for (node, stalled) in stall.iter_mut().enumerate() {
            let cost = costs.nodes.get(node).copied().unwrap_or(0);
            let mut left = cost;
            while let Some(read) = demand.uses.get(user).filter(|u| u.node == node) {
                let slices = demand.items[read.item].slices.max(1) as u128;
                let mine = copies[next..].iter().take_while(|c| c.user == user).count();
                let part = |count: u64| (cost as u128 * count as u128 / slices) as u64;
                if mine > 0 {
                    let streamed: u64 = copies[next..next + mine].iter().map(|c| part(c.count)).sum();
                    let resident = left.saturating_sub(streamed);
                    let launches = mine as u64 - u64::from(placement.resident[read.item] == 0);
                    note(Busy::Node(node), now, now + resident);
                    (now, left) = (now + resident, left - resident);
                    compute += resident + launches * costs.launch;
                }
                for index in next..next + mine {
                    if index > next || placement.resident[read.item] > 0 {
                        now += costs.launch;
                    }
                    let wait = arrived[index].saturating_sub(now);
                    note(Busy::Wait(index), now, now + wait);
                    *stalled += wait;
                    now += wait;
                    let part = part(copies[index].count).min(left);
                    note(Busy::Node(node), now, now + part);
                    (now, left) = (now + part, left - part);
                    compute += part;
                    if let Some(following) = placement.next(index) {
                        let start = link.max(now);
                        link = start + lengths[following];
                        note(Busy::Copy(following), start, link);
                        arrived[following] = link;
                    }
                }
                next += mine;
                user += 1;
            }
            note(Busy::Node(node), now, now + left);
            now += left;
            compute += left;
        }
        time = now - begin;
        let after = ahead(&arrived, link, now);
        if after == state {
            break;
        }
        state = after;
        if step + 1 == WARM {
            before = now;
        }
        if step + 1 == WARM + MEAN {
            time = (now - before) / MEAN;
        }
    }
    Prediction { time, compute, copies: moved, stall }
}
