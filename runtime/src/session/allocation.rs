//! When a session's activations, inputs and outputs are allocated, and for which shapes.
//!
//! What is held follows from the allocation and, under [`Allocation::OnProfileChange`], from the profile in force. A step brings
//! what is held to what is wanted before it runs, so a change that failed for lack of memory leaves a usable session.

use millrace_ir::{Bindings, Error, Kind, Result, ShapeProfile};

use super::{Backend, PAGES, Session};
use crate::engine::Engine;
use crate::ledger::Class;
use crate::options::{Allocation, ProfileChoice};
use crate::sizes::{StepSizes, no_size};

/// A profile at the session's number of cache pages.
#[derive(Clone, Debug)]
pub(super) struct Bounds {
    name: String,
    maxima: Bindings,
    /// Bytes of its largest step.
    bytes: u64,
}

impl Bounds {
    /// The profiles of `engine`; one that takes all shapes if it has none. Symbols of states have their value in `maxima`.
    pub fn of(engine: &Engine, maxima: &Bindings) -> Vec<Bounds> {
        let dims = &engine.module().dims;
        let with_pages = |mut bindings: Bindings| {
            maxima.iter().filter(|(s, _)| s.name() == PAGES).for_each(|(s, v)| bindings.set(s, v));
            bindings
        };
        let profiles = &engine.manifest().profiles;
        if profiles.is_empty() {
            let maxima = with_pages(Bindings::maxima(dims));
            return vec![Bounds { name: "all".to_string(), maxima, bytes: 0 }];
        }
        let bounds =
            |p: &ShapeProfile| Bounds { name: p.name.clone(), maxima: with_pages(p.maxima(dims)), bytes: 0 };
        profiles.iter().map(bounds).collect()
    }

    fn takes(&self, bindings: &Bindings) -> bool {
        bindings.iter().all(|(sym, value)| self.maxima.get(sym).is_none_or(|most| value <= most))
    }
}

/// What is allocated for steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Held {
    /// Nothing, or what a dynamic step has left.
    Nothing,
    /// What the largest steps of all profiles need.
    All,
    /// What the largest step of one profile needs.
    Profile(usize),
    /// Inputs and outputs of the largest steps.
    Io,
}

/// Bytes that a step allocates.
#[derive(Clone, Debug)]
pub(super) struct Need {
    pub sizes: StepSizes,
    /// Scratch memory of a device.
    pub scratch: u64,
}

/// Alignment of arenas in memory that is lent.
fn alignment(backend: &Backend) -> u64 {
    match backend {
        Backend::Cpu(_) => crate::memory::ALIGN as u64,
        Backend::Cuda(_) => 256,
    }
}

impl<'e> Session<'e> {
    /// What a step at `bindings` allocates.
    pub(super) fn need_at(&self, bindings: &Bindings) -> Result<Need> {
        let scratch = match &self.backend {
            Backend::Cpu(_) => 0,
            Backend::Cuda(cuda) => cuda.scratch_bytes(bindings)?,
        };
        Ok(Need { sizes: StepSizes::at(self.module(), bindings)?, scratch })
    }

    /// What serves the largest step of every profile.
    pub(super) fn need_of_all(&self) -> Result<Need> {
        let mut all = Need { sizes: StepSizes::none(self.module()), scratch: 0 };
        for bounds in &self.bounds {
            let need = self.need_at(&bounds.maxima)?;
            all.sizes.raise(&need.sizes);
            all.scratch = all.scratch.max(need.scratch);
        }
        Ok(all)
    }

    fn need_of_io(&self) -> Result<Need> {
        let mut need = self.need_of_all()?;
        need.sizes.arenas.fill(0);
        Ok(Need { scratch: 0, ..need })
    }

    /// What is held between steps, or for the smallest step if nothing is.
    pub(super) fn standing_need(&self) -> Result<Need> {
        match self.allocation {
            Allocation::Static => self.need_of_all(),
            Allocation::OnProfileChange => {
                let index = self.choice.or_else(|| self.cheapest(|_| true)).unwrap_or(0);
                self.need_at(&self.bounds[index].maxima)
            }
            Allocation::Dynamic => {
                let mut minima = Bindings::minima(&self.module().dims);
                self.maxima.iter().filter(|(s, _)| s.name() == PAGES).for_each(|(s, v)| minima.set(s, v));
                self.need_at(&minima)
            }
            Allocation::UserManaged => self.need_of_io(),
        }
    }

    /// Bytes that the whole session takes, by class, with what its allocation holds between steps; those of the smallest step
    /// if it holds nothing. Staging memory is left out.
    ///
    /// # Errors
    /// `run/no-size` if a size has no value.
    pub fn standing_bytes(&self) -> Result<Vec<(Class, u64)>> {
        self.required_with(&self.standing_need()?)
    }

