//! A program on a terminal of its own: what is on its screen, in the order in which it came. Not the terminal (`pty`).

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::monitor::PATIENCE;
use crate::pty::Pty;

/// It is killed when this is dropped.
pub struct OnTerminal {
    pub pty: Pty,
    pub child: Child,
    /// How much of the screen's text has been looked at.
    pub seen: usize,
    /// The terminal's settings before.
    pub before: String,
}

impl OnTerminal {
    /// Starts a program. The terminal has 24 rows and 80 columns, and is the program's own: `^C` reaches it.
    pub fn start(words: &[&str], environment: &[(&str, &str)]) -> OnTerminal {
        let pty = Pty::new();
        pty.resize(24, 80);
        let before = pty.settings();
        let mut command = Command::new("setsid");
        command.arg("--ctty").args(words).env("TERM", "xterm").env_remove("XDG_STATE_HOME").env_remove("NO_COLOR");
        command.envs(environment.iter().copied());
        let line = || Stdio::from(pty.line.try_clone().unwrap());
        let child = command.stdin(line()).stdout(line()).stderr(line()).spawn().expect("setsid runs");
        OnTerminal { pty, child, seen: 0, before }
    }

    /// Waits until the screen has this after what was looked at so far.
    #[track_caller]
    pub fn expect(&mut self, part: &str) {
        let seen = self.seen;
        let end = self.pty.screen.wait(PATIENCE, |text, _| text[seen..].find(part).map(|at| seen + at + part.len()));
        let Some(end) = end else { panic!("{part:?} does not come after: {:?}", &self.pty.screen.text()[seen..]) };
        self.seen = end;
    }

    pub fn type_in(&mut self, keys: &str) {
        self.pty.type_in(keys.as_bytes());
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-s", name, &pid]).status().unwrap().success());
    }

    /// Its status; the terminal must be as it was.
    #[track_caller]
    pub fn status(&mut self) -> i32 {
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert_eq!(self.pty.settings(), self.before);
                assert!(!self.pty.screen.text().contains("Traceback"), "{}", self.pty.screen.text());
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < until, "the program does not end: {}", self.pty.screen.text());
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for OnTerminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
