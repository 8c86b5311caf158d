use super::*;

/// The error that `result` is: a mistake of the user's, as text.
#[track_caller]
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
    let error = result.expect_err("is refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn the_machine_type_is_microvm_in_any_case_with_or_without_its_key() {
    for text in ["microvm", "MicroVm", "type=MicroVM", "dump-guest-core=on,type=microvm"] {
        let mut spec = VmSpec::new("k");
        machine(text, &mut spec).unwrap();
        assert_eq!(spec, VmSpec::new("k"), "{text}");
    }
    let refused = refusal(machine("q35", &mut VmSpec::new("k")));
    assert_eq!(refused, "-machine q35: \"q35\" is no value of \"type\"; accepted: microvm");
}

#[test]
fn the_machine_properties_are_written_into_the_spec() {
    let mut spec = VmSpec::new("k");
    machine("microvm,dump-guest-core=off,mem-share=on", &mut spec).unwrap();
    assert_eq!(spec, VmSpec { dump_guest_core: false, mem_share: true, ..VmSpec::new("k") });
}

#[test]
fn vcpus_are_1_to_254() {
    assert_eq!(cpus("1").unwrap(), 1);
    assert_eq!(cpus("cpus=254").unwrap(), 254);
    for text in ["0", "255", "256", "-1", "+1", "1.5", "four", "18446744073709551617"] {
        let refused = refusal(cpus(text));
        assert!(refused.contains(text) && refused.ends_with("accepted: a number from 1 to 254"), "{refused}");
    }
    assert!(refusal(cpus("4,maxcpus=8")).ends_with("CPUs cannot be hot-plugged; accepted: maxcpus=4"));
}

#[test]
fn memory_without_a_unit_is_mib_below_1048576_and_bytes_from_there_up() {
    for (text, bytes) in [
        ("16", 16 << 20),
        ("524288", 512 << 30),
        ("16777216", 16 << 20),
        ("size=268435456", 256 << 20),
        ("549755813888", 512 << 30),
    ] {
        assert_eq!(memory_bytes(text).unwrap(), bytes, "{text}");
    }
    // 1048575 is MiB and far too much; 1048576 is one MiB and too little.
    refusal(memory_bytes("1048575"));
    refusal(memory_bytes("1048576"));
}

#[test]
fn memory_units_are_mib_and_gib() {
    for text in ["1024m", "1024M", "1024MiB", "1g", "1G", "1GiB", "size=1G"] {
        assert_eq!(memory_bytes(text).unwrap(), 1 << 30, "{text}");
    }
}

#[test]
fn memory_outside_its_limits_or_not_in_whole_mib_is_refused() {
    for text in
        ["0", "15", "15M", "513G", "549755813889", "268435457", "1T", "1kB", "G", "-1", "1 G", "17179869185G", "0x100"]
    {
        let refused = refusal(memory_bytes(text));
        assert!(refused.starts_with(&format!("-m {text}: ")) && refused.contains("16M to 512G"), "{refused}");
    }
}

#[test]
fn a_drive_of_id_and_file_is_writable_direct_and_served_by_the_main_loop() {
    assert_eq!(drive("id=vda,file=/a b.img").unwrap(), DriveSpec::new("vda", "/a b.img"));
    let drive = drive("file=x,id=y").unwrap();
    assert_eq!((drive.access, drive.cache, drive.aio), (Access::ReadWrite, Cache::Direct, Aio::Auto));
}

#[test]
fn every_property_of_a_drive_is_read() {
    let text =
        "id=a,file=f,readonly=true,direct=no,serial=01234567890123456789,iothread=io,aio=threads,format=raw,if=none";
    let expected = DriveSpec {
        access: Access::ReadOnly,
        cache: Cache::Buffered,
        serial: Some("01234567890123456789".into()),
        iothread: Some("io".into()),
        aio: Aio::Threads,
        ..DriveSpec::new("a", "f")
    };
    assert_eq!(drive(text).unwrap(), expected);
    assert_eq!(drive("id=a,file=f,aio=io_uring").unwrap().aio, Aio::IoUring);
    assert_eq!(drive("id=a,file=f,aio=native").unwrap().aio, Aio::Auto);
}

