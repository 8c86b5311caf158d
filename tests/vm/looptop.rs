//! `tools/looptop` as people and programs use it: the live view on a terminal, a page, JSON, a file for Prometheus.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use serde_json::{Value, json};

use crate::client::Client;
use crate::monitor::{Folder, Monitor, PATIENCE, Setup, skipped};
use crate::terminal::OnTerminal;

fn script() -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/looptop").to_str().unwrap().to_owned()
}

/// A machine of that name, whose socket is the only one in its folder.
fn machine(name: &str, words: &str, iops: u32) -> Option<Monitor> {
    if !Command::new("python3").arg("--version").output().is_ok_and(|output| output.status.success()) {
        skipped("there is no python3");
        return None;
    }
    let setup = Setup::guest(words)?.option("-name", name).flag("-balloon");
    let monitor = setup.iothread("io1").disk("vda", 1 << 20, &format!("direct=off,iothread=io1,iops={iops}")).start();
    monitor.serial.expect("begin");
    Some(monitor)
}

fn balloon(name: &str) -> Option<Monitor> {
    machine(name, "mode=balloon touch=off", 700)
}

fn folder(monitor: &Monitor) -> PathBuf {
    monitor.socket().parent().unwrap().to_owned()
}

/// Status, output and errors of looptop with these words.
fn run(words: &[&str]) -> (i32, String, String) {
    let output = Command::new("python3").arg(script()).args(words).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(!err.contains("Traceback"), "{err}");
    (output.status.code().unwrap_or(-1), out, err)
}

/// What it says of the machines there over a tenth of a second.
#[track_caller]
fn look(places: &[&Path]) -> Vec<Value> {
    let places = places.iter().map(|place| place.to_str().unwrap());
    let words: Vec<&str> = ["--once", "--json", "--interval", "0.1"].into_iter().chain(places).collect();
    let (code, out, err) = run(&words);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let mut told: Value = serde_json::from_str(&out).unwrap();
    serde_json::from_value(told["machines"].take()).unwrap()
}

#[test]
fn json_has_the_machines_own_figures() {
    let Some(monitor) = balloon("web1") else { return };
    let mut client = monitor.qmp();
    client.call_with("balloon", &json!({"value": 200 << 20}));
    let done = |client: &mut Client| client.call("query-balloon")["actual"] == 200 << 20;
    assert!((0..100_000).any(|_| done(&mut client)), "the guest does not follow");
    let [told] = &look(&[&folder(&monitor)])[..] else { panic!("not one machine") };
    assert_eq!([&told["name"], &told["state"], &told["up"]], [&json!("web1"), &json!("running"), &json!(true)]);
    let disk = &told["disks"][0];
    assert_eq!((&disk["id"], &disk["limits"]), (&json!("vda"), &json!({"iops": 700})));
    let stats = client.call("query-blockstats")[0]["stats"].take();
    for (name, value) in disk["counters"].as_object().unwrap() {
        assert_eq!(stats[name], *value, "{name}");
    }
    let own = client.call("query-iothreads")[0].take();
    let [told_loop] = &told["iothreads"].as_array().unwrap()[..] else { panic!("not one loop: {told}") };
    assert_eq!((&told_loop["id"], &told_loop["longest-handler-ns"]), (&own["id"], &own["loop"]["longest-handler-ns"]));
    assert_eq!(told_loop["wakes-per-second"].as_object().unwrap().len(), 4);
    for share in [&told_loop["busy"], &told["cpu"], &told["vcpus"], &told_loop["cpu"]] {
        assert!(share.as_f64().is_some_and(|share| share >= 0.0), "{told}");
    }
    let detail = client.call("query-balloon-detail");
    for name in ["target", "actual", "reclaimed-bytes", "stuck-since"] {
        assert_eq!(told["balloon"][name], detail[name], "{name}");
    }
}

#[test]
fn a_limit_that_holds_requests_back_is_seen() {
    let Some(monitor) = machine("db1", "mode=blk-load depth=4 ms=100000", 100) else { return };
    let places = folder(&monitor);
    // Each look is over a tenth of a second; a crowded host may give the guest no turn in one.
    let seen = (0..100).any(|_| {
        let [told] = &look(&[&places])[..] else { panic!("not one machine") };
        let disk = &told["disks"][0];
        let above = |name: &str| disk[name].as_f64().is_some_and(|value| value > 0.0);
        above("reads-per-second") && above("throttled-per-second") && above("waiting") && above("read-bytes-per-second")
    });
    assert!(seen);
}

