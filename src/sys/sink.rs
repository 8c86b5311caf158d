//! Writes the lines of the log and of standard error. No thread ever waits for a reader.
//!
//! A line that a pipe or a terminal does not take is lost and counted; the count is written before the next line that is
//! taken. Other processes share standard error, so its open file is never switched to non-blocking. It is opened a second
//! time where that is possible; otherwise poll(2) is called before each write. Any thread.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use super::{clock, gettid, poll};

/// How long the last line of the process waits for a slow reader.
const LAST_PATIENCE: Duration = Duration::from_secs(1);
/// A terminal or pipe that is writable has room for this number of bytes.
const AT_ONCE: usize = 256;

/// Standard error, after it was opened here.
static STDERR: Mutex<Option<Sink>> = Mutex::new(None);

/// A file that lines are written to.
#[derive(Debug)]
pub struct Sink {
    way: Way,
    /// The end of a line of which the file took only the beginning.
    rest: Vec<u8>,
    /// Lines lost since the last one that the file took.
    lost: u64,
}

/// How to write without waiting.
#[derive(Debug)]
enum Way {
    /// A regular file, or one that was opened with `O_NONBLOCK`.
    Plain(File),
    /// A socket that other processes share.
    Socket(OwnedFd),
    /// A pipe or terminal that other processes share, and that could not be opened again.
    Shared(File),
}

impl Sink {
    /// Opens a file to append to; `options` decide whether to create it. A FIFO needs no reader, now or later: it holds the lines
    /// for which it has room.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(options: &mut OpenOptions, path: &Path) -> io::Result<File> {
        // A FIFO that is opened for reading too needs no other reader.
        let is_fifo = path.metadata().is_ok_and(|facts| facts.file_type().is_fifo());
        options.append(true).read(is_fifo).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path)
    }

    /// A sink into what [`Sink::open`] opened.
    pub fn new(file: File) -> Sink {
        Sink { way: Way::Plain(file), rest: Vec::new(), lost: 0 }
    }

    /// A sink into standard output.
    ///
    /// # Errors
    /// It is closed.
    pub fn stdout() -> io::Result<Sink> {
        Sink::shared(io::stdout().as_fd())
    }

    /// A sink into a descriptor whose open file other processes share.
    fn shared(fd: BorrowedFd<'_>) -> io::Result<Sink> {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let file = File::from(fd.try_clone_to_owned()?);
        let kind = file.metadata()?.file_type();
        let again = || {
            let mut options = OpenOptions::new();
            options.write(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(&path)
        };
        let way = if kind.is_file() {
            Way::Plain(file)
        } else if kind.is_socket() {
            Way::Socket(file.into())
        } else {
            again().map_or(Way::Shared(file), Way::Plain)
        };
        Ok(Sink { way, rest: Vec::new(), lost: 0 })
    }

    /// Writes a line, or counts it as lost.
    pub fn line(&mut self, line: &[u8]) {
        if self.lost > 0 {
            let note = format!(
                "{} WARN {}: {} log lines were lost: the log did not take them\n",
                clock::utc(),
                gettid(),
                self.lost
            );
            if self.takes(note.as_bytes()) {
                self.lost = 0;
            }
        }
        if self.lost > 0 || !self.takes(line) {
            self.lost += 1;
        }
    }

    /// Whether the file has taken the line, or its beginning: the rest then goes before the next one.
    fn takes(&mut self, line: &[u8]) -> bool {
        let rest = mem::take(&mut self.rest);
        let written = self.write(&rest);
        if written < rest.len() {
            self.rest = rest[written..].to_vec();
            return false;
        }
        let written = self.write(line);
        self.rest = if written > 0 { line[written..].to_vec() } else { Vec::new() };
        written > 0
    }

    /// Writes what the file takes now: how many bytes.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while written < bytes.len() {
            match self.way.write(&bytes[written..]) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) | Err(_) => break,
                Ok(count) => written += count,
            }
        }
        written
    }
}

impl Write for Sink {
    /// Takes a line.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.line(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Way {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Way::Plain(file) => file.write(bytes),
            Way::Socket(socket) => {
                let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
                // SAFETY: the kernel reads as many bytes as the slice has.
                let sent = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
                usize::try_from(sent).map_err(|_| io::Error::last_os_error())
            }
            Way::Shared(file) if poll::is_writable(file.as_fd()) => file.write(&bytes[..bytes.len().min(AT_ONCE)]),
            Way::Shared(_) => Ok(0),
        }
    }
}

fn with_stderr(act: impl FnOnce(&mut Sink)) {
    let mut stderr = STDERR.lock().unwrap_or_else(PoisonError::into_inner);
    if stderr.is_none() {
        *stderr = Sink::shared(io::stderr().as_fd()).ok();
    }
    // Without standard error, or a descriptor for it, the line is lost.
    if let Some(sink) = stderr.as_mut() {
        act(sink);
    }
}

/// Opens standard error now, because there may be no descriptor left for it later.
pub fn open_stderr() {
    with_stderr(|_| ());
}

/// Writes a line to standard error, or counts it as lost.
pub fn stderr_line(line: &[u8]) {
    with_stderr(|sink| sink.line(line));
}

/// Writes the last line of the process to standard error. A slow reader has a second to make room.
pub fn stderr_last_line(line: &[u8]) {
    let until = Instant::now() + LAST_PATIENCE;
    with_stderr(|sink| {
        sink.line(line);
        while (sink.lost > 0 || !sink.rest.is_empty()) && Instant::now() < until {
            thread::sleep(LAST_PATIENCE / 100);
            if sink.lost == 0 {
                sink.takes(&[]);
            } else {
                sink.lost -= 1;
                sink.line(line);
            }
        }
    });
}

/// Closes the second open file of standard error, whose descriptor now leads to another file.
pub fn stderr_changed() {
    *STDERR.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

#[cfg(test)]
mod tests {
    use std::io::{Read, pipe};

    use super::*;

    #[test]
    fn pipe_that_cannot_be_opened_again_is_not_waited_for() {
        let (mut reader, writer) = pipe().unwrap();
        let mut sink = Sink { way: Way::Shared(OwnedFd::from(writer).into()), rest: Vec::new(), lost: 0 };
        let line = [&[b'x'; 999][..], b"\n"].concat();
        (0..100).for_each(|_| sink.line(&line));
        assert!((30..100).contains(&sink.lost), "{}", sink.lost);
        let (lost, rest) = (sink.lost, sink.rest.len());
        let mut bytes = vec![0; (100 - lost as usize) * 1000 - rest];
        reader.read_exact(&mut bytes).unwrap();
        sink.line(b"last\n");
        drop(sink);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(text.contains(&format!(" {lost} log lines were lost")) && text.ends_with("\nlast\n"), "{text}");
    }
}
