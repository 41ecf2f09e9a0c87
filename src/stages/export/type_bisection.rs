//! Kick-offs of several types of which the server takes some and refuses others: bisected, until it is known which.

use std::collections::{BTreeSet, HashSet, VecDeque};

use super::Kickoff;
use crate::error::{Error, ErrorKind};

/// The kick-offs that a run has still to make, in their order, and what came of those that it made.
pub(super) struct TypeBisection {
    waiting: VecDeque<Asking>,
    exports: usize,
    /// Types of which it is known that each is refused, so that there is nothing to be found out.
    known: HashSet<String>,
    /// Why the first kick-off was refused that was taken apart.
    first: Option<Error>,
    /// True if the server accepted a kick-off of the run.
    accepted: bool,
    /// True if a type by itself was answered otherwise than what it was refused with, so that it is a matter of types.
    is_proven: bool,
    /// Number of our exports that it has: what it refuses then may be for want of a slot.
    held: usize,
    /// True if an export failed that was not refused.
    failed: bool,
    refused: Vec<Refused>,
    /// Types that were refused by themselves, and why, which nobody has been told yet.
    found: Vec<(String, String)>,
}

/// A kick-off to be made.
pub(super) struct Asking {
    /// Its number among the run's exports.
    pub export: usize,
    pub kickoff: Kickoff,
    /// The status by which was refused what it is a part of.
    part_of: Option<u16>,
    /// True if it is asked for only where one of the types asked for before it was answered otherwise.
    needs_proof: bool,
}

/// A kick-off that was refused and is not taken apart any further: its number among the run's exports, and why.
pub(super) type Refused = (usize, Kickoff, Error);

impl TypeBisection {
    pub(crate) fn of(kickoffs: &[Kickoff], known: HashSet<String>) -> Self {
        let asking = |(export, kickoff): (usize, &Kickoff)| Asking {
            export,
            kickoff: kickoff.clone(),
            part_of: None,
            needs_proof: false,
        };
        Self {
            waiting: kickoffs.iter().enumerate().map(asking).collect(),
            exports: kickoffs.len(),
            known,
            first: None,
            accepted: false,
            is_proven: false,
            held: 0,
            failed: false,
            refused: Vec::new(),
            found: Vec::new(),
        }
    }

    pub(crate) fn next(&mut self) -> Option<Asking> {
        let asking = self.waiting.pop_front()?;
        if !asking.needs_proof || self.is_proven {
            return Some(asking);
        }
        // Each type that was asked for by itself was refused like all of them: it is not the types.
        let why = self.first.as_ref().map_or_else(String::new, ToString::to_string);
        self.found.extend(asking.kickoff.requested.iter().map(|name| (name.to_string(), why.clone())));
        self.refused.push((asking.export, asking.kickoff, Error::new(ErrorKind::Server, why)));
        self.next()
    }

    /// Returns true if there is one export only.
    pub(crate) fn is_one(&self) -> bool {
        self.exports == 1
    }

    /// An export of an earlier run is resumed.
    pub(crate) fn resumes(&mut self) {
        self.held += 1;
    }

    /// The server does not have it any more.
    pub(crate) fn is_gone(&mut self) {
        self.held -= 1;
    }

    pub(crate) fn accepted(&mut self) {
        self.held += 1;
        (self.accepted, self.is_proven) = (true, true);
    }

    pub(crate) fn failed(&mut self) {
        self.failed = true;
    }

    /// Returns true if the server has an export of ours.
    pub(crate) fn holds(&self) -> bool {
        self.held > 0
    }

    /// Takes what was refused apart, where that can tell anything: into how many parts, 0 where not. They come next,
    /// each with a number of its own. Where the server names a type, or it is known that it is a matter of types, these
    /// are halves. Else a few types by themselves come first, and the rest only where one of them is answered
    /// otherwise: a server that refuses for another reason is not asked for each type.
    pub(crate) fn refused(&mut self, asking: Asking, error: Error) -> usize {
        let Asking { export, mut kickoff, part_of, .. } = asking;
        // What was refused when the server had no export of ours was so for a type, and so are its parts, refused like
        // it.
        let for_a_type = part_of.map_or(!self.holds(), |status| error.status() == Some(status));
        self.is_proven |= part_of.is_some() && !for_a_type;
        let is_known = kickoff.requested.iter().all(|name| self.known.contains(&**name));
        if for_a_type && kickoff.requested.len() > 1 && !is_known {
            // An export that is gone is not to be asked for again.
            kickoff.in_flight = None;
            self.is_proven |= names_a_type(&error, &kickoff);
            let parts = match self.is_proven {
                true => {
                    let second = kickoff.take_half();
                    vec![(kickoff, false), (second, false)]
                }
                false => {
                    let last = kickoff.requested.len() - 1;
                    let probes: BTreeSet<usize> = [0, last / 2, last].into();
                    let rest = |at: &usize| !probes.contains(at);
                    let rest: Vec<usize> = (0..=last).filter(rest).collect();
                    let mut parts: Vec<_> = probes.iter().map(|at| (kickoff.only(&[*at]), false)).collect();
                    if !rest.is_empty() {
                        parts.push((kickoff.only(&rest), true));
                    }
                    parts
                }
            };
            let count = parts.len();
            for (number, (kickoff, needs_proof)) in parts.into_iter().enumerate().rev() {
                let export = self.exports + number;
                self.waiting.push_front(Asking { export, kickoff, part_of: error.status(), needs_proof });
            }
            self.exports += count;
            self.first.get_or_insert(error);
            return count;
        }
        if for_a_type && (kickoff.requested.len() == 1 || is_known) {
            self.found.extend(kickoff.requested.iter().map(|name| (name.to_string(), error.to_string())));
        }
        self.refused.push((export, kickoff, error));
        0
    }

