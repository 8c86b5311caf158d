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
    assert!(refusal(cpus("4,maxcpus=8")).ends_with("unknown key \"maxcpus\"; accepted keys: cpus"));
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
        ["0", "15", "15M", "513G", "549755813889", "268435457", "1T", "1kB", "G", "-1", "1 G", "17179869184G", "0x100"]
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
    for words in ["server,wait", "server=off", "server,wait=on", "server,server", "server,", "reconnect=1"] {
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
