//! The pages in `docs/` say only what is so: every guarantee of the event loop names a test that exists.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

/// The names of all functions in the Rust files below `folder`.
fn functions(folder: &Path, names: &mut HashSet<String>) -> std::io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            functions(&path, names)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            let text = fs::read_to_string(&path)?;
            let after_fn = text.split("fn ").skip(1);
            names.extend(after_fn.map(|rest| rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()));
        }
    }
    Ok(())
}

#[test]
fn every_guarantee_of_the_event_loop_names_a_test_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/event-loop.md")).unwrap();
    let mut names = HashSet::new();
    functions(&root.join("src/event/tests"), &mut names).unwrap();
    functions(&root.join("tests"), &mut names).unwrap();
    for guarantee in 1..=24 {
        let row = page.lines().find(|line| line.starts_with(&format!("| G{guarantee} |")));
        let row = row.unwrap_or_else(|| panic!("G{guarantee} is not in the page"));
        // What stands between backquotes and begins like `t01`, `p1` or `g03` is a test's name.
        let quoted = row.split('`').skip(1).step_by(2);
        let tests: Vec<&str> = quoted
            .filter(|name| name.starts_with(['t', 'p', 'g']) && name[1..].starts_with(|c: char| c.is_ascii_digit()))
            .collect();
        assert!(!tests.is_empty(), "G{guarantee} names no test");
        for test in tests {
            assert!(names.contains(test), "G{guarantee} names {test}, which does not exist");
        }
    }
}

#[test]
fn every_test_of_the_list_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut names = HashSet::new();
    functions(&root.join("src/event/tests"), &mut names).unwrap();
    let numbers = (1..=20).map(|n| format!("t{n:02}_")).chain((1..=4).map(|n| format!("p{n}_")));
    for number in numbers {
        assert!(names.iter().any(|name| name.starts_with(&number)), "there is no test {number}");
    }
}
