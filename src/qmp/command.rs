//! The table of commands: name, arguments, reply.
//!
//! One entry adds a command: it is then parsed, listed by `query-commands` and described by `query-qmp-schema`. A
//! command about the protocol goes to [`Protocol`] and is answered by the session; any other to [`Command`], and the
//! compiler then asks `control` for the answer. The type behind the arrow is the reply's; `tests/vm/qmp.rs` holds every
//! real reply against it.

use serde_json::{Map, Value};

use crate::error::{Error, Kind, Result};
use crate::qmp::balloon::{BalloonArguments, BalloonDetail, BalloonInfo, BalloonStats, BalloonStatsInterval};
use crate::qmp::block::{BlockIOThrottle, BlockInfo, BlockStats};
use crate::qmp::chardev::{ChardevAdd, ChardevInfo, ChardevRemove, ChardevResize, ChardevReturn};
use crate::qmp::introspect::SchemaInfo;
use crate::qmp::net::{NetdevStats, NetdevThrottle, SetLink};
use crate::qmp::plug::{
    self, BlockResize, BlockdevAdd, BlockdevDel, Closefd, DeviceAdd, DeviceDel, Getfd, NetdevAdd, NetdevDel,
};
use crate::qmp::reply::{
    CommandInfo, CpuInfo, CpuInfoFast, EventInfo, IOThreadInfo, KvmInfo, MachineInfo, NameInfo, StatusInfo, VersionInfo,
};
use crate::qmp::request::Call;
use crate::qmp::schema::{Empty, Object, Type, Typed, names, object};
use crate::qmp::vsock::VsockInfo;

names! {
    /// What a client may switch on. None is offered, so each is refused by name.
    pub enum QmpCapability {
        /// Out-of-band execution.
        "oob" => Oob,
    }
}

object! {
    /// The arguments of `qmp_capabilities`.
    pub struct Capabilities {
        /// What to switch on.
        "enable" => enable: Option<Vec<QmpCapability>>,
    }
}

/// One command of the table.
pub struct Entry {
    /// What `execute` takes.
    pub name: &'static str,
    /// What `arguments` takes.
    pub arguments: &'static Object,
    /// What stands under `return`.
    pub returns: &'static Type,
    /// Reads arguments that were checked against the description.
    parse: fn(Map<String, Value>) -> serde_json::Result<Asked>,
}