#[test]
fn a_page_is_for_people() {
    let Some(monitor) = balloon("web1") else { return };
    let (code, page, _) = run(&["--once", "--interval", "0.1", monitor.socket().to_str().unwrap()]);
    assert_eq!(code, 0);
    for (row, parts) in [
        ("web1 ", vec!["running", "cpu ", "vCPUs", "resident"]),
        ("  loop ", vec!["busy%", "turns/s", "signal/s", "longest"]),
        ("  io1 ", vec![]),
        ("  disk ", vec!["wait%", "depth", "limit"]),
        ("  vda ", vec!["iops 700"]),
        ("  balloon ", vec!["target", "actual", "reclaimed"]),
    ] {
        let line = page.lines().find(|line| line.starts_with(row)).unwrap_or_else(|| panic!("{row} in: {page}"));
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    }
    assert!(!page.contains('\x1b'));
}

/// The samples of a file for Prometheus, whose form is checked.
fn samples(text: &str) -> BTreeMap<String, f64> {
    assert!(text.ends_with('\n'), "{text}");
    let mut kinds: BTreeMap<&str, &str> = BTreeMap::new();
    let (mut samples, mut last) = (BTreeMap::new(), "");
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, said) = help.split_once(' ').unwrap();
            assert!(name.starts_with("loopvisor_") && said.ends_with('.') && !kinds.contains_key(name), "{line}");
            last = name;
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert_eq!(name, last, "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            kinds.insert(name, kind);
        } else {
            let (sample, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = sample.split_once('{').unwrap();
            // Samples of a metric stand together, behind what is said of it.
            assert!(name == last && kinds.contains_key(name) && labels.starts_with("vm=\""), "{line}");
            assert!(samples.insert(sample.to_owned(), value.parse().unwrap()).is_none(), "twice: {line}");
        }
    }
    samples
}

#[test]
fn the_file_for_prometheus_is_whole_and_its_table_too() {
    let Some(monitor) = balloon("web1") else { return };
    let mut client = monitor.qmp();
    let out = Folder::new();
    let (file, socket) = (out.path("loopvisor.prom"), monitor.socket());
    let words = ["--prometheus", file.to_str().unwrap(), "--once", socket.to_str().unwrap()];
    assert_eq!(run(&words), (0, String::new(), String::new()));
    let told = samples(&fs::read_to_string(&file).unwrap());
    assert_eq!(told["loopvisor_up{vm=\"web1\"}"], 1.0);
    assert_eq!(told["loopvisor_running{vm=\"web1\"}"], 1.0);
    let turns = client.call("query-iothreads")[0]["loop"]["turns"].as_f64();
    assert_eq!(told.get("loopvisor_iothread_turns_total{vm=\"web1\",iothread=\"io1\"}").copied(), turns);
    assert_eq!(told["loopvisor_disk_limit_operations{vm=\"web1\",disk=\"vda\",direction=\"both\"}"], 700.0);
    assert_eq!(told["loopvisor_balloon_target_bytes{vm=\"web1\"}"], f64::from(256 << 20));
    assert!(told.contains_key("loopvisor_iothread_wakes_total{vm=\"web1\",iothread=\"io1\",cause=\"timer\"}"));
    // Whoever serves the file may be another user; nothing else is left in the folder.
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o444, 0o444);
    assert_eq!(fs::read_dir(out.path("")).unwrap().count(), 1);
    // The page has a row for each metric, and none for another.
    let page = include_str!("../../docs/looptop.md");
    let rows = page.lines().filter_map(|line| line.strip_prefix("| `loopvisor_")?.split('`').next());
    let rows: BTreeSet<&str> = rows.collect();
    let made = fs::read_to_string(script()).unwrap();
    let table = made.split("METRICS = [").nth(1).unwrap().split("\n]\n").next().unwrap();
    let metrics = table.lines().filter_map(|line| line.strip_prefix("    ('")?.split('\'').next());
    let metrics: BTreeSet<&str> = metrics.collect();
    assert!(metrics.len() > 30);
    assert_eq!(rows, metrics);
    for name in told.keys().filter_map(|sample| sample.strip_prefix("loopvisor_")?.split('{').next()) {
        assert!(rows.contains(name), "{name}");
    }
}

