//! A monitor that runs, and everything a test may ask of it in bounded time.
//!
//! When a test fails while one lives, what the guest said and where the monitor stands (SIGUSR1) is printed.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// How long anything may take. The emulated processors of a nested host are slow, and others may use the host's.
pub const LIMIT: Duration = Duration::from_secs(120);

/// vCPUs of a machine that is to have several, where that works for long: an emulated host whose two processors both run a
/// guest was seen to lock up, or to reset itself, every few hours. Several at once are tried in shorter tests.
pub fn cpus() -> u32 {
    if std::env::var("LOOPVISOR_HOST").is_ok_and(|host| host == "nested") { 1 } else { 2 }
}

/// A directory of one test's own, removed with it.
pub struct Directory(PathBuf);

impl Directory {
    /// One for small files and sockets.
    pub fn new() -> Directory {
        Directory::under(&std::env::temp_dir())
    }

    /// One on a file system that is no memory: such a one may refuse O_DIRECT.
    pub fn on_disk() -> Directory {
        Directory::under(Path::new(env!("CARGO_TARGET_TMPDIR")))
    }

    fn under(parent: &Path) -> Directory {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("loopvisor-linux-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = parent.join(name);
        fs::create_dir_all(&path).unwrap();
        Directory(path)
    }

    pub fn file(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().unwrap()
    }

    /// A file of `size` bytes, all zero and none allocated.
    pub fn image(&self, name: &str, size: u64) -> String {
        let path = self.file(name);
        fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a program has written so far.
#[derive(Clone, Default)]
struct Output(Arc<(Mutex<Collected>, Condvar)>);

#[derive(Default)]
struct Collected {
    bytes: Vec<u8>,
    /// There will be no more.
    ended: bool,
}

impl Output {
    /// Reads `from` to its end, on a thread of its own.
    fn collect(mut from: impl Read + Send + 'static) -> Output {
        let output = Output::default();
        let collected = output.clone();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                let read = from.read(&mut bytes).unwrap_or(0);
                let mut text = collected.0.0.lock().unwrap();
                text.bytes.extend(&bytes[..read]);
                text.ended = read == 0;
                // Whoever waits looks at whole lines; a serial port writes byte by byte.
                if text.ended || bytes[..read].contains(&b'\n') {
                    collected.0.1.notify_all();
                }
                if read == 0 {
                    return;
                }
            }
        });
        output
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.0.lock().unwrap_or_else(PoisonError::into_inner).bytes).into_owned()
    }

    /// What `find` finds in the text, as soon as it does; `None` at the limit, or at the end of the text.
    fn wait<T>(&self, mut find: impl FnMut(&str) -> Option<T>) -> Option<T> {
        let until = Instant::now() + LIMIT;
        let mut text = self.0.0.lock().unwrap();
        loop {
            let found = find(&String::from_utf8_lossy(&text.bytes));
            let left = until.saturating_duration_since(Instant::now());
            if found.is_some() || text.ended || left.is_zero() {
                return found;
            }
            text = self.0.1.wait_timeout(text, left).unwrap().0;
        }
    }
}

/// A running monitor with a guest.
pub struct Monitor {
    child: Child,
    keyboard: ChildStdin,
    console: Output,
    log: Output,
    socket: String,
    // Last, so dropped last.
    _directory: Directory,
}

impl Monitor {
    /// Starts the monitor with a kernel of `LOOPVISOR_LINUX`, the test guest's initramfs, the words of the kernel's
    /// command line that every test wants and these, and these options. A reset is its end.
    pub fn start(kernel: &str, words: &str, options: &[&str]) -> Monitor {
        Monitor::start_that_reboots(kernel, words, &[&["-no-reboot"], options].concat())
    }

    /// The same, and a reset starts the guest anew.
    pub fn start_that_reboots(kernel: &str, words: &str, options: &[&str]) -> Monitor {
        let linux = PathBuf::from(std::env::var_os("LOOPVISOR_LINUX").expect("LOOPVISOR_LINUX, see docs/testing.md"));
        let file = |name: &str| path(&linux.join(name));
        Monitor::boot(&file(kernel), words, &[&["-initrd", &file("initramfs.cpio")], options].concat())
    }

    /// Starts the monitor with this kernel file and no initrd. A reset boots the guest again.
    pub fn boot(kernel: &str, words: &str, options: &[&str]) -> Monitor {
        let append = format!("console=ttyS0 panic=-1 {words}");
        let directory = Directory::new();
        let socket = directory.file("qmp.sock");
        let mut child = Command::new(env!("CARGO_BIN_EXE_loopvisor"))
            .args(["-kernel", kernel, "-append", &append])
            .args(["-serial", "stdio", "-qmp", &format!("unix:{socket},server,nowait")])
            .args(options)
            .env("RUST_LOG", "info")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let console = Output::collect(child.stdout.take().unwrap());
        let log = Output::collect(child.stderr.take().unwrap());
        let keyboard = child.stdin.take().unwrap();
        Monitor { child, keyboard, console, log, socket, _directory: directory }
    }

    /// Types a line on the guest's serial port.
    pub fn type_line(&mut self, line: &str) {
        writeln!(self.keyboard, "{line}").unwrap();
    }

    /// A number of the monitor's own from the host's /proc, such as `RssAnon`, in KiB.
    pub fn status_kib(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap()
    }

