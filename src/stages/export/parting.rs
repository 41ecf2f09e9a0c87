//! Kick-offs of several types of which the server takes some and refuses others: asked for by halves, until it is known which.

use std::collections::VecDeque;

use super::Kickoff;
use crate::error::{Error, ErrorKind};

/// The kick-offs that a run has still to make, in their order, and what came of those that it made.
pub(super) struct Parting {
    waiting: VecDeque<(usize, Kickoff)>,
    exports: usize,
    allowed: bool,
    /// Why the first kick-off was refused that was taken apart.
    first: Option<Error>,
    /// Whether one ended otherwise than by a refusal: well, or not.
    came: bool,
    failed: bool,
    refused: Vec<Refused>,
}

/// A kick-off that was refused and is not taken apart any further: its number among the run's exports, and why.
pub(super) type Refused = (usize, Kickoff, Error);

impl Parting {
    /// Where parting is not `allowed`, what is refused together fails together.
    pub fn of(kickoffs: &[Kickoff], allowed: bool) -> Self {
        let waiting = kickoffs.iter().cloned().enumerate().collect();
        let exports = kickoffs.len();
        Self { waiting, exports, allowed, first: None, came: false, failed: false, refused: Vec::new() }
    }

    /// The next one, and its number.
    pub fn next(&mut self) -> Option<(usize, Kickoff)> {
        self.waiting.pop_front()
    }

    /// Whether there is one export only.
    pub fn is_one(&self) -> bool {
        self.exports == 1
    }

    pub fn came(&mut self) {
        self.came = true;
    }

    pub fn failed(&mut self) {
        self.failed = true;
    }

    /// Takes what was refused apart: the first half keeps the number and comes next, the second has a new one. Whether it did.
    pub fn refused(&mut self, export: usize, mut kickoff: Kickoff, error: Error) -> bool {
        if !self.allowed || kickoff.asked.len() < 2 || !may_be_for_a_type(&error) {
            self.refused.push((export, kickoff, error));
            return false;
        }
        let second = kickoff.take_half();
        self.waiting.push_front((self.exports, second));
        self.waiting.push_front((export, kickoff));
        self.exports += 1;
        self.first.get_or_insert(error);
        true
    }

    /// Whether kick-offs were refused, types by themselves too, and nothing came nor failed otherwise: it is not the types then.
    pub fn is_in_vain(&self) -> bool {
        self.first.is_some() && !self.came && !self.failed
    }

    /// What was refused; the first error alone where there was one kick-off and nothing of it came.
    pub fn end(self, kickoffs: usize) -> Result<Vec<Refused>, Error> {
        let nothing = !self.came && !self.failed && kickoffs == 1;
        match self.first {
            Some(first) if nothing => Err(first),
            None if nothing => match self.refused.into_iter().next() {
                Some((_, _, error)) => Err(error),
                None => Ok(Vec::new()),
            },
            _ => Ok(self.refused),
        }
    }

    /// Types that were refused by themselves, and why, where others came.
    pub fn set_aside(&self) -> Vec<(String, String)> {
        let single = |(_, kickoff, error): &Refused| match kickoff.asked.as_slice() {
            [name] if self.came => Some((name.to_string(), error.to_string())),
            _ => None,
        };
        self.refused.iter().filter_map(single).collect()
    }
}

/// Whether a kick-off may have been refused for one of its types: not for who asks, nor for when.
fn may_be_for_a_type(error: &Error) -> bool {
    let status = error.status().unwrap_or_default();
    let of_request = (400..500).contains(&status) && !matches!(status, 401 | 408 | 425 | 429);
    matches!(error.kind(), ErrorKind::Server | ErrorKind::Auth) && (of_request || status == 501)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fhir::{ExportRequest, Level};

    fn kickoff(names: &[&str]) -> Kickoff {
        let types = names.iter().map(|name| (*name).to_owned()).collect();
        let request = ExportRequest { level: Level::System, types, since: Some(7), options: Default::default() };
        Kickoff { request, asked: names.iter().map(|name| (*name).into()).collect(), known: Vec::new(), in_flight: None }
    }

    fn refusal(status: u16) -> Error {
        Error::new(ErrorKind::Server, format!("answered {status}")).with_status(status)
    }

    /// Plays a server that refuses what names any of `forbidden`: what was asked for and came, and what was asked for in all.
    fn play(names: &[&str], forbidden: &[&str], parting: &mut Parting) -> (Vec<String>, usize) {
        let (mut came, mut asked, mut numbers) = (Vec::new(), 0, std::collections::BTreeSet::new());
        while let Some((number, kickoff)) = parting.next() {
            asked += 1;
            let of_request: Vec<&str> = kickoff.asked.iter().map(|name| &**name).collect();
            assert_eq!(kickoff.request.types, of_request, "what is asked and what is answered for differ");
            if kickoff.request.types.iter().any(|name| forbidden.contains(&name.as_str())) {
                numbers.insert(number);
                parting.refused(number, kickoff, refusal(400));
            } else {
                assert!(numbers.insert(number) || parting.first.is_some());
                came.extend(kickoff.request.types);
                parting.came();
            }
        }
        assert_eq!(numbers.len(), parting.exports, "each export has a number of its own: {names:?}");
        (came, asked)
    }

    // Breaks if a type that is refused keeps another from being asked for, or if finding it takes a request a type.
    #[test]
    fn what_is_refused_together_is_found_by_halves() {
        let all: Vec<String> = (0..40).map(|number| format!("T{number:02}")).collect();
        let names: Vec<&str> = all.iter().map(String::as_str).collect();
        for forbidden in [vec![], vec!["T00"], vec!["T39"], vec!["T07", "T08"], vec!["T03", "T21", "T38"]] {
            let mut parting = Parting::of(&[kickoff(&names)], true);
            let (mut came, asked) = play(&names, &forbidden, &mut parting);
            came.sort();
            let wanted: Vec<&str> = names.iter().copied().filter(|name| !forbidden.contains(name)).collect();
            assert_eq!(came, wanted);
            assert!(asked <= 1 + forbidden.len() * 12, "{asked} for {forbidden:?}");
            let aside: Vec<String> = parting.set_aside().into_iter().map(|(name, _)| name).collect();
            assert_eq!(aside, forbidden);
            assert!(!parting.is_in_vain() && parting.end(1).is_ok());
        }
    }

    // Breaks if a refusal that is for none of the types costs every run a request a type, or hides the server's first words.
    #[test]
    fn a_refusal_that_is_for_no_type_is_the_runs_end() {
        let names = ["A", "B", "C"];
        let mut parting = Parting::of(&[kickoff(&names)], true);
        assert_eq!(play(&names, &names, &mut parting), (vec![], 5));
        assert!(parting.is_in_vain() && parting.set_aside().is_empty());
        assert!(parting.end(1).is_err());
        let mut parting = Parting::of(&[kickoff(&names)], false);
        assert_eq!(play(&names, &names, &mut parting), (vec![], 1));
        assert!(!parting.is_in_vain() && parting.end(1).is_err());
        for status in [401, 408, 429, 500, 503] {
            let mut parting = Parting::of(&[kickoff(&names)], true);
            let (number, kickoff) = parting.next().unwrap();
            assert!(!parting.refused(number, kickoff, refusal(status)), "{status}");
        }
    }
}
