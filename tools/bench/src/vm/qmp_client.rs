//! A client of the management socket: one command at a time.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::Result;

const PATIENCE: Duration = Duration::from_secs(10);

/// A session past its greeting.
pub struct Client {
    stream: UnixStream,
    input: BufReader<UnixStream>,
    line: String,
}

impl Client {
    /// Connects, waiting for the socket to be there, and enters command mode.
    pub fn connect(path: &Path) -> Result<Client> {
        let began = Instant::now();
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > PATIENCE => return Err(format!("{path:?}: {error}").into()),
                Err(_) => sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut client = Client { input: BufReader::new(stream.try_clone()?), stream, line: String::new() };
        client.receive()?;
        client.ask("{\"execute\":\"qmp_capabilities\"}\n")?;
        Ok(client)
    }

    /// Sends a command, a line, and waits for its answer; how long that took. Events in between are part of it.
    pub fn ask(&mut self, command: &str) -> Result<Duration> {
        Ok(self.exchange(command)?.0)
    }

    /// Sends a command, a line; its answer.
    pub fn answer(&mut self, command: &str) -> Result<Value> {
        Ok(self.exchange(command)?.1)
    }

    fn exchange(&mut self, command: &str) -> Result<(Duration, Value)> {
        let began = Instant::now();
        self.stream.write_all(command.as_bytes())?;
        loop {
            self.receive()?;
            let took = began.elapsed();
            let mut answer: Value = serde_json::from_str(&self.line)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok((took, value.take()));
            }
            if let Some(error) = answer.get("error") {
                return Err(format!("{}: {error}", command.trim()).into());
            }
        }
    }

    fn receive(&mut self) -> Result<()> {
        self.line.clear();
        match self.input.read_line(&mut self.line)? {
            0 => Err("QMP: the socket was closed".into()),
            _ => Ok(()),
        }
    }
}
