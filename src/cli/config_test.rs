//! `-config`, `-dump-config` and `-check` on the command line: what comes first, what wins, and that what is printed is read
//! back as the same machine.

use std::fs;
use std::path::PathBuf;

use proptest::prelude::*;

use super::tests::{limits, machine};
use super::*;
use crate::config::chardev::{ChardevSpec, ConsoleSpec};
use crate::config::net::{Mac, NicSpec, TapSpec};
use crate::config::rng::{RngSource, RngSpec};
use crate::config::spec::{AutoSpec, BalloonSpec, SerialSpec};
use crate::config::vsock::{Carrier, VsockSpec};
use crate::qos::Limits;

/// A file that goes with its holder.
struct Written(PathBuf);

impl Written {
    fn new(text: &str) -> Written {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("loopvisor-config-{}-{count}.json", std::process::id()));
        fs::write(&path, text).unwrap();
        Written(path)
    }

    /// The command line of this file and `rest`.
    fn with(&self, rest: &str) -> Result<Command> {
        let words = ["-config", self.0.to_str().unwrap()].into_iter().chain(rest.split_whitespace());
        parse(words.map(OsString::from))
    }

    #[track_caller]
    fn run(&self, rest: &str) -> VmSpec {
        match self.with(rest).unwrap() {
            Command::Run(spec) => *spec,
            other => panic!("does not run: {other:?}"),
        }
    }

    #[track_caller]
    fn refusal(&self, rest: &str) -> String {
        let error = self.with(rest).expect_err("is refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string().replace(self.0.to_str().unwrap(), "x.json")
    }
}

impl Drop for Written {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

/// What a file of `text` and the line `rest` ask for together, and what one line alone does.
#[track_caller]
fn same(text: &str, rest: &str, line: &str) {
    let Command::Run(alone) = parse(line.split_whitespace().map(OsString::from)).unwrap() else {
        panic!("does not run")
    };
    assert_eq!(Written::new(text).run(rest), *alone, "{text} {rest}");
}

const FILE: &str = r#"{
    "boot-source": {"kernel_image_path": "k", "boot_args": "a", "initrd_fs_path": "i"},
    "machine-config": {"vcpu_count": 2, "mem_size": "64M", "mem_share": true, "disk_slots": 4, "mem_path": "m"},
    "name": "n", "log": "l", "pidfile": "p", "serial": {"stdio": true}, "freeze": true
}"#;

#[test]
fn a_file_alone_makes_the_machine() {
    let line = "-kernel k -append a -initrd i -smp 2 -m 64M -machine microvm,mem-share=on,disk-slots=4 -mem-path m -name n -D l \
                -pidfile p -serial stdio -S";
    same(FILE, "", line);
}

#[test]
fn single_options_replace_what_the_file_says() {
    let rest = "-kernel k2 -append b -initrd i2 -smp 3 -m 65M -machine mem-share=off,disk-slots=5 -mem-path m2 -name n2 -D l2 \
                -pidfile p2 -no-reboot";
    let line = "-kernel k2 -append b -initrd i2 -smp 3 -m 65M -machine disk-slots=5 -mem-path m2 -name n2 -D l2 -pidfile p2 \
                -serial stdio -S -no-reboot";
    same(FILE, rest, line);
    assert_eq!(Written::new(FILE).run("-D").log, LogSpec::Stderr);
    let spec = Written::new(FILE).run("-machine microvm");
    assert_eq!((spec.mem_share, spec.disk_slots), (true, Some(4)), "what -machine does not say stays");
}