#[test]
fn a_drive_without_id_or_file_or_with_a_wrong_property_is_refused() {
    for (text, about) in [
        ("id=a", "key \"file\" is missing"),
        ("file=f", "key \"id\" is missing"),
        ("id=a,file=f,readonly=maybe", "accepted: on, yes, true, off, no, false"),
        ("id=a,file=f,serial=012345678901234567890", "accepted: text of at most 20 bytes"),
        ("id=a,file=f,serial=äöüäöüäöüäö", "accepted: text of at most 20 bytes"),
        ("id=a,file=f,aio=off", "accepted: io_uring, threads, native"),
        ("id=a,file=f,logical_block_size=1024", "accepted: 512, 4096"),
        ("id=a,file=f,logical_block_size=4k", "accepted: 512, 4096"),
        ("id=a,file=f,physical_block_size=256", "a power of two from 512 to 2097152"),
        ("id=a,file=f,physical_block_size=4194304", "a power of two from 512 to 2097152"),
        ("id=a,file=f,physical_block_size=3000", "a power of two from 512 to 2097152"),
        ("id=a,file=f,format=qcow2", "accepted: raw"),
        ("id=a,file=f,if=virtio", "accepted: none"),
        ("id=a,file=f,readonyl=on", "did you mean \"readonly\"?"),
        ("a,file=f", "\"a\" is not key=value"),
    ] {
        let refused = refusal(drive(text));
        assert!(refused.starts_with(&format!("-drive {text}: ")) && refused.contains(about), "{refused}");
    }
    refusal(drive(&format!("id={},file=f", "i".repeat(256))));
    refusal(drive(&format!("id=a,file={}", "f".repeat(4096))));
    drive(&format!("id={},file={}", "ä".repeat(255), "f".repeat(4095))).unwrap();
}

#[test]
fn rule_d1_7_an_iothread_is_its_id() {
    assert_eq!(iothread("id=iothread1").unwrap().id, "iothread1");
    for text in ["iothread1", "id=", "name=a", "id=a,id=b"] {
        assert!(refusal(iothread(text)).starts_with(&format!("-iothread {text}: ")));
    }
    refusal(iothread(&format!("id={}", "i".repeat(256))));
}

#[test]
fn the_serial_port_goes_to_stdio_only() {
    assert_eq!(serial("stdio").unwrap(), SerialSpec::Stdio);
    assert_eq!(refusal(serial("pty")), "-serial pty: \"pty\" is not accepted; accepted: stdio");
}

#[test]
fn a_management_socket_is_a_unix_socket_that_the_monitor_listens_on() {
    for text in ["unix:/s,server,nowait", "unix:/s,server", "unix:/s,server=on,wait=off", "unix:/s,nowait,server"] {
        assert_eq!(qmp(text).unwrap(), PathBuf::from("/s"), "{text}");
        assert_eq!(api_channel(text).unwrap(), PathBuf::from("/s"), "{text}");
    }
    assert_eq!(api_channel("unix:/a=b.sock").unwrap(), PathBuf::from("/a=b.sock"));
    assert!(refusal(qmp("unix:/s")).contains("\"server\" is missing"));
    for text in ["tcp:127.0.0.1:4444,server,nowait", "/s", "UNIX:/s", "file:/s"] {
        assert!(refusal(qmp(text)).contains("accepted: unix:PATH,server,nowait"));
        assert!(refusal(api_channel(text)).starts_with(&format!("-api-channel {text}: ")));
    }
    for words in ["server,wait", "server=off", "server,wait=on", "server,server=off", "server,", "reconnect=1"] {
        refusal(qmp(&format!("unix:/s,{words}")));
    }
}

#[test]
fn the_path_of_a_socket_has_at_most_107_bytes() {
    let path = "s".repeat(107);
    assert_eq!(api_channel(&format!("unix:{path}")).unwrap(), PathBuf::from(&path));
    let refused = refusal(api_channel(&format!("unix:{path}s")));
    assert!(refused.ends_with("the socket's path has 108 bytes; accepted: 1 to 107"), "{refused}");
    refusal(api_channel("unix:"));
}

#[test]
fn names_and_paths_have_a_longest_length() {
    assert_eq!(name(&"ä".repeat(255)).unwrap().chars().count(), 255);
    assert_eq!(refusal(name(&"n".repeat(256))), "-name: the name has 256 characters; accepted: 1 to 255");
    assert_eq!(file("-D", "log").unwrap(), PathBuf::from("log"));
    assert_eq!(refusal(file("-D", &"f".repeat(4096))), "-D: the path has 4096 bytes; accepted: 1 to 4095");
}

/// The limits that `words` ask for.
#[track_caller]
fn limited(words: &str) -> Limits {
    drive(&format!("id=a,file=f,{words}")).unwrap().limits
}

