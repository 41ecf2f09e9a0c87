//! Which rows go: copies that lose within the run, and rows of the table that are replaced or deleted.
//!
//! Keys of the run that fit into memory are indexed, and the table's ids go by once. Where they do
//! not, both sides are laid out by partitions of the key space on disk, and the same is done partition by partition.

pub(crate) mod bloom_filter;
pub(crate) mod deletions;
pub(crate) mod keys;
pub(crate) mod not_matched;
pub(crate) mod nulls;
pub(crate) mod precedence;
pub(crate) mod row_equality;
mod staged_rows;

use std::collections::{BTreeMap, HashMap};

use roaring::RoaringTreemap;

use crate::commit::upsert::Merged;
use crate::matching::bloom_filter::Filter;
use crate::matching::deletions::{Deletions, MAX_IDS, Scratch};
use crate::matching::keys::{DataFile, Ids, OpenFile, all_ids, for_each_string, selection};
use crate::matching::not_matched::NotMatchedBySource;
use crate::matching::precedence::{OrderRules, Precedence, compare_versions, is_undated};
use crate::matching::row_equality::row_hashes;
use crate::matching::staged_rows::{ByKey, StagedRows, is_newer};
use crate::row::{RowKey, RowPosition, key_of};
use crate::staging::StagedFile;
use crate::staging::spill::{ContentAt, KeyAt, PARTITIONS, Part, Spill, partition};
use crate::table::Table;
use crate::table::snapshot_files::TargetFile;
use crate::unchanged::rows::UnchangedRows;
use flow::on_all_cores;
use foundation::error::{Error, ErrorKind, Result};

/// Memory that a row of the run takes while it is matched: its key and place in the index, and its match.
const BYTES_A_ROW: u64 = 136;

/// Rows to be marked, before any file is written.
#[derive(Debug, Default)]
pub(crate) struct MergePlan {
    pub merged: Merged,
    /// By data file of the table.
    pub gone: BTreeMap<usize, RoaringTreemap>,
    /// By staged file.
    pub staged_gone: Vec<RoaringTreemap>,
    /// Live rows of the table, and those of them that the run does not bring; counted where that matters.
    live: u64,
    absent: u64,
    /// Copies that lose within the run, by the index of the export's file that they came in.
    pub copies: BTreeMap<u32, u64>,
    /// Winners that the table has in the same version: only their content can tell.
    equal: Vec<RoaringTreemap>,
    /// The table's rows that they are equal to.
    equal_held: BTreeMap<usize, RoaringTreemap>,
}

impl MergePlan {
    fn mark(&mut self, held: &KeyAt) {
        self.gone.entry(held.file as usize).or_default().insert(held.row());
    }
    fn mark_staged(&mut self, staged: &KeyAt) {
        self.staged_gone[staged.file as usize].insert(staged.row());
        self.merged.skipped += 1;
    }
}

/// Rows of a file of the table.
#[derive(Debug, Default)]
struct Seen {
    /// All rows, those included that are gone.
    rows: u64,
    /// Live rows that the run neither brings nor deletes by name.
    absent: RoaringTreemap,
}

/// One match of what a run brings with a table's files.
pub(crate) struct Matching<'a> {
    pub table: &'a Table,
    pub targets: &'a [TargetFile],
    pub files: &'a [StagedFile],
    /// Rows of the targets that the run brings as they are, by target; and where they came from.
    pub unchanged: (&'a [RoaringTreemap], &'a [UnchangedRows]),
    pub deletions: &'a Deletions,
    pub order: OrderRules,
    pub absent: NotMatchedBySource,
    pub scratch: &'a Scratch,
}

