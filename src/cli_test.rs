use super::*;
use crate::config::chardev::{ChardevSpec, ConsoleSpec};
use crate::config::net::{NicSpec, TapSpec};
use crate::config::rng::{RngSource, RngSpec};
use crate::config::spec::{Access, Aio, BalloonSpec, Cache, DriveSpec, IothreadSpec, KernelFormat, SerialSpec};
use crate::config::vsock::{Carrier, VsockSpec};
use crate::qos::{Limit, Limits, Quantity, Spelling};
use proptest::prelude::*;
use std::os::unix::ffi::OsStringExt;

fn parse_line(line: &str) -> Result<Command> {
    parse(line.split_whitespace().map(OsString::from))
}

#[track_caller]
fn run(line: &str) -> VmSpec {
    match parse_line(line).unwrap() {
        Command::Run(spec) => *spec,
        other => panic!("does not run: {other:?}"),
    }
}

#[track_caller]
fn refusal(line: &str) -> String {
    let error = parse_line(line).expect_err("is refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[track_caller]
fn printed(line: &str) -> String {
    match parse_line(line).unwrap() {
        Command::Print(text) => text,
        other => panic!("does not print: {other:?}"),
    }
}

#[test]
fn a_kernel_alone_makes_the_default_machine() {
    assert_eq!(run("-kernel vmlinux"), VmSpec::new("vmlinux"));
    assert_eq!(run("--kernel vmlinux"), VmSpec::new("vmlinux"));
    assert!(refusal("").starts_with("-kernel is missing"));
    assert!(refusal("-smp 2").starts_with("-kernel is missing"));
}

fn nic(id: &str, tap: &str) -> NicSpec {
    let tap = TapSpec { name: Some(tap.into()), fds: vec![], queue_pairs: 1, limits: Limits::default() };
    NicSpec { id: id.into(), tap, mac: None, iothread: None, queue_size: 256 }
}

#[test]
fn every_option_reaches_its_part_of_the_spec() {
    let line = "-name vm1 -machine microvm,dump-guest-core=off,disk-slots=3,nic-slots=2,kernel-format=flat,auto-kernel-cmdline=on -cpu host,pmu=off -smp 4 -m 1G -mem-path m -balloon deflate-on-oom=true -kernel k -initrd i -append a=b=c d \
                -rng random_file=/dev/hwrng,bytes_per_sec=1000 -object rng-random,id=r,filename=f -device vsock,id=v,guest-cid=3,uds_path=/v \
                -iothread id=io1 -drive id=vda,file=f,iothread=io1,iops=200,throttling.group=g -netdev id=n0,netdev=t0 -netdev tap,id=x,ifname=t1 \
                -device virtio-net-device,netdev=x,id=n1 -serial stdio -api-channel unix:/a \
                -qmp unix:/b,server,nowait -qmp unix:/c,server -D log -pidfile pid -freeze -no-reboot \
                -chardev socket,id=c,path=/d,server,nowait -device virtconsole,chardev=c,id=e";
    let expected = VmSpec {
        disk_slots: Some(3),
        nic_slots: Some(2),
        name: "vm1".into(),
        cpus: 4,
        memory_bytes: 1 << 30,
        dump_guest_core: false,
        mem_share: false,
        mem_path: Some("m".into()),
        kernel: "k".into(),
        kernel_format: KernelFormat::Flat,
        kernel_words: Some(true),
        pmu: false,
        initrd: Some("i".into()),
        append: "a=b=c d".into(),
        drives: vec![DriveSpec {
            iothread: Some("io1".into()),
            limits: Limits::iops(200),
            group: Some("g".into()),
            ..DriveSpec::new("vda", "f")
        }],
        nics: vec![nic("n0", "t0"), nic("n1", "t1")],
        netdevs: vec![],
        iothreads: vec![IothreadSpec { id: "io1".into() }],
        balloons: vec![BalloonSpec { deflate_on_oom: true, ..BalloonSpec::default() }],
        rngs: vec![RngSpec { source: "/dev/hwrng".into(), bytes_per_second: Some(1000), ..RngSpec::default() }],
        rng_sources: vec![RngSource { id: "r".into(), file: "f".into() }],
        chardevs: vec![ChardevSpec { id: "c".into(), path: "/d".into() }],
        consoles: vec![ConsoleSpec { id: "e".into(), chardev: "c".into() }],
        vsocks: vec![VsockSpec { id: "v".into(), cid: 3, carrier: Carrier::Sockets("/v".into()) }],
        serial: SerialSpec::Stdio,
        qmp: vec!["/a".into(), "/b".into(), "/c".into()],
        log: LogSpec::File("log".into()),
        pidfile: Some("pid".into()),
        daemonize: false,
        freeze: true,
        no_reboot: true,
        ignored: vec![],
    };
    assert_eq!(run(line), expected);
    assert_eq!(run("-kernel k -daemonize -S"), VmSpec { daemonize: true, freeze: true, ..VmSpec::new("k") });
}

/// Section 0.1 of the facts about the original: what the early versions type, and the later ones.
#[test]
fn both_spellings_of_the_original_make_the_same_machine() {
    let rows = [
        ("-iothread id=io", "-object iothread,id=io"),
        (
            "-iothread id=io -drive id=d,file=f,iothread=io,iops=200,serial=s,\
             logical_block_size=4096,physical_block_size=8192",
            "-object iothread,id=io -drive id=root,file=f,throttling.iops-total=200,format=raw,if=none \
             -device virtio-blk-device,drive=root,id=d,iothread=io,serial=s,\
             logical_block_size=4096,physical_block_size=8192",
        ),
        (
            "-iothread id=io -netdev id=n,netdev=t,mac=52:54:00:00:00:01,iothread=io,vhost=off",
            "-object iothread,id=io -netdev tap,id=host,ifname=t \
             -device virtio-net-device,netdev=host,id=n,iothread=io,mac=52:54:00:00:00:01",
        ),
        ("-balloon deflate-on-oom=true", "-device virtio-balloon-device,id=b,deflate-on-oom=true"),
        (
            "-chardev id=c,path=/p",
            "-device virtio-serial-device -chardev socket,path=/p,id=c,server,nowait -device virtconsole,chardev=c,id=c",
        ),
        ("-device vsock,id=v,guest-cid=3", "-device vhost-vsock-device,id=v,guest-cid=3"),
        (
            "-rng random_file=/dev/random,bytes_per_sec=1000",
            "-object rng-random,id=r,filename=/dev/random -device virtio-rng-device,rng=r,max-bytes=1000,period=1000",
        ),
        ("-api-channel unix:/q", "-qmp unix:/q,server,nowait"),
        ("-api-channel unix:/q", "-chardev socket,id=c,path=/q,server,nowait -mon chardev=c,id=m,mode=control"),
        ("-m 536870912", "-m 512"),
        ("-m 268435456", "-m 256"),
        // The least of later versions.
        ("-m 134217728", "-m 128"),
        ("-machine MicroVm", "-machine type=microvm,accel=kvm,usb=off -accel kvm -cpu host"),
    ];
    for (early, late) in rows {
        let [early, late] = [early, late].map(|words| run(&format!("-kernel k {words}")));
        // A source of random numbers is an object of its own there, and no part of the machine.
        assert_eq!(VmSpec { rng_sources: vec![], ..late }, early);
        assert_ne!(early, VmSpec { ignored: vec!["x".into()], ..early.clone() });
    }
}

/// What Kata Containers' driver for the original types.
#[test]
fn the_command_line_of_kata_containers_is_understood_whole() {
    let spec = run(
        "-name sandbox-1 -uuid 8dbc8a5c-e1b1-4b1c-9a30-2a1d58fa1a3e -smp 2 -m 512 -kernel vmlinux.bin -append a=b c \
         -initrd i -qmp unix:/run/q,server,nowait -D -disable-seccomp -machine type=microvm,dump-guest-core=off,mem-share=on,reboot=off \
         -drive id=drive-root,file=r.img,readonly=on,direct=off -device virtio-blk-device,drive=drive-root,id=virtio-drive-root \
         -object rng-random,id=objrng0,filename=/dev/urandom -device virtio-rng-device,rng=objrng0,id=virtio-rng0 \
         -device virtio-serial-device,id=virtio-serial0 -chardev socket,id=charconsole0,path=/run/c,server,nowait \
         -device virtconsole,chardev=charconsole0,id=virtio-console0,nr=0 \
         -device vhost-vsock-device,id=vsock-1,guest-cid=7,vhostfd=5 -netdev tap,id=tap0,fds=3:4 -device virtio-net-device,netdev=tap0,id=net0,mac=52:54:00:00:00:01",
    );
    assert_eq!((spec.name.as_str(), spec.cpus, spec.memory_bytes), ("sandbox-1", 2, 512 << 20));
    assert_eq!((spec.log.clone(), spec.mem_share, spec.dump_guest_core), (LogSpec::Stdout, true, false));
    let drive = DriveSpec::new("virtio-drive-root", "r.img");
    assert_eq!(spec.drives, [DriveSpec { access: Access::ReadOnly, cache: Cache::Buffered, ..drive }]);
    assert_eq!(spec.consoles, [ConsoleSpec { id: "virtio-console0".into(), chardev: "charconsole0".into() }]);
    assert_eq!((spec.nics[0].id.as_str(), spec.nics[0].tap.fds.as_slice()), ("net0", [3, 4].as_slice()));
    assert_eq!((spec.rngs[0].id.as_str(), spec.qmp.len()), ("virtio-rng0", 1));
    assert_eq!(spec.vsocks, [VsockSpec { id: "vsock-1".into(), cid: 7, carrier: Carrier::Kernel(Some(5)) }]);
    assert_eq!(spec.ignored, ["-uuid", "-disable-seccomp"]);
    // A device that is not here is refused by its name, with what takes its place.
    let refused = refusal("-kernel k -device vhost-user-fs-device,chardev=c,tag=t,id=f");
    assert!(refused.contains("no such type \"vhost-user-fs-device\"; accepted: a disk image"), "{refused}");
    let refused = refusal("-kernel k -device virtio-blk-pci,drive=a");
    assert!(refused.contains("accepted: virtio-blk-device: there is no PCI"), "{refused}");
}

#[test]
fn what_others_pass_to_every_monitor_is_accepted_with_its_word_and_told() {
    let spec =
        run("-nodefaults -no-user-config -nographic -display none -kernel k -rtc base=utc -append a --no-shutdown -S");
    assert_eq!(spec.ignored, ["-nodefaults", "-no-user-config", "-nographic", "-display", "-rtc", "-no-shutdown"]);
    assert_eq!(VmSpec { ignored: vec![], ..spec }, run("-kernel k -append a -S"));
    assert!(refusal("-kernel k -nographic none").contains("none"));
    assert!(refusal("-kernel k -accel tcg").ends_with("accepted: kvm"));
    assert!(refusal("-kernel k -cpu max").ends_with("accepted: host"));
    assert!(refusal("-kernel k -mon chardev=c").contains("there is no chardev \"c\""));
    assert!(
        refusal("-kernel k -machine microvm,accel=tcg").contains("\"tcg\" is no value of \"accel\"; accepted: kvm")
    );
}

#[test]
fn the_words_of_the_kernel_command_line_need_no_quotes_and_keep_every_equals_sign() {
    let spec = run("-append console=ttyS0 root=PARTUUID=1234-5 quiet -kernel k");
    assert_eq!(spec.append, "console=ttyS0 root=PARTUUID=1234-5 quiet");
    let quoted = ["-kernel", "k", "-append", "root=/dev/vda -- -x"].map(OsString::from);
    let Ok(Command::Run(spec)) = parse(quoted) else { panic!("is accepted") };
    assert_eq!(spec.append, "root=/dev/vda -- -x");
    let Ok(Command::Run(spec)) = parse(["-kernel", "k", "-append", ""].map(OsString::from)) else { panic!("is") };
    assert_eq!(spec.append, "");
}

#[test]
fn the_log_option_may_stand_without_a_file() {
    assert_eq!(run("-kernel k -D -S").log, LogSpec::Stdout);
    assert_eq!(run("-D -kernel k").log, LogSpec::Stdout);
    assert_eq!(run("-D -kernel k -serial stdio").log, LogSpec::Stderr);
    assert_eq!(run("-kernel k -log l").log, LogSpec::File("l".into()));
}

#[test]
fn a_balloon_may_stand_without_a_value_and_only_once() {
    assert_eq!(run("-kernel k -balloon -S").balloons, [BalloonSpec::default()]);
    assert_eq!(run("-balloon -kernel k").balloons, [BalloonSpec::default()]);
    let twice = refusal("-kernel k -balloon -balloon deflate-on-oom=true");
    assert_eq!(twice, "-balloon: one balloon too many; accepted: one (rule D3.5)");
    assert!(refusal("-kernel k -balloon a b").starts_with("-balloon: \"b\" is one word too many"));
}

#[test]
fn a_mistake_names_the_option_the_word_and_what_would_be_accepted() {
    for (line, text) in [
        ("vmlinux -smp 2", "\"vmlinux\": no option stands before it; accepted: -OPTION vmlinux"),
        ("-kernel", "-kernel: the value is missing; accepted: -kernel FILE"),
        ("-kernel -smp 2", "-kernel: the value is missing; accepted: -kernel FILE"),
        ("-append -kernel k", "-append: the value is missing; accepted: -append WORD..."),
        ("-kernel a b", "-kernel: \"b\" is one word too many; accepted: -kernel FILE"),
        ("-kernel k -D a b", "-D: \"b\" is one word too many; accepted: -D [FILE]"),
        ("-kernel k -daemonize yes", "-daemonize: \"yes\" is one word too many; accepted: -daemonize"),
        (
            "-kernel a --kernel b",
            "--kernel: the option is given twice, and not with the same words; give it once (the first is a)",
        ),
        ("-kernal k", "-kernal: no such option; did you mean -kernel?"),
        ("--kernel=k", "--kernel=k: the value is a word of its own; accepted: --kernel k"),
        ("-kernel k -daemonize=on", "-daemonize=on: -daemonize takes no value; accepted: -daemonize"),
        ("-kernel k -S=off", "-S=off: -S takes no value; leave it out"),
    ] {
        assert_eq!(refusal(line), text, "{line}");
    }
    for unknown in ["-incoming x", "-zz x", "-", "--", "---kernel k", "-d", "-K"] {
        let refused = refusal(&format!("-kernel k {unknown}"));
        assert!(refused.contains("no such option"), "{refused}");
    }
    let all = refusal("-zz x");
    assert!(
        all.contains("accepted: -h -help -name -machine -accel -cpu -smp -m -mem-path -kernel ")
            && all.ends_with(" -V -version")
    );
}

#[test]
fn option_given_twice_with_the_same_words_is_accepted() {
    let once = run("-kernel k -S -append a b");
    assert_eq!(run("-kernel k -S -freeze --kernel k -append a b -append a b -S"), once);
}

#[test]
fn words_of_other_monitors_are_accepted() {
    let plain = run("-kernel k -smp 4 -name web");
    for line in [
        "-kernel k -smp cpus=4,sockets=2,cores=2,threads=1 -name guest=web,debug-threads=on",
        "-kernel k -smp 4,sockets=1,dies=1,clusters=1,cores=4,threads=1,maxcpus=4 -name web,debug-threads=off",
        "-kernel k -smp sockets=1,cores=2,threads=2 -name debug-threads=on,guest=web -cpu host,pmu=on",
        "-kernel k -smp cpus=4,cores=2 -name web",
    ] {
        assert_eq!(run(line), plain, "{line}");
    }
    assert!(!run("-kernel k -cpu host,pmu=off").pmu);
    assert_eq!(run("-kernel k -name a,b=c").name, "a,b=c");
    for (line, text) in [
        (
            "-smp 4,cores=3",
            "-smp 4,cores=3: 4 CPUs are not a multiple of the 3 in the topology; leave the topology out",
        ),
        ("-smp sockets=5,cores=51", "-smp sockets=5,cores=51: the topology has 255 CPUs; use one with at most 254"),
        ("-smp sockets=2,cores=200", "-smp sockets=2,cores=200: the topology has 400 CPUs; use one with at most 254"),
        (
            "-smp 4,sockets=1,cores=2,threads=1",
            "-smp 4,sockets=1,cores=2,threads=1: the topology has 2 CPUs, and there are 4; leave the topology out",
        ),
        ("-smp 2,maxcpus=4", "-smp 2,maxcpus=4: CPUs cannot be hot-plugged; accepted: maxcpus=2"),
        (
            "-smp maxcpus=2,cores=0",
            "-smp maxcpus=2,cores=0: \"0\" is no value of \"cores\"; accepted: a number from 1 to 254",
        ),
        ("-cpu max", "-cpu max: \"max\" is no value of \"model\"; accepted: host"),
        ("-cpu host,-avx", "-cpu host,-avx: \"-avx\" is not key=value; accepted keys: model, pmu"),
        ("-name guest=x,process=y", "-name guest=x,process=y: the process keeps its name; accepted: without process="),
    ] {
        let refused = refusal(&format!("-kernel k {line}"));
        assert_eq!(refused, text);
    }
}

#[test]
fn network_of_another_kind_is_refused_with_the_kind_that_there_is() {
    for kind in ["user", "bridge,br=br0", "socket,fd=3", "vhost-user", "passt", "type=user", "stream"] {
        let refused = refusal(&format!("-kernel k -netdev {kind},id=n0"));
        let word = kind.trim_start_matches("type=").split(',').next().unwrap();
        let text = format!("-netdev {kind},id=n0: a network of the kind {word:?} is not supported; accepted: a tap");
        assert!(refused.starts_with(&text), "{refused}");
        assert!(refused.contains("-netdev tap,id=NAME,ifname=TAP") && refused.contains("ip tuntap add"), "{refused}");
    }
}

#[test]
fn an_empty_word_is_a_missing_value() {
    for option in ["-kernel", "-name", "-D", "-drive", "-pidfile"] {
        let error = parse([option, ""].map(OsString::from)).unwrap_err().to_string();
        assert!(error.starts_with(&format!("{option}: the value is missing")), "{error}");
    }
}

#[test]
fn a_word_that_is_not_utf_8_is_refused() {
    let words = [OsString::from("-kernel"), OsString::from_vec(vec![b'a', 0xff])];
    assert_eq!(parse(words).unwrap_err().to_string(), "-kernel: \"a\\xFF\" is not UTF-8; accepted: UTF-8 text");
}

#[test]
fn the_machine_is_checked_as_a_whole() {
    assert!(refusal("-kernel k -drive id=a,file=f,iothread=io1").contains("no such iothread"));
    let group = "-kernel k -drive id=a,file=f,iops=1,throttling.group=g -drive id=b,file=g,iops=2,throttling.group=g";
    assert!(refusal(group).starts_with("-drive id=b,throttling.group=g: its limits are not those of drive \"a\""));
}

#[test]
fn help_has_every_option_with_its_syntax_and_wins_over_mistakes() {
    for line in ["-h", "-help", "--help", "-bogus -h", "-kernel -h"] {
        assert_eq!(printed(line), pages::help(), "{line}");
    }
    let help = pages::help();
    for (name, syntax) in [
        ("-h, -help", ""),
        ("-name", " [guest=]TEXT"),
        ("-drive", " id=NAME,file=FILE[,readonly=on|off]"),
        ("-D, -log", " [FILE]"),
        ("-S, -freeze", ""),
        ("-V, -version", ""),
    ] {
        assert!(help.contains(&format!("\n  {name}{syntax}")), "{name}\n{help}");
    }
    assert!(!help.contains("--"), "the help shows one dash\n{help}");
}

#[test]
fn the_version_is_printed_alone() {
    assert_eq!(printed("-V"), concat!("loopvisor ", env!("CARGO_PKG_VERSION"), "\n"));
    assert_eq!(printed("-version"), printed("-V"));
}

const FORMATS: [(&str, KernelFormat); 4] = [
    ("auto", KernelFormat::Auto),
    ("bzimage", KernelFormat::Bzimage),
    ("elf", KernelFormat::Elf),
    ("flat", KernelFormat::Flat),
];

/// The command line that asks for `spec`.
fn typed(spec: &VmSpec) -> Vec<OsString> {
    let on = |yes| if yes { "on" } else { "off" };
    let mut words: Vec<String> = vec!["-kernel".into(), spec.kernel.display().to_string()];
    let mut add = |option: &str, value: String| words.extend([option.to_owned(), value]);
    add("-name", spec.name.clone());
    add("-smp", spec.cpus.to_string());
    add("-m", spec.memory_bytes.to_string());
    let (dumped, shared) = (on(spec.dump_guest_core), on(spec.mem_share));
    let format = FORMATS.iter().find(|(_, format)| *format == spec.kernel_format).unwrap().0;
    add("-machine", format!("microvm,dump-guest-core={dumped},mem-share={shared},kernel-format={format}"));
    add("-append", spec.append.clone());
    for iothread in &spec.iothreads {
        add("-iothread", format!("id={}", iothread.id));
    }
    for drive in &spec.drives {
        let mut text = format!("id={},file={}", drive.id, drive.file.display());
        text += &format!(",readonly={}", on(drive.access == Access::ReadOnly));
        text += &format!(",direct={}", on(drive.cache == Cache::Direct));
        text += &drive.serial.iter().map(|serial| format!(",serial={serial}")).collect::<String>();
        text += &drive.logical_block.iter().map(|bytes| format!(",logical_block_size={bytes}")).collect::<String>();
        text += &drive.physical_block.iter().map(|bytes| format!(",physical_block_size={bytes}")).collect::<String>();
        text += &drive.iothread.iter().map(|iothread| format!(",iothread={iothread}")).collect::<String>();
        text += match drive.aio {
            Aio::Auto => "",
            Aio::IoUring => ",aio=io_uring",
            Aio::Threads => ",aio=threads",
        };
        for (quantity, limit) in Quantity::ALL.into_iter().zip(drive.limits.each) {
            let name = Spelling::CommandLine.rate(quantity);
            text += &format!(",{name}={},{name}-max={}", limit.rate, limit.max);
            let length = limit.max_length.iter();
            text += &length.map(|length| format!(",{name}-max-length={length}")).collect::<String>();
        }
        text += &format!(",throttling.iops-size={}", drive.limits.iops_size);
        text += &drive.group.iter().map(|group| format!(",throttling.group={group}")).collect::<String>();
        add("-drive", text);
    }
    if spec.freeze {
        words.push("-S".into());
    }
    if spec.no_reboot {
        words.push("-no-reboot".into());
    }
    words.into_iter().map(OsString::from).collect()
}

prop_compose! {
    fn limit(most: u64)(rate in 0..=most)(
        rate in Just(rate),
        max in prop::option::of(rate.max(1)..=most),
        length in 1..=86_400_u64,
    ) -> Limit {
        let max = max.filter(|_| rate > 0);
        Limit { rate, max: max.unwrap_or(0), max_length: max.map(|_| length) }
    }
}

prop_compose! {
    pub(super) fn limits()(
        each in Quantity::ALL.map(|quantity| limit(quantity.most())),
        iops_size in 0..=1_u64 << 32,
    ) -> Limits {
        let iops = each[..3].iter().any(|limit| limit.rate > 0);
        Limits { each, iops_size: if iops { iops_size } else { 0 } }
    }
}

prop_compose! {
    fn drives(iothreads: usize)(
        drives in prop::collection::vec(
            (any::<[bool; 5]>(), prop::option::of("[^,]{1,5}"), prop::option::of(0..iothreads.max(1)), 0..3_usize, limits()),
            0..11)
    ) -> Vec<DriveSpec> {
        drives.into_iter().enumerate().map(|(n, ([read_only, direct, grouped, large, larger], serial, iothread, aio, limits))| DriveSpec {
            access: if read_only { Access::ReadOnly } else { Access::ReadWrite },
            cache: if direct { Cache::Direct } else { Cache::Buffered },
            serial,
            logical_block: large.then_some(4096),
            physical_block: larger.then_some(1 << 16),
            iothread: iothread.filter(|_| iothreads > 0).map(|n| format!("io{n}")),
            aio: [Aio::Auto, Aio::IoUring, Aio::Threads][aio],
            limits,
            // A group of its own, with the thread and limits that it has.
            group: grouped.then(|| format!("g{n}")),
            ..DriveSpec::new(format!("d{n}"), format!("/{n}.img"))
        }).collect()
    }
}

prop_compose! {
    pub(super) fn machine()(iothreads in 0..8_usize)(
        name in "[^-].{0,20}",
        cpus in 1..=254_u8,
        mib in 16..=524_288_u64,
        flags in any::<[bool; 4]>(),
        (_, kernel_format) in prop::sample::select(FORMATS.to_vec()),
        append in "([^- ][^ ]{0,9}( [^ ]{1,9}){0,4})?",
        iothreads in Just(iothreads),
        drives in drives(iothreads),
    ) -> VmSpec {
        let [dump_guest_core, mem_share, freeze, no_reboot] = flags;
        let iothreads = (0..iothreads).map(|n| IothreadSpec { id: format!("io{n}") }).collect();
        let memory_bytes = mib << 20;
        VmSpec { name, cpus, memory_bytes, dump_guest_core, mem_share, append, drives, iothreads, freeze, no_reboot,
            kernel_format,
            ..VmSpec::new("vmlinux") }
    }
}

/// A word that is likely to reach far into the parser.
fn word() -> impl Strategy<Value = Vec<u8>> {
    let known = ["-kernel", "-drive", "-m", "-smp", "-D", "-append", "-qmp", "-machine", "id=a,file=b", "unix:/s", "1"];
    prop_oneof![
        prop::sample::select(known.to_vec()).prop_map(|word| word.as_bytes().to_vec()),
        prop::collection::vec(prop::sample::select(b"-=,idfile0G\xff ".to_vec()), 0..12),
        any::<Vec<u8>>(),
    ]
}

proptest! {
    #[test]
    fn a_spec_typed_and_parsed_is_the_same_spec(spec in machine()) {
        prop_assert_eq!(parse(typed(&spec)).unwrap(), Command::Run(Box::new(spec)));
    }

    #[test]
    fn no_words_make_the_parser_panic_and_every_refusal_is_the_users_mistake(
        words in prop::collection::vec(word(), 0..12)
    ) {
        if let Err(error) = parse(words.into_iter().map(OsString::from_vec)) {
            prop_assert_eq!(error.exit_code(), 2);
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
