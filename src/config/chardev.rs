//! `-chardev` and the consoles on it, in both spellings: the original's early one, where `-chardev` is a console on a Unix
//! socket, and the later one, where `-device virtconsole` puts a console on a `-chardev socket`.
//!
//! Both end in the same two lists of a [`VmSpec`]. Main thread, before anything is started.

use std::collections::HashSet;
use std::path::PathBuf;

use super::keyvalue::KeyValues;
use super::options::socket_path;
use super::spec::{MAX_NAME_CHARS, MAX_SOCKET_PATH_BYTES, VmSpec};
use crate::error::{Error, Result};

/// `-chardev`: a Unix socket on which the monitor listens for one client at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChardevSpec {
    /// The name that QMP and devices use; unique among these.
    pub id: String,
    /// The socket's path.
    pub path: PathBuf,
}

/// A virtio-console, and what it is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConsoleSpec {
    /// The name that messages use; unique among consoles.
    pub id: String,
    /// The id of its [`ChardevSpec`], which is nobody else's.
    pub chardev: String,
}

/// `-chardev id=,path=` and `-chardev socket,id=,path=,server[,nowait]`, written into `spec`.
///
/// # Errors
/// What is wrong with the keys.
pub fn chardev(text: &str, spec: &mut VmSpec) -> Result<()> {
    let keys = ["backend", "id", "path", "server", "wait"];
    let pairs = KeyValues::read("-chardev", text, &keys, |place, word| match word {
        "server" => Some(("server", "on")),
        "nowait" => Some(("wait", "off")),
        _ => (place == 0).then_some(("backend", word)),
    })?;
    let backend = pairs.get("backend", "socket", |backend| (backend == "socket").then_some(()))?;
    let chardev = chardev_of(&pairs)?;
    let listens = pairs.get("server", "on (the monitor listens)", |value| (value == "on").then_some(()))?;
    pairs.get("wait", "off (the machine starts without a client)", |value| (value == "off").then_some(()))?;
    match backend {
        // The early spelling makes the console too.
        None => spec.consoles.push(ConsoleSpec { id: chardev.id.clone(), chardev: chardev.id.clone() }),
        Some(()) if listens.is_none() => {
            return Err(pairs.mistake(
                "the word \"server\" is missing, and connecting to a socket is not supported; accepted: \
                 socket,id=NAME,path=PATH,server,nowait",
            ));
        }
        Some(()) => {}
    }
    spec.chardevs.push(chardev);
    Ok(())
}

/// The socket of these pairs.
pub(super) fn chardev_of(pairs: &KeyValues<'_>) -> Result<ChardevSpec> {
    let accepted = format!("the path of a Unix socket (at most {MAX_SOCKET_PATH_BYTES} bytes)");
    Ok(ChardevSpec {
        id: pairs.require("id", "NAME (1 to 255 characters)", name)?,
        path: pairs.require("path", &accepted, socket_path)?,
    })
}

/// `-device virtconsole,chardev=NAME,id=NAME`, written into `spec`.
///
/// # Errors
/// What is wrong with the keys.
pub fn virtconsole(text: &str, spec: &mut VmSpec) -> Result<()> {
    let pairs = KeyValues::read("-device", text, &["type", "chardev", "id", "nr"], kind)?;
    // Each console has a device of its own, whose only port is its first.
    pairs.get("nr", "0", |number| (number == "0").then_some(()))?;
    spec.consoles.push(console_of(&pairs)?);
    Ok(())
}

/// The console of these pairs.
pub(super) fn console_of(pairs: &KeyValues<'_>) -> Result<ConsoleSpec> {
    Ok(ConsoleSpec {
        id: pairs.require("id", "NAME (1 to 255 characters)", name)?,
        chardev: pairs.require("chardev", "the id of a -chardev", name)?,
    })
}

/// `-device virtio-serial-device[,id=NAME]`: the bus of the later spelling. Each console has one of its own anyway.
///
/// # Errors
/// What is wrong with the keys.
pub fn virtio_serial(text: &str) -> Result<()> {
    let pairs = KeyValues::read("-device", text, &["type", "id"], kind)?;
    pairs.get("id", "NAME (1 to 255 characters)", name).map(drop)
}

/// The first word of a `-device` is its type.
fn kind(place: usize, word: &str) -> Option<(&str, &str)> {
    (place == 0).then_some(("type", word))
}

fn name(text: &str) -> Option<String> {
    (1..=MAX_NAME_CHARS).contains(&text.chars().count()).then(|| text.to_owned())
}

