//! Needs of servers of a kind, as YAML in the binary: defaults for keys of `source`, each with its reason.

use serde_json::Value;

use super::tree::Tree;

/// The profiles as they are written, with reasons and sources.
pub const PROFILES: &str = include_str!("profiles.yaml");

/// Sets what the profile that a file names knows better than the usual defaults, where the file itself does not say.
pub(super) fn apply(tree: &mut Tree) {
    let Some(Tree::Scalar(Value::String(name))) = tree.get("source.profile") else { return };
    let Ok(Tree::Map(profiles)) = serde_saphyr::from_str::<Tree>(PROFILES) else { return };
    let Some((_, _, _, Tree::Map(defaults))) = profiles.into_iter().find(|profile| profile.0 == *name) else { return };
    let place = tree.place_of("source.profile").unwrap_or((1, 1));
    for (key, _, _, value) in defaults {
        let path = format!("source.{key}");
        // The group of a profile belongs to its level.
        let level_is_theirs = key == "group"
            && !matches!(tree.get("source.level"), Some(Tree::Scalar(Value::String(level))) if level == "group");
        if tree.get(&path).is_none() && !level_is_theirs {
            // A key of a profile is known to be one: a test reads them all.
            let _ = tree.set(&path, place, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::read_pipeline;
    use super::*;

    // Breaks if a profile has a key or a value that no file could have, or no reason for one.
    #[test]
    fn every_profile_is_one_that_a_file_can_name() {
        let Tree::Map(profiles) = serde_saphyr::from_str::<Tree>(PROFILES).unwrap() else { panic!() };
        assert!(profiles.len() >= 6);
        for (name, ..) in &profiles {
            let group = if PROFILES.contains(&format!("{name}:\n  level: group")) || name == "oracle" {
                "\n  group: g"
            } else {
                ""
            };
            let file = format!(
                "version: 1\nname: x\nsource:\n  url: https://h.example\n  profile: {name}{group}\ntables: /tmp/t\n"
            );
            read_pipeline(&file, &[]).unwrap_or_else(|problems| panic!("{name}: {problems:?}"));
        }
        let entries = PROFILES.lines().filter(|line| line.starts_with("  "));
        assert!(entries.clone().count() > 10 && entries.clone().all(|line| line.contains("  # ")), "a reason each");
    }

    #[test]
    fn a_files_own_keys_win() {
        let file = |more: &str| {
            let text = format!(
                "version: 1\nname: x\nsource:\n  url: https://h.example\n  profile: epic\n  group: g\n{more}tables: \
                    /tmp/t\n"
            );
            read_pipeline(&text, &[]).unwrap().file.source
        };
        assert_eq!(file("").timeout.0.as_secs(), 14 * 24 * 3600);
        assert_eq!(file("  timeout: 1h\n").timeout.0.as_secs(), 3600);
        // Found by the fuzzer: what a profile sets was said to come from `--set`.
        let no_group = "version: 1\nname: x\nsource:\n  url: https://h.example\n  profile: epic\ntables: /tmp/t\n";
        let problem = read_pipeline(no_group, &[]).unwrap_err().remove(0).to_string();
        assert!(problem.starts_with("5:3: source.level: level group needs source.group"), "{problem}");
    }
}
