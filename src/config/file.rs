//! The file of `-config`: its keys, and how each part of it becomes a part of a [`VmSpec`].
//!
//! Each object is read against the table of its keys and then handed, as the pairs that an option's text would be, to the
//! function that gives those of the option their meaning; so a value means in the file what it means on the command line.
//! How the text is written is `json`'s business, the rules between the parts are `check`'s, and `dump` writes what is read
//! here. Main thread, before anything is started.

use std::path::PathBuf;

use super::chardev::ConsoleSpec;
use super::json::{Member, Text, Type, Value};
use super::keyvalue::{KeyValues, Origin, hint};
use super::spec::{LogSpec, MAX_NAME_CHARS, MAX_PATH_BYTES, MAX_SOCKET_PATH_BYTES, SerialSpec, VmSpec};
use super::{chardev, net, options, rng, vsock};
use crate::error::Result;
use crate::qos::{Quantity, Spelling};

/// What stands for a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A text that is not empty.
    Text,
    /// A text.
    Words,
    /// A number, or a text that writes one.
    Number,
    /// A number, or a text of a number and a unit.
    Size,
    /// Yes or no, or a text that says one.
    Bool,
    /// An array of numbers, or a text that writes one.
    Numbers,
}

impl Kind {
    fn accepts(self, kind: Type) -> bool {
        match self {
            Kind::Text | Kind::Words => kind == Type::Text,
            Kind::Number | Kind::Size => matches!(kind, Type::Number | Type::Text),
            Kind::Bool => matches!(kind, Type::Bool | Type::Text),
            Kind::Numbers => matches!(kind, Type::Array | Type::Number | Type::Text),
        }
    }

    fn accepted(self) -> &'static str {
        match self {
            Kind::Text | Kind::Words => "a text, in quotes",
            Kind::Number => "a number, in quotes or not",
            Kind::Size => "a number, or a text of a number and a unit",
            Kind::Bool => "true or false, or a text: on, yes, true, off, no, false",
            Kind::Numbers => "an array of numbers, or one number",
        }
    }
}

/// A key of an object: its name in the file, that of the option's key that means the same, and what stands for it.
#[derive(Clone, Debug)]
struct Key {
    name: String,
    means: String,
    kind: Kind,
}

/// What a top key stands for.
enum Part {
    /// An object.
    One(Vec<Key>),
    /// An array of objects.
    Many(Vec<Key>),
    /// A value of its own.
    Value(Kind),
    /// An array of texts.
    Texts,
}

fn keys(list: &[(&str, &str, Kind)]) -> Vec<Key> {
    let key = |&(name, means, kind): &(&str, &str, Kind)| Key { name: name.into(), means: means.into(), kind };
    list.iter().map(key).collect()
}

/// The same with the limits of a device, which stand in an object of their own.
fn keys_and_limits(list: &[(&str, &str, Kind)], spelling: Spelling) -> Vec<Key> {
    let kind = |of: Quantity| if of.is_bytes() { Kind::Size } else { Kind::Number };
    let of_quantity =
        |of| [(spelling.rate(of), kind(of)), (spelling.max(of), kind(of)), (spelling.max_length(of), Kind::Number)];
    let limits = Quantity::ALL.into_iter().flat_map(of_quantity);
    let own = |(name, kind): (String, Kind)| Key { means: name.clone(), name, kind };
    keys(list).into_iter().chain(limits.map(own)).collect()
}

/// The keys of `machine-config`.
const MACHINE_CONFIG: [(&str, &str, Kind); 12] = [
    ("type", "type", Kind::Text),
    ("vcpu_count", "cpus", Kind::Number),
    ("mem_size", "size", Kind::Size),
    ("mem_path", "mem-path", Kind::Text),
    ("mem_share", "mem-share", Kind::Bool),
    // The original's guide writes it so.
    ("mem-share", "mem-share", Kind::Bool),
    ("dump_guest_core", "dump-guest-core", Kind::Bool),
    ("disk_slots", "disk-slots", Kind::Number),
    ("nic_slots", "nic-slots", Kind::Number),
    ("kernel_format", "kernel-format", Kind::Text),
    ("auto_kernel_cmdline", "auto-kernel-cmdline", Kind::Bool),
    ("pmu", "pmu", Kind::Bool),
];