/// The sentence that refuses `words`, without the option and the text before it.
#[track_caller]
fn refused_limits(words: &str) -> String {
    let text = format!("id=a,file=f,{words}");
    let refused = refusal(drive(&text));
    let sentence = refused.strip_prefix(&format!("-drive {text}: "));
    sentence.unwrap_or_else(|| panic!("{refused:?} does not begin with what was typed")).to_owned()
}

fn limits_of(quantity: Quantity, limit: Limit) -> Limits {
    let mut limits = Limits::default();
    limits.each[quantity as usize] = limit;
    limits
}

#[test]
fn rule_d2_3_iops_are_0_to_1000000_and_0_is_no_limit() {
    for (iops, rate) in [("0", 0), ("1", 1), ("200", 200), ("0007", 7), ("1000000", 1_000_000)] {
        assert_eq!(limited(&format!("iops={iops}")), Limits::iops(rate));
        assert_eq!(limited(&format!("throttling.iops-total={iops}")), Limits::iops(rate));
    }
    assert!(limited("iops=0").is_none());
    for key in ["iops", "throttling.iops-total", "throttling.iops-read", "throttling.iops-write-max"] {
        for wrong in ["1000001", "18446744073709551615", "18446744073709551616", "-1", "+1", "1.5", "1e3", "1K", "abc"]
        {
            let refused = refused_limits(&format!("{key}={wrong}"));
            assert_eq!(refused, format!("{wrong:?} is no value of {key:?}; accepted: a number from 0 to 1000000"));
        }
        assert!(refused_limits(&format!("{key}=")).ends_with(&format!("is missing; accepted: {key}=value")));
        let twice = format!("key {key:?} is given twice, as \"1\" and as \"2\"; give it once");
        assert_eq!(refused_limits(&format!("{key}=1,{key}=2")), twice);
    }
}

#[test]
fn rule_d2_6_a_drive_takes_iops_and_has_no_limit_without() {
    assert_eq!(
        drive("id=a,file=f,iops=200").unwrap(),
        DriveSpec { limits: Limits::iops(200), ..DriveSpec::new("a", "f") }
    );
    assert!(drive("id=a,file=f").unwrap().limits.is_none());
}

#[test]
fn the_two_spellings_of_iops_exclude_each_other_even_if_equal() {
    for (short, long) in [(1, 2), (5, 5), (0, 0), (0, 5)] {
        for words in
            [format!("iops={short},throttling.iops-total={long}"), format!("throttling.iops-total={long},iops={short}")]
        {
            let sentence = "\"iops\" and \"throttling.iops-total\" are one limit; accepted: one of the two";
            assert_eq!(refused_limits(&words), sentence, "{words}");
        }
    }
}

#[test]
fn every_quantity_has_a_rate_a_burst_and_a_length_of_its_own() {
    for quantity in Quantity::ALL {
        let name = Spelling::CommandLine.rate(quantity);
        let limit = Limit { rate: 100, max: 300, max_length: Some(60) };
        let words = format!("{name}=100,{name}-max=300,{name}-max-length=60");
        assert_eq!(limited(&words), limits_of(quantity, limit));
    }
    for key in throttling_keys() {
        assert!(refused_limits(&format!("{key}=")).contains("is missing"), "{key}");
    }
    assert_eq!(throttling_keys().len(), 20);
}

#[test]
fn a_burst_lasts_a_second_unless_more_is_said_and_zero_is_no_burst() {
    let limit = |max, max_length| limits_of(Quantity::Iops, Limit { rate: 100, max, max_length });
    assert_eq!(limited("iops=100,throttling.iops-total-max=100"), limit(100, Some(1)));
    let told = limited("iops=100,throttling.iops-total-max=200,throttling.iops-total-max-length=1");
    assert_eq!(told, limited("throttling.iops-total=100,throttling.iops-total-max=200"));
    let words = "iops=100,throttling.iops-total-max=200,throttling.iops-total-max-length=86400";
    assert_eq!(limited(words), limit(200, Some(86_400)));
    assert_eq!(limited("iops=100,throttling.iops-total-max=0"), limit(0, None));
    assert!(limited("iops=0,throttling.iops-total-max=0").is_none());
}

