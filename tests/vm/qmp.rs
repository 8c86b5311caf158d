//! The management protocol on its real socket: the socket's file, the conversation, the answers.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;

use loopvisor::qmp::command::COMMANDS;
use serde_json::{Value, json};

use crate::client::Client;
use crate::monitor::{Monitor, Setup, skipped};
use crate::{net, proc};

/// An idle machine with an iothread and a disk.
fn machine() -> Option<Monitor> {
    let setup = Setup::guest("mode=idle")?.option("-name", "web1").option("-smp", "2");
    Some(setup.iothread("io1").disk("vda", 1 << 20, "direct=off,iothread=io1").start())
}

/// One of all devices that can be had here, whose balloon's driver is up.
fn whole_machine() -> Option<Monitor> {
    let setup = Setup::guest_that_reboots("mode=balloon touch=off")?.option("-name", "web1").flag("-balloon");
    let vsock = format!("vsock,id=v,guest-cid=3,uds_path={}", setup.folder.path("v").display());
    let setup = setup.option("-device", &vsock);
    let chardev = format!("id=con0,path={}", setup.folder.path("console").display());
    let setup = setup.option("-chardev", &chardev);
    let setup = setup.iothread("io1").disk("vda", 1 << 20, "direct=off,iothread=io1");
    let monitor = if net::has_taps() { net::with_nic(setup) } else { setup }.start();
    monitor.serial.expect("balloon: begin");
    Some(monitor)
}

#[test]
fn the_socket_is_its_owners_alone_and_removed_at_the_end() {
    let Some(mut monitor) = machine() else { return };
    let mut client = monitor.qmp();
    assert_eq!(fs::metadata(monitor.socket()).unwrap().permissions().mode() & 0o777, 0o600);
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);
    assert!(!monitor.socket().exists());
}

#[test]
fn a_live_socket_of_another_process_is_left_alone_and_the_start_fails() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let path = setup.folder.path("qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let mut monitor = setup.start();
    assert_eq!(monitor.exit_code(), 1);
    let told = monitor.log.text();
    assert!(told.contains(path.to_str().unwrap()) && told.contains("another process listens"), "{told}");
    // It was asked once who is there, and is still to be reached.
    let _ = listener.accept().unwrap();
    let _client = Client::connect(&path).unwrap();
    let _ = listener.accept().unwrap();
}

#[test]
fn a_live_socket_of_another_monitor_is_left_alone() {
    let Some(first) = machine() else { return };
    let mut client = first.qmp();
    let option = format!("unix:{},server,nowait", first.socket().display());
    for name in ["-qmp", "-api-channel"] {
        let setup = Setup::bare().option("-kernel", crate::monitor::guest().to_str().unwrap());
        let (code, told) = setup.option(name, &option).run();
        assert_eq!(code, 1, "{told}");
    }
    client.call("query-status");
    first.qmp().call("query-status");
}

#[test]
fn a_dead_socket_is_replaced() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    drop(UnixListener::bind(setup.folder.path("qmp")).unwrap());
    assert!(setup.folder.path("qmp").exists());
    let mut monitor = setup.start();
    monitor.serial.expect("idle: begin");
    monitor.qmp().call("quit");
    assert_eq!(monitor.exit_code(), 0);
}

#[test]
fn a_path_that_is_no_socket_is_refused_and_left_as_it_is() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let path = setup.folder.path("qmp");
    fs::write(&path, "precious").unwrap();
    let mut monitor = setup.start();
    assert_eq!(monitor.exit_code(), 1);
    assert!(monitor.log.text().contains("no socket"));
    assert_eq!(fs::read_to_string(path).unwrap(), "precious");
}

#[test]
fn a_socket_that_was_replaced_by_anothers_is_not_removed_at_the_end() {
    let Some(mut monitor) = machine() else { return };
    let mut client = monitor.qmp();
    fs::remove_file(monitor.socket()).unwrap();
    let _others = UnixListener::bind(monitor.socket()).unwrap();
    client.call("quit");
    assert_eq!(monitor.exit_code(), 0);
    assert!(monitor.socket().exists());
}

#[test]
fn a_start_that_fails_later_removes_its_socket() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let mut monitor = setup.drive("vda", Path::new("/no/such/file"), "").start();
    assert_eq!(monitor.exit_code(), 1);
    assert!(!monitor.socket().exists());
}

