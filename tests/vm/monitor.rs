//! Starts the program with a folder of its own, reads all it says, and ends it. Not for the protocol (`client`).

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::client::Client;

/// How long any one wait may last. Far more than a wait needs, even on a crowded host.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Says, past the test harness's capture and on a line of its own, that the present test cannot run here.
pub fn skipped(why: &str) {
    let test = thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "\nskipped: {test}: {why}");
}

/// Whether there is a KVM to test on; says so if not.
pub fn has_kvm() -> bool {
    match File::options().read(true).write(true).open("/dev/kvm") {
        Ok(_) => true,
        Err(error) => {
            skipped(&format!("/dev/kvm: {error}"));
            false
        }
    }
}

/// The bare-metal guest.
pub fn guest() -> &'static Path {
    static GUEST: OnceLock<PathBuf> = OnceLock::new();
    GUEST.get_or_init(|| {
        if let Some(path) = std::env::var_os("LOOPVISOR_GUEST") {
            return path.into();
        }
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest");
        let manifest = folder.join("Cargo.toml");
        let cargo = [OsStr::new("build"), "--release".as_ref(), "--manifest-path".as_ref(), manifest.as_ref()];
        let built = Command::new(env!("CARGO")).args(cargo).output().expect("cargo runs");
        assert!(built.status.success(), "build the guest: {}", String::from_utf8_lossy(&built.stderr));
        folder.join("target/x86_64-unknown-linux-gnu/release/loopguest")
    })
}

/// A folder that is removed with all that is in it.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Folder {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("loopvisor-vm-{}-{count}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What was written so far, and whether that is all.
#[derive(Default)]
struct Written {
    bytes: Vec<u8>,
    ended: bool,
}

/// What a process writes, as it comes.
#[derive(Clone, Default)]
pub struct Tap(Arc<(Mutex<Written>, Condvar)>);

impl Tap {
    /// Reads `from` to its end on a thread of its own.
    pub fn on(mut from: impl Read + Send + 'static) -> Tap {
        let tap = Tap::default();
        let shared = tap.0.clone();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            loop {
                let count = from.read(&mut bytes).unwrap_or(0);
                let mut written = shared.0.lock().unwrap_or_else(PoisonError::into_inner);
                written.bytes.extend_from_slice(&bytes[..count]);
                written.ended = count == 0;
                shared.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        tap
    }

    pub fn text(&self) -> String {
        let written = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&written.bytes).into_owned()
    }

    /// Waits until `found` finds something in the text, the second argument being whether the text is complete.
    pub fn wait<T>(&self, patience: Duration, mut found: impl FnMut(&str, bool) -> Option<T>) -> Option<T> {
        let until = Instant::now() + patience;
        let mut written = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(it) = found(&String::from_utf8_lossy(&written.bytes), written.ended) {
                return Some(it);
            }
            let left = until.checked_duration_since(Instant::now()).filter(|_| !written.ended)?;
            written = self.0.1.wait_timeout(written, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits for a piece of text.
    #[track_caller]
    pub fn expect(&self, part: &str) {
        let seen = self.wait(PATIENCE, |text, _| text.contains(part).then_some(()));
        assert!(seen.is_some(), "{part:?} is not in:\n{}", self.text());
    }
}

/// A monitor that has not been started.
pub struct Setup {
    pub folder: Folder,
    under: Vec<String>,
    args: Vec<String>,
    stdin: Stdio,
    stdout: Stdio,
    stderr: Stdio,
}

impl Setup {
    /// The program without any option.
    pub fn bare() -> Setup {
        let [stdin, stdout, stderr] = [Stdio::null(), Stdio::piped(), Stdio::piped()];
        Setup { folder: Folder::new(), under: vec![], args: vec![], stdin, stdout, stderr }
    }

    /// The guest with these words, its serial port, and a QMP socket; a reset is its end. `None`, with the reason printed,
    /// without KVM.
    pub fn guest(words: &str) -> Option<Setup> {
        Some(Setup::guest_that_reboots(words)?.flag("-no-reboot"))
    }

    /// The same, and a reset starts the guest anew.
    pub fn guest_that_reboots(words: &str) -> Option<Setup> {
        if !has_kvm() {
            return None;
        }
        let setup = Setup::bare();
        let socket = format!("unix:{},server,nowait", setup.folder.path("qmp").display());
        let setup = setup.option("-kernel", guest().to_str().unwrap()).option("-append", words);
        Some(setup.option("-serial", "stdio").option("-qmp", &socket))
    }

    pub fn flag(mut self, name: &str) -> Setup {
        self.args.push(name.to_owned());
        self
    }

    pub fn option(self, name: &str, value: &str) -> Setup {
        self.flag(name).flag(value)
    }

    /// Another word in the place of one.
    pub fn replace(mut self, word: &str, by: &str) -> Setup {
        self.args.iter_mut().filter(|arg| *arg == word).for_each(|arg| by.clone_into(arg));
        self
    }

    pub fn iothread(self, id: &str) -> Setup {
        self.option("-iothread", &format!("id={id}"))
    }

    /// A new file of that many zeroes as a drive; `rest` is what follows in its option.
    pub fn disk(self, id: &str, bytes: u64, rest: &str) -> Setup {
        let path = self.folder.path(&format!("{id}.img"));
        File::create(&path).unwrap().set_len(bytes).unwrap();
        self.drive(id, &path, rest)
    }

    /// A file that is there as a drive.
    pub fn drive(self, id: &str, file: &Path, rest: &str) -> Setup {
        let comma = if rest.is_empty() { "" } else { "," };
        self.option("-drive", &format!("id={id},file={}{comma}{rest}", file.display()))
    }

    /// Starts the program by this command, which must become it by exec: "$@" of a shell.
    pub fn under(mut self, command: &[&str]) -> Setup {
        self.under = command.iter().map(|&word| word.to_owned()).collect();
        self
    }

    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Setup {
        self.stdin = stdin.into();
        self
    }

    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Setup {
        self.stdout = stdout.into();
        self
    }

    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Setup {
        self.stderr = stderr.into();
        self
    }

    pub fn start(self) -> Monitor {
        let words = self.under.iter().map(String::as_str).chain([env!("CARGO_BIN_EXE_loopvisor")]);
        let words: Vec<&str> = words.chain(self.args.iter().map(String::as_str)).collect();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]).stdin(self.stdin).stdout(self.stdout).stderr(self.stderr);
        let mut child = command.spawn().expect("the program starts");
        let serial = child.stdout.take().map(Tap::on).unwrap_or_default();
        let stderr = child.stderr.take();
        let log_is_elsewhere = stderr.is_none();
        let log = stderr.map(Tap::on).unwrap_or_default();
        let line = words.join(" ");
        Monitor { stdin: child.stdin.take(), child, serial, log, log_is_elsewhere, line, folder: self.folder }
    }