#[test]
fn things_of_which_there_is_one_are_replaced_too() {
    let file = r#"{"balloon": {"deflate_on_oom": true}, "rng": {}, "vsock": {"vsock_id": "v", "guest_cid": 3, "uds_path": "/v"}}"#;
    let all = "-kernel k -balloon deflate-on-oom=on -rng -device vsock,id=v,guest-cid=3,uds_path=/v";
    same(file, "-kernel k", all);
    for (rest, line) in [
        ("-balloon auto=on,floor=64M", "-balloon auto=on,floor=64M -rng -device vsock,id=v,guest-cid=3,uds_path=/v"),
        (
            "-rng bytes_per_sec=64",
            "-balloon deflate-on-oom=on -rng bytes_per_sec=64 -device vsock,id=v,guest-cid=3,uds_path=/v",
        ),
        (
            "-device vsock,id=w,guest-cid=4,uds_path=/w",
            "-balloon deflate-on-oom=on -rng -device vsock,id=w,guest-cid=4,uds_path=/w",
        ),
    ] {
        same(file, &format!("-kernel k {rest}"), &format!("-kernel k {line}"));
    }
    let twice = Written::new(file).refusal("-kernel k -balloon -balloon");
    assert!(twice.contains("one balloon too many"), "{twice}");
}

#[test]
fn lists_add_to_those_of_the_file() {
    let file = r#"{
        "boot-source": {"kernel_image_path": "k"},
        "drive": [{"drive_id": "a", "path_on_host": "a"}], "iothread": [{"id": "io1"}],
        "net": [{"iface_id": "n", "host_dev_name": "t"}], "console": [{"console_id": "c", "socket_path": "/c"}],
        "qmp": ["/q"], "rng_source": [{"id": "r", "filename": "f"}]
    }"#;
    let rest = "-drive id=b,file=b,iothread=io1 -iothread id=io2 -netdev id=m,netdev=u,iothread=io2 -chardev id=d,path=/d \
                -qmp unix:/r,server -device virtio-rng-device,rng=r";
    let line = "-kernel k -drive id=a,file=a -iothread id=io1 -netdev id=n,netdev=t -chardev id=c,path=/c -qmp unix:/q,server \
                -object rng-random,id=r,filename=f";
    same(file, rest, &format!("{line} {rest}"));
    for (twice, sentence) in [
        ("-drive id=a,file=x", "-drive id=a: another drive has this id"),
        ("-iothread id=io1", "-iothread id=io1: another iothread has this id"),
        ("-netdev id=n,netdev=x", "-netdev id=n: another NIC has this id"),
        ("-chardev id=c,path=/x", "-chardev id=c: another chardev has this id"),
        ("-qmp unix:/q,server", "-qmp unix:/q: -qmp, -api-channel or a vsock has this socket already"),
    ] {
        let refused = Written::new(file).refusal(twice);
        assert!(refused.starts_with(&format!("-config x.json with the rest of the line: {sentence}")), "{refused}");
    }
}

