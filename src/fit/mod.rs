//! What an engine will take and how fast it will be, told before it runs.

mod steps;

pub use steps::Step;
