//! Real trouble: stalled, full, shortened, foreign and locked files.

use std::io::{BufRead, BufReader};
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use super::fuse_test::StallingFile;
use super::testing::*;
use super::*;
use crate::config::spec::Cache;

const AIO: [Aio; 2] = [Aio::Auto, Aio::Threads];

fn refusal(spec: &DriveSpec) -> String {
    Disk::open(spec, ram()).err().expect("must be refused").to_string()
}

#[test]
fn only_a_regular_file_or_block_device_of_a_sector_or_more_is_a_disk() {
    let directory = std::env::temp_dir();
    let fifo = directory.join(format!("loopvisor-fifo-{}", std::process::id()));
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    for path in [&fifo, &directory, std::path::Path::new("/dev/null")] {
        let read_only = DriveSpec { access: Access::ReadOnly, ..spec(path) };
        let text = refusal(&read_only);
        assert!(text.contains("neither a regular file nor a block device"), "{text}");
        assert!(text.starts_with("drive \"vda\": "), "{text}");
    }
    std::fs::remove_file(&fifo).unwrap();
    let socket = std::os::unix::net::UnixListener::bind(&fifo).unwrap();
    assert!(refusal(&spec(&fifo)).contains("is a socket, and neither a regular file nor a block device"));
    drop(socket);
    std::fs::remove_file(&fifo).unwrap();
    let read_only = DriveSpec { access: Access::ReadOnly, ..spec("/proc/version".as_ref()) };
    let text = refusal(&read_only);
    assert!(text.contains("\"/proc/version\" has no size, as files have that the kernel makes"), "{text}");
    assert!(refusal(&spec(&fifo)).contains("No such file"));
    assert!(!fifo.exists(), "a missing file is not created");
    let tiny = TestFile::new(true, &[0; 511]);
    assert!(refusal(&spec(&tiny.0)).contains("511 bytes, less than one block of 512"));
}

#[test]
fn one_machine_writes_or_many_read() {
    let file = TestFile::new(true, &[0; 4096]);
    let reader = DriveSpec { access: Access::ReadOnly, ..spec(&file.0) };
    let first = Disk::open(&reader, ram()).unwrap();
    let second = Disk::open(&reader, ram()).unwrap();
    assert!(refusal(&spec(&file.0)).contains("is in use by this VM, as its drive \"vda\", which reads it"));
    drop((first, second));
    let writer = Disk::open(&spec(&file.0), ram()).unwrap();
    assert!(refusal(&reader).contains("is in use by"));
    drop(writer);
    Disk::open(&reader, ram()).unwrap();
}

