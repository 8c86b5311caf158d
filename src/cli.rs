//! The command line: the words typed in, one [`VmSpec`] (or a text to print) out.
//!
//! The record `Options` is the list of all options: name, syntax, help. Words are grouped and counted against it
//! here, because our users write `-kernel` and argh reads `--kernel`; then argh fills the record, and
//! `config::options` gives each text its meaning. What the file of `-config` says comes first, and the words replace it or
//! add to it. Nothing here touches the host, but that this file is read. Main thread, before all else.

pub mod pages;

use std::ffi::OsString;
use std::mem;
use std::path::PathBuf;

use argh::{ArgsInfo, FlagInfo, FromArgs, Optionality};

use crate::config::dump::dump;
use crate::config::json::Text;
use crate::config::keyvalue::near;
use crate::config::spec::{LogSpec, SerialSpec, VmSpec};
use crate::config::{chardev, device, file, net, object, options, rng};
use crate::error::{Error, Result};

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Run this machine.
    Run(Box<VmSpec>),
    /// Find out whether this machine could run here, and leave nothing behind.
    Check(Box<VmSpec>),
    /// Write this text to standard output and exit with 0.
    Print(String),
}

/// KVM virtual machine monitor for x86_64 Linux hosts
// The syntax in `arg_name` is read by `arity`: `[X]` may be left out, `X...` is one word or more.
#[derive(FromArgs, ArgsInfo)]
struct Options {
    /// what query-name answers; at most 255 characters
    #[argh(option, arg_name = "[guest=]TEXT[,debug-threads=on|off]")]
    name: Option<String>,
    /// the machine type; dump-guest-core=on and mem-share=off unless given; slots for disks (6) and NICs (2), empty ones for
    /// a later plug
    #[argh(
        option,
        arg_name = "[type=]microvm[,accel=kvm][,usb=off][,dump-guest-core=on|off][,mem-share=on|off][,disk-slots=N][,nic-slots=N]\
                    [,kernel-format=auto|bzimage|elf|flat][,reboot=on|off]\
                    [,auto-kernel-cmdline=on|off]"
    )]
    machine: Option<String>,
    /// what runs the guest: the processor, always
    #[argh(option, arg_name = "kvm")]
    accel: Option<String>,
    /// the model of the vCPUs, only the host's processor; pmu=off hides its performance counters
    #[argh(option, arg_name = "host[,pmu=on|off]")]
    cpu: Option<String>,
    /// vCPUs, 1 to 254; default 1; a topology must have the same number, and has no other effect
    #[argh(option, arg_name = "[cpus=]N[,maxcpus=N][,sockets=N][,dies=N][,clusters=N][,cores=N][,threads=N]")]
    smp: Option<String>,
    /// memory, 16M to 512G; without a unit MiB, or bytes from 1048576 up; default 256M
    #[argh(option, arg_name = "[size=]N[M|G]")]
    m: Option<String>,
    /// guest memory is the file PATH, made if it is not there, or one without a name in the folder PATH; on hugetlbfs it
    /// consists of huge pages
    #[argh(option, arg_name = "PATH")]
    mem_path: Option<String>,
    /// the kernel: bzImage, ELF vmlinux, or a flat one called *.bin; required
    #[argh(option, arg_name = "FILE")]
    kernel: Option<String>,
    /// the initial RAM disk
    #[argh(option, arg_name = "FILE")]
    initrd: Option<String>,
    /// the kernel's command line; quotes are not needed
    #[argh(option, arg_name = "WORD...")]
    append: Option<String>,
    /// a disk, the first is /dev/vda; readonly=off, direct=on and no limits unless given; repeatable
    #[argh(
        option,
        arg_name = "id=NAME,file=FILE[,readonly=on|off][,direct=on|off][,serial=TEXT][,iothread=NAME]\
                    [,aio=io_uring|threads|native][,logical_block_size=512|4096][,physical_block_size=BYTES]\
                    [,format=raw][,if=none][,iops=N][,throttling.KEY=VALUE]"
    )]
    drive: Vec<String>,
    /// a NIC on a tap, the first is eth0; no limits unless given; with -netdev tap,id=NAME,ifname=TAP its other keys stand at
    /// -device virtio-net-device,netdev=NAME; repeatable
    #[argh(
        option,
        arg_name = "id=NAME,netdev=TAP[,mac=MAC][,iothread=NAME][,fds=N[:N...]][,queues=N][,queue-size=N][,vhost=off]\
                    [,throttling.KEY=VALUE]"
    )]
    netdev: Vec<String>,
    /// a thread with an event loop that serves drives and NICs; repeatable, at most 8
    #[argh(option, arg_name = "id=NAME")]
    iothread: Vec<String>,
    /// a device by its type; repeatable
    #[argh(option, arg_name = "TYPE[,KEY=VALUE,...]")]
    device: Vec<String>,
    /// let the guest give memory back, and QMP's balloon say how much; deflate-on-oom=off, free-page-reporting=on, auto=off
    /// unless given
    #[argh(
        option,
        arg_name = "[deflate-on-oom=on|off][,free-page-reporting=on|off][,auto=on|off][,floor=SIZE][,pressure=FILE]"
    )]
    balloon: Vec<String>,
    /// random numbers for the guest; from /dev/urandom and without a limit unless given
    #[argh(option, arg_name = "[random_file=FILE][,bytes_per_sec=N]")]
    rng: Vec<String>,
    /// something that a device names; repeatable
    #[argh(option, arg_name = "TYPE[,KEY=VALUE,...]")]
    object: Vec<String>,
    /// a console on a Unix socket, the first is /dev/hvc0; or with "socket" a socket for -device virtconsole; repeatable
    #[argh(option, arg_name = "[socket,]id=NAME,path=PATH[,server][,nowait]")]
    chardev: Vec<String>,
    /// connect the first serial port to standard input and output
    #[argh(option, arg_name = "stdio")]
    serial: Option<String>,
    /// listen for QMP on a Unix socket
    #[argh(option, arg_name = "unix:PATH[,server][,nowait]")]
    api_channel: Option<String>,
    /// listen for QMP on a Unix socket; repeatable
    #[argh(option, arg_name = "unix:PATH,server[,nowait]")]
    qmp: Vec<String>,
    /// listen for QMP on the socket of a -chardev socket; repeatable
    #[argh(option, arg_name = "chardev=NAME[,id=NAME][,mode=control]")]
    mon: Vec<String>,
    /// append the log to FILE; without FILE standard output, unless -serial stdio has it; default standard error
    #[argh(option, short = 'D', arg_name = "[FILE]")]
    log: Option<String>,
    /// write the process id to FILE, removed at exit
    #[argh(option, arg_name = "FILE")]
    pidfile: Option<String>,
    /// run in the background once the machine is set up
    #[argh(switch)]
    daemonize: bool,
    /// do not start the vCPUs before QMP's cont
    #[argh(switch, short = 'S')]
    freeze: bool,
    /// end at a reset of the guest's, or at QMP's system_reset, instead of starting it anew
    #[argh(switch)]
    no_reboot: bool,
    /// read FILE first, a machine in JSON; the other options replace what it says, or add to its lists
    #[argh(option, arg_name = "FILE")]
    config: Option<String>,
    /// print the machine that is asked for as a file for -config, and exit
    #[argh(switch)]
    dump_config: bool,
    /// find out whether everything is right and the host has what is asked for, start nothing, and exit
    #[argh(switch)]
    check: bool,
    /// print the version
    #[argh(switch, short = 'V')]
    #[expect(dead_code, reason = "answered before the record is filled")]
    version: bool,
}

