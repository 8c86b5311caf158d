//! What a client is told unasked: the table of events, and the line that one makes.

use serde::Serialize;

use crate::qmp::balloon::BalloonInfo;
use crate::qmp::plug::DeviceDeleted;
use crate::qmp::schema::{Empty, Object, names, object};

names! {
    /// Why the machine ended, or was reset.
    pub enum ShutdownCause {
        /// A vCPU failed.
        "host-error" => HostError,
        /// The command `quit`.
        "host-qmp-quit" => HostQmpQuit,
        /// The command `system_reset`.
        "host-qmp-system-reset" => HostQmpSystemReset,
        /// SIGTERM, SIGINT or SIGHUP.
        "host-signal" => HostSignal,
        /// `Ctrl-a x` on the terminal.
        "host-ui" => HostUi,
        /// The guest switched itself off.
        "guest-shutdown" => GuestShutdown,
        /// The guest reset itself.
        "guest-reset" => GuestReset,
        /// The guest's kernel panicked.
        "guest-panic" => GuestPanic,
    }

    /// What is done about a panic of the guest's.
    pub enum GuestPanicAction {
        /// The machine ends.
        "poweroff" => Poweroff,
        /// The guest goes on.
        "run" => Run,
    }

    /// The direction of a request.
    pub enum IoOperationType {
        /// A read.
        "read" => Read,
        /// A write, flush, discard or write of zeroes.
        "write" => Write,
    }

    /// What was done about a failed request.
    pub enum BlockErrorAction {
        /// The guest was told.
        "report" => Report,
    }
}

object! {
    /// The data of `SHUTDOWN`.
    pub struct Shutdown {
        /// Whether the guest did it.
        "guest" => guest: bool,
        /// Why.
        "reason" => reason: ShutdownCause,
    }

    /// The data of `RESET`.
    pub struct ResetData {
        /// Whether the guest did it.
        "guest" => guest: bool,
        /// Why.
        "reason" => reason: ShutdownCause,
    }

    /// The data of `GUEST_PANICKED` and `GUEST_CRASHLOADED`.
    pub struct Panicked {
        /// What is done about it.
        "action" => action: GuestPanicAction,
    }

    /// The data of `BLOCK_IO_ERROR`.
    pub struct BlockIoError {
        /// The path of the device that carries the disk.
        "qom-path" => qom_path: String,
        /// The drive's id.
        "device" => device: String,
        /// The node's name: the drive's id.
        "node-name" => node_name: Option<String>,
        /// The direction.
        "operation" => operation: IoOperationType,
        /// What was done about it.
        "action" => action: BlockErrorAction,
        /// Whether it was for want of space on the host.
        "nospace" => nospace: Option<bool>,
        /// The host's words.
        "reason" => reason: String,
    }

    /// The data of `GUEST_MEMORY_FULL`. Ours.
    pub struct GuestMemoryFull {
        /// Which file system is full.
        "reason" => reason: String,
    }

    /// The data of `EVENTS_LOST`. Ours.
    pub struct EventsLost {
        /// How many events this client was not sent, because it did not read what it was sent before.
        "count" => count: u64,
    }
}

impl ShutdownCause {
    /// Whether it was the guest's doing.
    pub fn is_guests(self) -> bool {
        matches!(self, ShutdownCause::GuestShutdown | ShutdownCause::GuestReset | ShutdownCause::GuestPanic)
    }
}

