//! A machine from a file in JSON; and `-check`, which finds out whether it could run here and leaves nothing behind.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde_json::{Value, json};

use crate::monitor::{Monitor, PATIENCE, Setup, guest, has_kvm};

const MIB: u64 = 1 << 20;

/// A machine with a part of each kind, all of whose files are in `folder`, written there as `x.json`.
fn write_file(folder: &Path, words: &str) -> Value {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let config = json!({
        "boot-source": { "kernel_image_path": guest().to_str().unwrap(), "boot_args": words },
        "machine-config": { "vcpu_count": "2", "mem_size": "64M", "mem_path": path("ram"), "mem-share": "on" },
        "iothread": [{ "id": "io1" }],
        "drive": [{
            "drive_id": "vda", "path_on_host": path("vda.img"), "read_only": false, "direct": false, "iothread": "io1",
            "throttling": { "iops_total": 5000, "group": "g" },
        }],
        "console": [{ "console_id": "c", "socket_path": path("console") }],
        "vsock": { "vsock_id": "v", "guest_cid": 3, "uds_path": path("vsock") },
        "balloon": { "deflate_on_oom": true },
        "rng": { "bytes_per_sec": 1000 },
        "serial": { "stdio": true },
        "name": "from a file",
        "qmp": [path("qmp")],
        "log": path("log"),
        "pidfile": path("pid"),
    });
    File::create(folder.join("vda.img")).unwrap().set_len(MIB).unwrap();
    fs::write(folder.join("x.json"), config.to_string()).unwrap();
    config
}

/// The program with the file of `write_file`, changed by `change`.
fn from_file(words: &str, change: impl FnOnce(&mut Value)) -> Setup {
    let setup = Setup::bare();
    let folder = setup.folder.path("");
    let mut config = write_file(&folder, words);
    change(&mut config);
    fs::write(folder.join("x.json"), config.to_string()).unwrap();
    let file = folder.join("x.json");
    setup.option("-config", file.to_str().unwrap())
}

/// Everything in the folder: names, sizes, when it was written to, and what it is.
fn listing(folder: &Path) -> Vec<(String, u64, i64, u32)> {
    let mut all: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let entry = entry.unwrap();
            let facts = entry.metadata().unwrap();
            (entry.file_name().into_string().unwrap(), facts.len(), facts.mtime_nsec(), facts.mode())
        })
        .collect();
    all.sort_unstable();
    all
}

/// Checks, with what is in the folder as it was before: the exit code, and standard output and error.
#[track_caller]
fn check(setup: Setup) -> (i32, String, String) {
    let folder = setup.folder.path("");
    let before = listing(&folder);
    let mut monitor = setup.flag("-check").start();
    let code = monitor.exit_code();
    assert!(monitor.serial.wait(PATIENCE, |_, ended| ended.then_some(())).is_some());
    assert_eq!(listing(&folder), before, "{}", monitor.log.text());
    (code, monitor.serial.text(), monitor.log.text())
}

#[test]
fn a_guest_is_booted_wholly_from_a_file_and_stopped_by_qmp() {
    if !has_kvm() {
        return;
    }
    let mut monitor: Monitor = from_file("mode=idle wake=never", |_| ()).start();
    monitor.serial.expect("idle: begin");
    let mut client = monitor.qmp();
    assert_eq!(client.call("query-name")["name"], "from a file");
    assert_eq!(client.call("query-iothreads")[0]["id"], "io1");
    assert_eq!(client.call("query-cpus").as_array().map(Vec::len), Some(2));
    assert_eq!(client.call("query-blockstats")[0]["device"], "vda");
    let pid = fs::read_to_string(monitor.folder.path("pid")).unwrap();
    assert_eq!(pid.trim(), monitor.pid().to_string());
    client.call("stop");
    assert_eq!(client.await_event("STOP")["event"], "STOP");
    assert_eq!(client.call("query-status")["status"], "paused");
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);
    assert_eq!(fs::metadata(monitor.folder.path("ram")).unwrap().len(), 64 * MIB);
    assert!(!monitor.folder.path("pid").exists() && monitor.folder.path("log").exists());
}

#[test]
fn a_check_of_a_machine_that_could_run_leaves_nothing_behind() {
    if !has_kvm() {
        return;
    }
    let good = |setup| assert_eq!(check(setup), (0, "loopvisor: the configuration is good\n".into(), String::new()));
    good(from_file("mode=idle", |_| ()));
    let background = |config: &mut Value| {
        config["daemonize"] = json!(true);
        config["serial"] = json!({ "stdio": false });
    };
    good(from_file("mode=idle", background).flag("-freeze"));
}