/// Options that other monitors have, that those who start virtual machines pass to all of them, and that mean nothing
/// here: how they are written, and whether a word follows.
const IGNORED: [(&str, bool); 15] = [
    ("boot", true),
    ("disable-seccomp", false),
    ("display", true),
    ("msg", true),
    ("no-hpet", false),
    ("no-shutdown", false),
    ("no-user-config", false),
    ("nodefaults", false),
    ("nographic", false),
    ("overcommit", true),
    ("realtime", true),
    ("rtc", true),
    ("sandbox", true),
    ("uuid", true),
    ("vga", true),
];

/// Takes out what means nothing here, with its words.
fn without_ignored(words: Vec<OsString>) -> (Vec<OsString>, Vec<String>) {
    let (mut kept, mut ignored) = (Vec::new(), Vec::new());
    let mut words = words.into_iter().peekable();
    while let Some(word) = words.next() {
        let known = word.to_str().and_then(|word| {
            let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'))?;
            IGNORED.iter().find(|(ignored, _)| *ignored == name)
        });
        let Some((name, takes_word)) = known else {
            kept.push(word);
            continue;
        };
        ignored.push(format!("-{name}"));
        if *takes_word {
            words.next_if(|word| !word.as_encoded_bytes().starts_with(b"-"));
        }
    }
    (kept, ignored)
}