/// What no single option can be wrong about.
///
/// # Errors
/// An id used twice, a console on a chardev that is not there or is another's, a chardev that nobody uses.
pub(super) fn check(spec: &VmSpec) -> Result<()> {
    let mut ids = HashSet::new();
    if let Some(twice) = spec.chardevs.iter().find(|chardev| !ids.insert(&chardev.id)) {
        return Err(Error::usage(format!(
            "-chardev id={}: another chardev has this id; accepted: an id of its own",
            twice.id
        )));
    }
    let (mut ids, mut used) = (HashSet::new(), HashSet::new());
    for ConsoleSpec { id, chardev } in &spec.consoles {
        let mistake = |sentence: String| Err(Error::usage(format!("-device virtconsole,id={id}: {sentence}")));
        if !ids.insert(id) {
            return mistake("another console has this id; accepted: an id of its own".into());
        }
        if !spec.chardevs.iter().any(|other| other.id == *chardev) {
            let ids: Vec<&str> = spec.chardevs.iter().map(|chardev| chardev.id.as_str()).collect();
            let socket = || format!("with -chardev socket,id={chardev},path=PATH,server,nowait");
            let accepted = if ids.is_empty() { socket() } else { ids.join(", ") };
            return mistake(format!("there is no chardev {chardev:?}; accepted: {accepted}"));
        }
        if !used.insert(chardev) {
            return mistake(format!("chardev {chardev:?} is another's; accepted: a -chardev of its own"));
        }
    }
    if let Some(ChardevSpec { id, .. }) = spec.chardevs.iter().find(|chardev| !used.contains(&chardev.id)) {
        return Err(Error::usage(format!(
            "-chardev socket,id={id}: nothing uses it; accepted: with -device virtconsole,chardev={id},id=NAME"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::device::device;

    fn read(chardevs: &[&str], devices: &[&str]) -> Result<VmSpec> {
        let mut spec = VmSpec::new("vmlinux");
        for text in chardevs {
            chardev(text, &mut spec)?;
        }
        for text in devices {
            device(text, &mut spec, &mut Vec::new())?;
        }
        spec.check()?;
        Ok(spec)
    }

    fn refusal(chardevs: &[&str], devices: &[&str]) -> String {
        read(chardevs, devices).expect_err("is refused").to_string()
    }

    #[test]
    fn both_spellings_make_the_same_machine() {
        let early = read(&["id=c,path=/c"], &[]).unwrap();
        let late =
            read(&["socket,path=/c,id=c,server,nowait"], &["virtio-serial-device", "virtconsole,chardev=c,id=c"]);
        assert_eq!(early, late.unwrap());
        assert_eq!(early.chardevs, [ChardevSpec { id: "c".into(), path: "/c".into() }]);
        assert_eq!(early.consoles, [ConsoleSpec { id: "c".into(), chardev: "c".into() }]);
        let late = read(
            &["socket,path=/c,id=c,server=on,wait=off"],
            &["virtio-serial-device,id=bus", "virtconsole,chardev=c,id=d"],
        );
        assert_eq!(late.unwrap().consoles, [ConsoleSpec { id: "d".into(), chardev: "c".into() }]);
    }

    #[test]
    fn what_is_wrong_with_a_chardev_is_said_with_what_is_accepted() {
        for (text, sentence) in [
            ("id=c", "key \"path\" is missing; accepted: path=the path of a Unix socket (at most 107 bytes)"),
            ("path=/c", "key \"id\" is missing; accepted: id=NAME (1 to 255 characters)"),
            ("pty,id=c,path=/c", "\"pty\" is no value of \"backend\"; accepted: socket"),
            ("socket,id=c,path=/c", "the word \"server\" is missing, and connecting to a socket is not supported;"),
            ("socket,id=c,path=/c,server,wait", "the value of \"wait\" is missing; accepted: wait=VALUE"),
            ("socket,id=c,path=/c,server=off", "\"off\" is no value of \"server\"; accepted: on"),
            ("socket,id=c,path=/c,server,wait=on", "\"on\" is no value of \"wait\"; accepted: off"),
            ("id=c,pth=/c", "unknown key \"pth\" (did you mean \"path\"?)"),
        ] {
            let refused = refusal(&[text], &[]);
            assert!(refused.starts_with(&format!("-chardev {text}: {sentence}")), "{refused}");
        }
        let long = format!("id=c,path=/{}", "c".repeat(107));
        assert!(refusal(&[&long], &[]).contains("at most 107 bytes"));
    }

    #[test]
    fn a_console_has_a_chardev_of_its_own_and_a_chardev_has_a_console() {
        const C: &str = "socket,path=/c,id=c,server,nowait";
        assert_eq!(
            refusal(&[], &["virtconsole,chardev=c,id=d"]),
            "-device virtconsole,id=d: there is no chardev \"c\"; accepted: with -chardev \
             socket,id=c,path=PATH,server,nowait"
        );
        assert_eq!(
            refusal(&[C], &["virtconsole,chardev=x,id=d"]),
            "-device virtconsole,id=d: there is no chardev \"x\"; accepted: c"
        );
        assert_eq!(
            refusal(&[C], &["virtconsole,chardev=c,id=d", "virtconsole,chardev=c,id=e"]),
            "-device virtconsole,id=e: chardev \"c\" is another's; accepted: a -chardev of its own"
        );
        assert_eq!(
            refusal(&[C], &["virtio-serial-device"]),
            "-chardev socket,id=c: nothing uses it; accepted: with -device virtconsole,chardev=c,id=NAME"
        );
        assert!(refusal(&[C], &["virtconsole,id=d"]).contains("key \"chardev\" is missing"));
        assert!(refusal(&[C], &["virtconsole,chardev=c"]).contains("key \"id\" is missing"));
    }

    #[test]
    fn ids_and_paths_are_not_used_twice() {
        assert!(refusal(&["id=c,path=/c", "id=c,path=/d"], &[]).starts_with("-chardev id=c: another chardev has this"));
        let e = "socket,path=/e,id=e,server,nowait";
        let refused = refusal(&["id=c,path=/c", e], &["virtconsole,chardev=e,id=c"]);
        assert!(refused.starts_with("-device virtconsole,id=c: another console has this id"), "{refused}");
        let refused = refusal(&["id=c,path=/c", "id=d,path=/c"], &[]);
        assert!(refused.starts_with("-chardev id=d: "), "{refused}");
    }

    #[test]
    fn rule_d3_4_a_console_counts_among_the_eleven_devices() {
        let texts: Vec<String> = (0..12).map(|n| format!("id=c{n},path=/c{n}")).collect();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        read(&texts[..11], &[]).unwrap();
        let refused = refusal(&texts, &[]);
        assert!(refused.contains("id=c11: ") && refused.contains("rule D3.4"), "{refused}");
    }
}