#[test]
fn bytes_are_plain_or_in_powers_of_1024() {
    for (text, bytes) in [
        ("0", 0),
        ("1", 1),
        ("1000000000000000", MAX_BPS),
        ("64K", 65_536),
        ("10M", 10_485_760),
        ("3G", 3_221_225_472),
        ("931322G", 931_322 << 30),
    ] {
        for quantity in [Quantity::Bps, Quantity::BpsRead, Quantity::BpsWrite] {
            let words = format!("{}={text}", Spelling::CommandLine.rate(quantity));
            assert_eq!(limited(&words), limits_of(quantity, Limit { rate: bytes, ..Limit::default() }), "{words}");
        }
        let limits = limited(&format!("iops=1,throttling.iops-size={text}"));
        assert_eq!(limits, Limits { iops_size: bytes, ..Limits::iops(1) });
    }
    for key in ["throttling.bps-total", "throttling.bps-read-max", "throttling.iops-size"] {
        for wrong in [
            "1000000000000001",
            "931323G",
            "18446744073709551615",
            "18446744073709551616",
            "17179869185G",
            "-1",
            "1.5",
            "1.5M",
            "abc",
            "K",
            "1k",
            "1KB",
            "1KiB",
            "1T",
            "1M1",
            "0x10",
        ] {
            let refused = refused_limits(&format!("iops=1,{key}={wrong}"));
            assert_eq!(
                refused,
                format!(
                    "{wrong:?} is no value of {key:?}; accepted: a number of bytes from 0 to 1000000000000000, written \
                     65536, 64K, 10M or 1G (powers of 1024)"
                )
            );
        }
    }
}

#[test]
fn totals_and_directions_may_be_limited_together() {
    let limits = limited("iops=300,throttling.iops-read=200,throttling.iops-write=200,throttling.bps-total=1M");
    let rates = limits.each.map(|limit| limit.rate);
    assert_eq!(rates, [300, 200, 200, 1 << 20, 0, 0]);
}

#[test]
fn limits_that_contradict_themselves_are_refused_with_what_would_do() {
    let length = "a number of seconds from 1 to 86400";
    for (words, sentence) in [
        (
            "throttling.iops-total-max=5",
            "throttling.iops-total-max allows a burst over throttling.iops-total, which is not limited; accepted: both, or neither".to_owned(),
        ),
        (
            "iops=0,throttling.iops-total-max=5",
            "throttling.iops-total-max allows a burst over throttling.iops-total, which is not limited; accepted: both, or neither".to_owned(),
        ),
        (
            "throttling.bps-read=1M,throttling.bps-write-max=2M",
            "throttling.bps-write-max allows a burst over throttling.bps-write, which is not limited; accepted: both, or neither".to_owned(),
        ),
        (
            "iops=100,throttling.iops-total-max=99",
            "throttling.iops-total-max is 99 and lower than throttling.iops-total, which is 100; accepted: at least 100".to_owned(),
        ),
        (
            "iops=100,throttling.iops-total-max-length=5",
            "throttling.iops-total-max-length says how long a burst lasts, and throttling.iops-total-max allows none; accepted: both, or \
             neither"
                .to_owned(),
        ),
        (
            "throttling.bps-total-max-length=1",
            "throttling.bps-total-max-length says how long a burst lasts, and throttling.bps-total-max allows none; accepted: both, or neither"
                .to_owned(),
        ),
        (
            "iops=1,throttling.iops-total-max=2,throttling.iops-total-max-length=0",
            format!("\"0\" is no value of \"throttling.iops-total-max-length\"; accepted: {length}"),
        ),
        (
            "iops=1,throttling.iops-total-max=2,throttling.iops-total-max-length=86401",
            format!("\"86401\" is no value of \"throttling.iops-total-max-length\"; accepted: {length}"),
        ),
        (
            "throttling.iops-size=4096",
            "throttling.iops-size says how many requests a large one is, and none are limited; accepted: with throttling.iops-total, \
             throttling.iops-read or throttling.iops-write"
                .to_owned(),
        ),
    ] {
        assert_eq!(refused_limits(words), sentence, "{words}");
    }
    refused_limits("throttling.bps-total=1M,throttling.iops-size=4096");
    for iops in ["iops", "throttling.iops-total", "throttling.iops-read", "throttling.iops-write"] {
        assert_eq!(limited(&format!("{iops}=1,throttling.iops-size=4K")).iops_size, 4096);
    }
}

