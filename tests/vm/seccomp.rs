//! The program under a seccomp filter that refuses a part of io_uring, as container engines and systemd units install one.

use serde_json::json;

use crate::monitor::Setup;

/// Installs a filter that answers one system call with one errno, and becomes the program.
const FILTERED: &str = "
import ctypes, os, struct, sys
call, errno = int(sys.argv[1]), int(sys.argv[2])
code = [(0x20, 0, 0, 0), (0x15, 0, 1, call), (0x06, 0, 0, 0x50000 | errno), (0x06, 0, 0, 0x7fff0000)]
filter = ctypes.create_string_buffer(b''.join(struct.pack('HBBI', *line) for line in code))
program = struct.pack('HxxxxxxP', len(code), ctypes.addressof(filter))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, program, 0, 0) == 0, ctypes.get_errno()
os.execv(sys.argv[3], sys.argv[3:])
";

const CALLS: [(&str, &str); 3] = [("io_uring_setup", "425"), ("io_uring_enter", "426"), ("io_uring_register", "427")];

/// The program where that call fails with that errno.
fn filtered(setup: Setup, call: &str, errno: i32) -> Setup {
    let python = std::env::var("LOOPVISOR_PYTHON").unwrap_or_else(|_| "python3".into());
    setup.under(&[&python, "-c", FILTERED, call, &errno.to_string()])
}

#[test]
fn a_disk_uses_threads_where_a_filter_refuses_io_uring() {
    for errno in [libc::ENOSYS, libc::EPERM, libc::EACCES] {
        for (name, call) in CALLS {
            let Some(setup) = Setup::guest("mode=blk-check end=acpi") else { return };
            let setup = setup.disk("vda", 1 << 20, "direct=on");
            let mut monitor = filtered(setup, call, errno).start();
            monitor.expect_ok();
            let log = monitor.log.text();
            assert!(log.contains(&format!("no io_uring here ({name}: ")) && log.contains("using threads"), "{log}");
        }
    }
}

#[test]
fn aio_io_uring_is_an_error_where_a_filter_refuses_it() {
    for (name, call) in CALLS {
        let Some(setup) = Setup::guest("mode=blk-check end=acpi") else { return };
        let setup = setup.disk("vda", 1 << 20, "direct=on,aio=io_uring");
        let (code, told) = filtered(setup, call, libc::EPERM).run();
        assert_eq!(code, 1, "{told}");
        for part in ["drive \"vda\"", name, "leave out aio=io_uring"] {
            assert!(told.contains(part), "{part:?} is not in {told}");
        }
        // The same at a plug, where the machine goes on.
        let monitor = filtered(Setup::guest("mode=idle").unwrap().disk("a", 1 << 20, ""), call, libc::EPERM).start();
        let file = monitor.folder.path("b.img");
        std::fs::File::create(&file).unwrap().set_len(1 << 20).unwrap();
        let node = json!({"node-name": "b", "aio": "io_uring", "file": {"filename": file.to_str().unwrap()}});
        let mut client = monitor.qmp();
        let (class, told) = client.mistake(&json!({"execute": "blockdev-add", "arguments": node}).to_string());
        assert_eq!(class, "GenericError");
        assert!(told.contains(name), "{told}");
        client.call("query-status");
    }
}
