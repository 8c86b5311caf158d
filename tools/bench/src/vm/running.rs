//! A monitor that runs: started, listened to, ended. Whatever goes wrong, it does not outlive its `Running`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::Result;

/// A guest that says nothing for this long has failed.
const SILENCE: Duration = Duration::from_secs(60);

/// A started monitor; dropping it kills it.
pub struct Running {
    child: Child,
    began: Instant,
    unread: Vec<u8>,
    reaped: bool,
}

/// How a run went.
pub struct Ended {
    /// From the start to the exit.
    pub wall: Duration,
    /// Processor time of all its threads, guest's included.
    pub cpu: Duration,
}

impl Running {
    /// Starts the command with standard input and output on pipes. The clock starts before posix_spawn.
    pub fn start(mut command: Command) -> Result<Running> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let began = Instant::now();
        let child = command.spawn().map_err(|error| format!("{:?}: {error}", command.get_program()))?;
        Ok(Running { child, began, unread: Vec::new(), reaped: false })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How long ago it was started.
    pub fn age(&self) -> Duration {
        self.began.elapsed()
    }

    /// Waits for the first byte of output; how long that took from the start.
    pub fn first_byte(&mut self) -> Result<Duration> {
        if !self.fetch()? {
            return Err(format!("process {}: it ended without a byte of output", self.pid()).into());
        }
        Ok(self.age())
    }

    /// Reads lines up to the first that begins with `start`, and returns that one.
    pub fn line(&mut self, start: &str) -> Result<String> {
        self.lines(start)?.pop().ok_or_else(|| "no line".into())
    }

    /// Reads lines up to the first that begins with `start`, and returns all of them.
    pub fn lines(&mut self, start: &str) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        loop {
            while let Some(end) = self.unread.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=end).collect();
                let line = String::from_utf8_lossy(&line).trim().to_owned();
                if line.starts_with("guest: FAILED") {
                    return Err(format!("process {}: {line}", self.pid()).into());
                }
                lines.push(line);
                if lines.last().is_some_and(|line| line.starts_with(start)) {
                    return Ok(lines);
                }
            }
            if !self.fetch()? {
                return Err(format!("process {}: it ended before a line \"{start}\"", self.pid()).into());
            }
        }
    }

    /// Reads what there is, waiting for at least a byte; false at the end of the output.
    fn fetch(&mut self) -> Result<bool> {
        let fd = self.child.stdout.as_ref().ok_or("no output")?.as_raw_fd();
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut bytes = [0u8; 4096];
        // SAFETY: one pollfd.
        match unsafe { libc::poll(&mut poll, 1, SILENCE.as_millis() as libc::c_int) } {
            0 => return Err(format!("process {}: silent for {} s", self.pid(), SILENCE.as_secs()).into()),
            -1 => return Err(io::Error::last_os_error().into()),
            _ => {}
        }
        // SAFETY: the buffer has that many bytes.
        let count = unsafe { libc::read(fd, bytes.as_mut_ptr().cast(), bytes.len()) };
        let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
        self.unread.extend_from_slice(&bytes[..count]);
        Ok(count > 0)
    }

    /// Reads to the end of the output and waits for the exit.
    pub fn finish(mut self) -> Result<Ended> {
        while self.fetch()? {
            self.unread.clear();
        }
        self.reap()
    }

    /// Kills it.
    pub fn kill(mut self) -> Result<Ended> {
        self.child.kill()?;
        self.reap()
    }

    fn reap(&mut self) -> Result<Ended> {
        let mut usage = MaybeUninit::<libc::rusage>::zeroed();
        let mut status = 0;
        // SAFETY: our own child, not reaped yet; both places are ours.
        if unsafe { libc::wait4(self.pid() as libc::pid_t, &mut status, 0, usage.as_mut_ptr()) } < 0 {
            return Err(io::Error::last_os_error().into());
        }
        self.reaped = true;
        // SAFETY: filled, and valid when zero.
        let usage = unsafe { usage.assume_init() };
        let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
        Ok(Ended { wall: self.age(), cpu: time(usage.ru_utime) + time(usage.ru_stime) })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            let _ = self.child.kill();
            let _ = self.reap();
        }
    }
}

/// The number behind `key=` in a line of the guest's.
pub fn number(line: &str, key: &str) -> Result<f64> {
    let words = line.split(' ').filter_map(|word| word.split_once('='));
    let value = words.clone().find(|(name, _)| *name == key).and_then(|(_, value)| value.parse().ok());
    value.ok_or_else(|| format!("no {key}= in \"{line}\"").into())
}