/// Every top key, and what stands for it. Those of the original come first.
fn parts() -> Vec<(&'static str, Part)> {
    use Kind::{Bool, Number, Numbers, Size, Text, Words};
    let boot_source =
        [("kernel_image_path", "kernel", Text), ("boot_args", "append", Words), ("initrd_fs_path", "initrd", Text)];
    let drive = [
        ("drive_id", "id", Text),
        ("path_on_host", "file", Text),
        ("read_only", "readonly", Bool),
        ("direct", "direct", Bool),
        ("serial_num", "serial", Text),
        ("logical_block_size", "logical_block_size", Number),
        ("physical_block_size", "physical_block_size", Number),
        ("iothread", "iothread", Text),
        ("iops", "iops", Number),
        ("aio", "aio", Text),
        ("throttling.iops_size", "throttling.iops_size", Size),
        ("throttling.group", "throttling.group", Text),
    ];
    let net = [
        ("iface_id", "id", Text),
        ("host_dev_name", "netdev", Text),
        ("mac", "mac", Text),
        ("iothread", "iothread", Text),
        ("tap_fd", "fd", Number),
        ("tap_fds", "fds", Numbers),
        ("queues", "queues", Number),
        ("queue_size", "queue-size", Number),
        ("vhost", "vhost", Bool),
        ("vhost_type", "vhost-type", Text),
        ("vhost_fd", "vhostfd", Number),
    ];
    let balloon = [
        ("deflate_on_oom", "deflate-on-oom", Bool),
        ("free_page_reporting", "free-page-reporting", Bool),
        ("auto", "auto", Bool),
        ("floor", "floor", Size),
        ("pressure", "pressure", Text),
    ];
    let vsock = [
        ("vsock_id", "id", Text),
        ("guest_cid", "guest-cid", Number),
        ("uds_path", "uds_path", Text),
        ("vhost_fd", "vhostfd", Number),
    ];
    let console = [("console_id", "id", Text), ("socket_path", "path", Text), ("chardev", "chardev", Text)];
    let rng =
        [("random_file", "random_file", Text), ("bytes_per_sec", "bytes_per_sec", Number), ("rng_id", "id", Text)];
    vec![
        ("boot-source", Part::One(keys(&boot_source))),
        ("machine-config", Part::One(keys(&MACHINE_CONFIG))),
        ("drive", Part::Many(keys_and_limits(&drive, Spelling::File))),
        ("net", Part::Many(keys_and_limits(&net, Spelling::NicFile))),
        ("console", Part::Many(keys(&console))),
        ("vsock", Part::One(keys(&vsock))),
        ("serial", Part::One(keys(&[("stdio", "stdio", Bool)]))),
        ("iothread", Part::Many(keys(&[("id", "id", Text)]))),
        ("balloon", Part::One(keys(&balloon))),
        ("rng", Part::One(keys(&rng))),
        ("rng_source", Part::Many(keys(&[("id", "id", Text), ("filename", "filename", Text)]))),
        ("chardev", Part::Many(keys(&[("id", "id", Text), ("socket_path", "path", Text)]))),
        ("name", Part::Value(Text)),
        ("qmp", Part::Texts),
        ("log", Part::Value(Text)),
        ("pidfile", Part::Value(Text)),
        ("daemonize", Part::Value(Bool)),
        ("freeze", Part::Value(Bool)),
        ("no_reboot", Part::Value(Bool)),
        // What an editor looks up the file's keys in.
        ("$schema", Part::Value(Text)),
    ]
}

/// What a file says of a machine, written into `spec`: single things replace what is there, lists add to it.
///
/// # Errors
/// A mistake of the user's, with its line and column.
pub fn read(text: &Text, spec: &mut VmSpec) -> Result<()> {
    let value = text.value()?;
    if value.kind() != Type::Object {
        return Err(value.mistake(format!("this is {}; accepted: an object, {{...}}", value.kind())));
    }
    let parts = parts();
    let names: Vec<&str> = parts.iter().map(|(name, _)| *name).collect();
    let mut own = Object { at: value.at(), text, keys: Vec::new(), fields: Vec::new() };
    let mut objects = Vec::new();
    let mut seen: Vec<String> = Vec::new();
    for Member { key, at, value } in value.members()? {
        let Some((name, part)) = parts.iter().find(|(name, _)| *name == key) else {
            return Err(unknown(text, at, &key, "", &names));
        };
        if seen.contains(&key) {
            return Err(twice(text, at, &key));
        }
        match part {
            Part::Value(kind) => {
                let own_key = Key { name: key.clone(), means: key.clone(), kind: *kind };
                own.add(&own_key, value)?;
                own.keys.push(own_key);
            }
            Part::One(keys) => objects.push((*name, Object::read(text, name, value, keys)?)),
            Part::Many(keys) => {
                for value in list(name, value, "an array of objects")? {
                    objects.push((*name, Object::read(text, name, value, keys)?));
                }
            }
            Part::Texts => {
                let kind = Key { name: key.clone(), means: key.clone(), kind: Kind::Text };
                for value in list(name, value, "an array of texts")? {
                    let mut object = Object { at: value.at(), text, keys: vec![kind.clone()], fields: Vec::new() };
                    object.add(&kind, value)?;
                    objects.push((*name, object));
                }
            }
        }
        seen.push(key);
    }
    read_own(&own.pairs(), spec)?;
    // In the order of the table and not of the file, which has no meaning there.
    for (name, _) in &parts {
        for (_, object) in objects.iter().filter(|(other, _)| other == name) {
            read_part(name, &object.pairs(), spec)?;
        }
    }
    Ok(())
}

