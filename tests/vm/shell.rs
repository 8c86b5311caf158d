//! `tools/qmp-shell` as people and scripts use it: a command, a pipe, a terminal. On our own socket, and on QEMU's.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use loopvisor::qmp::command::COMMANDS;
use loopvisor::qmp::event::EVENTS;
use serde_json::{Value, json};

use crate::client::Client;
use crate::disk::with_a_stalling_disk;
use crate::monitor::{Folder, Monitor, PATIENCE, Setup, skipped};
use crate::terminal::OnTerminal;

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/qmp-shell")
}

/// Whether there is a Python; says so if not.
fn has_python() -> bool {
    let found = Command::new("python3").arg("--version").output();
    let found = found.is_ok_and(|output| output.status.success());
    if !found {
        skipped("there is no python3");
    }
    found
}

/// A machine whose guest follows its balloon.
fn machine() -> Option<Monitor> {
    if !has_python() {
        return None;
    }
    let setup = Setup::guest("mode=balloon touch=off")?.option("-name", "web1").flag("-balloon");
    let monitor = setup.iothread("io1").disk("vda", 1 << 20, "direct=off,iothread=io1,iops=900").start();
    monitor.serial.expect("balloon: begin");
    Some(monitor)
}

/// What the shell says to these words behind the socket, with `input` on its standard input.
fn run(socket: &Path, words: &[&str], input: &str) -> (i32, String, String) {
    let mut command = Command::new("python3");
    command.arg(script()).arg(socket).args(words);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    // It may have ended without reading.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    told(child.wait_with_output().unwrap())
}

fn told(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let (out, err) = (text(output.stdout), text(output.stderr));
    assert!(!err.contains("Traceback"), "{err}");
    (output.status.code().unwrap_or(-1), out, err)
}

/// What it says to one command each.
fn one(socket: &Path, commands: &[&str]) -> (i32, String, String) {
    let words: Vec<&str> = commands.iter().flat_map(|&command| ["-c", command]).collect();
    run(socket, &words, "")
}

/// The one line of a refusal, which ends the shell with this status.
#[track_caller]
fn refusal(socket: &Path, command: &str, status: i32) -> String {
    let (code, out, err) = one(socket, &[command]);
    assert_eq!((code, out.as_str(), err.lines().count()), (status, "", 1), "{command}: {err}");
    err.strip_prefix("qmp-shell: ").expect("the name comes first").trim_end().to_owned()
}

