//! A Debian that runs, and the shell on its serial port.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::monitor::{Directory, Monitor};

/// How long one thing may take: an emulated processor starts some hundred programs until there is a prompt.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// What no console may show.
const TROUBLES: [&str; 8] =
    ["lockup", "LOCKUP", "blocked for more", "BUG", "Oops", "unstable", "I/O error", "EXT4-fs error"];

/// A file that `tools/run-tests` has put there for this program.
pub fn given(variable: &str) -> String {
    std::env::var(variable).unwrap_or_else(|_| panic!("{variable} is not set: run make test-distro"))
}

/// A root file system of a test's own, with as few blocks as the image has.
pub fn root(directory: &Directory) -> String {
    let path = directory.file("root.img");
    let (mut from, mut to) =
        (fs::File::open(given("LOOPVISOR_DISTRO_ROOT")).unwrap(), fs::File::create(&path).unwrap());
    let size = from.seek(SeekFrom::End(0)).unwrap();
    to.set_len(size).unwrap();
    from.rewind().unwrap();
    let mut bytes = vec![0; 1 << 16];
    for at in (0..size).step_by(bytes.len()) {
        from.read_exact(&mut bytes).unwrap();
        if bytes.iter().any(|&byte| byte != 0) {
            to.seek(SeekFrom::Start(at)).unwrap();
            to.write_all(&bytes).unwrap();
        }
    }
    path
}

/// That the file system in the image was unmounted and is whole.
pub fn assert_clean(image: &str) {
    let check = Command::new("/usr/sbin/e2fsck").args(["-fn", image]).output().unwrap();
    let said = String::from_utf8_lossy(&check.stdout).into_owned();
    assert!(check.status.success(), "e2fsck: {said}");
    assert!(!said.contains("recovering journal"), "e2fsck: {said}");
    // The state in the superblock: 1 is clean, and no journal waits (`needs_recovery` is 4).
    let mut superblock = [0; 1024];
    let mut file = fs::File::open(image).unwrap();
    file.seek(SeekFrom::Start(1024)).unwrap();
    file.read_exact(&mut superblock).unwrap();
    assert_eq!((superblock[58], superblock[96] & 4), (1, 0), "the file system was not unmounted");
}

/// A running Debian.
pub struct Debian {
    pub monitor: Monitor,
    /// How much of the console has been read.
    seen: usize,
    /// Numbers the commands.
    commands: u32,
}

impl Debian {
    /// Starts it on this root file system with these further options.
    pub fn start(root: &str, options: &[&str]) -> Debian {
        let [kernel, initrd] = ["LOOPVISOR_DISTRO_KERNEL", "LOOPVISOR_DISTRO_INITRD"].map(given);
        let drive = format!("id=root,file={root},direct=off");
        let all = [&["-initrd", &initrd, "-m", "512M", "-drive", &drive], options].concat();
        Debian { monitor: Monitor::boot(&kernel, "root=/dev/vda rw", &all), seen: 0, commands: 0 }
    }

    /// Waits until the console says this, and returns what it said before.
    pub fn until(&mut self, text: &str) -> String {
        let until = Instant::now() + PATIENCE;
        loop {
            let console = self.monitor.console();
            let new = &console[self.seen..];
            if let Some(at) = new.find(text) {
                let before = new[..at].to_string();
                self.seen += at + text.len();
                return before;
            }
            assert!(Instant::now() < until, "Debian did not say {text:?} within {PATIENCE:?}");
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits for the prompt of getty and logs in as root: from here on there is a shell that does not echo.
    pub fn log_in(&mut self) {
        self.until("loopvisor login: ");
        self.monitor.type_line("root");
        self.until("Password: ");
        self.monitor.type_line("loopvisor");
        self.until("root@loopvisor:~# ");
        self.monitor.type_line("stty -echo; PS1= PS2= PROMPT_COMMAND= TERM=dumb exec dash");
        self.run("dmesg -n 1");
    }

    /// Runs a line in the shell: its exit code and what it printed.
    pub fn try_run(&mut self, line: &str) -> (i32, String) {
        self.commands += 1;
        let number = self.commands;
        self.monitor.type_line(&format!("echo begin'-{number}'; {line}\necho end'-{number}:'$?."));
        self.until(&format!("begin-{number}\n"));
        let printed = self.until(&format!("end-{number}:"));
        let code = self.until(".");
        (code.parse().unwrap(), printed.trim_end().to_string())
    }

    /// What a line that must succeed prints.
    #[track_caller]
    pub fn run(&mut self, line: &str) -> String {
        let (code, printed) = self.try_run(line);
        assert_eq!(code, 0, "{line}: {printed}");
        printed
    }

    /// Repeats a line until it succeeds.
    #[track_caller]
    pub fn wait_until(&mut self, line: &str) -> String {
        let loop_line = format!("i=0; until {line}; do i=$((i + 1)); [ $i -lt 150 ] || break; sleep 0.2; done; {line}");
        self.run(&loop_line)
    }

    /// That it has come up as it should.
    pub fn assert_up(&mut self) {
        // Jobs may still be under way when getty is there; this waits for them.
        let (_, state) = self.try_run("systemctl is-system-running --wait");
        let failed = self.run("systemctl --failed --no-legend --plain");
        assert_eq!((state.as_str(), failed.as_str()), ("running", ""));
    }

    pub fn assert_no_trouble(&self) {
        let console = self.monitor.console();
        let troubles: Vec<_> =
            console.lines().filter(|line| TROUBLES.iter().any(|trouble| line.contains(trouble))).collect();
        assert!(troubles.is_empty(), "{troubles:#?}");
    }
}