    /// Types that were refused by themselves, and why, once it is known that others are not; each once.
    pub(crate) fn reject(&mut self) -> Vec<(String, String)> {
        if self.accepted { std::mem::take(&mut self.found) } else { Vec::new() }
    }

    /// The types, where each was refused by itself and nothing else happened: it is not the types then.
    pub(crate) fn in_vain(&self) -> Option<Vec<String>> {
        let refused = self.refused.iter().map(|(_, kickoff, _)| kickoff.requested.len()).sum::<usize>();
        let in_vain = self.first.is_some() && !self.holds() && !self.failed && refused == self.found.len();
        in_vain.then(|| self.found.iter().map(|(name, _)| name.clone()).collect())
    }

    /// Returns the kick-offs that were not sent yet, nor by an earlier run.
    pub(crate) fn rest(&mut self) -> Vec<(usize, Kickoff)> {
        let rest = std::mem::take(&mut self.waiting).into_iter();
        let (resumes, rest): (VecDeque<_>, VecDeque<_>) = rest.partition(|asking| asking.kickoff.in_flight.is_some());
        self.waiting = resumes;
        rest.into_iter().map(|asking| (asking.export, asking.kickoff)).collect()
    }

    /// Returns the rejection; the first error alone where there was one kick-off and nothing of it came.
    pub(crate) fn end(self, kickoffs: usize) -> Result<Vec<Refused>, Error> {
        if kickoffs > 1 || self.holds() || self.failed {
            return Ok(self.refused);
        }
        match self.first.or_else(|| self.refused.into_iter().next().map(|(_, _, error)| error)) {
            Some(error) => Err(error),
            None => Ok(Vec::new()),
        }
    }
}

/// Returns true if a refusal names a type of the kick-off, as a word of its own.
fn names_a_type(error: &Error, kickoff: &Kickoff) -> bool {
    let words = error.to_string();
    // What comes before the server's own words is the URL, which may have types in it.
    let words = words.split_once("the server answered").map_or("", |(_, words)| words);
    let mut words = words.split(|letter: char| !letter.is_ascii_alphanumeric());
    words.any(|word| kickoff.requested.iter().any(|name| **name == *word))
}

/// Returns true if a kick-off may have been refused for one of its types: not for who asks, nor for when.
pub(super) fn may_be_for_a_type(error: &Error) -> bool {
    // Bad request, forbidden, unprocessable, not implemented: others are for the group, the place, the length or the
    // time.
    matches!(error.kind(), ErrorKind::Server | ErrorKind::Auth) && matches!(error.status(), Some(400 | 403 | 422 | 501))
}

#[cfg(test)]
mod tests {
    use super::*;
    use bulk_data_client::{ExportRequest, Level};

    fn kickoff(names: &[&str]) -> Kickoff {
        let types = names.iter().map(|name| (*name).to_owned()).collect();
        let request = ExportRequest { level: Level::System, types, since: Some(7), options: Default::default() };
        Kickoff {
            request,
            requested: names.iter().map(|name| (*name).into()).collect(),
            known: Vec::new(),
            in_flight: None,
        }
    }

    fn refusal(status: u16) -> Error {
        Error::new(ErrorKind::Server, format!("answered {status}")).with_status(status)
    }

    /// Plays a server that refuses what names any of `forbidden`: what came, and how many kick-offs were made.
    fn play(bisection: &mut TypeBisection, forbidden: &[&str]) -> (Vec<String>, usize) {
        let (mut came, mut numbers) = (Vec::new(), BTreeSet::new());
        while let Some(asking) = bisection.next() {
            assert!(numbers.insert(asking.export), "two kick-offs have one number");
            let requested: Vec<&str> = asking.kickoff.requested.iter().map(|name| &**name).collect();
            assert_eq!(asking.kickoff.request.types, requested, "what is asked and what is answered for differ");
            if requested.iter().any(|name| forbidden.contains(name)) {
                bisection.refused(asking, refusal(400));
            } else {
                came.extend(asking.kickoff.request.types);
                bisection.accepted();
            }
        }
        assert_eq!(numbers.len(), bisection.exports);
        came.sort();
        (came, numbers.len())
    }

    fn aside(bisection: &mut TypeBisection) -> Vec<String> {
        bisection.reject().into_iter().map(|(name, _)| name).collect()
    }