fn parsed(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn one_command_prints_what_it_returns_and_its_status_is_the_replys() {
    let Some(monitor) = machine() else { return };
    let socket = monitor.socket();
    let (code, out, err) = one(&socket, &["query-status"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(parsed(&out), json!({"running": true, "singlestep": false, "status": "running"}));
    let told = refusal(&socket, "block_set_io_throttle id=nope iops=1", 1);
    assert_eq!(told, "DeviceNotFound: Device 'nope' not found");
    // Several, in their order; the first that fails is the last.
    let (code, out, _) = one(&socket, &["stop", "query-status", "balloon value=1", "cont"]);
    assert_eq!((code, out.contains("\"paused\"")), (1, true), "{out}");
    assert_eq!(monitor.qmp().call("query-status")["status"], "paused");
    let (code, out, _) = one(&socket, &["quit"]);
    assert_eq!((code, out.as_str()), (0, "{}\n"));
}

#[test]
fn the_schema_says_what_a_word_is_and_numbers_have_units() {
    let Some(monitor) = machine() else { return };
    let socket = monitor.socket();
    let mut client = monitor.qmp();
    // The machine has 256 MiB.
    for (typed, bytes) in [("128M", 128 << 20), ("0.125G", 128 << 20), ("131072k", 128 << 20), ("192MiB", 192 << 20)] {
        let (code, _, err) = one(&socket, &[&format!("balloon value={typed}")]);
        assert_eq!(code, 0, "{typed}: {err}");
        assert_eq!(client.call("query-balloon-detail")["target"], bytes, "{typed}");
    }
    // A string of digits is text where it stands in quotes, which this member takes too (rule D3.8).
    let (code, out, _) = run(&socket, &["--raw", "-c", "balloon value=\"201326592\""], "");
    assert_eq!((code, out.as_str()), (0, "{\"return\":{}}\n"));
    let line = "block_set_io_throttle id='vda' iops=2K iops_max=0x1000 bps=1M iops_max_length=7";
    assert_eq!(one(&socket, &[line]).0, 0);
    let disk = client.call("query-block")[0]["inserted"].take();
    assert_eq!([&disk["iops"], &disk["iops_max"], &disk["bps"], &disk["iops_max_length"]], [2048, 4096, 1 << 20, 7]);
    // Text needs no quotes where the schema says text, whatever it looks like.
    for (typed, name) in [("7", "7"), ("[a", "[a"), ("true", "true"), ("\"a b\"", "a b"), ("'a b'", "a b")] {
        let told = refusal(&socket, &format!("block_set_io_throttle id={typed} iops=1"), 1);
        assert_eq!(told, format!("DeviceNotFound: Device '{name}' not found"));
    }
}

#[test]
fn what_cannot_be_meant_is_refused_before_it_is_sent() {
    let Some(monitor) = machine() else { return };
    for (line, part) in [
        ("balon value=1", "balon is no command; did you mean balloon?"),
        ("balloon valu=1", "balloon: valu is no argument; did you mean value?"),
        ("balloon", "balloon: value must be given; `help balloon` explains"),
        ("balloon 256M", "\"256M\" is no argument; write NAME=VALUE"),
        ("balloon value=1M value=2M", "value is given twice; give it once"),
        ("balloon value.x=1", "balloon: value cannot be members of its own; accepted: whole number, or text"),
        ("block_set_io_throttle id=vda iops=1.5", "iops cannot be \"1.5\"; accepted: whole number (K, M, G, T"),
        ("block_set_io_throttle id=vda iops=[1", "iops: not JSON: Expecting"),
        ("qmp_capabilities enable=oop", "enable cannot be \"oop\"; did you mean oob?"),
        ("help balon", "balon is no command and no event; did you mean balloon?"),
        ("{\"execute\":", "the line is not JSON: "),
    ] {
        let told = refusal(&monitor.socket(), line, 2);
        assert!(told.contains(part), "{line}: {told}");
    }
}

#[test]
fn a_pipe_is_a_command_a_line_and_mistakes_are_told_with_their_line() {
    let Some(monitor) = machine() else { return };
    let input = "# a comment\n\n  query-name  \nbalon\nballoon value=1\n{\"execute\":\"query-kvm\"}\n\u{fffd}\nstop";
    let (code, out, err) = run(&monitor.socket(), &[], input);
    assert_eq!(out, "{\"name\": \"web1\"}\n{\"enabled\": true, \"present\": true}\n{}\n");
    let lines: Vec<&str> = err.lines().collect();
    assert_eq!((code, lines.len()), (2, 3), "{err}");
    assert!(lines[0].starts_with("qmp-shell: line 4: balon is no command"), "{err}");
    assert!(lines[1].starts_with("qmp-shell: line 5: GenericError: "), "{err}");
    assert!(lines[2].starts_with("qmp-shell: line 7: "), "{err}");
    assert_eq!(run(&monitor.socket(), &[], "cont\nballoon value=1\nstop\n").0, 1);
    assert_eq!(monitor.qmp().call("query-status")["status"], "paused");
}

#[test]
fn raw_answers_are_the_lines_that_came() {
    let Some(monitor) = machine() else { return };
    let (code, out, err) =
        run(&monitor.socket(), &["--raw"], "{\"execute\":\"query-name\",\"id\":[7]}\nballoon value=1\nquery-name\n");
    let lines: Vec<&str> = out.lines().collect();
    assert_eq!((code, lines.len(), err.as_str()), (1, 3, ""), "{out}");
    assert_eq!(lines[0], "{\"return\":{\"name\":\"web1\"},\"id\":[7]}");
    assert_eq!(parsed(lines[1])["error"]["class"], "GenericError");
    assert_eq!(lines[2], "{\"return\":{\"name\":\"web1\"}}");
}

#[test]
fn help_lists_every_command_and_event_and_explains_each() {
    let Some(monitor) = machine() else { return };
    let names: Vec<&str> =
        COMMANDS.iter().map(|entry| entry.name).chain(EVENTS.iter().map(|(name, _)| *name)).collect();
    let lines: String = names.iter().map(|name| format!("help {name}\n")).collect();
    let (code, out, err) = run(&monitor.socket(), &[], &format!("help\n{lines}"));
    assert_eq!((code, err.as_str()), (0, ""));
    let (list, pages) = out.split_once("qmp_capabilities\n").expect("the first page is that of the first command");
    let listed: Vec<&str> = list.split("The shell").next().unwrap().split_whitespace().collect();
    // The list has each once; the page of the first command begins with its name too.
    for name in &names[1..] {
        assert_eq!(listed.iter().filter(|word| *word == name).count(), 1, "{name} in: {list}");
    }
    let (_, page) = pages.split_once("\nblock_set_io_throttle\n").unwrap();
    let arguments = COMMANDS.iter().find(|entry| entry.name == "block_set_io_throttle").unwrap().arguments;
    for (row, member) in page.lines().zip(arguments.members) {
        let optional = format!("  [{}=]", member.name);
        assert!(row.starts_with(&optional) && (row.contains("whole number") || row.contains("text")), "{row}");
    }
    assert!(page.lines().nth(arguments.members.len()) == Some("returns nothing"));
    let (_, page) = pages.split_once("\nSHUTDOWN: an event\n").unwrap();
    assert!(
        page.lines().any(|row| row.trim_start().starts_with("reason") && row.contains(" host-qmp-quit | ")),
        "{page}"
    );
}

#[test]
fn a_socket_that_cannot_be_used_is_told_in_one_sentence() {
    let Some(mut monitor) = machine() else { return };
    let folder = Folder::new();
    let missing = monitor.folder.path("web2.sock");
    assert!(refusal(&missing, "stop", 2).contains("web2.sock does not exist; sockets in"));
    assert!(refusal(&missing, "stop", 2).ends_with(": qmp"));
    assert!(refusal(&folder.path("x"), "stop", 2).contains("is the machine started with -qmp unix:"));
    let file = folder.path("file");
    fs::write(&file, "").unwrap();
    assert!(refusal(&file, "stop", 2).contains("is no socket"));
    assert!(refusal(&folder.path(&"x".repeat(120)), "stop", 2).contains("longer than the path of a socket can be"));
    // The clients that a socket has room for, and one more. Each is held.
    let all: Vec<Client> = (0..32).map(|_| monitor.qmp()).collect();
    assert!(refusal(&monitor.socket(), "stop", 2).contains("takes no client: 32 clients are connected to this socket"));
    drop(all);
    // A socket that its owner has left, and one of another protocol.
    let dead = folder.path("dead");
    drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
    assert!(refusal(&dead, "stop", 2).contains("nobody listens at"));
    let odd = folder.path("odd");
    let listener = std::os::unix::net::UnixListener::bind(&odd).unwrap();
    let answering = std::thread::spawn(move || {
        for greeting in ["hello\n", "[]\n", "{}\n", "{\"QMP\":7}\n"] {
            listener.accept().unwrap().0.write_all(greeting.as_bytes()).unwrap();
        }
    });
    for _ in 0..4 {
        assert!(refusal(&odd, "stop", 2).contains("speaks something other than QMP"));
    }
    answering.join().unwrap();
    monitor.signal("KILL");
    monitor.exit_code();
    assert!(refusal(&monitor.socket(), "stop", 2).contains("nobody listens at"));
}

#[test]
fn a_socket_of_another_user_is_told_in_one_sentence() {
    let Some(monitor) = machine() else { return };
    let probe = Command::new("setpriv").args(["--reuid", "65534", "--clear-groups", "python3", "--version"]).output();
    let python = if probe.is_ok_and(|output| output.status.success()) { "python3" } else { "/usr/bin/python3" };
    // Where the repository lies may be closed to others; the folder of the test is open.
    let copy = monitor.folder.path("qmp-shell");
    fs::copy(script(), &copy).unwrap();
    fs::set_permissions(&copy, fs::Permissions::from_mode(0o644)).unwrap();
    let mut command = Command::new("setpriv");
    let words = ["--reuid", "65534", "--clear-groups", python, copy.to_str().unwrap()];
    let output = match command.args(words).arg(monitor.socket()).args(["-c", "stop"]).output() {
        Ok(output) if output.status.code() == Some(2) => output,
        other => return skipped(&format!("python3 cannot be run as another user: {other:?}")),
    };
    let (code, _, err) = told(output);
    assert_eq!(code, 2);
    assert!(err.contains("may not be opened by this user; be the user that started the machine"), "{err}");
}

#[test]
fn a_reader_that_leaves_and_a_full_disk_bring_no_traceback() {
    let Some(monitor) = machine() else { return };
    let shell = format!("python3 {} {}", script().display(), monitor.socket().display());
    let bash = |line: &str| told(Command::new("bash").args(["-o", "pipefail", "-c", line]).output().unwrap());
    let (code, out, err) = bash(&format!("yes query-kvm | head -10000 | {shell} | head -1"));
    assert_eq!((code, out.lines().count(), err.as_str()), (141, 1, ""));
    let (code, _, err) = bash(&format!("{shell} -c query-kvm >/dev/full"));
    assert_eq!((code, err.lines().count()), (2, 1), "{err}");
    assert!(err.contains("the output cannot be written: No space left on device"), "{err}");
    for closed in ["<&-", ">&-"] {
        let (code, _, err) = bash(&format!("{shell} {closed}"));
        assert_eq!((code, err.lines().count()), (2, 1), "{err}");
    }
}

/// The shell on a terminal, at its first prompt. Its history is in `home`; `plain` is without colours.
fn start(monitor: &Monitor, home: &Path, plain: bool) -> OnTerminal {
    let (script, socket) = (script(), monitor.socket());
    let words = ["python3", script.to_str().unwrap(), socket.to_str().unwrap()];
    let colours = if plain { "1" } else { "" };
    let mut shell = OnTerminal::start(&words, &[("HOME", home.to_str().unwrap()), ("NO_COLOR", colours)]);
    shell.expect("^D leaves.");
    shell.expect(">");
    shell
}

/// Types a line and waits for what its answer has, and for the next prompt: what is typed before that, the terminal itself
/// would take for editing.
#[track_caller]
fn answer(shell: &mut OnTerminal, line: &str, part: &str) {
    shell.type_in(&format!("{line}\r"));
    shell.expect(part);
    shell.expect(">");
}

#[test]
fn an_event_is_shown_above_the_prompt_and_what_was_typed_stays() {
    let Some(monitor) = machine() else { return };
    let mut client = monitor.qmp();
    let mut shell = start(&monitor, &monitor.folder.path(""), true);
    shell.type_in("query-satus");
    shell.expect("query-satus");
    // The cursor is put behind the first `s`, where a letter is missing.
    shell.type_in("\x1b[D\x1b[D\x1b[D\x1b[D");
    client.call("stop");
    let typed = shell.seen;
    shell.expect(" STOP\r\n");
    // The line was wiped out for the event, and is written again.
    assert!(shell.pty.screen.text()[typed..shell.seen].contains("\x1b[K"), "{:?}", shell.pty.screen.text());
    shell.expect("web1> query-satus");
    answer(&mut shell, "t", "{\"running\": false, \"singlestep\": false, \"status\": \"paused\"}");
    // The same of a line that takes three rows.
    let long = format!("block_set_io_throttle id={}", "y".repeat(200));
    shell.type_in(&long);
    shell.expect("yyy");
    client.call("cont");
    shell.expect(" RESUME\r\n");
    shell.expect("web1> block_set_io_throttle id=yyy");
    answer(&mut shell, "z", &format!("Device '{}z' not found", "y".repeat(200)));
    // Several at once, while nothing is typed, and as an answer comes.
    answer(&mut shell, "stop", " STOP\r\n");
    shell.type_in("exit\r");
    assert_eq!(shell.status(), 0);
}

#[test]
fn tab_completes_commands_arguments_and_values() {
    let Some(monitor) = machine() else { return };
    let mut client = monitor.qmp();
    let mut shell = start(&monitor, &monitor.folder.path(""), true);
    shell.type_in("block_s\t");
    shell.expect("block_set_io_throttle ");
    shell.type_in("i\t");
    // What may follow is listed once there are several.
    shell.expect("iops_size=");
    shell.type_in("d=\t");
    shell.expect("id=vda ");
    answer(&mut shell, "iops_s\t512", "{}");
    assert_eq!(client.call("query-block")[0]["inserted"]["iops_size"], 512);
    // An argument that was given is not offered again.
    shell.type_in("balloon value=128M v\t\x15");
    answer(&mut shell, "help SHUT\t", "SHUTDOWN: an event");
    shell.type_in("qmp_capabilities en\t\x15");
    shell.expect("enable=");
    // While a completion asks the machine, events come.
    shell.type_in("block_set_io_throttle id=");
    client.call("stop");
    answer(&mut shell, "\tiops=77", "{}");
    assert_eq!(client.call("query-block")[0]["inserted"]["iops"], 77);
    shell.type_in("\x04");
    assert_eq!(shell.status(), 0);
    assert!(!shell.pty.screen.text().contains("value=128M value="));
}

#[test]
fn colours_are_for_terminals_and_not_for_who_wants_none() {
    let Some(monitor) = machine() else { return };
    let mut shell = start(&monitor, &monitor.folder.path(""), false);
    answer(&mut shell, "query-kvm", "\x1b[34m\"enabled\"\x1b[m: \x1b[35mtrue\x1b[m");
    answer(&mut shell, "balon", "\x1b[31mbalon is no command");
    let mut shell = start(&monitor, &monitor.folder.path(""), true);
    answer(&mut shell, "query-kvm", "{\"enabled\": true, \"present\": true}");
    assert!(!shell.pty.screen.text().contains("\x1b[3"), "{:?}", shell.pty.screen.text());
}

#[test]
fn history_is_kept_for_its_owner_alone_and_not_where_it_cannot_be() {
    let Some(monitor) = machine() else { return };
    let home = monitor.folder.path("home");
    let mut shell = start(&monitor, &home, true);
    answer(&mut shell, "query-kvm", "enabled");
    answer(&mut shell, " query-name", "web1");
    answer(&mut shell, "query-kvm", "enabled");
    answer(&mut shell, "query-status", "running");
    // It is written at once: a shell that is killed loses nothing.
    drop(shell);
    let file = home.join(".local/state/loopvisor/qmp-shell_history");
    assert_eq!(fs::read_to_string(&file).unwrap(), "query-kvm\nquery-status\n");
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    let mut shell = start(&monitor, &home, true);
    shell.type_in("\x1b[A\x1b[A\r");
    shell.expect("{\"enabled\": true, \"present\": true}");
    drop(shell);
    let mut shell = start(&monitor, Path::new("/proc/nowhere"), true);
    answer(&mut shell, "query-kvm", "enabled");
    answer(&mut shell, "\x1b[A", "enabled");
    shell.type_in("\x04");
    assert_eq!(shell.status(), 0);
}

#[test]
fn quit_asks_first_and_the_shell_ends_with_the_machine() {
    let Some(mut monitor) = machine() else { return };
    let mut shell = start(&monitor, &monitor.folder.path(""), true);
    shell.type_in("quit\r");
    shell.expect("This ends the machine. Go on? [y/N] ");
    answer(&mut shell, "", "web1");
    answer(&mut shell, "query-name", "web1");
    shell.type_in("quit\r");
    shell.expect("[y/N] ");
    shell.type_in("y\r");
    shell.expect("the machine has ended (host-qmp-quit)");
    assert_eq!(shell.status(), 0);
    assert_eq!(monitor.exit_code(), 0);
}

#[test]
fn the_terminal_is_as_before_however_the_shell_ends() {
    type End = fn(&mut OnTerminal, &Monitor);
    let ends: [(&str, i32, End); 5] = [
        ("^D", 0, |shell, _| {
            shell.type_in("\x03");
            shell.expect(">");
            shell.type_in("\x04");
        }),
        ("exit", 0, |shell, _| shell.type_in("\x15exit\r")),
        ("the machine is killed", 2, |_, monitor| monitor.signal("KILL")),
        ("a signal", 143, |shell, _| shell.signal("TERM")),
        ("the machine quits", 0, |_, monitor| {
            monitor.qmp().call("quit");
        }),
    ];
    for (name, status, end) in ends {
        let Some(monitor) = machine() else { return };
        let mut shell = start(&monitor, &monitor.folder.path(""), true);
        shell.type_in("query-st");
        shell.expect("query-st");
        assert_ne!(shell.pty.settings(), shell.before, "{name}");
        end(&mut shell, &monitor);
        assert_eq!(shell.status(), status, "{name}");
    }
}

#[test]
fn an_answer_that_is_not_waited_for_is_shown_when_it_comes() {
    if !has_python() {
        return;
    }
    let words = "mode=blk-load depth=4 count=1000 end=acpi";
    let Some((monitor, stall)) = with_a_stalling_disk(words, ",iothread=io1") else { return };
    let mut client = monitor.qmp();
    stall.stall();
    client.call("cont");
    stall.await_held(1);
    let mut shell = start(&monitor, &monitor.folder.path(""), true);
    // Before the request is sent ^C ends the line only, and it is typed again. This machine has no name.
    loop {
        shell.type_in("stop\r");
        shell.expect("stop\r\n");
        shell.type_in("\x03");
        let before = shell.seen;
        shell.expect(">");
        if shell.pty.screen.text()[before..].contains("not waiting for stop any longer; its answer is shown when") {
            break;
        }
    }
    stall.release();
    shell.expect(" STOP\r\n");
    shell.expect(" late answer to stop");
    shell.expect(">");
    answer(&mut shell, "query-status", "\"paused\"");
    shell.type_in("\x04");
    assert_eq!(shell.status(), 0);
}

#[test]
fn qemu_s_own_socket_is_served_too() {
    if !has_python() {
        return;
    }
    let folder = Folder::new();
    let socket = folder.path("qemu.sock");
    let server = format!("unix:{},server=on,wait=off", socket.display());
    let words = ["-M", "microvm", "-m", "64", "-nodefaults", "-display", "none", "-S", "-qmp", &server];
    let spawned = Command::new("qemu-system-x86_64").args(words).stdin(Stdio::null()).stderr(Stdio::null()).spawn();
    let Ok(child) = spawned else { return skipped("there is no qemu-system-x86_64") };
    let mut qemu = Ended(child);
    let until = Instant::now() + PATIENCE;
    while !socket.exists() {
        assert!(Instant::now() < until && qemu.0.try_wait().unwrap().is_none(), "QEMU does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    let ok = |lines: &[&str]| {
        let (code, out, err) = one(&socket, lines);
        assert_eq!((code, err.as_str()), (0, ""), "{lines:?}");
        out
    };
    assert_eq!(parsed(&ok(&["query-status"]))["status"], "prelaunch");
    // Members that depend on another's value, nested ones, sizes.
    ok(&["blockdev-add driver=raw node-name=r file.size=1G file.driver=null-co offset=4K cache.direct=on"]);
    let nodes = parsed(&ok(&["query-named-block-nodes"]));
    let nodes = nodes.as_array().unwrap();
    let node = nodes.iter().find(|node| node["node-name"] == "r").unwrap();
    assert_eq!(node["image"]["virtual-size"], (1_u64 << 30) - 4096);
    assert_eq!(node["cache"]["direct"], true);
    // A reference by name where an object could stand too; a list of words; a whole object.
    ok(&["blockdev-add driver=copy-on-read node-name=c file=r", "blockdev-del node-name=c"]);
    ok(&["chardev-add id=x backend={\"type\":\"null\", \"data\":{}}", "chardev-remove id=x"]);
    ok(&["object-add qom-type=iothread id=io1 poll-max-ns=0"]);
    assert!(ok(&["human-monitor-command command-line='info status'"]).starts_with("VM status: paused"));
    assert!(ok(&["help blockdev-add driver=qcow2"]).contains("overlap-check.template="));
    assert!(ok(&["help"]).contains("migrate-set-parameters"));
    assert!(
        refusal(&socket, "blockdev-add driver=qcow22", 2).contains("driver cannot be \"qcow22\"; did you mean qcow2?")
    );
    assert!(refusal(&socket, "block_set_io_throttle id=a iops=1", 2).contains("bps and bps_rd and bps_wr"));
    // It has members that the schema does not tell of.
    assert!(refusal(&socket, "device_add driver=virtio-balloon-device x=1", 1).starts_with("GenericError"));
    let (code, out, _) = run(&socket, &[], "quit\n");
    assert_eq!((code, out.as_str()), (0, "{}\n"));
}

/// A process that is ended when this is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
