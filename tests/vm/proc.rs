//! What the host's /proc says about a process and its threads.

use std::collections::BTreeMap;
use std::fs;

/// The threads of a process: id and name.
pub fn threads(pid: u32) -> BTreeMap<u32, String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("the process runs");
    let ids = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse::<u32>().ok());
    ids.filter_map(|id| {
        let name = fs::read_to_string(format!("/proc/{pid}/task/{id}/comm")).ok()?;
        Some((id, name.trim_end().to_owned()))
    })
    .collect()
}

/// The id of the only thread of that name.
#[track_caller]
pub fn thread(pid: u32, name: &str) -> u32 {
    let all = threads(pid);
    let mut found = all.iter().filter(|(_, other)| *other == name).map(|(id, _)| *id);
    match (found.next(), found.next()) {
        (Some(id), None) => id,
        _ => panic!("not one thread {name} in {all:?}"),
    }
}

/// How often a thread went to sleep of its own accord: each wait that waited is one.
#[track_caller]
pub fn sleeps(pid: u32, thread: u32) -> u64 {
    status_number(&format!("/proc/{pid}/task/{thread}/status"), "voluntary_ctxt_switches:")
}

/// Anonymous memory of a process that is in RAM, in KiB.
#[track_caller]
pub fn anonymous_kib(pid: u32) -> u64 {
    status_number(&format!("/proc/{pid}/status"), "RssAnon:")
}

/// How much of the code of its program a process has mapped, and how much there is, in KiB.
#[track_caller]
pub fn code_kib(pid: u32) -> (u64, u64) {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("the process runs");
    let code = maps.split("\nVmFlags:").find(|map| map.contains(" r-xp ") && map.contains("loopvisor"));
    let field = |name: &str| -> Option<u64> {
        let line = code?.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse().ok()
    };
    (field("Rss:").expect("a mapping of code"), field("Size:").expect("its size"))
}

#[track_caller]
fn status_number(path: &str, field: &str) -> u64 {
    let status = fs::read_to_string(path).expect("the thread runs");
    let line = status.lines().find_map(|line| line.strip_prefix(field)).expect("a field of the status");
    line.split_whitespace().next().and_then(|number| number.parse().ok()).expect("a number")
}
