//! The pages in `docs/` say only what is so: every guarantee of the event loop and every promise of a disk limit names a
//! test that exists, every key of a drive, of the balloon and of a configuration file has its row, every refusal shown is what
//! the program says, and every command line shown is one that it takes.

#![allow(clippy::expect_used, clippy::panic, reason = "a test's own functions are not in the lint's exception")]

use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::path::Path;

use loopvisor::cli;
use loopvisor::config::file;
use loopvisor::config::json::Text;
use loopvisor::config::spec::VmSpec;
use loopvisor::qos::{Quantity, Spelling};

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
fn every_row_of_the_table_of_resets_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/lifecycle.md")).unwrap();
    let table = page.split("### What is reset").nth(1).and_then(|rest| rest.split("### ").next()).unwrap();
    let mut names = HashSet::new();
    functions(&root.join("src"), &mut names).unwrap();
    functions(&root.join("tests"), &mut names).unwrap();
    // A test is quoted, and its name is long.
    let tests: Vec<&str> = table.split('`').skip(1).step_by(2).filter(|name| name.matches('_').count() > 3).collect();
    assert!(tests.len() > 15, "{tests:?}");
    let missing: Vec<_> = tests.iter().filter(|name| !names.contains(**name)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_promise_of_a_disk_limit_names_a_test_that_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/qos.md")).unwrap();
    let promised = page.split("## What is promised").nth(1).and_then(|rest| rest.split("## ").next()).unwrap();
    let mut names = HashSet::new();
    functions(&root.join("src"), &mut names).unwrap();
    let rows = promised.lines().filter(|line| line.starts_with("| ") && !line.starts_with("| promise "));
    let mut tests = 0;
    for row in rows {
        // What stands between backquotes in the last column is a test's name.
        let held_by = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        for test in held_by.split('`').skip(1).step_by(2) {
            assert!(names.contains(test), "the page names {test}, which does not exist");
            tests += 1;
        }
    }
    assert!(tests > 8, "{tests} tests are named");
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

/// What the program says to `line`, its words parted by blanks.
fn refusal(line: &str) -> String {
    let refused = cli::parse(line.split_whitespace().map(OsString::from));
    refused.expect_err("is refused").to_string()
}

/// The keys that the refusal of an unknown one of an option lists.
fn keys_of(option: &str, unknown: &str) -> Vec<String> {
    let refused = refusal(&format!("-kernel k {option} {unknown}=1"));
    let (_, keys) = refused.split_once("accepted keys: ").expect("keys are listed");
    keys.split(", ").map(str::to_owned).collect()
}

#[test]
fn every_key_of_a_drive_and_of_the_balloon_has_its_row() {
    let page = include_str!("../docs/cli.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    for key in ["-drive", "-netdev", "-balloon", "-rng", "-chardev"].into_iter().flat_map(|option| keys_of(option, "x"))
    {
        assert!(rows.iter().any(|row| row.starts_with(&format!("| `{key}` |"))), "{key} has no row");
    }
    let limits = keys_of("-drive", "throttling.x");
    assert!(limits.len() > Quantity::ALL.len());
    for key in limits {
        // The keys of a burst are told of once for all quantities.
        let rate = Quantity::ALL.iter().map(|&quantity| Spelling::CommandLine.rate(quantity));
        let shown = rate.into_iter().find(|rate| key.starts_with(&format!("{rate}-max"))).unwrap_or(key);
        let cells = rows.iter().filter_map(|row| row.split(" | ").next());
        assert!(cells.into_iter().any(|cell| cell.contains(&format!("`{shown}`"))), "{shown} has no row");
    }
}

#[test]
fn every_refusal_of_the_command_lines_page_is_what_the_program_says() {
    let page = include_str!("../docs/cli.md");
    let refusals: Vec<&str> = page.lines().filter_map(|line| line.strip_prefix("    loopvisor: ")).collect();
    assert!(refusals.len() > 5);
    for shown in refusals {
        let (typed, _) = shown.split_once(": ").expect("what was typed stands before the sentence");
        let line = match typed {
            "-kernal" => "-kernal k".to_owned(),
            "-kernel" => "-kernel a b".to_owned(),
            // What is wrong between two parts names only the keys it is about.
            "-drive id=b,throttling.group=g" => {
                format!("-kernel k -drive id=a,file=a,throttling.group=g,iops=1 {typed},file=b,iops=2")
            }
            "-netdev tap,id=a" => format!("-kernel k {typed},ifname=t"),
            "-drive id=b" => format!("-kernel k -machine disk-slots=1 -drive id=a,file=a {typed},file=b"),
            "-machine disk-slots=9,nic-slots=3" => "-kernel k -machine microvm,disk-slots=9,nic-slots=3".to_owned(),
            "-drive id=a,iothread=io9" => format!("-kernel k -iothread id=io0 -iothread id=io1 {typed},file=b"),
            _ => format!("-kernel k {typed}"),
        };
        assert_eq!(refusal(&line), shown);
    }
}

/// What the reader of a configuration file says to `text`.
fn refusal_of_file(text: &str) -> String {
    let text = Text::new("x.json", text.into()).expect("is a text");
    file::read(&text, &mut VmSpec::new("k")).expect_err("is refused").to_string()
}

/// The keys that the refusal of an unknown one lists, where `around` has a place for it.
fn keys_of_file(around: &str) -> Vec<String> {
    let refused = refusal_of_file(&around.replace('?', "\"an unknown key\": 1"));
    let (_, keys) = refused.split_once("accepted keys: ").expect("keys are listed");
    keys.split(", ").map(str::to_owned).collect()
}

#[test]
fn every_key_of_a_configuration_file_has_its_row() {
    let page = include_str!("../docs/config.md");
    let rows: Vec<&str> = page.lines().filter(|line| line.starts_with("| `")).collect();
    for part in keys_of_file("{?}") {
        assert!(rows.iter().any(|row| row.starts_with(&format!("| `{part}` |"))), "{part} has no row");
        let around = [format!("{{{part:?}: {{?}}}}"), format!("{{{part:?}: [{{?}}]}}")];
        let refused: Vec<String> =
            around.iter().map(|around| refusal_of_file(&around.replace('?', "\"?\": 1"))).collect();
        let Some(place) = refused.iter().position(|refused| refused.contains("accepted keys: ")) else { continue };
        for key in keys_of_file(&around[place]) {
            let own = [format!("| `{key}` |"), format!("| `{part}` | `{key}` |")];
            assert!(rows.iter().any(|row| own.iter().any(|own| row.starts_with(own))), "{key} of {part} has no row");
        }
    }
    for key in keys_of_file("{\"drive\": [{\"throttling\": {?}}]}").iter().filter(|key| !key.contains("_max")) {
        assert!(page.contains(&format!("`{key}`")), "{key} of throttling is not told of");
    }
}

#[test]
fn every_refusal_of_the_configuration_files_page_is_what_the_program_says() {
    let lines: Vec<&str> = include_str!("../docs/config.md").lines().collect();
    let mut shown = 0;
    for pair in lines.windows(2) {
        let Some(refused) = pair[1].strip_prefix("    loopvisor: ") else { continue };
        // What is wrong between parts stands alone, and is told in the command line's words.
        let said = match pair[0].strip_prefix("    ") {
            Some(text) => refusal_of_file(text),
            None => {
                let line = "-kernel k -iothread id=io0 -iothread id=io1 -drive id=a,file=b,iothread=io9";
                format!("-config x.json with the rest of the line: {}", refusal(line))
            }
        };
        assert_eq!(said, refused);
        shown += 1;
    }
    assert!(shown > 6, "{shown}");
}

/// The words of a line, as a shell parts them where there are blanks and double quotes.
fn words(line: &str) -> Vec<OsString> {
    let mut words = Vec::new();
    for (at, part) in line.split('"').enumerate() {
        if at % 2 == 1 {
            words.push(part.into());
        } else {
            words.extend(part.split_whitespace().map(OsString::from));
        }
    }
    words
}

#[test]
fn every_command_line_that_a_page_shows_is_accepted() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut seen = 0;
    for entry in fs::read_dir(root.join("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_none_or(|kind| kind != "md") {
            continue;
        }
        let page = fs::read_to_string(&path).unwrap().replace("\\\n", " ");
        let typed = page.lines().filter_map(|line| {
            let line = line.strip_prefix("    ")?;
            line.strip_prefix("host$ ").unwrap_or(line).strip_prefix("loopvisor ")
        });
        // Dots stand for what is not said, a file of options would have to be there, and the guest begins lines so too.
        let typed = typed.filter(|line| line.contains(" -kernel ") || line.starts_with("-kernel "));
        // What goes to a file is the shell's.
        let typed = typed.map(|line| line.split(" >").next().unwrap_or(line));
        for line in typed.filter(|line| !line.contains("...") && !line.contains(" -config ")) {
            let parsed = cli::parse(words(line));
            assert!(parsed.is_ok(), "{}: {line}: {}", path.display(), parsed.unwrap_err());
            seen += 1;
        }
    }
    assert!(seen > 3, "{seen} command lines are found");
}