/// Reads the words behind the program's name.
///
/// # Errors
///
/// Every error is a mistake of the user's (`Kind::Usage`, exit code 2) that names the option, the word, and what would
/// be accepted.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command> {
    let (words, ignored) = without_ignored(args.into_iter().collect());
    // A request for help is answered whatever else is wrong.
    for word in &words {
        match word.to_str().and_then(flag_of).map(|flag| flag.long) {
            Some("--help") => return Ok(Command::Print(pages::help())),
            Some("--version") => return Ok(Command::Print(format!("loopvisor {}\n", env!("CARGO_PKG_VERSION")))),
            _ => {}
        }
    }
    let mut args = Vec::new();
    for given in group(&words)? {
        args.push(given.flag.long.to_owned());
        args.extend(given.value()?);
    }
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let options = Options::from_args(&["loopvisor"], &args).map_err(|exit| Error::usage(exit.output.trim_end()))?;
    let mut spec = spec(&options)?;
    spec.ignored = ignored;
    spec.check().map_err(|error| match &options.config {
        Some(file) => Error::usage(format!("-config {file} with the rest of the line: {error}")),
        None => error,
    })?;
    match (options.dump_config, options.check) {
        (false, false) => Ok(Command::Run(Box::new(spec))),
        (false, true) => Ok(Command::Check(Box::new(spec))),
        (true, false) => Ok(Command::Print(dump(&spec))),
        (true, true) => Err(Error::usage("-check and -dump-config: both say what to do; accepted: one of the two")),
    }
}

/// Whether a line that `parse` has refused asks for the log on standard output: `-D` without a file, and no `-serial stdio`.
pub fn logs_to_stdout(args: &[OsString]) -> bool {
    let is_option = |word: &OsString, long: &str| word.to_str().and_then(flag_of).is_some_and(|flag| flag.long == long);
    let bare = |at: usize| args.get(at + 1).is_none_or(|next| next.as_encoded_bytes().starts_with(b"-"));
    let bare_log = args.iter().enumerate().any(|(at, word)| is_option(word, "--log") && bare(at));
    bare_log && !args.iter().any(|word| is_option(word, "--serial"))
}

/// The machine that the file and the record describe, not yet checked as a whole.
fn spec(given: &Options) -> Result<VmSpec> {
    let file = |option, text: &Option<String>| -> Result<Option<PathBuf>> {
        text.as_deref().map(|text| options::file(option, text)).transpose()
    };
    let mut spec = VmSpec::new("");
    if let Some(path) = file("-config", &given.config)? {
        file::read(&Text::open(&path)?, &mut spec)?;
    }
    if let Some(kernel) = file("-kernel", &given.kernel)? {
        spec.kernel = kernel;
    }
    if spec.kernel.as_os_str().is_empty() {
        return Err(Error::usage(
            "-kernel is missing; accepted: -kernel FILE, or kernel_image_path in the file of -config (loopvisor -h lists all \
             options)",
        ));
    }
    if let Some(text) = &given.name {
        spec.name = options::name(text)?;
    }
    if let Some(text) = &given.machine {
        options::machine(text, &mut spec)?;
    }
    if let Some(text) = &given.accel {
        options::accel(text)?;
    }
    if let Some(text) = &given.cpu {
        spec.pmu = options::cpu(text)?.unwrap_or(spec.pmu);
    }
    if let Some(text) = &given.smp {
        spec.cpus = options::cpus(text)?;
    }
    if let Some(text) = &given.m {
        spec.memory_bytes = options::memory_bytes(text)?;
    }
    spec.initrd = file("-initrd", &given.initrd)?.or(spec.initrd);
    spec.append = given.append.clone().unwrap_or(spec.append);
    spec.mem_path = file("-mem-path", &given.mem_path)?.or(spec.mem_path);
    if let Some(text) = &given.serial {
        spec.serial = options::serial(text)?;
    }
    if let Some(text) = &given.log {
        spec.log = match (text.is_empty(), spec.serial) {
            (true, SerialSpec::None) => LogSpec::Stdout,
            (true, SerialSpec::Stdio) => LogSpec::Stderr,
            (false, _) => LogSpec::File(options::file("-D", text)?),
        };
    }
    spec.pidfile = file("-pidfile", &given.pidfile)?.or(spec.pidfile);
    spec.daemonize |= given.daemonize;
    spec.freeze |= given.freeze;
    spec.no_reboot |= given.no_reboot;
    lists(given, &mut spec)?;
    Ok(spec)
}