#[test]
fn both_options_and_several_sockets_lead_to_the_same_machine() {
    let Some(setup) = Setup::guest("mode=idle") else { return };
    let [second, third] = ["second", "third"].map(|name| setup.folder.path(name));
    let setup = setup.option("-api-channel", &format!("unix:{}", second.display()));
    let mut monitor = setup.option("-qmp", &format!("unix:{},server", third.display())).start();
    let mut client = monitor.qmp();
    let mut others = [&second, &third].map(|path| {
        let mut other = Client::connect(path).unwrap();
        other.negotiate();
        other
    });
    client.call("stop");
    for other in &mut others {
        assert_eq!(other.event()["event"], "STOP");
        assert_eq!(other.call("query-status")["status"], "paused");
    }
    others[1].call("quit");
    assert_eq!(monitor.exit_code(), 0);
    assert!(!second.exists() && !third.exists());
}

#[test]
fn the_greeting_comes_first_and_negotiation_before_anything_else() {
    let Some(monitor) = machine() else { return };
    let mut client = monitor.connect();
    let greeting = client.line();
    assert_eq!(greeting["QMP"]["capabilities"], json!([]));
    assert_eq!(greeting["QMP"]["version"]["qemu"]["major"], 5);
    let (class, text) = client.mistake("{\"execute\":\"query-status\"}");
    assert_eq!((class.as_str(), text.contains("qmp_capabilities")), ("CommandNotFound", true));
    // No event is told to who has not negotiated.
    let mut other = monitor.qmp();
    other.call("stop");
    other.call("cont");
    client.mistake("{\"execute\":\"stop\"}");
    assert_eq!(client.events_kept(), 0);
    client.call("qmp_capabilities");
    other.call("stop");
    assert_eq!(client.event()["event"], "STOP");
    let (class, _) = client.mistake("{\"execute\":\"qmp_capabilities\"}");
    assert_eq!(class, "CommandNotFound");
}

#[test]
fn every_command_answers_in_the_shape_that_the_schema_says() {
    let Some(monitor) = whole_machine() else { return };
    let mut client = monitor.qmp();
    let data = monitor.folder.path("data.img");
    File::create(&data).unwrap().set_len(1 << 20).unwrap();
    let path = monitor.folder.path("console");
    let nics = net::has_taps();
    // `plug_net` plugs taps.
    let others = ["qmp_capabilities", "netdev_add", "netdev_del", "system_reset", "quit"];
    for entry in COMMANDS.iter().filter(|entry| !others.contains(&entry.name)) {
        if !nics && ["netdev_set_throttle", "set_link"].contains(&entry.name) {
            continue;
        }
        // `call_with` holds the answer against the table, which has the commands of a plug in an order that works.
        let arguments = match entry.name {
            // After it was removed: they stand in this order in the table.
            "chardev-remove" => json!({"id": "con0"}),
            "chardev-add" => json!({"id": "con0", "backend": {"type": "socket", "data":
                {"addr": {"type": "unix", "data": {"path": path}}}}}),
            "chardev-resize" => json!({"id": "con0", "cols": 80, "rows": 25}),
            "blockdev-add" => json!({"node-name": "data", "file": {"filename": data.to_str()}}),
            "device_add" => json!({"id": "dev", "driver": "virtio-blk-mmio", "drive": "data"}),
            "block_resize" => json!({"device": "dev", "size": 2 << 20}),
            "device_del" => json!({"id": "dev"}),
            "blockdev-del" => json!({"node-name": "data"}),
            "getfd" => {
                client.send_with("getfd", &json!({"fdname": "fd1"}), &File::open(&data).unwrap());
                continue;
            }
            "closefd" => json!({"fdname": "fd1"}),
            "block_set_io_throttle" => json!({"id": "vda"}),
            "netdev_set_throttle" => json!({"id": "n0", "pps": 1000}),
            "set_link" => json!({"name": "n0", "up": true}),
            "balloon" => json!({"value": 1 << 30}),
            "balloon-stats-interval" => json!({"seconds": 0}),
            _ => json!({}),
        };
        client.call_with(entry.name, &arguments);
    }
    assert_eq!(client.call("query-name"), json!({"name": "web1"}));
    let names: Vec<Value> = COMMANDS.iter().map(|entry| json!({"name": entry.name})).collect();
    assert_eq!(client.call("query-commands"), json!(names));
    // With it the drivers are gone that some of them want.
    client.call("system_reset");
    client.call("quit");
}

