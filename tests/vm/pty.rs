//! A pseudo-terminal, as an operator's.

#![allow(unsafe_code)] // The standard library has no pseudo-terminals.

use std::fs::File;
use std::io::Write;
use std::os::fd::FromRawFd;
use std::process::{Command, Stdio};

use crate::monitor::Tap;

/// The operator's side of a terminal.
pub struct Pty {
    keys: File,
    /// The other side: what programs have as their standard input and output.
    pub line: File,
    pub screen: Tap,
}

impl Pty {
    pub fn new() -> Pty {
        let (mut operator, mut line) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: the call writes two descriptors and is given nothing else.
        let done = unsafe { libc::openpty(&raw mut operator, &raw mut line, null, null.cast(), null.cast()) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
        for end in [operator, line] {
            // A program that held the operator's side itself would never see it go.
            // SAFETY: the call changes a flag of a descriptor and nothing else.
            assert_eq!(unsafe { libc::fcntl(end, libc::F_SETFD, libc::FD_CLOEXEC) }, 0);
        }
        // SAFETY: both descriptors are new and nobody else's.
        let (keys, line) = unsafe { (File::from_raw_fd(operator), File::from_raw_fd(line)) };
        let screen = Tap::on(keys.try_clone().unwrap());
        Pty { keys, line, screen }
    }

    /// Its size; it has none at first.
    pub fn resize(&self, rows: u32, columns: u32) {
        let line = Stdio::from(self.line.try_clone().unwrap());
        let words = ["rows", &rows.to_string(), "columns", &columns.to_string()];
        assert!(Command::new("stty").args(words).stdin(line).status().expect("stty runs").success());
    }

    pub fn type_in(&mut self, keys: &[u8]) {
        self.keys.write_all(keys).unwrap();
    }

    /// All settings, as text.
    pub fn settings(&self) -> String {
        let line = Stdio::from(self.line.try_clone().unwrap());
        let output = Command::new("stty").arg("-g").stdin(line).output().expect("stty runs");
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    }
}