    /// Bytes that a step with symbols `bindings` takes for itself, by class, whatever the allocation: activations, inputs and
    /// outputs, scratch memory of a device. Cache pages need no value.
    ///
    /// # Errors
    /// `run/no-size` if a size has no value.
    pub fn shapes_bytes(&self, bindings: &Bindings) -> Result<Vec<(Class, u64)>> {
        let need = self.need_at(bindings)?;
        let mut bytes = vec![(Class::Activations, need.sizes.activations()), (Class::Io, need.sizes.io())];
        if let Backend::Cuda(_) = &self.backend {
            bytes.push((Class::Workspace, need.scratch));
        }
        Ok(bytes)
    }

    /// Names of the engine's profiles; one, `all`, if it was compiled without any.
    pub fn profiles(&self) -> impl ExactSizeIterator<Item = &str> {
        self.bounds.iter().map(|b| b.name.as_str())
    }

    /// The largest values of the symbols of profile `index`.
    pub fn profile_maxima(&self, index: usize) -> Option<&Bindings> {
        self.bounds.get(index).map(|b| &b.maxima)
    }

    /// Bytes of activations of the largest step of each profile. Static allocation takes the largest of them.
    ///
    /// # Errors
    /// `run/no-size` if a size has no value.
    pub fn profile_bytes(&self) -> Result<Vec<u64>> {
        let bytes = |b: &Bounds| StepSizes::at(self.module(), &b.maxima).map(|s| s.activations());
        self.bounds.iter().map(bytes).collect()
    }

    /// The number of the selected profile; nothing if each step takes the one that suits it.
    pub fn selected_profile(&self) -> Option<usize> {
        self.choice
    }

    fn chosen(&self, choice: &ProfileChoice) -> Result<Option<usize>> {
        let found = match choice {
            ProfileChoice::Automatic => return Ok(None),
            ProfileChoice::Index(index) => Some(*index).filter(|i| *i < self.bounds.len()),
            ProfileChoice::Name(name) => self.bounds.iter().position(|b| b.name == *name),
        };
        let names: Vec<&str> = self.profiles().collect();
        let asked = match choice {
            ProfileChoice::Name(name) => format!("`{name}`"),
            ProfileChoice::Index(index) => index.to_string(),
            ProfileChoice::Automatic => String::new(),
        };
        found.map(Some).ok_or_else(|| {
            Error::new(Kind::Usage, "run/no-such-profile", format!("the engine has no profile {asked}"))
                .hint(format!("it has {}", names.join(", ")))
        })
    }

    /// Ranks the profiles and notes the choice of the options, before anything is allocated.
    pub(super) fn choose(&mut self, choice: &ProfileChoice) -> Result<()> {
        for index in 0..self.bounds.len() {
            let need = self.need_at(&self.bounds[index].maxima)?;
            let own = [need.sizes.activations(), need.sizes.io(), need.scratch];
            self.bounds[index].bytes = own.into_iter().fold(0, u64::saturating_add);
        }
        self.choice = self.chosen(choice)?;
        Ok(())
    }

    /// Selects the profile that steps run under from here on. Under [`Allocation::OnProfileChange`] memory is allocated for it
    /// now.
    ///
    /// # Errors
    /// `run/no-such-profile`; `run/cap` or `run/out-of-memory`, and the selection then stays as it was.
    pub fn select_profile(&mut self, choice: impl Into<ProfileChoice>) -> Result<()> {
        let choice = self.chosen(&choice.into())?;
        let before = std::mem::replace(&mut self.choice, choice);
        if let (Allocation::OnProfileChange, Some(index)) = (self.allocation, choice)
            && let Err(error) = self.hold(Held::Profile(index))
        {
            self.choice = before;
            return Err(error);
        }
        Ok(())
    }

    /// Among the profiles that `fits` the one of least memory, the first among equals.
    fn cheapest(&self, fits: impl Fn(&Bounds) -> bool) -> Option<usize> {
        let all = self.bounds.iter().enumerate().filter(|(_, b)| fits(b));
        all.min_by_key(|(_, b)| b.bytes).map(|(index, _)| index)
    }

    /// The profile that a step at `bindings` runs under.
    ///
    /// # Errors
    /// `run/no-profile` if the selected one, or none, takes the shape.
    pub fn profile_for(&self, bindings: &Bindings) -> Result<usize> {
        let found = match self.choice {
            Some(index) => Some(index).filter(|i| self.bounds[*i].takes(bindings)),
            None => self.cheapest(|b| b.takes(bindings)),
        };
        found.ok_or_else(|| {
            let values: Vec<String> = bindings
                .iter()
                .filter(|(s, _)| s.name() != PAGES)
                .map(|(s, v)| format!("{s} = {v}"))
                .collect();
            let (message, hint) = match self.choice {
                Some(i) => (
                    format!("profile `{}` does not take", self.bounds[i].name),
                    "select another profile or none",
                ),
                None => ("no profile takes".to_string(), "compile with a profile that takes it"),
            };
            Error::new(Kind::BadInput, "run/no-profile", format!("{message} {}", values.join(", ")))
                .hint(hint)
        })
    }

