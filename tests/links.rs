//! Whoever reads the pages gets on: every link of theirs leads to a file and a heading that exist, every page can be reached
//! from the README, and begins by saying what it is about.

#![allow(clippy::expect_used, clippy::panic, reason = "a test's own functions are not in the lint's exception")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// A page's text without its examples, in which nothing is a link.
fn prose(text: &str) -> String {
    let mut fenced = false;
    let mut lines = Vec::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced && !line.starts_with("    ") {
            lines.push(line);
        }
    }
    lines.join("\n")
}

/// The same without what stands between backquotes.
fn without_code(text: &str) -> String {
    text.split('`').step_by(2).collect()
}

/// What follows `](`, up to the bracket.
fn links(text: &str) -> Vec<String> {
    let text = without_code(&prose(text));
    text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(target, _)| target.to_owned()).collect()
}

/// The anchors that GitHub gives a page's headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for heading in prose(text).lines().filter(|line| line.starts_with('#')) {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | ' '));
        let anchor: String = kept.map(|c| if c == ' ' { '-' } else { c }).collect();
        // The second of a name gets a number.
        let mut again = 0;
        let mut name = anchor.clone();
        while !found.insert(name) {
            again += 1;
            name = format!("{anchor}-{again}");
        }
    }
    found
}

/// Every page, by its path from the root.
fn pages() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs = fs::read_dir(root.join("docs"))
        .expect("the pages are there")
        .map(|entry| Path::new("docs").join(entry.expect("is an entry").file_name()));
    let top = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(PathBuf::from);
    let all = docs.chain(top).filter(|page| page.extension().is_some_and(|kind| kind == "md"));
    let there = all.filter(|page| root.join(page).exists());
    there.map(|page| (page.clone(), fs::read_to_string(root.join(page)).expect("is text"))).collect()
}

/// The path that a link of `page` means, from the root, without `..`.
fn meant(page: &Path, target: &str) -> PathBuf {
    let mut path = page.parent().expect("is a file").to_owned();
    for part in Path::new(target).components() {
        match part.as_os_str().to_str().expect("is text") {
            ".." => assert!(path.pop(), "{} leads out of here: {target}", page.display()),
            "." => {}
            name => path.push(name),
        }
    }
    path
}

#[test]
fn every_link_of_a_page_leads_to_a_file_and_a_heading_that_exist() {
    let pages = pages();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut broken, mut followed) = (Vec::new(), 0);
    for (page, text) in &pages {
        for link in links(text).iter().filter(|link| !link.contains(':')) {
            let (file, anchor) =
                link.split_once('#').map_or((link.as_str(), None), |(file, anchor)| (file, Some(anchor)));
            let path = if file.is_empty() { page.clone() } else { meant(page, file) };
            let heading = match (anchor, pages.get(&path)) {
                (None, _) => true,
                (Some(anchor), Some(text)) => anchors(text).contains(anchor),
                (Some(_), None) => false,
            };
            if !root.join(&path).exists() || !heading {
                broken.push(format!("{}: {link}", page.display()));
            }
            followed += 1;
        }
    }
    assert!(broken.is_empty(), "{broken:#?}");
    assert!(followed > 80, "{followed} links are found");
}

#[test]
fn every_page_can_be_reached_from_the_readme() {
    let pages = pages();
    let mut reached = BTreeSet::from([PathBuf::from("README.md")]);
    let mut next: Vec<PathBuf> = reached.iter().cloned().collect();
    while let Some(page) = next.pop() {
        for link in links(&pages[&page]).iter().filter(|link| !link.contains(':')) {
            let file = link.split('#').next().unwrap_or_default();
            let path = meant(&page, file);
            if pages.contains_key(&path) && reached.insert(path.clone()) {
                next.push(path);
            }
        }
    }
    let lost: Vec<_> = pages.keys().filter(|page| !reached.contains(*page)).collect();
    assert!(lost.is_empty(), "{lost:?}");
}

#[test]
fn every_page_begins_with_a_title_and_a_paragraph() {
    for (page, text) in pages() {
        let mut lines = text.lines().filter(|line| !line.is_empty());
        let (title, first) = (lines.next().unwrap(), lines.next().unwrap());
        assert!(title.starts_with("# "), "{}: {title}", page.display());
        let begins = first.chars().next().unwrap();
        assert!(begins.is_alphabetic() || matches!(begins, '`' | '['), "{}: {first}", page.display());
        assert!(!first.starts_with("```"), "{}: {first}", page.display());
    }
}
