//! The floors of `src`: a file imports only from lower floors, and within its floor only from named siblings.
//!
//! That keeps every module readable without those above it, and cycles from appearing. The table is the one of
//! `docs/architecture.md`; whoever adds a module adds it here.

#![allow(clippy::expect_used)] // A test may panic; clippy knows its functions and not its helpers.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules of `src/lib.rs`, floor by floor, each with the siblings that it may import.
const FLOORS: &[&[(&str, &[&str])]] = &[
    &[("error", &[]), ("sys", &["error"])],
    &[("bus", &[]), ("config", &["qos"]), ("elastic", &[]), ("event", &[]), ("qmp", &["config"]), ("qos", &[])],
    &[("memory", &[]), ("kvm", &["memory"])],
    &[("virtio", &[])],
    &[("disk", &[]), ("devices", &["disk"])],
    &[("machine", &[])],
    &[("control", &[])],
    &[("cli", &[]), ("logging", &[]), ("pidfile", &[]), ("main", &["cli", "logging", "pidfile"])],
];

fn floor(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.iter().any(|(name, _)| *name == module))
}

/// Whether a file of module `from` may import `to`.
fn allowed(from: &str, to: &str) -> bool {
    let Some((above, below)) = floor(from).zip(floor(to)) else { return false };
    let siblings = FLOORS[above].iter().find(|(name, _)| *name == from).map_or(&[][..], |(_, siblings)| siblings);
    from == to || below < above || siblings.contains(&to)
}

/// The modules that a line of code names by `crate::` (or by `loopvisor::`, which is how main.rs names them).
fn imports(line: &str) -> Vec<&str> {
    let code = line.split("//").next().unwrap_or_default();
    let ends = |c: char| !c.is_ascii_alphanumeric() && c != '_';
    let starts = ["crate::", "loopvisor::"].into_iter().flat_map(|root| {
        code.match_indices(root).filter(|(at, _)| !code[..*at].ends_with(|c| !ends(c))).map(|(at, _)| at + root.len())
    });
    let mut modules = Vec::new();
    for start in starts {
        let rest = &code[start..];
        match rest.strip_prefix('{') {
            // Of a list, the first word of each member.
            Some(list) => modules.extend(list.split(',').map(|member| member.trim().split(ends).next().unwrap_or(""))),
            None => modules.push(rest.split(ends).next().unwrap_or("")),
        }
    }
    modules.retain(|module| !module.is_empty());
    modules
}

fn sources(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).expect("read src") {
        let path = entry.expect("read src").path();
        if path.is_dir() {
            files.extend(sources(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files
}

fn src() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// The module of `lib.rs` that a file belongs to.
fn module(file: &Path) -> String {
    let below = file.strip_prefix(src()).expect("a file of src");
    let first = below.iter().next().and_then(|part| part.to_str()).expect("a name").trim_end_matches(".rs");
    // The command line's tests lie beside it.
    first.trim_end_matches("_test").to_string()
}

#[test]
fn no_file_imports_from_a_floor_above_its_own() {
    let mut offences = Vec::new();
    for file in sources(&src()) {
        let from = module(&file);
        if from == "lib" {
            continue;
        }
        assert!(floor(&from).is_some(), "{} is on no floor: add its module to the table here", file.display());
        for (number, line) in fs::read_to_string(&file).expect("read a source").lines().enumerate() {
            for to in imports(line) {
                if !allowed(&from, to) {
                    offences.push(format!("{}:{}: {}", file.display(), number + 1, line.trim()));
                }
            }
        }
    }
    assert!(offences.is_empty(), "imports from a floor above, or from a sibling not named:\n{}", offences.join("\n"));
}

#[test]
fn the_table_has_the_modules_of_lib_rs_and_in_their_order() {
    let lib = fs::read_to_string(src().join("lib.rs")).expect("read lib.rs");
    let declared: Vec<&str> = lib
        .lines()
        .filter_map(|line| line.trim_start_matches("pub ").strip_prefix("mod ")?.strip_suffix(';'))
        .collect();
    let floors: Vec<usize> = declared.iter().filter_map(|module| floor(module)).collect();
    assert_eq!(floors.len(), declared.len(), "a module of lib.rs is on no floor: {declared:?}");
    assert!(floors.is_sorted(), "lib.rs is not in floor order: {declared:?}");
    // And main.rs, which is no module.
    assert_eq!(declared.len() + 1, FLOORS.iter().map(|floor| floor.len()).sum());
}

#[test]
fn an_import_is_found_wherever_it_stands_in_a_line() {
    assert_eq!(imports("use crate::error::{Error, Result};"), ["error"]);
    assert_eq!(imports("pub use crate::{bus::Slot, event};"), ["bus", "event"]);
    assert_eq!(imports("    let x = crate::sys::clock(crate::memory::A);"), ["sys", "memory"]);
    assert_eq!(imports("pub(crate) mod a; // crate::control"), [""; 0]);
    assert_eq!(imports("use loopvisor::cli;"), ["cli"]);
    assert_eq!(imports("//! [`crate::control`]"), [""; 0]);
    assert!(allowed("virtio", "event") && allowed("devices", "disk") && allowed("event", "event"));
    assert!(!allowed("event", "virtio") && !allowed("disk", "devices") && !allowed("event", "qmp"));
    assert!(!allowed("event", "nowhere") && !allowed("nowhere", "event"));
}