#[test]
fn a_reader_of_the_file_for_prometheus_never_sees_half_of_it() {
    let Some(monitor) = balloon("web1") else { return };
    let out = Folder::new();
    let file = out.path("loopvisor.prom");
    let mut command = Command::new("python3");
    command.arg(script()).arg("--prometheus").arg(&file).args(["--interval", "0.1"]).arg(folder(&monitor));
    let mut writer = Ended(command.stdin(Stdio::null()).spawn().unwrap());
    let until = Instant::now() + PATIENCE;
    let mut files = BTreeSet::new();
    while files.len() < 5 {
        use std::os::unix::fs::MetadataExt;
        assert!(Instant::now() < until && writer.0.try_wait().unwrap().is_none(), "{files:?}");
        let Ok(text) = fs::read_to_string(&file) else { continue };
        assert!(samples(&text).contains_key("loopvisor_balloon_stuck{vm=\"web1\"}"), "{text}");
        // A new inode each time.
        files.extend(fs::metadata(&file).ok().map(|file| (file.ino(), file.ctime_nsec())));
    }
}

#[test]
fn machines_of_one_name_are_told_apart() {
    let (Some(one), Some(other)) = (balloon("web1"), balloon("web1")) else { return };
    let told = look(&[&one.socket(), &folder(&other)]);
    let names: BTreeSet<&str> = told.iter().map(|machine| machine["name"].as_str().unwrap()).collect();
    // Both sockets' files have the same name as well.
    let expected = [&one, &other].map(|monitor| format!("web1@{}", monitor.socket().display()));
    assert_eq!(names, expected.iter().map(String::as_str).collect());
}

#[test]
fn it_takes_one_of_the_clients_that_a_socket_has_room_for_and_none_if_there_is_none() {
    let Some(monitor) = balloon("web1") else { return };
    let mut all: Vec<Client> = (0..31).map(|_| monitor.qmp()).collect();
    assert_eq!(look(&[&monitor.socket()]).len(), 1);
    all.push(monitor.qmp());
    let (code, page, err) = run(&["--once", "--interval", "0.1", monitor.socket().to_str().unwrap()]);
    assert_eq!((code, page.trim_end()), (2, "qmp   full"));
    assert!(err.contains("no machine answers in"), "{err}");
}

#[test]
fn what_cannot_be_done_is_told_in_one_sentence() {
    let Some(monitor) = balloon("web1") else { return };
    let here = folder(&monitor);
    let (here, file) = (here.to_str().unwrap(), monitor.folder.path("vda.img"));
    for (words, part) in [
        (vec!["/no/such"], "/no/such does not exist; give QMP sockets, or a folder where they are"),
        (vec![file.to_str().unwrap()], "is neither a socket nor a folder"),
        (vec![here], "the live view needs a terminal; add --once"),
        (vec!["--prometheus", "/no/such/file", "--once", here], "/no/such/file cannot be written: No such file"),
    ] {
        let (code, out, err) = run(&words);
        assert_eq!((code, out.as_str(), err.lines().count()), (2, "", 1), "{err}");
        assert!(err.starts_with("looptop: ") && err.contains(part), "{err}");
    }
    for words in [vec!["--json", here], vec!["--interval", "0", "--once", here], vec![]] {
        assert_eq!(run(&words).0, 2, "{words:?}");
    }
    let line = format!("python3 {} --once --interval 0.1 {here}", script());
    let bash = |line: &str| Command::new("bash").args(["-o", "pipefail", "-c", line]).output().unwrap();
    let full = bash(&format!("{line} >/dev/full"));
    assert_eq!(full.status.code(), Some(2));
    assert_eq!(String::from_utf8_lossy(&full.stderr).lines().count(), 1);
    let left = bash(&format!("{line} | true"));
    assert!(left.stderr.is_empty(), "{}", String::from_utf8_lossy(&left.stderr));
}

/// looptop on a terminal, watching the folder.
fn start(places: &[&Path]) -> OnTerminal {
    let script = script();
    let words = ["python3", &script, "--interval", "0.2"];
    let words: Vec<&str> = words.into_iter().chain(places.iter().map(|place| place.to_str().unwrap())).collect();
    OnTerminal::start(&words, &[])
}