#[test]
fn the_vcpus_and_the_disk_are_described_as_they_are() {
    let Some(monitor) = machine() else { return };
    let mut client = monitor.qmp();
    // At once: the threads' ids are there before anybody can ask.
    let cpus = client.call("query-cpus-fast");
    let old_cpus = client.call("query-cpus");
    assert_eq!(cpus.as_array().unwrap().len(), 2);
    for index in 0..2 {
        let thread = proc::thread(monitor.pid(), &format!("CPU {index}/KVM"));
        assert_eq!(cpus[index]["thread-id"], thread);
        assert_eq!(old_cpus[index]["thread_id"], thread);
    }
    let disk = client.call("query-block")[0].take();
    // As QEMU has it for a device that has an id, and drives' devices have theirs.
    assert_eq!((&disk["device"], &disk["qdev"]), (&json!("vda"), &json!("vda")));
    assert_eq!(disk["inserted"]["image"]["virtual-size"], 1 << 20);
    assert_eq!(disk["inserted"]["file"], monitor.folder.path("vda.img").to_str().unwrap());
    assert_eq!(client.call("query-blockstats")[0]["qdev"], "vda");
}

#[test]
fn an_unknown_command_and_a_wrong_argument_are_told_by_class_and_name() {
    let Some(monitor) = machine() else { return };
    let mut client = monitor.qmp();
    let (class, text) = client.mistake("{\"execute\":\"no-such\"}");
    assert_eq!((class.as_str(), text.contains("no-such")), ("CommandNotFound", true));
    for request in [
        "{\"execute\":\"stop\",\"arguments\":{\"now\":true}}",
        "{\"execute\":\"stop\",\"now\":1}",
        "{\"exec-oob\":\"stop\"}",
        "{\"execute\":7}",
        "{}",
        "[]",
    ] {
        assert_eq!(client.mistake(request).0, "GenericError", "{request}");
    }
    assert_eq!(client.call("query-status")["status"], "running");
}

#[test]
fn an_id_of_any_type_comes_back() {
    let Some(monitor) = machine() else { return };
    let mut client = monitor.qmp();
    for id in
        [json!(null), json!(1), json!(-1.5), json!("ä\n\u{1f600}"), json!([1, {"a": null}]), json!({"b": [], "a": 1})]
    {
        client.send(&json!({"execute": "query-status", "id": id}).to_string());
        assert_eq!(client.answer().get("id"), Some(&id));
        client.send(&json!({"execute": "nope", "id": id}).to_string());
        let answer = client.answer();
        assert_eq!((answer.get("id"), &answer["error"]["class"]), (Some(&id), &json!("CommandNotFound")));
    }
    client.send("{\"execute\":\"query-status\"}");
    assert!(client.answer().get("id").is_none());
}

#[test]
fn clients_at_once_have_conversations_of_their_own_and_all_hear_of_events() {
    let Some(monitor) = machine() else { return };
    let mut clients: Vec<Client> = (0..8).map(|_| monitor.qmp()).collect();
    for (n, client) in clients.iter_mut().enumerate() {
        client.send(&json!({"execute": "query-status", "id": n}).to_string());
    }
    for (n, client) in clients.iter_mut().enumerate().rev() {
        assert_eq!(client.answer()["id"], n);
    }
    clients[3].call("stop");
    for client in &mut clients {
        assert_eq!(client.event()["event"], "STOP");
    }
}

/// Runs `tests/vm/qemu_client.py` with the package from PyPI, unmodified. `make test` gets it into `target/venv`.
#[test]
fn the_python_library_of_qemu_drives_a_session() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let python = std::env::var_os("LOOPVISOR_PYTHON").unwrap_or(root.join("target/venv/bin/python").into());
    let probe = Command::new(&python).args(["-c", "import qemu.qmp"]).output();
    if !probe.as_ref().is_ok_and(|output| output.status.success()) {
        return skipped(&format!("{python:?} cannot import qemu.qmp: {probe:?}"));
    }
    let Some(mut monitor) = whole_machine() else { return };
    let script = root.join("tests/vm/qemu_client.py");
    let output = Command::new(&python).arg(script).arg(monitor.socket()).output().unwrap();
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "all went well\n");
    assert_eq!(monitor.exit_code(), 0);
}