/// Makes [`Event`] and [`EVENTS`] of one table: `"NAME" => Variant(Data)`.
macro_rules! events {
    ($($(#[$doc:meta])* $name:literal => $variant:ident $(($data:ty))?),* $(,)?) => {
        /// Something to tell every client.
        #[derive(Clone, Debug, PartialEq, Eq, Serialize)]
        #[serde(tag = "event", content = "data")]
        pub enum Event {
            $($(#[$doc])* #[serde(rename = $name)] $variant $(($data))?,)*
        }

        /// Every event's name and data.
        pub const EVENTS: &[(&str, &Object)] = &[$(($name, events!(@data $($data)?))),*];
    };
    (@data) => { Empty::OBJECT };
    (@data $data:ty) => { <$data>::OBJECT };
}

events! {
    /// The vCPUs stopped.
    "STOP" => Stop,
    /// The vCPUs run again.
    "RESUME" => Resume,
    /// The power button was pressed.
    "POWERDOWN" => Powerdown,
    /// The guest's kernel has panicked.
    "GUEST_PANICKED" => GuestPanicked(Panicked),
    /// The guest's kernel has panicked and starts a crash kernel.
    "GUEST_CRASHLOADED" => GuestCrashloaded(Panicked),
    /// The machine was reset.
    "RESET" => Reset(ResetData),
    /// The machine ends.
    "SHUTDOWN" => Shutdown(Shutdown),
    /// A disk's request failed on the host; the guest was told.
    "BLOCK_IO_ERROR" => BlockIoError(BlockIoError),
    /// The host has no room for a page of guest memory; `STOP` follows.
    "GUEST_MEMORY_FULL" => GuestMemoryFull(GuestMemoryFull),
    /// The guest has given memory away or taken it back; the name of the system we replace.
    "BALLOON_CHANGED" => BalloonChanged(BalloonInfo),
    /// The same under QEMU's name.
    "BALLOON_CHANGE" => BalloonChange(BalloonInfo),
    /// A device is out of its slot.
    "DEVICE_DELETED" => DeviceDeleted(DeviceDeleted),
    /// This client missed events.
    "EVENTS_LOST" => EventsLost(EventsLost),
}

/// When an event happened: time since 1970-01-01 00:00 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Timestamp {
    /// Whole seconds.
    pub seconds: u64,
    /// The rest, 0 to 999999.
    pub microseconds: u32,
}

impl Timestamp {
    /// From nanoseconds of CLOCK_REALTIME.
    pub fn from_realtime_ns(ns: u64) -> Self {
        let microseconds = u32::try_from(ns % 1_000_000_000 / 1_000).unwrap_or(0);
        Timestamp { seconds: ns / 1_000_000_000, microseconds }
    }
}

/// The object that an event is sent as.
#[derive(Serialize)]
pub(super) struct Notice<'a> {
    pub timestamp: Timestamp,
    #[serde(flatten)]
    pub event: &'a Event,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qmp::response;

    fn line(event: &Event) -> String {
        let mut out = Vec::new();
        response::event(&mut out, event, Timestamp::from_realtime_ns(1_795_420_198_028_804_999));
        String::from_utf8(out).expect("is UTF-8")
    }

    #[test]
    fn an_event_looks_as_qemu_writes_it() {
        let at = r#"{"timestamp":{"seconds":1795420198,"microseconds":28804},"event":"#;
        assert_eq!(line(&Event::Stop), format!("{at}\"STOP\"}}\r\n"));
        let shutdown = Event::Shutdown(Shutdown { guest: false, reason: ShutdownCause::HostQmpQuit });
        let data = r#"{"guest":false,"reason":"host-qmp-quit"}"#;
        assert_eq!(line(&shutdown), format!("{at}\"SHUTDOWN\",\"data\":{data}}}\r\n"));
    }

    #[test]
    fn what_is_sent_has_the_name_and_the_shape_that_the_table_says() {
        let events = [
            Event::Stop,
            Event::Resume,
            Event::Powerdown,
            Event::GuestPanicked(Panicked { action: GuestPanicAction::Poweroff }),
            Event::GuestCrashloaded(Panicked { action: GuestPanicAction::Run }),
            Event::Reset(ResetData { guest: true, reason: ShutdownCause::GuestReset }),
            Event::Shutdown(Shutdown { guest: true, reason: ShutdownCause::GuestShutdown }),
            Event::BlockIoError(BlockIoError {
                qom_path: "/machine/peripheral/vda".into(),
                device: "vda".into(),
                node_name: None,
                operation: IoOperationType::Write,
                action: BlockErrorAction::Report,
                nospace: Some(true),
                reason: "No space left on device".into(),
            }),
            Event::GuestMemoryFull(GuestMemoryFull { reason: "full".into() }),
            Event::BalloonChanged(BalloonInfo { actual: 1 << 30 }),
            Event::BalloonChange(BalloonInfo { actual: 1 << 30 }),
            Event::DeviceDeleted(DeviceDeleted { device: Some("vdb".into()), path: "vdb".into() }),
            Event::EventsLost(EventsLost { count: 3 }),
        ];
        assert_eq!(events.len(), EVENTS.len());
        for (event, (name, data)) in events.iter().zip(EVENTS) {
            let value = serde_json::to_value(event).expect("has a JSON form");
            assert_eq!(value["event"], *name);
            let sent = value.get("data").and_then(|data| data.as_object()).cloned().unwrap_or_default();
            assert_eq!(data.check(&sent, ""), Ok(()));
        }
    }
}