/// What a machine may have several of is added to what is there, and what it has one of takes its place.
fn lists(given: &Options, spec: &mut VmSpec) -> Result<()> {
    let earlier = (mem::take(&mut spec.balloons), mem::take(&mut spec.rngs), mem::take(&mut spec.vsocks));
    for text in &given.drive {
        spec.drives.push(options::drive(text)?);
    }
    for text in &given.iothread {
        spec.iothreads.push(options::iothread(text)?);
    }
    for text in &given.rng {
        spec.rngs.push(rng::rng(text)?);
    }
    // Before the devices that name them.
    for text in &given.object {
        object::object(text, spec)?;
    }
    for text in &given.chardev {
        chardev::chardev(text, spec)?;
    }
    for text in &given.netdev {
        net::netdev(text, spec)?;
    }
    let mut named = Vec::new();
    for text in &given.device {
        device::device(text, spec, &mut named)?;
    }
    for text in &given.balloon {
        spec.balloons.push(options::balloon(text)?);
    }
    if let Some(text) = &given.api_channel {
        spec.qmp.push(options::api_channel(text)?);
    }
    for text in &given.qmp {
        spec.qmp.push(options::qmp(text)?);
    }
    for text in &given.mon {
        options::monitor(text, spec)?;
    }
    keep(&mut spec.balloons, earlier.0);
    keep(&mut spec.rngs, earlier.1);
    keep(&mut spec.vsocks, earlier.2);
    Ok(())
}

/// What there was before stays unless there is something now.
fn keep<T>(now: &mut Vec<T>, before: Vec<T>) {
    if now.is_empty() {
        *now = before;
    }
}

/// One option as typed, with the words behind it.
struct Given<'a> {
    flag: &'static FlagInfo<'static>,
    typed: &'a str,
    words: Vec<&'a str>,
}

/// How many words an option takes.
#[derive(PartialEq, Eq)]
enum Arity {
    None,
    AtMostOne,
    One,
    Many,
}

impl Given<'_> {
    /// The one value that argh is to see behind the option, or none behind a switch.
    fn value(&self) -> Result<Option<String>> {
        let typed = self.typed;
        let (arity, syntax) = arity(self.flag);
        let excess = match arity {
            Arity::None => self.words.first(),
            Arity::AtMostOne | Arity::One => self.words.get(1),
            Arity::Many => None,
        };
        if let Some(excess) = excess {
            return Err(Error::usage(format!("{typed}: {excess:?} is one word too many; accepted: {typed}{syntax}")));
        }
        // An empty word is a variable that was not set; only a kernel command line may well be empty.
        let empty = self.words.iter().any(|word| word.is_empty());
        match arity {
            Arity::None => Ok(None),
            Arity::AtMostOne if self.words.is_empty() => Ok(Some(String::new())),
            Arity::Many if !self.words.is_empty() => Ok(Some(self.words.join(" "))),
            Arity::AtMostOne | Arity::One if !empty && !self.words.is_empty() => Ok(Some(self.words[0].to_owned())),
            _ => Err(Error::usage(format!("{typed}: the value is missing; accepted: {typed}{syntax}"))),
        }
    }
}