    /// How many descriptors the monitor has open.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// What it says of the device of that id when it is asked where it stands (SIGUSR1).
    pub fn dump(&self, id: &str) -> String {
        // SAFETY: a signal to our own child, which has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, libc::SIGUSR1) };
        let start = format!(": {id}: ");
        let said = self.log.wait(|log| {
            let whole = &log[..log.rfind('\n')?];
            whole.lines().find(|line| line.contains(&start)).map(str::to_owned)
        });
        said.unwrap_or_else(|| panic!("no word of {id} within {LIMIT:?}"))
    }

    /// Everything the guest has written to its serial port.
    pub fn console(&self) -> String {
        self.console.text().replace('\r', "")
    }

    /// What the monitor itself has said.
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// The lines of the console that begin like this, without that.
    pub fn lines(&self, start: &str) -> Vec<String> {
        self.console().lines().filter_map(|line| line.strip_prefix(start)).map(str::to_string).collect()
    }

    /// Waits until more than `old` whole lines have this in them: how many do then, and the last of them.
    pub fn wait_for(&self, text: &str, old: usize) -> (usize, String) {
        let found = self.console.wait(|console| {
            let whole = &console[..console.rfind('\n')?];
            let lines: Vec<_> = whole.lines().filter(|line| line.contains(text)).collect();
            Some((lines.len(), lines.last()?.to_string())).filter(|(count, _)| *count > old)
        });
        found.unwrap_or_else(|| panic!("the guest did not say {text:?} within {LIMIT:?}"))
    }

    /// Waits for the monitor's end, and returns its exit code.
    pub fn wait(&mut self) -> i32 {
        // The end of its output is the end of the process, or is a moment before it.
        self.console.wait(|_| None::<()>);
        let until = Instant::now() + LIMIT;
        while Instant::now() < until {
            if let Some(status) = self.child.try_wait().unwrap() {
                return ExitStatus::code(&status).unwrap_or_else(|| panic!("the monitor died: {status}"));
            }
            thread::yield_now();
        }
        panic!("the monitor did not end within {LIMIT:?}");
    }

    /// A client of its management socket, past the negotiation.
    pub fn qmp(&self) -> Qmp {
        let until = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(&self.socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > until => panic!("{}: {error}", self.socket),
                Err(_) => thread::yield_now(),
            }
        };
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut qmp = Qmp { lines: BufReader::new(stream), events: Vec::new() };
        assert!(qmp.next().expect("a greeting").get("QMP").is_some());
        qmp.run("qmp_capabilities");
        qmp
    }
}

/// The end of the log of the host's kernel, where it may be read.
fn kernel_log() -> String {
    let open = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg");
    let Ok(mut file) = open else { return String::new() };
    let (mut lines, mut line) = (Vec::new(), [0; 8192]);
    while let Ok(len) = file.read(&mut line) {
        lines.push(String::from_utf8_lossy(&line[..len]).into_owned());
    }
    lines[lines.len().saturating_sub(30)..].concat()
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if thread::panicking() {
            let said = self.log.text().len();
            // SAFETY: a signal to our own child, which has not been waited for if it is still there.
            unsafe { libc::kill(self.child.id() as i32, libc::SIGUSR1) };
            // What stands where comes in several lines, of which none says that it is the last.
            thread::sleep(Duration::from_secs(2));
            let log = self.log.text();
            println!("---- the guest's console ----\n{}", self.console());
            // Who has died has said nothing; the host's kernel may have.
            println!("---- the monitor's state: {:?}; the host's kernel ----\n{}", self.child.try_wait(), kernel_log());
            println!("---- the monitor's log ----\n{}\n---- and where it stands ----\n{}", &log[..said], &log[said..]);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client of the management socket.
pub struct Qmp {
    lines: BufReader<UnixStream>,
    /// The names and data of all events so far.
    pub events: Vec<(String, Value)>,
}

impl Qmp {
    /// The answer to a command without arguments; events that come before it are kept.
    pub fn run(&mut self, command: &str) -> Value {
        self.run_with(command, &json!({}))
    }

    /// The same with arguments.
    pub fn run_with(&mut self, command: &str, arguments: &Value) -> Value {
        writeln!(self.lines.get_mut(), "{}", json!({ "execute": command, "arguments": arguments })).unwrap();
        loop {
            let answer = self.next().unwrap_or_else(|| panic!("{command}: the connection ended"));
            match answer.get("return") {
                Some(value) => return value.clone(),
                None => assert!(answer.get("event").is_some(), "{command}: {answer}"),
            }
        }
    }

    /// Hands over a descriptor, which is called `name` from then on.
    pub fn hand_over(&mut self, name: &str, file: &fs::File) {
        let request = json!({ "execute": "getfd", "arguments": { "fdname": name } }).to_string();
        self.lines.get_mut().send_with_fd(request.as_bytes(), file.as_raw_fd()).unwrap();
        assert_eq!(self.next().unwrap()["return"], json!({}));
    }

    /// Reads up to the end of the connection: the names and data of all events.
    pub fn finish(mut self) -> Vec<(String, Value)> {
        while self.next().is_some() {}
        self.events
    }

    /// The next thing the monitor says; `None` at the end.
    fn next(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) => return None,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
            read => read.unwrap(),
        };
        let value: Value = serde_json::from_str(&line).unwrap();
        if let Some(name) = value["event"].as_str() {
            self.events.push((name.to_string(), value["data"].clone()));
        }
        Some(value)
    }
}

/// How many bytes a file or block device has.
pub fn size(path: &str) -> u64 {
    fs::File::open(path).unwrap().seek(SeekFrom::End(0)).unwrap()
}

/// A path as a word of a command line.
fn path(path: &Path) -> String {
    path.to_str().unwrap().to_string()
}