/// The top keys that stand for a value of their own.
fn read_own(pairs: &KeyValues<'_>, spec: &mut VmSpec) -> Result<()> {
    if let Some(name) =
        pairs.get("name", &format!("a text of 1 to {MAX_NAME_CHARS} characters"), options::short_text)?
    {
        spec.name = name;
    }
    if let Some(path) = path(pairs, "log")? {
        spec.log = LogSpec::File(path);
    }
    spec.pidfile = path(pairs, "pidfile")?.or(spec.pidfile.take());
    let flags = [("daemonize", &mut spec.daemonize), ("freeze", &mut spec.freeze), ("no_reboot", &mut spec.no_reboot)];
    for (key, flag) in flags {
        *flag = pairs.get_bool(key)?.unwrap_or(*flag);
    }
    Ok(())
}

/// One object of the part called `part`, or one text of a list.
fn read_part(part: &str, pairs: &KeyValues<'_>, spec: &mut VmSpec) -> Result<()> {
    match part {
        "boot-source" => {
            if let Some(kernel) = path(pairs, "kernel")? {
                spec.kernel = kernel;
            }
            spec.append = pairs.get("append", "", |words| Some(words.to_owned()))?.unwrap_or_default();
            spec.initrd = path(pairs, "initrd")?;
        }
        "machine-config" => {
            options::machine_of(pairs, spec)?;
            spec.cpus = options::cpus_of(pairs)?.unwrap_or(spec.cpus);
            spec.memory_bytes = options::memory_of(pairs)?.unwrap_or(spec.memory_bytes);
            spec.mem_path = path(pairs, "mem-path")?;
        }
        "drive" => spec.drives.push(options::drive_of(pairs, Spelling::File)?),
        "net" => spec.nics.push(net::nic_of(pairs, Spelling::NicFile)?),
        "console" => read_console(pairs, spec)?,
        "chardev" => spec.chardevs.push(chardev::chardev_of(pairs)?),
        "vsock" => spec.vsocks.push(vsock::vsock_of(pairs)?),
        "serial" => {
            let stdio = pairs.get_bool("stdio")?;
            let stdio = stdio.ok_or_else(|| pairs.missing("stdio", &pairs.pair("stdio", "true")))?;
            spec.serial = if stdio { SerialSpec::Stdio } else { SerialSpec::None };
        }
        "iothread" => spec.iothreads.push(options::iothread_of(pairs)?),
        "balloon" => spec.balloons.push(options::balloon_of(pairs)?),
        "rng" => spec.rngs.push(rng::rng_of(pairs)?),
        "rng_source" => spec.rng_sources.push(rng::object_of(pairs)?),
        "qmp" => {
            let accepted = format!("the path of a Unix socket (at most {MAX_SOCKET_PATH_BYTES} bytes)");
            spec.qmp.push(pairs.require("qmp", &accepted, options::socket_path)?);
        }
        _ => {}
    }
    Ok(())
}

/// A console on a socket of its own, as the original writes it, or on a chardev.
fn read_console(pairs: &KeyValues<'_>, spec: &mut VmSpec) -> Result<()> {
    match (pairs.get("path", "", Some)?, pairs.get("chardev", "", Some)?) {
        (Some(_), None) => {
            let own = chardev::chardev_of(pairs)?;
            spec.consoles.push(ConsoleSpec { id: own.id.clone(), chardev: own.id.clone() });
            spec.chardevs.push(own);
            Ok(())
        }
        (None, Some(_)) => {
            spec.consoles.push(chardev::console_of(pairs)?);
            Ok(())
        }
        (None, None) => {
            let accepted =
                format!("{}, or {}", pairs.pair("path", "PATH"), pairs.pair("chardev", "the id of a chardev"));
            Err(pairs.missing("path", &accepted))
        }
        (Some(_), Some(_)) => {
            let sentence = "\"socket_path\" makes a chardev for this console alone, and \"chardev\" names one; accepted: \
                            one of the two";
            Err(pairs.mistake(sentence))
        }
    }
}

fn path(pairs: &KeyValues<'_>, key: &str) -> Result<Option<PathBuf>> {
    pairs.get(key, &format!("a path of 1 to {MAX_PATH_BYTES} bytes"), options::file_path)
}

fn list<'t>(name: &str, value: Value<'t>, accepted: &str) -> Result<Vec<Value<'t>>> {
    match value.kind() {
        Type::Array => value.items(),
        kind => Err(value.mistake(format!("{name:?} is {kind}; accepted: {accepted}, [...]"))),
    }
}