#[test]
fn limits_of_any_origin_are_checked_for_what_an_option_cannot_say() {
    let one =
        |quantity, rate, max, max_length| limits_of(quantity, Limit { rate, max, max_length }).check(Spelling::Qmp);
    let refused = |quantity, rate, max, max_length| one(quantity, rate, max, max_length).unwrap_err();
    assert_eq!(Limits::default().check(Spelling::Qmp), Ok(()));
    assert_eq!(refused(Quantity::IopsRead, 1_000_001, 0, None), "iops_rd is 1000001; accepted: 0 to 1000000");
    assert_eq!(refused(Quantity::Iops, 1, 1_000_001, None), "iops_max is 1000001; accepted: 0 to 1000000");
    assert_eq!(
        refused(Quantity::Bps, MAX_BPS + 1, 0, None),
        "bps is 1000000000000001; accepted: 0 to 1000000000000000"
    );
    for length in [0, 86_401, u64::MAX] {
        let sentence = format!("bps_wr_max_length is {length}; accepted: 1 to 86400 seconds");
        assert_eq!(refused(Quantity::BpsWrite, 1, 1, Some(length)), sentence);
    }
    for quantity in Quantity::ALL {
        let most = quantity.most();
        assert_eq!(one(quantity, most, most, Some(86_400)), Ok(()));
        assert_eq!(one(quantity, 1, most, None), Ok(()));
    }
    let size = |iops_size| Limits { iops_size, ..Limits::iops(1) }.check(Spelling::Qmp);
    assert_eq!(size(MAX_BPS), Ok(()));
    assert_eq!(size(MAX_BPS + 1).unwrap_err(), "iops_size is 1000000000000001; accepted: 0 to 1000000000000000");
}

#[test]
fn a_drive_may_be_of_a_group() {
    assert_eq!(drive("id=a,file=f").unwrap().group, None);
    let drive_of = |group: &str| drive(&format!("id=a,file=f,throttling.group={group}"));
    assert_eq!(drive_of("g1").unwrap().group.as_deref(), Some("g1"));
    drive_of(&"ä".repeat(255)).unwrap();
    assert!(refusal(drive_of(&"g".repeat(256))).ends_with("accepted: NAME (1 to 255 characters)"));
    assert!(refusal(drive_of("")).contains("the value of \"throttling.group\" is missing"));
}

#[test]
fn an_unknown_key_is_answered_with_the_keys_of_its_family() {
    let own = "accepted keys: id, file, readonly, direct, serial, logical_block_size, \
               physical_block_size, iothread, aio, format, if, iops, throttling.KEY";
    assert!(refused_limits("size=1").ends_with(own));
    assert!(refused_limits("iops.total=1").ends_with(own));
    let refused = refused_limits("throttling.iops-totl=1");
    assert!(refused.contains("did you mean \"throttling.iops-total\"?"), "{refused}");
    assert!(refused.ends_with(&format!("accepted keys: {}", throttling_keys().join(", "))), "{refused}");
    assert!(refused_limits("throttling.q").ends_with(&throttling_keys().join(", ")));
}

#[test]
fn rule_d3_6_a_balloon_deflates_on_oom_if_asked_and_reports_free_pages_unless_asked_not_to() {
    assert_eq!(balloon("").unwrap(), BalloonSpec { deflate_on_oom: false, free_page_reporting: true, auto: None });
    for (text, deflate_on_oom, free_page_reporting) in [
        ("deflate-on-oom=true", true, true),
        ("deflate-on-oom=false", false, true),
        ("free-page-reporting=off,deflate-on-oom=on", true, false),
        ("auto=off", false, true),
    ] {
        let expected = BalloonSpec { deflate_on_oom, free_page_reporting, auto: None };
        assert_eq!(balloon(text).unwrap(), expected, "{text}");
    }
    assert!(refusal(balloon("deflate-on-oom=1")).contains("\"1\" is no value of \"deflate-on-oom\""));
    assert!(refusal(balloon("deflate_on_oom=on")).contains("did you mean \"deflate-on-oom\"?"));
    assert!(refusal(balloon("true")).contains("accepted keys: deflate-on-oom"));
}

#[test]
fn an_automatic_balloon_has_a_floor_and_its_words_mean_nothing_without_it() {
    let auto = |floor_bytes, pressure: &str| Some(AutoSpec { floor_bytes, pressure: pressure.into() });
    assert_eq!(balloon("auto=on,floor=512M").unwrap().auto, auto(512 << 20, "/proc/pressure/memory"));
    assert_eq!(balloon("floor=1G,pressure=/a=b,auto=yes").unwrap().auto, auto(1 << 30, "/a=b"));
    assert!(refusal(balloon("auto=on")).contains("accepted: floor=the memory that the guest keeps, from 32M up"));
    for text in ["auto=on,floor=31M", "auto=on,floor=512", "auto=on,floor=1.5G", "auto=on,floor=18446744073709551615G"]
    {
        assert!(refusal(balloon(text)).contains("is no value of \"floor\""), "{text}");
    }
    for text in ["floor=512M", "pressure=/p", "auto=off,floor=512M"] {
        assert!(refusal(balloon(text)).ends_with("accepted: with auto=on"), "{text}");
    }
}