    // Breaks if a type that is refused keeps another from being asked for, or if finding it takes a request a type.
    #[test]
    fn what_is_refused_together_is_found_by_halves() {
        let all: Vec<String> = (0..40).map(|number| format!("T{number:02}")).collect();
        let names: Vec<&str> = all.iter().map(String::as_str).collect();
        for forbidden in [vec![], vec!["T00"], vec!["T39"], vec!["T07", "T08"], vec!["T03", "T21", "T38"]] {
            let mut bisection = TypeBisection::of(&[kickoff(&names)], HashSet::new());
            let (came, requested) = play(&mut bisection, &forbidden);
            let wanted: Vec<&str> = names.iter().copied().filter(|name| !forbidden.contains(name)).collect();
            assert_eq!(came, wanted);
            assert!(requested <= 1 + forbidden.len() * 12, "{requested} for {forbidden:?}");
            assert_eq!(aside(&mut bisection), forbidden);
            assert!(bisection.reject().is_empty() && bisection.in_vain().is_none() && bisection.end(1).is_ok());
        }
    }

    // Breaks if a refusal that is for none of the types costs every run a request a type, or hides the server's first
    // words.
    #[test]
    fn a_refusal_that_is_for_no_type_is_the_runs_end() {
        let names = ["A", "B", "C"];
        let mut bisection = TypeBisection::of(&[kickoff(&names)], HashSet::new());
        assert_eq!(play(&mut bisection, &names), (vec![], 4));
        assert!(bisection.reject().is_empty());
        let refused: HashSet<String> = bisection.in_vain().unwrap().into_iter().collect();
        assert_eq!(refused.len(), 3);
        assert!(bisection.end(1).is_err());
        // Known now.
        let mut bisection = TypeBisection::of(&[kickoff(&names)], refused.clone());
        assert_eq!(play(&mut bisection, &names), (vec![], 1));
        assert!(bisection.in_vain().is_none() && bisection.end(1).is_err());
        // Another is asked for with them: it comes, and they are set aside without being asked for one by one.
        let mut bisection = TypeBisection::of(&[kickoff(&["A", "B", "D"])], refused);
        assert_eq!(play(&mut bisection, &names), (vec!["D".to_owned()], 4));
        assert_eq!(aside(&mut bisection), ["A", "B"]);
    }

    // Breaks if a server that refuses for another reason is asked for each type, or if one that names a type is for
    // others.
    #[test]
    fn a_few_types_tell_whether_it_is_a_matter_of_types() {
        let all: Vec<String> = (0..40).map(|number| format!("T{number:02}")).collect();
        let names: Vec<&str> = all.iter().map(String::as_str).collect();
        let mut bisection = TypeBisection::of(&[kickoff(&names)], HashSet::new());
        let mut requested = 0;
        while let Some(asking) = bisection.next() {
            requested += 1;
            bisection.refused(asking, refusal(400));
        }
        assert_eq!((requested, bisection.in_vain().map(|types| types.len())), (4, Some(40)));
        assert!(bisection.end(1).is_err());
        // By the server's words.
        let mut bisection = TypeBisection::of(&[kickoff(&names)], HashSet::new());
        let whole = bisection.next().unwrap();
        let error =
            Error::new(ErrorKind::Server, "the kick-off: the server answered 400: no T07 here").with_status(400);
        assert_eq!(bisection.refused(whole, error), 2);
    }

    // Breaks if a server with one slot that does not say so has its types taken for refused.
    #[test]
    fn what_is_refused_while_the_server_has_an_export_of_ours_is_not_taken_apart() {
        let mut bisection = TypeBisection::of(&[kickoff(&["A"]), kickoff(&["B", "C"])], HashSet::new());
        assert_eq!(play(&mut bisection, &["B"]), (vec!["A".to_owned()], 2));
        assert!(bisection.reject().is_empty() && bisection.in_vain().is_none());
        assert_eq!(bisection.end(2).unwrap().len(), 1);
    }

    // Breaks if a half that fails otherwise, or is refused otherwise, is taken for refused.
    #[test]
    fn halves_that_fail_otherwise_say_nothing_of_their_types() {
        let mut bisection = TypeBisection::of(&[kickoff(&["A", "B"])], HashSet::new());
        let whole = bisection.next().unwrap();
        assert_eq!(bisection.refused(whole, refusal(403)), 2);
        let first = bisection.next().unwrap();
        assert_eq!(bisection.refused(first, refusal(400)), 0);
        assert_eq!(bisection.rest().len(), 1);
        bisection.failed();
        assert!(bisection.reject().is_empty() && bisection.in_vain().is_none());
        assert_eq!(bisection.end(1).unwrap().len(), 1);
        for status in [401, 404, 405, 408, 409, 413, 414, 415, 423, 429, 500, 503] {
            assert!(!may_be_for_a_type(&refusal(status)), "{status}");
        }
        assert!(!may_be_for_a_type(&Error::new(ErrorKind::Interrupted, "stopped")));
        assert!(may_be_for_a_type(&refusal(400)) && may_be_for_a_type(&refusal(403)));
    }
}