    /// Whether a step at `bindings` has a profile.
    pub(crate) fn takes(&self, bindings: &Bindings) -> bool {
        match self.choice {
            Some(index) => self.bounds[index].takes(bindings),
            None => self.bounds.iter().any(|b| b.takes(bindings)),
        }
    }

    /// Brings what is held to `held`.
    fn hold(&mut self, held: Held) -> Result<()> {
        if self.held == held && held != Held::Nothing {
            return Ok(());
        }
        let need = match held {
            Held::Nothing => {
                self.release();
                return Ok(());
            }
            Held::All => self.need_of_all()?,
            Held::Profile(index) => self.need_at(&self.bounds[index].maxima.clone())?,
            Held::Io => self.need_of_io()?,
        };
        self.allocate(&need, true)?;
        self.held = held;
        Ok(())
    }

    /// Allocates what the allocation takes before any step.
    pub(super) fn hold_standing(&mut self) -> Result<()> {
        self.hold(match (self.allocation, self.choice) {
            (Allocation::Static, _) => Held::All,
            (Allocation::OnProfileChange, Some(index)) => Held::Profile(index),
            (Allocation::OnProfileChange, None) | (Allocation::Dynamic, _) => Held::Nothing,
            (Allocation::UserManaged, _) => Held::Io,
        })
    }

    /// Allocates what a step at `bindings` takes.
    pub(super) fn hold_for(&mut self, bindings: &Bindings) -> Result<()> {
        let profile = self.profile_for(bindings)?;
        match self.allocation {
            Allocation::Static => self.hold(Held::All),
            Allocation::OnProfileChange => self.hold(Held::Profile(profile)),
            Allocation::UserManaged => self.hold(Held::Io),
            Allocation::Dynamic => {
                let need = self.need_at(bindings)?;
                self.allocate(&need, false)
            }
        }
    }

    /// Whether memory for steps stays where it is, whatever their shapes.
    pub(super) fn stays(&self) -> bool {
        match self.allocation {
            Allocation::Static => true,
            Allocation::OnProfileChange => self.choice.is_some() || self.bounds.len() == 1,
            Allocation::Dynamic | Allocation::UserManaged => false,
        }
    }

    /// Gives back what a dynamic step took, but for its outputs.
    pub(super) fn after_step(&mut self) {
        if self.allocation == Allocation::Dynamic {
            match &mut self.backend {
                Backend::Cpu(cpu) => cpu.release_arenas(),
                Backend::Cuda(cuda) => cuda.release_arenas(),
            }
        }
        if matches!(self.allocation, Allocation::Dynamic | Allocation::UserManaged) {
            self.ledger.set(Class::Activations, 0);
        }
    }

    /// Bytes of memory that [`Session::run_in`] needs for a step with symbols `bindings`: arenas and scratch memory, each on its
    /// alignment. Cache pages need no value.
    ///
    /// # Errors
    /// `run/no-size` if a size has no value.
    pub fn lent_bytes(&self, bindings: &Bindings) -> Result<u64> {
        self.lent_need(&self.need_at(bindings)?)
    }

    /// Bytes of memory that suffice [`Session::run_in`] for every step.
    ///
    /// # Errors
    /// `run/no-size` if a size has no value.
    pub fn most_lent_bytes(&self) -> Result<u64> {
        let each = self.bounds.iter().map(|b| self.lent_bytes(&b.maxima));
        each.collect::<Result<Vec<u64>>>().map(|all| all.into_iter().max().unwrap_or(0))
    }

    fn lent_need(&self, need: &Need) -> Result<u64> {
        let align = alignment(&self.backend);
        let sizes = need.sizes.arenas.iter().copied().chain([need.scratch]);
        let mut rounded = sizes.map(|n| n.checked_next_multiple_of(align));
        rounded.try_fold(0u64, |sum, n| sum.checked_add(n?)).ok_or_else(|| no_size("lent memory"))
    }

    /// Checks that memory was lent if steps need it, and enough.
    pub(super) fn check_lent(&self, lent: Option<u64>, bindings: &Bindings) -> Result<()> {
        match (self.allocation, lent) {
            (Allocation::UserManaged, Some(len)) => {
                let needed = self.lent_bytes(bindings)?;
                if len >= needed {
                    return Ok(());
                }
                let message = format!("{needed} bytes are needed for activations, {len} were lent");
                Err(Error::new(Kind::OutOfMemory, "run/lent-too-small", message)
                    .hint("Session::lent_bytes tells what a step needs"))
            }
            (Allocation::UserManaged, None) => {
                let message = "activation memory is the caller's, and none was lent";
                Err(Error::new(Kind::Usage, "run/nothing-lent", message)
                    .hint("use Session::run_in, or another allocation"))
            }
            (other, Some(_)) => {
                let message = format!("memory was lent to a session with {} allocation", other.name());
                Err(Error::new(Kind::Usage, "run/not-user-managed", message)
                    .hint("set Allocation::UserManaged"))
            }
            (_, None) => Ok(()),
        }
    }
}