/// Every option with the words up to the next one: `-append console=ttyS0 root=/dev/vda` needs no quotes.
fn group(words: &[OsString]) -> Result<Vec<Given<'_>>> {
    let mut given: Vec<Given<'_>> = Vec::new();
    for word in words {
        let last = given.last_mut();
        let Some(word) = word.to_str() else {
            let option = last.map_or("the first word", |last| last.typed);
            return Err(Error::usage(format!("{option}: {word:?} is not UTF-8; accepted: UTF-8 text")));
        };
        if !word.starts_with('-') {
            let Some(last) = last else {
                return Err(Error::usage(format!("{word:?}: no option stands before it; accepted: -OPTION {word}")));
            };
            last.words.push(word);
            continue;
        }
        let flag = flag_of(word).ok_or_else(|| unknown(word))?;
        given.push(Given { flag, typed: word, words: Vec::new() });
    }
    once(given)
}

/// An option that is not repeatable may be given again with the same words.
fn once(given: Vec<Given<'_>>) -> Result<Vec<Given<'_>>> {
    let mut kept: Vec<Given<'_>> = Vec::new();
    for option in given {
        let repeatable = option.flag.optionality == Optionality::Repeating;
        match kept.iter().find(|other| !repeatable && other.flag.long == option.flag.long) {
            None => kept.push(option),
            Some(before) if before.words == option.words => {}
            Some(before) => {
                let sentence = "the option is given twice, and not with the same words; give it once";
                return Err(Error::usage(format!(
                    "{}: {sentence} (the first is {})",
                    option.typed,
                    before.words.join(" ")
                )));
            }
        }
    }
    Ok(kept)
}

fn unknown(word: &str) -> Error {
    if let Some((option, value)) = word.split_once('=')
        && let Some(flag) = flag_of(option)
    {
        return Error::usage(match (arity(flag).0, value) {
            (Arity::None, "off" | "no" | "false") => format!("{word}: {option} takes no value; leave it out"),
            (Arity::None, _) => format!("{word}: {option} takes no value; accepted: {option}"),
            _ => format!("{word}: the value is a word of its own; accepted: {option} {value}"),
        });
    }
    let name = word.trim_start_matches('-');
    let names: Vec<String> = flags().iter().flat_map(names).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    match near(name, &names) {
        Some(near) => Error::usage(format!("{word}: no such option; did you mean -{near}?")),
        None => Error::usage(format!("{word}: no such option; accepted: -{}", names.join(" -"))),
    }
}

/// All options; argh puts its own `--help` first.
fn flags() -> &'static [FlagInfo<'static>] {
    Options::get_args_info().flags
}

/// The option that `word` spells, with one dash or two.
fn flag_of(word: &str) -> Option<&'static FlagInfo<'static>> {
    let name = word.strip_prefix("--").or_else(|| word.strip_prefix('-'))?;
    flags().iter().find(|flag| names(flag).any(|known| known == name))
}

/// The names of an option without dashes: the short one if it has one, then the long one.
fn names(flag: &FlagInfo<'_>) -> impl Iterator<Item = String> {
    let short = flag.short.or((flag.long == "--help").then_some('h'));
    short.map(String::from).into_iter().chain(flag.long.strip_prefix("--").map(String::from))
}

/// How many words an option takes, and the syntax of its value with the blank before it.
fn arity(flag: &FlagInfo<'_>) -> (Arity, String) {
    let syntax = pages::syntax(flag);
    let arity = match syntax.as_str() {
        "" => return (Arity::None, syntax),
        _ if syntax.ends_with("...") => Arity::Many,
        _ if is_optional(&syntax) => Arity::AtMostOne,
        _ => Arity::One,
    };
    (arity, format!(" {syntax}"))
}

/// Whether all of the syntax stands in brackets.
fn is_optional(syntax: &str) -> bool {
    let mut depth = 0;
    syntax.chars().all(|c| {
        depth += i32::from(c == '[') - i32::from(c == ']');
        depth > 0 || c == ']'
    })
}

#[cfg(test)]
#[path = "cli_test.rs"]
mod tests;

#[cfg(test)]
#[path = "cli/config_test.rs"]
mod config_tests;