macro_rules! commands {
    ($($(#[$group_doc:meta])* pub enum $group:ident {
        $($(#[$doc:meta])* $name:literal => $variant:ident $(($arguments:ty))? -> $returns:ty),* $(,)?
    })*) => {
        $($(#[$group_doc])*
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum $group {
            $($(#[$doc])* $variant $((Box<$arguments>))?,)*
        })*

        /// What a request asks for.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Asked {
            $($(#[$group_doc])* $group($group),)*
        }

        /// Every command.
        pub const COMMANDS: &[Entry] = &[$($(Entry {
            name: $name,
            arguments: commands!(@object $($arguments)?),
            returns: <$returns as Typed>::TYPE,
            parse: |arguments| commands!(@parse arguments, $group, $variant $(, $arguments)?),
        },)*)*];
    };
    (@object) => { Empty::OBJECT };
    (@object $arguments:ty) => { <$arguments>::OBJECT };
    (@parse $value:ident, $group:ident, $variant:ident) => {{
        let _ = $value;
        Ok(Asked::$group($group::$variant))
    }};
    (@parse $value:ident, $group:ident, $variant:ident, $arguments:ty) => {
        serde_json::from_value::<Box<$arguments>>(Value::Object($value)).map(|read| Asked::$group($group::$variant(read)))
    };
}

commands! {
    /// A command about the protocol itself.
    pub enum Protocol {
        /// Ends the negotiation.
        "qmp_capabilities" => Negotiate(Capabilities) -> Empty,
        /// This program's version.
        "query-version" => QueryVersion -> VersionInfo,
        /// The names of all commands.
        "query-commands" => QueryCommands -> Vec<CommandInfo>,
        /// The names of all events.
        "query-events" => QueryEvents -> Vec<EventInfo>,
        /// The shapes of all commands and events.
        "query-qmp-schema" => QuerySchema -> Vec<SchemaInfo>,
    }

    /// A command about the machine.
    pub enum Command {
        /// What the machine is doing.
        "query-status" => QueryStatus -> StatusInfo,
        /// Park the vCPUs and drain the disks.
        "stop" => Stop -> Empty,
        /// Let the vCPUs run.
        "cont" => Cont -> Empty,
        /// Press the power button.
        "system_powerdown" => SystemPowerdown -> Empty,
        /// Reset the machine.
        "system_reset" => SystemReset -> Empty,
        /// End the monitor.
        "quit" => Quit -> Empty,
        /// Whether KVM is used.
        "query-kvm" => QueryKvm -> KvmInfo,
        /// The machine's name.
        "query-name" => QueryName -> NameInfo,
        /// The vCPUs, in the old form.
        "query-cpus" => QueryCpus -> Vec<CpuInfo>,
        /// The vCPUs.
        "query-cpus-fast" => QueryCpusFast -> Vec<CpuInfoFast>,
        /// The iothreads.
        "query-iothreads" => QueryIothreads -> Vec<IOThreadInfo>,
        /// The disks.
        "query-block" => QueryBlock -> Vec<BlockInfo>,
        /// What the disks did.
        "query-blockstats" => QueryBlockstats -> Vec<BlockStats>,
        /// Limit a disk, or what its group shares.
        "block_set_io_throttle" => BlockSetIoThrottle(BlockIOThrottle) -> Empty,
        /// The NICs, and what they did.
        "query-netstats" => QueryNetstats -> Vec<NetdevStats>,
        /// The vsock, and what went through it.
        "query-vsock" => QueryVsock -> Vec<VsockInfo>,
        /// Limit a NIC.
        "netdev_set_throttle" => NetdevSetThrottle(NetdevThrottle) -> Empty,
        /// Plug a NIC's cable in, or pull it.
        "set_link" => SetLink(SetLink) -> Empty,
        /// Open a file for a later plug.
        "blockdev-add" => BlockdevAdd(BlockdevAdd) -> Empty,
        /// Plug what was opened into a slot.
        "device_add" => DeviceAdd(DeviceAdd) -> Empty,
        /// Make a disk longer.
        "block_resize" => BlockResize(BlockResize) -> Empty,
        /// Unplug a device.
        "device_del" => DeviceDel(DeviceDel) -> Empty,
        /// Close a file that no device has.
        "blockdev-del" => BlockdevDel(BlockdevDel) -> Empty,
        /// Keep the descriptor that came with this request.
        "getfd" => Getfd(Getfd) -> Empty,
        /// Close a descriptor that was kept.
        "closefd" => Closefd(Closefd) -> Empty,
        /// Open a tap for a later plug.
        "netdev_add" => NetdevAdd(NetdevAdd) -> Empty,
        /// Close a tap that no device has.
        "netdev_del" => NetdevDel(NetdevDel) -> Empty,
        /// How much memory the guest shall have.
        "balloon" => Balloon(BalloonArguments) -> Empty,
        /// How much memory the guest has.
        "query-balloon" => QueryBalloon -> BalloonInfo,
        /// Where the memory is.
        "query-balloon-detail" => QueryBalloonDetail -> BalloonDetail,
        /// What the guest says of its memory.
        "query-balloon-stats" => QueryBalloonStats -> BalloonStats,
        /// How often the guest is asked.
        "balloon-stats-interval" => BalloonStatsInterval(BalloonStatsInterval) -> Empty,
        /// What the consoles are connected to.
        "query-chardev" => QueryChardev -> Vec<ChardevInfo>,
        /// Disconnect a console.
        "chardev-remove" => ChardevRemove(ChardevRemove) -> Empty,
        /// Connect a console.
        "chardev-add" => ChardevAdd(ChardevAdd) -> ChardevReturn,
        /// How large a console's terminal is.
        "chardev-resize" => ChardevResize(ChardevResize) -> Empty,
        /// The machine types.
        "query-machines" => QueryMachines -> Vec<MachineInfo>,
    }
}

/// Looks the name up and reads the arguments.
///
/// # Errors
/// `CommandNotFound` for a name that is not in the table; otherwise a sentence that names the argument and what is
/// accepted.
pub fn parse(call: Call) -> Result<Asked> {
    let Some(entry) = COMMANDS.iter().find(|entry| entry.name == call.name) else {
        return Err(Error::new(Kind::NoCommand, format!("The command {} has not been found", call.name)));
    };
    plug::refuse(entry.name, &call.arguments)?;
    entry.arguments.check(&call.arguments, "").map_err(Error::usage)?;
    (entry.parse)(call.arguments).map_err(|error| Error::usage(format!("the arguments of {}: {error}", entry.name)))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ask(name: &str, arguments: &Value) -> Result<Asked> {
        let arguments = arguments.as_object().expect("an object").clone();
        parse(Call { name: name.to_owned(), arguments })
    }

    #[test]
    fn every_command_stands_once_in_the_table_and_is_parsed_by_its_name() {
        for (index, entry) in COMMANDS.iter().enumerate() {
            let missing = entry.arguments.members.iter().find(|member| !member.optional);
            let told = ask(entry.name, &json!({})).err().map(|error| error.to_string());
            let expected = missing.map(|member| format!("Parameter '{}' is missing", member.name));
            assert_eq!(told, expected, "{}", entry.name);
            assert!(COMMANDS[..index].iter().all(|other| other.name != entry.name), "{} twice", entry.name);
        }
        assert_eq!(ask("cont", &json!({})).unwrap(), Asked::Command(Command::Cont));
    }

    #[test]
    fn an_unknown_command_is_told_as_qemu_does() {
        let error = ask("nope", &json!({})).unwrap_err();
        assert_eq!((error.kind(), error.to_string()), (Kind::NoCommand, "The command nope has not been found".into()));
    }

    #[test]
    fn arguments_are_read_and_unknown_ones_refused() {
        let capabilities = Capabilities { enable: Some(vec![QmpCapability::Oob]) };
        let asked = ask("qmp_capabilities", &json!({"enable": ["oob"]})).unwrap();
        assert_eq!(asked, Asked::Protocol(Protocol::Negotiate(Box::new(capabilities))));
        let told = ask("stop", &json!({"now": true})).unwrap_err().to_string();
        assert_eq!(told, "Parameter 'now' is unexpected; accepted: nothing");
        let told = ask("qmp_capabilities", &json!({"enable": ["x"]})).unwrap_err().to_string();
        assert_eq!(told, "Parameter 'enable[0]' does not accept value 'x'; accepted: 'oob'");
    }
}