impl Matching<'_> {
    /// The rows that go.
    pub(crate) async fn plan(&self) -> Result<MergePlan> {
        let staged_gone = self.files.iter().map(|file| file.void.clone()).collect();
        let mut plan =
            MergePlan { staged_gone, equal: vec![RoaringTreemap::new(); self.files.len()], ..MergePlan::default() };
        let staged_rows: u64 = self.files.iter().map(|file| file.rows).sum::<u64>() + self.deletions.keys.rows();
        if staged_rows * BYTES_A_ROW <= self.scratch.memory as u64 {
            self.at_once(&mut plan).await?;
        } else {
            self.part_by_part(staged_rows, &mut plan).await?;
        }
        self.count_unchanged(&mut plan)?;
        self.absent.check(plan.absent, plan.live)?;
        plan.merged.absent = plan.absent;
        if let NotMatchedBySource::Overwrite(_) = self.absent {
            plan.merged.updated = plan.live - plan.absent;
            plan.merged.inserted = plan.merged.inserted.saturating_sub(plan.merged.updated);
        }
        self.compare(&mut plan).await?;
        Ok(plan)
    }

    async fn at_once(&self, plan: &mut MergePlan) -> Result<()> {
        let mut staged_rows = self.staged_rows(&Part::ALL, plan)?;
        staged_rows.make_bits();
        let stays = self.absent == NotMatchedBySource::Keep;
        let ids = if stays { self.ids().await? } else { None };
        // What a run without a row looks for, no file has.
        let targets = if stays && staged_rows.winners.is_empty() && staged_rows.deletions.is_empty() {
            &[]
        } else {
            self.targets
        };
        let handle = tokio::runtime::Handle::current();
        let found = on_all_cores(targets, |index, target| {
            handle.block_on(self.look(index, target, &staged_rows, ids.as_ref()))
        })?;
        let mut held = Vec::with_capacity(found.iter().map(|(held, _)| held.len()).sum());
        for (index, (here, seen)) in found.into_iter().enumerate() {
            held.extend(here);
            self.count_live(index, seen.rows, plan);
            seen.absent.iter().for_each(|row| self.absent_row(index, row, plan));
        }
        self.settle(&staged_rows, held, plan)
    }

    /// The rows of a file that the run brings, and what it does not bring.
    async fn look(
        &self,
        index: usize,
        target: &TargetFile,
        staged_rows: &StagedRows,
        ids: Option<&Ids>,
    ) -> Result<(Vec<KeyAt>, Seen)> {
        let mut seen = Seen::default();
        let (least, greatest) = &target.data.ids;
        if ids.is_some_and(|ids| ids.between(least.as_deref(), greatest.as_deref()).is_empty()) {
            return Ok((Vec::new(), seen));
        }
        let unchanged = &self.unchanged.0[index];
        let is_empty = staged_rows.winners.is_empty() && staged_rows.deletions.is_empty();
        if let Some(rows) = target.rows.filter(|rows| is_empty && unchanged.len() + target.data.gone.len() == *rows) {
            // All of its rows came, and nothing else did.
            seen.rows = rows;
            return Ok((Vec::new(), seen));
        }
        let file = self.open(target).await?;
        seen.rows = file.rows();
        let (mut found, mut keys) = (Vec::new(), Vec::new());
        let stays = self.absent == NotMatchedBySource::Keep;
        let each = |row, key: Option<u128>| match key.filter(|key| staged_rows.has(*key)) {
            Some(key) => {
                found.push(row);
                keys.push(key);
            }
            None if stays => {}
            None => drop(seen.absent.insert(row)),
        };
        file.for_each_id(ids, each).await?;
        seen.absent -= &target.data.gone;
        seen.absent -= unchanged;
        let mut live = found.iter().map(|row| !target.data.gone.contains(*row));
        keys.retain(|_| live.next().unwrap_or(false));
        found.retain(|row| !target.data.gone.contains(*row));
        if found.is_empty() || matches!(self.absent, NotMatchedBySource::Overwrite(_)) {
            return Ok((Vec::new(), seen));
        }
        let ranks = file.ranks(&found).await?;
        let matches = found.iter().zip(keys).zip(ranks);
        let held = matches.map(|((row, key), rank)| KeyAt::new(RowKey { key, ..rank }, index as u32, *row as u32));
        Ok((held.collect(), seen))
    }

    /// With memory for a part of the keys only.
    async fn part_by_part(&self, staged_rows: u64, plan: &mut MergePlan) -> Result<()> {
        let quarter = self.scratch.memory / 4;
        let mut filter = Filter::new(staged_rows, quarter);
        let mut rows = [0; PARTITIONS];
        let mut put = |staged: KeyAt| {
            filter.put(staged.key);
            rows[partition(staged.key)] += 1;
            Ok(())
        };
        self.files.iter().try_for_each(|file| file.keys.read(0..PARTITIONS, &mut put))?;
        self.deletions.keys.read(0..PARTITIONS, &mut put)?;
        let mut held = Spill::new(&self.scratch.folder, quarter);
        for (index, target) in self.targets.iter().enumerate() {
            let file = self.open(target).await?;
            let mut maybe = None;
            // Reading the ranks of all rows costs more than reading the ids twice, unless most rows match.
            if staged_rows * 4 < file.rows() {
                let mut rows = RoaringTreemap::new();
                let gone = &target.data.gone;
                let each = |row, key: Option<u128>| match key.filter(|key| filter.might_contain(*key)) {
                    Some(_) => drop(rows.insert(row)),
                    None if self.absent == NotMatchedBySource::Keep || gone.contains(row) => {}
                    None => self.absent_row(index, row, plan),
                };
                file.for_each_id(None, each).await?;
                maybe = Some(rows);
            }
            let each = |row, key: Option<RowKey>| match key.filter(|key| filter.might_contain(key.key)) {
                Some(key) => held.push(KeyAt::new(key, index as u32, row as u32)),
                None => {
                    self.absent_row(index, row, plan);
                    Ok(())
                }
            };
            file.for_each_ranked(maybe.as_ref(), each).await?;
            self.count_live(index, file.rows(), plan);
        }
        drop(filter);
        held.spill()?;
        for part in Part::of(&rows, self.scratch.memory as u64 / BYTES_A_ROW) {
            let staged_rows = self.staged_rows(&part, plan)?;
            let mut matches = Vec::new();
            held.read(part.partitions.clone(), |held| {
                if staged_rows.has(held.key) {
                    matches.push(held);
                } else if part.has(held.key) {
                    self.absent_row(held.file as usize, held.row(), plan);
                }
                Ok(())
            })?;
            self.settle(&staged_rows, matches, plan)?;
        }
        Ok(())
    }

    async fn open<'b>(&self, target: &'b TargetFile) -> Result<OpenFile<'b>> {
        let file = OpenFile::open(self.table, &target.data).await?;
        if file.rows() > KeyAt::MAX_ROWS {
            return Err(Error::new(ErrorKind::Table, format!("{} has more than a billion rows", target.data.path)));
        }
        Ok(file)
    }

    /// A row of the table that the run neither brings nor deletes by name.
    fn absent_row(&self, file: usize, row: u64, plan: &mut MergePlan) {
        if self.absent == NotMatchedBySource::Keep || self.unchanged.0[file].contains(row) {
            return;
        }
        plan.absent += 1;
        plan.merged.deleted += 1;
        plan.gone.entry(file).or_default().insert(row);
    }

    /// Counts a file of so many rows, where it matters which of them the run does not bring.
    fn count_live(&self, file: usize, rows: u64, plan: &mut MergePlan) {
        if self.absent == NotMatchedBySource::Keep {
            return;
        }
        plan.live += rows - self.targets[file].data.gone.len();
        if let NotMatchedBySource::Overwrite(_) = self.absent {
            plan.gone.entry(file).or_default().insert_range(0..rows);
        }
    }

    /// The ids that the run brings, where they are few enough for statistics to leave something out.
    async fn ids(&self) -> Result<Option<Ids>> {
        let rows: u64 = self.files.iter().map(|file| file.rows).sum();
        let Some(deleted) = self.deletions.ids.as_ref().filter(|ids| rows as usize + ids.len() <= MAX_IDS) else {
            return Ok(None);
        };
        let mut ids = deleted.clone();
        for file in self.files {
            ids.extend(all_ids(self.table, &file.path, file.size).await?);
        }
        Ok(Some(Ids::new(ids)))
    }

    /// Returns the rows of the run in `part`: among its own copies the newest wins.
    fn staged_rows(&self, part: &Part, plan: &mut MergePlan) -> Result<StagedRows> {
        let mut staged_rows = StagedRows::default();
        if part.partitions.len() == PARTITIONS {
            let rows = self.files.iter().map(|file| file.rows as usize).sum();
            staged_rows.winners.reserve_exact(rows);
            staged_rows.by_key.reserve(rows, |_| 0);
        }
        for (file, staged) in self.files.iter().enumerate() {
            staged.keys.read(part.partitions.clone(), |key| {
                if part.has(key.key)
                    && let Some(loser) = staged_rows.add(key.of_file(file))
                {
                    if !loser.row_key().replayed {
                        *plan.copies.entry(loser.arrival.file()).or_default() += 1;
                    }
                    plan.mark_staged(&loser);
                }
                Ok(())
            })?;
        }
        self.deletions.keys.read(part.partitions.clone(), |deleted| {
            if !part.has(deleted.key) {
                return Ok(());
            }
            let version = Deletions::version_of(&deleted);
            // An id that is in the output too is kept; out of quarantine it is not of this export's output.
            let is_older =
                |winner: &RowKey| winner.replayed || version.is_some_and(|version| winner.rank() < version.rank());
            match staged_rows.winner(deleted.key).map(|at| staged_rows.winners[at]) {
                Some(winner) if is_older(&winner.row_key()) => {
                    plan.mark_staged(&winner);
                    staged_rows.forget(deleted.key);
                }
                Some(_) => return Ok(()),
                None => {}
            }
            let known = staged_rows.deletions.entry(deleted.key).or_insert(version);
            // An entry of a `deleted` file says so whatever versions there are; of versions the newest does.
            let newest = (*known)
                .zip(version)
                .map(|(known, version)| if version.rank() > known.rank() { version } else { known });
            *known = newest;
            Ok(())
        })?;
        Ok(staged_rows)
    }

    /// Counts the rows that came as the table has them. What lost against a changed copy is counted with them.
    fn count_unchanged(&self, plan: &mut MergePlan) -> Result<()> {
        let came: u64 = self.unchanged.1.iter().map(UnchangedRows::rows).sum();
        plan.merged.skipped += came;
        plan.merged.unchanged = came;
        let different: u64 = self.unchanged.0.iter().map(RoaringTreemap::len).sum();
        if came == different {
            return Ok(());
        }
        // The same line came more than once.
        for (target, rows) in self.targets.iter().zip(self.unchanged.0) {
            let Some(last) = rows.max() else { continue };
            let mut newest = vec![None; last as usize + 1];
            for unchanged in self.unchanged.1 {
                unchanged.for_each_in(target.data.path.as_ref(), |row| {
                    let known: &mut Option<RowPosition> = &mut newest[row.place.row as usize];
                    let loser = known.map(|known| known.min(row.arrival));
                    *known = Some(known.map_or(row.arrival, |known| known.max(row.arrival)));
                    if let Some(loser) = loser {
                        *plan.copies.entry(loser.file()).or_default() += 1;
                    }
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    /// The newest arrival of each of these rows of the table that came unchanged.
    fn arrivals(&self, held: &[KeyAt]) -> Result<HashMap<(u32, u64), RowPosition>> {
        let mut found: HashMap<(u32, u64), RowPosition> = HashMap::new();
        for held in held.iter().filter(|held| self.unchanged.0[held.file as usize].contains(held.row())) {
            found.insert((held.file, held.row()), RowPosition::default());
        }
        let mut files: Vec<u32> = found.keys().map(|(file, _)| *file).collect();
        files.sort_unstable();
        files.dedup();
        for file in files {
            for unchanged in self.unchanged.1 {
                unchanged.for_each_in(self.targets[file as usize].data.path.as_ref(), |row| {
                    if let Some(newest) = found.get_mut(&(file, row.place.row.into())) {
                        *newest = row.arrival.max(*newest);
                    }
                    Ok(())
                })?;
            }
        }
        Ok(found)
    }

    /// Decides about each id that the table has: `held` are its rows in the table.
    fn settle(&self, staged_rows: &StagedRows, mut held: Vec<KeyAt>, plan: &mut MergePlan) -> Result<()> {
        plan.merged.inserted += staged_rows.by_key.len() as u64;
        if let NotMatchedBySource::Overwrite(_) = self.absent {
            return Ok(());
        }
        held.sort_unstable_by_key(|held| (held.key, held.file, held.row()));
        let arrivals = self.arrivals(&held)?;
        // The copy that came as the table has it, of an id that came changed or deleted too.
        let came = |copy: &KeyAt| {
            arrivals.get(&(copy.file, copy.row())).map(|arrival| RowKey { arrival: *arrival, ..copy.row_key() })
        };
        for copies in held.chunk_by(|a, b| a.key == b.key) {
            let Some(winner) = staged_rows.winner(copies[0].key).map(|at| staged_rows.winners[at]) else {
                let version = staged_rows.deletions.get(&copies[0].key).copied().flatten();
                // The table may have what came after the version that says that it is gone.
                let goes = |copy: &KeyAt| match (came(copy), version) {
                    // An id that is in the output too is kept.
                    (Some(_), None) => false,
                    (Some(came), Some(version)) => came.rank() < version.rank(),
                    (None, None) => true,
                    (None, Some(version)) => {
                        !matches!(compare_versions(&version, &copy.row_key(), OrderRules::default()), Precedence::Older)
                            || is_same(&version, &copy.row_key())
                    }
                };
                let before = copies.iter().filter(|copy| goes(copy)).map(|copy| plan.mark(copy)).count();
                plan.merged.deleted += u64::from(before == copies.len());
                continue;
            };
            plan.merged.inserted -= 1;
            // A table may hold an id twice, by the Python sync script's doing: the best copy stays at most.
            let best = |a: &&KeyAt, b: &&KeyAt| {
                (a.row_key().rank(), a.file, a.row()).cmp(&(b.row_key().rank(), b.file, b.row()))
            };
            let Some(best) = copies.iter().max_by(best) else { continue };
            copies.iter().filter(|copy| !std::ptr::eq(*copy, best)).for_each(|copy| plan.mark(copy));
            let (staged, held) = (winner.row_key(), best.row_key());
            if let Some(came) = came(best) {
                let wins = is_newer(&staged, &came);
                let loser = if wins { came } else { staged };
                if !loser.replayed {
                    *plan.copies.entry(loser.arrival.file()).or_default() += 1;
                }
                if !wins {
                    plan.mark_staged(&winner);
                    continue;
                }
            }
            plan.merged.undated += u64::from(
                self.order.undated_is_older && !staged.replayed && !staged.subsetted && is_undated(&staged, &held),
            );
            match compare_versions(&staged, &held, self.order) {
                Precedence::Newer => {
                    plan.mark(best);
                    plan.merged.updated += 1;
                }
                Precedence::Older => plan.mark_staged(&winner),
                Precedence::Compare => {
                    plan.equal[winner.file as usize].insert(winner.row());
                    plan.equal_held.entry(best.file as usize).or_default().insert(best.row());
                }
            }
        }
        Ok(())
    }

    /// Reads the rows that only their content can tell apart: those that say the same are skipped.
    async fn compare(&self, plan: &mut MergePlan) -> Result<()> {
        let (equal, equal_held) = (std::mem::take(&mut plan.equal), std::mem::take(&mut plan.equal_held));
        let quarter = self.scratch.memory / 4;
        let (mut staged, mut held) =
            (Spill::new(&self.scratch.folder, quarter), Spill::new(&self.scratch.folder, quarter));
        for (index, rows) in equal.iter().enumerate().filter(|(_, rows)| !rows.is_empty()) {
            let file = &self.files[index];
            contents(self.table, &DataFile::new(&file.path, file.size), index, rows, &mut staged).await?;
        }
        for (index, rows) in &equal_held {
            contents(self.table, &self.targets[*index].data, *index, rows, &mut held).await?;
        }
        let mut rows = [0; PARTITIONS];
        held.read(0..PARTITIONS, |held: ContentAt| {
            rows[partition(held.key)] += 1;
            Ok(())
        })?;
        for part in Part::of(&rows, quarter as u64 / 96) {
            let mut by_key: ByKey<ContentAt> = ByKey::default();
            held.read(part.partitions.clone(), |held| {
                if part.has(held.key) {
                    by_key.insert(held.key, held);
                }
                Ok(())
            })?;
            staged.read(part.partitions.clone(), |staged: ContentAt| {
                match by_key.get(&staged.key) {
                    Some(held) if held.content == staged.content => {
                        plan.staged_gone[staged.file as usize].insert(u64::from(staged.row));
                        plan.merged.skipped += 1;
                    }
                    Some(held) => {
                        plan.gone.entry(held.file as usize).or_default().insert(u64::from(held.row));
                        plan.merged.updated += 1;
                    }
                    // In another slice of its partition.
                    None => {}
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}

/// Returns true if two copies have one version.
fn is_same(a: &RowKey, b: &RowKey) -> bool {
    (a.last_updated, a.version) == (b.last_updated, b.version)
}

/// Adds what some rows of a file say to `out`. `index` is the file's.
async fn contents(
    table: &Table,
    file: &DataFile,
    index: usize,
    wanted: &RoaringTreemap,
    out: &mut Spill<ContentAt>,
) -> Result<()> {
    let mut rows = OpenFile::open(table, file).await?.read_rows(Some(selection(wanted.iter())))?;
    let mut places = wanted.iter();
    while let Some(batch) = rows.next().await? {
        let mut keys = vec![0; batch.num_rows()];
        if let Some(ids) = batch.column_by_name("id") {
            for_each_string(ids, |at, id| keys[at] = key_of(id.unwrap_or_default().as_bytes()))?;
        }
        for ((content, key), row) in row_hashes(&batch)?.into_iter().zip(keys).zip(&mut places) {
            out.push(ContentAt { key, content, file: index as u32, row: row as u32 })?;
        }
    }
    Ok(())
}