#[test]
fn rule_d1_2_the_iothreads_of_the_file_and_of_the_line_are_eight_together() {
    let iothreads: Vec<String> = (0..5).map(|n| format!(r#"{{"id": "f{n}"}}"#)).collect();
    let file = Written::new(&format!(r#"{{"iothread": [{}]}}"#, iothreads.join(",")));
    let rest = |count| (0..count).map(|n| format!(" -iothread id=l{n}")).collect::<String>();
    assert_eq!(file.run(&format!("-kernel k{}", rest(3))).iothreads.len(), 8);
    let refused = file.refusal(&format!("-kernel k{}", rest(4)));
    assert!(refused.contains("-iothread id=l3: one iothread too many") && refused.contains("rule D1.2"), "{refused}");
}

#[test]
fn the_kernel_may_stand_in_either_and_must_in_one() {
    let file = Written::new("{}");
    assert_eq!(file.run("-kernel k"), VmSpec::new("k"));
    assert!(
        file.refusal("").starts_with("-kernel is missing; accepted: -kernel FILE, or kernel_image_path in the file")
    );
}

#[test]
fn the_file_may_be_a_pipe() {
    let (mut near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut near, br#"{"boot-source": {"kernel_image_path": "k"}}"#).unwrap();
    drop(near);
    let pipe = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&far));
    // A socket cannot be opened anew, so its text comes through a pipe that can.
    assert!(parse(["-config", &pipe].map(OsString::from)).is_err());
    let (from, mut to) = std::io::pipe().unwrap();
    std::io::Write::write_all(&mut to, br#"{"boot-source": {"kernel_image_path": "k"}}"#).unwrap();
    drop(to);
    let pipe = format!("/dev/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&from));
    assert_eq!(parse(["-config", &pipe].map(OsString::from)).unwrap(), Command::Run(Box::new(VmSpec::new("k"))));
}

#[test]
fn what_is_asked_for_is_run_checked_or_printed() {
    let file = Written::new(FILE);
    let spec = file.run("");
    assert_eq!(file.with("-check").unwrap(), Command::Check(Box::new(spec.clone())));
    assert_eq!(file.with("-dump-config").unwrap(), Command::Print(dump(&spec)));
    assert!(file.refusal("-dump-config -check").ends_with("accepted: one of the two"));
    assert!(file.refusal("-check -smp 255").contains("\"255\""));
}

#[test]
fn every_option_comes_back_from_what_is_printed() {
    for rest in [
        "-name vm1 -smp 4 -m 1G -initrd i -append a=b=c \"d\" -S -no-reboot -D l -pidfile p",
        "-machine microvm,dump-guest-core=off,mem-share=on,disk-slots=3,nic-slots=1 -mem-path m",
        "-machine disk-slots=0,nic-slots=0,auto-kernel-cmdline=on,reboot=off",
        "-drive id=a,file=/a=b,readonly=on,direct=off,serial=7,aio=threads,iops=200 -drive id=b,file=b,aio=io_uring",
        "-iothread id=io1 -drive id=a,file=a,iothread=io1,throttling.group=g,throttling.iops-read=5,throttling.iops-read-max=9",
        "-drive id=a,file=a,throttling.bps-total=1M,throttling.bps-total-max=2M,throttling.bps-total-max-length=60",
        "-drive id=a,file=a,throttling.iops-write=7,throttling.iops-size=64K",
        "-drive id=a,file=a,logical_block_size=4096,physical_block_size=4096",
        "-netdev id=n,netdev=t,mac=52:54:00:12:34:56,queues=4,queue-size=1024,throttling.pps-write=5",
        "-netdev id=n,netdev=t,fds=5:6 -netdev id=m,fds=7",
        "-netdev tap,id=x,ifname=t -device virtio-net-device,netdev=x,id=n,mq=off",
        "-balloon",
        "-balloon deflate-on-oom=on,free-page-reporting=off,auto=on,floor=1G,pressure=/p -m 2G",
        "-rng",
        "-rng random_file=/dev/hwrng,bytes_per_sec=64",
        "-object rng-random,id=r,filename=f -device virtio-rng-device,rng=r,id=x,max-bytes=1024,period=1000",
        "-chardev id=c,path=/c -chardev socket,id=d,path=/d,server,nowait -device virtconsole,chardev=d,id=e",
        "-device vsock,id=v,guest-cid=4294967294,uds_path=/v",
        "-device vhost-vsock-device,id=v,guest-cid=3,vhostfd=7",
        "-object iothread,id=io -drive id=d,file=f -device virtio-blk-device,drive=d,id=e,iothread=io,serial=s",
        "-machine microvm,kernel-format=flat,auto-kernel-cmdline=off -device virtio-balloon-device,deflate-on-oom=on",
        "-serial stdio -api-channel unix:/a -qmp unix:/b,server",
        "-daemonize",
    ] {
        let line = format!("-kernel k {rest}");
        let Command::Run(spec) = parse(line.split_whitespace().map(OsString::from)).unwrap() else { panic!("{line}") };
        assert_eq!(Written::new(&dump(&spec)).run(""), *spec, "{line}");
    }
}

/// A text that a file can hold and a command line could.
fn any_text() -> impl Strategy<Value = String> {
    "[^\0]{1,12}"
}

fn carrier() -> impl Strategy<Value = Carrier> {
    prop_oneof![Just(Carrier::Sockets("/v".into())), prop::option::of(0..=i32::MAX).prop_map(Carrier::Kernel),]
}

prop_compose! {
    fn nics()(nics in prop::collection::vec(
        (prop::option::of(any::<[u8; 6]>()), 1..=16_u16, 8..=12_u32, any::<bool>(), limits()), 0..2)
    ) -> Vec<NicSpec> {
        nics.into_iter().enumerate().map(|(n, (mac, queue_pairs, size, handed, limits))| NicSpec {
            id: format!("n{n}"),
            tap: TapSpec {
                name: (!handed).then(|| format!("t{n}")),
                fds: if handed { (0..queue_pairs).map(|fd| (n as i32) * 100 + i32::from(fd)).collect() } else { vec![] },
                queue_pairs,
                // Only a drive has it.
                limits: Limits { iops_size: 0, ..limits },
            },
            mac: mac.map(|mac| Mac([mac[0] & 0xfe | 2, mac[1], mac[2], mac[3], mac[4], mac[5]])),
            iothread: None,
            queue_size: 1 << size,
        }).collect()
    }
}

prop_compose! {
    /// A machine with everything that one can have, but for most of the drives.
    fn whole()(
        spec in machine(),
        nics in nics(),
        balloon in prop::option::of((any::<[bool; 2]>(), prop::option::of((32..=16_384_u64, any_text())))),
        rng in prop::option::of((any_text(), any_text(), prop::option::of(64..=1_000_000_000_u64))),
        sources in prop::collection::vec(any_text(), 0..3),
        consoles in prop::collection::vec((any_text(), any::<bool>()), 0..2),
        reversed in any::<bool>(),
        vsock in prop::option::of((any_text(), 3..u32::MAX, carrier())),
        qmp in prop::collection::vec(any_text(), 0..3),
        [initrd, mem_path, log, pidfile] in [(); 4].map(|()| prop::option::of(any_text())),
        slots in prop::option::of(0..=6_usize),
        serial in any::<bool>(),
    ) -> VmSpec {
        let consoles: Vec<_> = consoles.into_iter().enumerate().collect();
        let chardevs = consoles.iter().map(|(n, (path, _))| ChardevSpec { id: format!("c{n}"), path: format!("/c{n}{path}").into() });
        let mut chardevs: Vec<_> = chardevs.collect();
        if reversed {
            chardevs.reverse();
        }
        let consoles = consoles.into_iter().map(|(n, (_, own))| {
            ConsoleSpec { id: if own { format!("c{n}") } else { format!("d{n}") }, chardev: format!("c{n}") }
        });
        let mut spec = VmSpec {
            nics,
            balloons: balloon.into_iter().map(|([deflate_on_oom, free_page_reporting], auto)| BalloonSpec {
                deflate_on_oom,
                free_page_reporting,
                auto: auto.map(|(mib, file)| AutoSpec { floor_bytes: mib << 20, pressure: file.into() }),
            }).collect(),
            rngs: rng.into_iter().map(|(id, source, bytes_per_second)| RngSpec { id, source: source.into(), bytes_per_second }).collect(),
            rng_sources: sources.into_iter().enumerate().map(|(n, file)| RngSource { id: format!("r{n}"), file: file.into() }).collect(),
            consoles: consoles.collect(),
            chardevs,
            vsocks: vsock.into_iter().map(|(id, cid, carrier)| VsockSpec { id, cid, carrier }).collect(),
            qmp: qmp.into_iter().enumerate().map(|(n, path)| format!("/q{n}{path}").into()).collect(),
            initrd: initrd.map(Into::into),
            mem_path: mem_path.map(Into::into),
            log: log.map_or(LogSpec::Stderr, |log| LogSpec::File(log.into())),
            pidfile: pidfile.map(Into::into),
            nic_slots: slots,
            serial: if serial { SerialSpec::Stdio } else { SerialSpec::None },
            daemonize: !serial,
            ..spec
        };
        spec.drives.truncate(3);
        // No word of a command line has a zero byte, and a file refuses one.
        spec.name.retain(|c| c != '\0');
        spec.append.retain(|c| c != '\0');
        for drive in &mut spec.drives {
            drive.serial = drive.serial.take().map(|serial| serial.replace('\0', "0"));
        }
        spec
    }
}

proptest! {
    #[test]
    fn any_machine_comes_back_from_what_is_printed(spec in whole()) {
        let mut read = VmSpec::new("");
        file::read(&Text::new("x.json", dump(&spec).into_bytes()).unwrap(), &mut read).unwrap();
        prop_assert_eq!(read, spec);
    }
}
