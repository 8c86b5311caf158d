//! A machine whose guest makes the disk requests that a test types (the bare-metal guest's mode `blk-typed`).

use std::fs::{self, File};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::client::Client;
use crate::host::{self, Memory};
use crate::monitor::{Monitor, PATIENCE, Setup};

/// What a request ends with (virtio 1.2, 5.2.6).
pub const OK: u64 = 0;
pub const IOERR: u64 = 1;

/// The content that the guest writes: each of these sectors tells of itself and of the seed.
pub fn pattern(seed: u64, sector: u64, sectors: u64) -> Vec<u8> {
    let word = |sector: u64, index: u64| ((seed << 40) + (sector << 8) + index + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (sector..sector + sectors).flat_map(|sector| (0..64).flat_map(move |n| word(sector, n).to_le_bytes())).collect()
}

/// A monitor with the guest, and a client of its QMP socket.
pub struct Typed {
    pub monitor: Monitor,
    pub client: Client,
    lines: u64,
}

/// The guest's line in reply.
pub struct Reply(String);

impl Reply {
    #[track_caller]
    pub fn number(&self, key: &str) -> u64 {
        let word = self.0.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        word.and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("no {key} in {:?}", self.0))
    }

    pub fn status(&self) -> u64 {
        self.number("status")
    }
}

impl Typed {
    /// A machine without disks; `None`, with the reason printed, without KVM.
    pub fn setup() -> Option<Setup> {
        Some(Setup::guest("mode=blk-typed end=acpi")?.stdin(Stdio::piped()))
    }

    #[track_caller]
    pub fn start(setup: Setup) -> Typed {
        let monitor = setup.start();
        let client = monitor.qmp();
        monitor.serial.expect("typed: begin");
        Typed { monitor, client, lines: 0 }
    }

    /// A machine with this as disk 0 (`slow`), and a file in memory as disk 1, on the same loop.
    pub fn beside_another(memory: &Memory, path: &Path, rest: &str, iothread: bool) -> Option<Typed> {
        let mut setup = Typed::setup()?;
        let home = if iothread { ",iothread=io1" } else { "" };
        if iothread {
            setup = setup.iothread("io1");
        }
        let setup = setup.drive("slow", path, &format!("{rest}{home}"));
        Some(Typed::start(setup.drive("fast", &memory.image("fast.img", 8 << 20), &format!("direct=off{home}"))))
    }

    /// Checks that a failed request of disk 0 is reported by an event, and that the VM and disk 1 still work.
    #[track_caller]
    pub fn check_failure(&mut self, failed: &str, operation: &str, no_space: bool) {
        let event = self.client.await_event("BLOCK_IO_ERROR");
        let data = &event["data"];
        assert_eq!(
            [&data["device"], &data["operation"], &data["action"]],
            ["slow", operation, "report"],
            "{failed}: {event}"
        );
        assert_eq!(data["nospace"], no_space, "{failed}: {event}");
        self.must(&["write 1 0 8 1", "flush 1"]);
        assert_eq!(self.ask("read 1 0 8 1").number("same"), 1);
        assert_eq!(self.client.call("query-status")["status"], "running");
    }

    /// Types a line, and does not wait for the reply; its number.
    pub fn send(&mut self, line: &str) -> u64 {
        self.lines += 1;
        self.monitor.type_in(&format!("{line}\n"));
        self.lines
    }

    /// Waits for the reply to the line of that number.
    #[track_caller]
    pub fn reply(&mut self, number: u64) -> Reply {
        let start = format!("typed: {number} ");
        let found = self.monitor.serial.wait(PATIENCE, |text, _| {
            let whole = &text[..text.rfind('\n')?];
            whole.lines().find_map(|line| line.strip_prefix(&start)).map(str::to_owned)
        });
        Reply(found.unwrap_or_else(|| panic!("the guest does not reply to line {number}")))
    }

