//! Which of two copies of a resource is the newer (DESIGN section 5, "Order").

use crate::row::RowKey;

/// Order of a staged row and the table's.
pub(crate) enum Precedence {
    /// It replaces it.
    Newer,
    /// It is skipped.
    Older,
    /// Nothing but the content can tell.
    Compare,
}

/// Rules for the order of copies.
#[derive(Debug, Clone, Copy, Default)]
pub struct OrderRules {
    /// Copies of equal version are compared, and rewritten where they differ.
    pub full_refresh: bool,
    /// A copy that says nothing of its age is older than a row of the table that does: nothing says that it comes from
    /// a newer export, as in a folder of files.
    pub undated_is_older: bool,
}

/// A staged row against the table's, by DESIGN section 5 "Order".
pub(crate) fn compare_versions(staged: &RowKey, table: &RowKey, rules: OrderRules) -> Precedence {
    const ABSENT: i64 = RowKey::ABSENT;
    if staged.subsetted != table.subsetted {
        return if staged.subsetted { Precedence::Older } else { Precedence::Newer };
    }
    // What lacks the order that the table's row has comes from the newer export.
    if rules.undated_is_older {
        if is_undated(staged, table) {
            return Precedence::Older;
        }
        if staged.last_updated != table.last_updated && table.last_updated != ABSENT {
            return if staged.last_updated > table.last_updated { Precedence::Newer } else { Precedence::Older };
        }
    }
    let lacks = |staged: i64, table: i64| staged == ABSENT && table != ABSENT;
    if lacks(staged.last_updated, table.last_updated) || lacks(staged.version, table.version) {
        // Out of quarantine it comes from an older one: what has no order cannot say that it is newer.
        return if staged.replayed { Precedence::Older } else { Precedence::Newer };
    }
    let unknown = |staged: i64, table: i64| staged == ABSENT || table == ABSENT;
    if staged.replayed && (unknown(staged.last_updated, table.last_updated) && unknown(staged.version, table.version)) {
        return Precedence::Older;
    }
    match (staged.last_updated, staged.version).cmp(&(table.last_updated, table.version)) {
        std::cmp::Ordering::Less => Precedence::Older,
        std::cmp::Ordering::Greater => Precedence::Newer,
        std::cmp::Ordering::Equal if staged.version != ABSENT && !rules.full_refresh => Precedence::Older,
        std::cmp::Ordering::Equal => Precedence::Compare,
    }
}

/// Returns true if a staged row says nothing of its age, and the table's row does.
pub(crate) fn is_undated(staged: &RowKey, table: &RowKey) -> bool {
    let lacks = |staged: i64, table: i64| staged == RowKey::ABSENT && table != RowKey::ABSENT;
    lacks(staged.last_updated, table.last_updated)
        || (staged.last_updated == RowKey::ABSENT && lacks(staged.version, table.version))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::RowPosition;

    fn key(last_updated: i64, version: i64, subsetted: bool) -> RowKey {
        RowKey { key: 1, last_updated, version, arrival: RowPosition::default(), subsetted, replayed: false }
    }
    const NONE: i64 = RowKey::ABSENT;

    // Every sentence of DESIGN section 5 "Order" that concerns the table.
    #[test]
    fn order_against_the_table() {
        let newer =
            |staged, table| matches!(compare_versions(&staged, &table, OrderRules::default()), Precedence::Newer);
        let older =
            |staged, table| matches!(compare_versions(&staged, &table, OrderRules::default()), Precedence::Older);
        let compare =
            |staged, table| matches!(compare_versions(&staged, &table, OrderRules::default()), Precedence::Compare);
        assert!(older(key(1, 1, false), key(2, 2, false)), "older is skipped");
        assert!(newer(key(2, 1, false), key(1, 1, false)), "lastUpdated comes first");
        assert!(newer(key(1, 10, false), key(1, 9, false)), "versions are numbers");
        assert!(newer(key(NONE, 1, false), key(5, 1, false)), "lacks lastUpdated: newer");
        assert!(newer(key(1, NONE, false), key(5, 3, false)), "lacks versionId: newer");
        assert!(older(key(1, 1, false), key(1, 1, false)), "equal and both with a version: skipped");
        assert!(compare(key(1, NONE, false), key(1, NONE, false)), "no version: compared");
        assert!(compare(key(NONE, NONE, false), key(NONE, NONE, false)), "nothing at all: compared");
        assert!(older(key(9, 9, true), key(1, 1, false)), "SUBSETTED never overwrites a complete one");
        assert!(newer(key(1, 1, false), key(9, 9, true)), "a complete one replaces a SUBSETTED one");
        let replayed = |key: RowKey| RowKey { replayed: true, ..key };
        assert!(newer(replayed(key(2, NONE, false)), key(1, NONE, false)), "out of quarantine, newer");
        assert!(older(replayed(key(1, 1, false)), key(2, 2, false)), "out of quarantine, older");
        assert!(older(replayed(key(NONE, 1, false)), key(5, 1, false)), "out of quarantine, lacks the table's order");
        assert!(older(replayed(key(NONE, NONE, false)), key(NONE, NONE, false)), "out of quarantine, without order");
        let rules = OrderRules { full_refresh: true, ..OrderRules::default() };
        assert!(
            matches!(compare_versions(&key(1, 1, false), &key(1, 1, false), rules), Precedence::Compare),
            "full refresh compares"
        );
        let rules = OrderRules { undated_is_older: true, ..OrderRules::default() };
        let of_folder = |staged, table| compare_versions(&staged, &table, rules);
        assert!(
            matches!(of_folder(key(NONE, NONE, false), key(5, 1, false)), Precedence::Older),
            "a folder's undated copy is not newer"
        );
        assert!(matches!(of_folder(key(NONE, NONE, false), key(NONE, NONE, false)), Precedence::Compare));
        assert!(matches!(of_folder(key(6, 1, false), key(5, 1, false)), Precedence::Newer));
        assert!(matches!(of_folder(key(6, NONE, false), key(5, 1, false)), Precedence::Newer), "it is dated");
        assert!(matches!(of_folder(key(4, NONE, false), key(5, 1, false)), Precedence::Older), "and older");
    }
}