#[test]
fn a_lock_conflict_names_the_process_that_has_the_file() {
    let file = TestFile::new(true, &[0; 4096]);
    let mut child = Command::new("flock")
        .args(["--exclusive", "--no-fork"])
        .arg(&file.0)
        .args(["sh", "-c", "echo locked; read line"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "locked\n");
    let text = refusal(&spec(&file.0));
    assert!(text.contains(&format!("is in use by process {} (", child.id())), "{text}");
    drop(child.stdin.take());
    child.wait().unwrap();
}

#[test]
fn a_file_that_became_shorter_gives_eio_and_is_not_made_longer() {
    for in_memory in [true, false] {
        for (cache, aio) in [(Cache::Buffered, Aio::Auto), (Cache::Direct, Aio::Auto), (Cache::Buffered, Aio::Threads)]
        {
            let file = TestFile::new(in_memory, &[5; 64 << 10]);
            let mut guest = Guest::new(&DriveSpec { cache, aio, ..spec(&file.0) });
            std::fs::OpenOptions::new().write(true).open(&file.0).unwrap().set_len(8192).unwrap();
            for offset in [4096, 8192, 32768] {
                let result = guest.run(Op::Read { offset, segments: &[segment(0, 8192)] });
                assert_eq!(errno(&result), libc::EIO, "{in_memory} {cache:?} {aio:?} {offset}");
            }
            guest.run(Op::Read { offset: 0, segments: &[segment(0, 8192)] }).unwrap();
            assert_eq!(file.content().len(), 8192);
        }
    }
}

/// A directory with a file system of its own; `None`, with the reason printed, where that is not allowed.
fn private_directory(kind: &str, options: &str) -> Option<(Mount, std::path::PathBuf)> {
    let path = std::env::temp_dir().join(format!("loopvisor-{kind}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    match Mount::new(kind, options, &path) {
        Ok(mount) => Some((mount, path)),
        Err(error) => {
            eprintln!("skipped: cannot mount {kind}: {error}");
            None
        }
    }
}

#[test]
fn a_full_file_system_gives_enospc_and_the_disk_goes_on() {
    let Some((mount, directory)) = private_directory("tmpfs", "size=64k") else { return };
    let path = directory.join("disk");
    for aio in AIO {
        std::fs::File::create(&path).unwrap().set_len(1 << 20).unwrap();
        let mut guest = Guest::new(&DriveSpec { aio, ..spec(&path) });
        // Short enough to be written in place, and long enough not to be.
        for len in [128 << 10, 512 << 10] {
            let result = guest.run(Op::Write { offset: 0, segments: &[segment(0, len)] });
            assert_eq!(errno(&result), libc::ENOSPC, "{aio:?} {len}");
        }
        guest.run(Op::Discard { offset: 0, len: 1 << 20 }).unwrap();
        guest.run(Op::Write { offset: 4096, segments: &[segment(0, 4096)] }).unwrap();
        guest.run(Op::Flush).unwrap();
    }
    drop(mount);
    std::fs::remove_dir(directory).unwrap();
}

#[test]
fn direct_io_that_a_file_system_cannot_do_is_refused_with_the_way_out() {
    let Some((mount, directory)) = private_directory("ramfs", "") else { return };
    let [layer, other] = ["layer", "other"].map(|name| directory.join(name));
    [&layer, &other].into_iter().for_each(|path| std::fs::create_dir(path).unwrap());
    std::fs::write(layer.join("disk"), [0; 4096]).unwrap();
    let in_memory = DriveSpec { cache: Cache::Direct, ..spec(&layer.join("disk")) };
    Disk::open(&in_memory, ram()).expect("memory has no page cache to go round");
    // The same through another file system, which is not known to be memory.
    let path = directory.join("disk");
    let direct = DriveSpec { file: path.clone(), access: Access::ReadOnly, ..in_memory };
    let layers = format!("lowerdir={}:{}", layer.display(), other.display());
    let overlay = Mount::new("overlay", &layers, &directory).unwrap();
    let text = refusal(&direct);
    assert!(text.contains("does not support direct I/O: use direct=off"), "{text}");
    Disk::open(&DriveSpec { cache: Cache::Buffered, ..direct }, ram()).unwrap();
    drop((overlay, mount));
    std::fs::remove_dir(directory).unwrap();
}

#[test]
fn a_stalled_file_stops_neither_submit_nor_another_disk_nor_the_drop() {
    for aio in AIO {
        let Some(stalled) = StallingFile::mount(64 << 10) else { return };
        let mut slow = Guest::new(&DriveSpec { aio, ..spec(stalled.path()) });
        let op = Op::Read { offset: 0, segments: &[segment(0, 4096)] };
        assert!(matches!(slow.disk.submit(op, 1), Submitted::Queued));
        slow.disk.poll(|_, _| panic!("nothing can be done yet"));
        stalled.await_read();

        let file = TestFile::new(false, &[9; 8192]);
        let mut quick = Guest::new(&DriveSpec { aio, cache: Cache::Direct, ..spec(&file.0) });
        quick.run(op).unwrap();
        assert_eq!(quick.take(0, 4096), [9; 4096]);

        assert!(matches!(slow.disk.submit(Op::Flush, 2), Submitted::Queued));
        slow.disk.poll(|token, _| assert_eq!(token, 2));
        stalled.release();
        assert!(slow.drain().iter().any(|(token, result)| *token == 1 && result.is_ok()));
        assert_eq!(slow.take(0, 4096), [7; 4096]);
    }
}

#[test]
fn dropping_a_disk_with_requests_in_flight_does_not_wait_and_leaves_their_memory_alone() {
    for aio in AIO {
        let Some(stalled) = StallingFile::mount(64 << 10) else { return };
        let mut guest = Guest::new(&DriveSpec { aio, ..spec(stalled.path()) });
        let op = Op::Read { offset: 0, segments: &[segment(0, 4096)] };
        assert!(matches!(guest.disk.submit(op, 1), Submitted::Queued));
        guest.disk.poll(|_, _| panic!("nothing can be done yet"));
        stalled.await_read();
        let Guest { ram, disk } = guest;
        drop(disk);
        assert!(Arc::strong_count(&ram) > 1, "guest memory outlives the request");
        stalled.release();
    }
}

#[test]
fn more_requests_than_a_disk_has_room_for_are_refused() {
    let Some(stalled) = StallingFile::mount(64 << 10) else { return };
    let mut guest = Guest::new(&spec(stalled.path()));
    for i in 0..MAX_IN_FLIGHT as u32 {
        let op = Op::Read { offset: 0, segments: &[segment(0, 512)] };
        assert!(matches!(guest.disk.submit(op, i), Submitted::Queued));
    }
    let one_more = guest.disk.submit(Op::Flush, 0);
    assert!(matches!(one_more, Submitted::Done(Err(error)) if error.raw_os_error() == Some(libc::EBUSY)));
    stalled.release();
    let mut tokens: Vec<u32> =
        guest.drain().into_iter().map(|(token, result)| result.map(|()| token).unwrap()).collect();
    tokens.sort_unstable();
    assert_eq!(tokens, (0..MAX_IN_FLIGHT as u32).collect::<Vec<_>>());
}

#[test]
fn aio_threads_makes_no_ring_and_names_its_threads_after_the_drive() {
    let file = TestFile::new(false, &[1; 8192]);
    let mut guest = Guest::new(&DriveSpec { aio: Aio::Threads, id: "a-long-drive-id".into(), ..spec(&file.0) });
    guest.run(Op::Flush).unwrap();
    let names: Vec<String> = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok())
        .collect();
    assert!(names.iter().any(|name| name.trim() == "a-long-dri/aio0"), "{names:?}");
    assert!(guest.disk.bell().as_raw_fd() >= 0);
}