    /// Types a line, and returns the reply.
    #[track_caller]
    pub fn ask(&mut self, line: &str) -> Reply {
        let number = self.send(line);
        self.reply(number)
    }

    /// Types lines whose requests must succeed.
    #[track_caller]
    pub fn must(&mut self, lines: &[&str]) {
        for line in lines {
            let reply = self.ask(line);
            assert_eq!(reply.status(), OK, "{line}: {}", reply.0);
        }
    }

    /// Opens a file for a slot, and plugs it there.
    #[track_caller]
    pub fn plug(&mut self, name: &str, file: &Path, slot: u32, direct: bool, aio: &str) {
        let driver = if fs::metadata(file).unwrap().file_type().is_block_device() { "host_device" } else { "file" };
        let node = json!({"node-name": name, "driver": "raw", "cache": {"direct": direct},
                          "file": {"driver": driver, "filename": file.to_str().unwrap(), "aio": aio}});
        self.client.call_with("blockdev-add", &node);
        let device = json!({"id": name, "driver": "virtio-blk-mmio", "addr": format!("{slot:#x}")});
        self.client.call_with("device_add", &device);
    }

    #[track_caller]
    pub fn unplug(&mut self, name: &str) {
        self.client.call_with("device_del", &json!({"id": name}));
    }

    /// What `query-block` says of the drive.
    #[track_caller]
    pub fn drive(&mut self, name: &str) -> Value {
        let all = self.client.call("query-block");
        let is_it = |one: &&Value| one["inserted"]["node-name"] == name || one["device"] == name;
        all.as_array().unwrap().iter().find(is_it).unwrap_or_else(|| panic!("no {name} in {all}")).clone()
    }

    /// Whether any descriptor that the monitor has of the file was opened with `O_DIRECT`.
    #[track_caller]
    pub fn opened_direct(&self, file: &Path) -> bool {
        let folder = format!("/proc/{}", self.monitor.pid());
        let mut found = Vec::new();
        for entry in fs::read_dir(format!("{folder}/fd")).unwrap().flatten() {
            // A descriptor may be closed while we look.
            if fs::read_link(entry.path()).is_ok_and(|path| path == file) {
                let name = entry.file_name().into_string().unwrap();
                let facts = fs::read_to_string(format!("{folder}/fdinfo/{name}")).unwrap();
                let flags = facts.lines().find_map(|line| line.strip_prefix("flags:")).unwrap().trim().to_owned();
                found.push(i32::from_str_radix(&flags, 8).unwrap());
            }
        }
        assert!(!found.is_empty(), "the monitor has not opened {file:?}");
        found.iter().any(|flags| flags & libc::O_DIRECT != 0)
    }

    /// That the guest reads the host's topology of this device, in logical blocks of this number of bytes.
    #[track_caller]
    pub fn check_topology(&mut self, disk: u32, device: &Path, block: u64) {
        const BLKIOMIN: u64 = 0x1278;
        const BLKIOOPT: u64 = 0x1279;
        const BLKPBSZGET: u64 = 0x127b;
        let file = File::open(device).unwrap();
        let number = |request| u64::from(host::told(&file, request));
        let [minimum, optimal, physical] = [BLKIOMIN, BLKIOOPT, BLKPBSZGET].map(number);
        let told = self.ask(&format!("tell {disk}"));
        let number = |key: &str| told.number(key);
        assert_eq!(number("has_topology"), 1);
        assert_eq!(number("blk_size"), block);
        assert_eq!(block << number("physical_exp"), physical, "{device:?}: the physical block");
        assert_eq!(number("min_io") * block, minimum, "{device:?}: the minimal I/O size");
        assert_eq!(number("opt_io") * block, optimal, "{device:?}: the optimal I/O size");
        assert_eq!(number("alignment"), 0);
    }

    /// Ends the guest, which must have found nothing wrong.
    #[track_caller]
    pub fn quit(mut self) {
        self.send("quit 0");
        self.monitor.expect_ok();
    }
}