#[test]
fn the_file_of_the_memory_is_after_a_check_what_it_was_before() {
    if !has_kvm() {
        return;
    }
    for content in [vec![], vec![7; 64 * MIB as usize]] {
        let setup = from_file("mode=idle", |_| ());
        let ram = setup.folder.path("ram");
        fs::write(&ram, &content).unwrap();
        let mut monitor = setup.flag("-check").start();
        assert_eq!(monitor.exit_code(), 0, "{}", monitor.log.text());
        assert!(fs::read(&ram).unwrap() == content, "{} bytes are others", content.len());
    }
}

#[test]
fn what_the_host_lacks_is_found_by_a_check_and_nothing_is_left_behind() {
    if !has_kvm() {
        return;
    }
    let in_folder = |setup: &Setup, name: &str| setup.folder.path(name).to_str().unwrap().to_owned();
    let plain = || from_file("mode=idle", |_| ());
    let with = |make: &dyn Fn(&Setup) -> (&'static str, String)| {
        let setup = plain();
        let (option, value) = make(&setup);
        setup.option(option, &value)
    };
    let (no_kernel, no_initrd) =
        (with(&|_| ("-kernel", "/nowhere/k".into())), with(&|_| ("-initrd", "/nowhere/i".into())));
    let no_format = with(&|setup| ("-kernel", in_folder(setup, "vda.img")));
    let no_drive = with(&|_| ("-drive", "id=b,file=/nowhere/b".into()));
    let no_folder = with(&|_| ("-qmp", "unix:/nowhere/s,server".into()));
    let no_log = with(&|_| ("-D", "/nowhere/log".into()));
    let no_tap = with(&|_| ("-netdev", "id=n,netdev=loopvisor-none".into()));
    let no_memory = with(&|_| ("-mem-path", "/nowhere/ram".into()));
    let pidfile = plain();
    fs::write(pidfile.folder.path("pid"), "1\n").unwrap();
    let socket = plain();
    let _listens = std::os::unix::net::UnixListener::bind(socket.folder.path("console")).unwrap();
    let locked = plain();
    let held = File::options().write(true).open(locked.folder.path("vda.img")).unwrap();
    held.lock().unwrap();
    for (setup, code, sentence) in [
        (no_kernel, 1, "kernel \"/nowhere/k\": open"),
        (no_initrd, 1, "initrd \"/nowhere/i\": open"),
        (no_format, 1, "kernel \""),
        (no_drive, 1, "/nowhere/b"),
        (no_folder, 1, "QMP socket: /nowhere/s"),
        (no_log, 1, "-D /nowhere/log: open the log file"),
        (no_tap, 1, "netdev \"n\": tap loopvisor-none: "),
        (no_memory, 1, "-mem-path /nowhere/ram"),
        (pidfile, 1, "pid: process 1 ("),
        (socket, 1, "another process listens there"),
        (locked, 1, "is in use by"),
        (plain().option("-rng", "random_file=/etc/passwd"), 2, "no character device"),
        (plain().option("-smp", "255"), 2, "a number from 1 to 254"),
    ] {
        let (ended, stdout, stderr) = check(setup);
        assert_eq!((ended, stdout.as_str()), (code, ""), "{sentence}: {stderr}");
        assert!(stderr.contains(sentence) && stderr.lines().count() == 1, "{sentence}: {stderr}");
    }
}

#[test]
fn a_check_beside_the_machine_that_runs_says_so_and_does_not_disturb_it() {
    if !has_kvm() {
        return;
    }
    let mut monitor = from_file("mode=idle wake=never", |_| ()).start();
    let mut client = monitor.qmp();
    let file = monitor.folder.path("x.json");
    let [other, other_memory] = ["other", "ram2"].map(|name| monitor.folder.path(name));
    let [pidfile, memory] = [("-pidfile", &other), ("-mem-path", &other_memory)];
    let holder = format!("is in use by process {} (loopvisor)", monitor.pid());
    let running = format!("pid: process {} (loopvisor) is running: end it", monitor.pid());
    for (options, sentence) in [
        (&[][..], running.as_str()),
        (&[pidfile], holder.as_str()),
        (&[pidfile, memory], "another process listens there"),
    ] {
        let setup = Setup::bare().option("-config", file.to_str().unwrap());
        let setup = options.iter().fold(setup, |setup, (option, value)| setup.option(option, value.to_str().unwrap()));
        let (code, told) = setup.flag("-check").run();
        assert!(code == 1 && told.contains(sentence), "{told}");
    }
    assert_eq!(client.call("query-status")["status"], "running");
    assert!(monitor.folder.path("pid").exists() && monitor.folder.path("console").exists() && !other.exists());
    assert_eq!(fs::metadata(monitor.folder.path("ram")).unwrap().len(), 64 * MIB);
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);
}