fn unknown(text: &Text, at: usize, key: &str, part: &str, names: &[&str]) -> crate::error::Error {
    let (hint, names) = (hint(key, names), names.join(", "));
    text.mistake(at, format!("unknown key {key:?}{part}{hint}; accepted keys: {names}"))
}

fn twice(text: &Text, at: usize, key: &str) -> crate::error::Error {
    text.mistake(at, format!("key {key:?} is given twice; accepted: once"))
}

/// An object of the file whose keys are known and whose values are of the right kind.
#[derive(Debug)]
struct Object<'t> {
    text: &'t Text,
    at: usize,
    keys: Vec<Key>,
    fields: Vec<Field>,
}

/// A key that is there: what it means, its name, where its value stands, and the text that an option would have had.
#[derive(Debug)]
struct Field {
    means: String,
    name: String,
    at: usize,
    value: String,
}

impl<'t> Object<'t> {
    fn read(text: &'t Text, part: &str, value: Value<'t>, keys: &[Key]) -> Result<Object<'t>> {
        let mut object = Object { text, at: value.at(), keys: keys.to_vec(), fields: Vec::new() };
        object.take(part, "", value, keys)?;
        Ok(object)
    }

    /// Takes in the members of `value`, of whose keys in the table `prefix` is the beginning.
    fn take(&mut self, part: &str, prefix: &str, value: Value<'t>, keys: &[Key]) -> Result<()> {
        if value.kind() != Type::Object {
            let kind = value.kind();
            return Err(value.mistake(format!("{part:?} is {kind}; accepted: an object, {{...}}")));
        }
        let mut nested = Vec::new();
        for Member { key, at, value } in value.members()? {
            let full = format!("{prefix}{key}");
            if let Some(known) = keys.iter().find(|known| known.name == full && !key.contains('.')) {
                if self.fields.iter().any(|field| field.means == known.means) {
                    return Err(twice(self.text, at, &key));
                }
                self.add(known, value)?;
            } else if prefix.is_empty() && keys.iter().any(|known| known.name.starts_with(&format!("{key}."))) {
                if nested.contains(&key) {
                    return Err(twice(self.text, at, &key));
                }
                self.take(&key, &format!("{key}."), value, keys)?;
                nested.push(key);
            } else {
                let names = keys.iter().filter_map(|known| known.name.strip_prefix(prefix));
                let mut names: Vec<&str> = names.map(|name| name.split('.').next().unwrap_or(name)).collect();
                names.dedup();
                return Err(unknown(self.text, at, &key, &format!(" in {part:?}"), &names));
            }
        }
        Ok(())
    }

    fn add(&mut self, key: &Key, value: Value<'_>) -> Result<()> {
        let (name, kind) = (&key.name, value.kind());
        let wrong = |value: Value<'_>, kind: Type| {
            value.mistake(format!("{name:?} is {kind}; accepted: {}", key.kind.accepted()))
        };
        if !key.kind.accepts(kind) {
            return Err(wrong(value, kind));
        }
        let text = if kind == Type::Array {
            let items = value.items()?.into_iter().map(|item| match item.kind() {
                Type::Number | Type::Text => item.text(),
                kind => Err(item.mistake(format!("a member of {name:?} is {kind}; accepted: a number"))),
            });
            items.collect::<Result<Vec<_>>>()?.join(":")
        } else {
            value.text()?
        };
        if text.is_empty() && key.kind != Kind::Words {
            return Err(value.mistake(format!("the value of {name:?} is empty; accepted: {}", key.kind.accepted())));
        }
        self.fields.push(Field { means: key.means.clone(), name: name.clone(), at: value.at(), value: text });
        Ok(())
    }

    fn pairs(&self) -> KeyValues<'_> {
        let pairs = self.fields.iter().map(|field| (field.means.as_str(), field.value.as_str()));
        KeyValues::of(Written(self), pairs.collect())
    }
}

/// Where the pairs of an object were written.
#[derive(Debug)]
struct Written<'o>(&'o Object<'o>);

impl Origin for Written<'_> {
    fn place(&self, key: Option<&str>) -> String {
        let field = self.0.fields.iter().find(|field| Some(field.means.as_str()) == key);
        self.0.text.place(field.map_or(self.0.at, |field| field.at))
    }

    /// As it is written there; a key that is not there, as the table has it.
    fn name(&self, key: &str) -> String {
        let field = self.0.fields.iter().find(|field| field.means == key).map(|field| &field.name);
        let known = || self.0.keys.iter().find(|known| known.means == key).map(|known| &known.name);
        field.or_else(known).map_or(key, String::as_str).to_owned()
    }

    fn pair(&self, key: &str, value: &str) -> String {
        format!("{:?}: {value}", self.name(key))
    }
}

#[cfg(test)]
#[path = "file_test.rs"]
mod tests;