#[test]
fn the_live_view_follows_what_comes_and_goes_and_takes_keys() {
    let Some(first) = balloon("web1") else { return };
    let watched = folder(&first);
    let mut view = start(&[&watched]);
    view.expect("\x1b[?1049h");
    view.expect("1 machine in ");
    view.expect("web1   running");
    view.expect("iops 700");
    // A limit that is changed, a machine that comes, one that goes.
    first.qmp().call_with("block_set_io_throttle", &json!({"id": "vda", "iops": 44}));
    view.expect("iops 44");
    let setup = Setup::guest("mode=idle").unwrap().option("-name", "web2");
    let socket = format!("unix:{},server,nowait", watched.join("second").display());
    let mut second = setup.option("-qmp", &socket).start();
    view.expect("2 machines in ");
    view.expect("web2   running");
    let mut client = Client::connect(&watched.join("second")).unwrap();
    client.negotiate();
    client.call("stop");
    view.expect("web2   paused");
    client.call("quit");
    assert_eq!(second.exit_code(), 0);
    view.expect("web2   ended: host-qmp-quit");
    // Keys: a line each, sorted otherwise, paused.
    view.type_in("d");
    view.expect("machine ");
    view.expect("disk B/s");
    view.type_in("s");
    view.expect("by cpu");
    view.type_in("p");
    view.expect("PAUSED");
    view.type_in("p");
    // A terminal of another size.
    view.pty.resize(10, 60);
    view.signal("WINCH");
    let title = |text: &str| text.rsplit("\x1b[H").next().and_then(|page| page.split("\x1b[m").next()).map(str::len);
    let narrow = "\x1b[7m".len() + 60;
    let seen = view.pty.screen.wait(PATIENCE, |text, _| (title(text) == Some(narrow)).then_some(()));
    assert!(seen.is_some(), "{:?}", view.pty.screen.text());
    // Two keys that are read at once are two keys.
    view.type_in("dq");
    view.expect("\x1b[?1049l");
    assert_eq!(view.status(), 0);
}

#[test]
fn the_terminal_is_as_before_however_it_ends() {
    let Some(monitor) = balloon("web1") else { return };
    for (name, status) in [("q", 0), ("^C", 130), ("TERM", 143), ("HUP", 129)] {
        let mut view = start(&[&folder(&monitor)]);
        view.expect("web1   running");
        assert_ne!(view.pty.settings(), view.before, "{name}");
        match name {
            "q" => view.type_in("q"),
            "^C" => view.type_in("\x03"),
            signal => view.signal(signal),
        }
        assert_eq!(view.status(), status, "{name}");
        assert!(view.pty.screen.text().ends_with("\x1b[?25h\x1b[?1049l"), "{name}: {:?}", view.pty.screen.text());
    }
}

#[test]
fn a_machine_is_not_asked_again_before_it_has_answered() {
    let Some(monitor) = balloon("web1") else { return };
    // Between looptop and the machine stands a socket that counts, and holds what it is told to hold.
    let between = monitor.folder.path("between");
    fs::create_dir(&between).unwrap();
    let listener = UnixListener::bind(between.join("counted")).unwrap();
    let machine = monitor.socket();
    let (asked, questions) = mpsc::channel::<String>();
    let (release, held) = mpsc::channel::<()>();
    thread::spawn(move || {
        let (theirs, _) = listener.accept().unwrap();
        let ours = std::os::unix::net::UnixStream::connect(machine).unwrap();
        let (mut to_machine, mut to_them) = (ours.try_clone().unwrap(), theirs.try_clone().unwrap());
        thread::spawn(move || {
            for line in BufReader::new(theirs).lines().map_while(Result::ok) {
                let _ = asked.send(line.clone());
                let _ = writeln!(to_machine, "{line}");
            }
        });
        for line in BufReader::new(ours).split(b'\n').map_while(Result::ok) {
            // From the first figures on every answer waits for leave.
            if line.windows(10).any(|part| part == b"singlestep") && held.recv().is_err() {
                return;
            }
            let _ = to_them.write_all(&[&line[..], b"\n"].concat());
        }
    });
    let mut view = start(&[&between]);
    let next = || serde_json::from_str::<Value>(&questions.recv_timeout(PATIENCE).unwrap()).unwrap()["execute"].take();
    assert_eq!([next(), next(), next()], ["qmp_capabilities", "query-commands", "query-name"]);
    let round: Vec<Value> = (0..6).map(|_| next()).collect();
    assert_eq!(round[0], "query-status");
    assert_eq!(round.iter().map(Value::to_string).collect::<BTreeSet<_>>().len(), 6, "{round:?}");
    // Many intervals go by: the title is drawn at each.
    let pages = |view: &OnTerminal| view.pty.screen.text().matches("\x1b[H").count();
    let before = pages(&view);
    let drawn = view.pty.screen.wait(PATIENCE, |text, _| (text.matches("\x1b[H").count() > before + 10).then_some(()));
    assert!(drawn.is_some());
    assert!(questions.try_recv().is_err(), "asked again without an answer");
    for _ in 0..3 {
        release.send(()).unwrap();
        assert_eq!((0..6).map(|_| next()).collect::<Vec<_>>(), round);
    }
    view.type_in("q");
    assert_eq!(view.status(), 0);
}

/// A process that is ended when this is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