    /// Runs it to its end: exit code and standard error.
    pub fn run(self) -> (i32, String) {
        let mut monitor = self.start();
        (monitor.exit_code(), monitor.log.text())
    }
}

/// A monitor that runs, or has ended. It is killed when this is dropped.
pub struct Monitor {
    child: Child,
    stdin: Option<ChildStdin>,
    /// What the guest writes to its serial port; empty if the output went elsewhere.
    pub serial: Tap,
    /// Its standard error; empty if that is another file.
    pub log: Tap,
    log_is_elsewhere: bool,
    line: String,
    pub folder: Folder,
}

impl Monitor {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn socket(&self) -> PathBuf {
        self.folder.path("qmp")
    }

    /// A client that has not said anything yet. The machine is running when the greeting comes.
    #[track_caller]
    pub fn connect(&self) -> Client {
        let until = Instant::now() + PATIENCE;
        loop {
            match Client::connect(&self.socket()) {
                Ok(client) => return client,
                Err(error) => {
                    // Its socket appears within milliseconds, or the program has ended.
                    let ended = self.log.wait(Duration::from_millis(2), |_, ended| ended.then_some(()));
                    let told = self.log.text();
                    assert!(ended.is_none() && Instant::now() < until, "connect: {error}: {told}");
                }
            }
        }
    }

    /// A client that has negotiated.
    #[track_caller]
    pub fn qmp(&self) -> Client {
        let mut client = self.connect();
        client.negotiate();
        client
    }

    /// Types on the serial port.
    pub fn type_in(&mut self, text: &str) {
        self.stdin.as_mut().expect("stdin is a pipe").write_all(text.as_bytes()).unwrap();
    }

    /// Ends the monitor as `kill -9` does.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn signal(&self, name: &str) {
        let command = format!("kill -{name} {}", self.pid());
        assert!(Command::new("sh").args(["-c", &command]).status().unwrap().success(), "{command}");
    }

    /// Waits for the end: the exit code, or minus the signal's number.
    #[track_caller]
    pub fn exit_code(&mut self) -> i32 {
        use std::os::unix::process::ExitStatusExt;
        let until = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(Instant::now() < until, "the monitor does not end");
            thread::sleep(Duration::from_millis(1));
        };
        // Its last lines may still be on their way.
        let _ = self.log.wait(PATIENCE, |_, ended| (ended || self.log_is_elsewhere).then_some(()));
        status.code().unwrap_or_else(|| -status.signal().unwrap_or(0))
    }

    /// Waits for the guest's verdict, which must be good, and the end of the monitor, which must be too.
    #[track_caller]
    pub fn expect_ok(&mut self) {
        let code = self.exit_code();
        assert!(self.serial.wait(PATIENCE, |_, ended| ended.then_some(())).is_some());
        assert!(self.serial.text().contains("guest: ok"), "the guest failed");
        assert_eq!(code, 0);
    }

    /// The dump that SIGUSR1 asks for: all lines logged from then on, up to the last device's.
    #[track_caller]
    pub fn dump(&self, devices: usize) -> String {
        let before = self.log.text().len();
        self.signal("USR1");
        let dump = self.log.wait(PATIENCE, |text, _| {
            let new = &text[before..];
            // But for slots in which nothing is.
            let told = |line: &str| line.contains("in flight in the device") && !line.contains(" slot 0x");
            let lines = new.lines().filter(|line| told(line)).count();
            (new.contains("loop main") && lines >= devices && new.ends_with('\n')).then(|| new.to_owned())
        });
        dump.expect("a dump in the log")
    }

    fn print_everything(&mut self) {
        eprintln!("--- {}", self.line);
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            let status = Client::connect(&self.socket()).ok().and_then(Client::ask_status);
            eprintln!("--- QMP status: {status:?}");
            self.signal("USR1");
            let _ = self.log.wait(Duration::from_secs(2), |_, _| None::<()>);
        }
        eprintln!("--- standard error:\n{}", self.log.text());
        let serial = self.serial.text();
        let last = serial.len().saturating_sub(8192);
        let last = (last..serial.len()).find(|&at| serial.is_char_boundary(at)).unwrap_or(0);
        eprintln!("--- serial port:\n{}\n---", &serial[last..]);
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        if thread::panicking() {
            self.print_everything();
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
