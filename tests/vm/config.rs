//! A machine from a file in JSON.

use std::fs::{self, File};
use std::path::Path;

use serde_json::{Value, json};

use crate::monitor::{Monitor, Setup, guest, has_kvm};

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
