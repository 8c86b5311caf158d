use super::*;
use crate::qos::Quantity;

fn try_read(netdev: &str, device: Option<&str>) -> Result<VmSpec> {
    let mut spec = VmSpec::new("k");
    super::netdev(netdev, &mut spec)?;
    if let Some(text) = device {
        super::device(text, &mut spec)?;
    }
    Ok(spec)
}

fn read(text: &str) -> NicSpec {
    let mut spec = try_read(text, None).unwrap();
    assert!(spec.netdevs.is_empty());
    spec.nics.remove(0)
}

#[track_caller]
fn refusal(text: &str) -> String {
    try_read(text, None).expect_err("is refused").to_string()
}

fn tap(name: &str) -> TapSpec {
    TapSpec { name: Some(name.into()), fds: vec![], queue_pairs: 1, limits: Limits::default() }
}

#[test]
fn the_early_spelling_says_all_of_a_nic() {
    let plain = NicSpec { id: "n0".into(), tap: tap("tap0"), mac: None, iothread: None, queue_size: 256 };
    assert_eq!(read("id=n0,netdev=tap0"), plain);
    let all = read("id=n0,netdev=tap0,mac=52:54:00:0a:0B:ff,iothread=io1,queues=4,queue-size=1024,vhost=off");
    let expected = NicSpec {
        tap: TapSpec { queue_pairs: 4, ..tap("tap0") },
        mac: Some(Mac([0x52, 0x54, 0, 0x0a, 0x0b, 0xff])),
        iothread: Some("io1".into()),
        queue_size: 1024,
        ..plain
    };
    assert_eq!(all, expected);
}

#[test]
fn the_later_spelling_parts_the_hosts_side_from_the_guests_and_ends_as_the_same() {
    let early = read("id=n0,netdev=tap0,mac=52:54:00:00:00:01,iothread=io1,queues=2,throttling.pps-total=7");
    for host in ["tap,id=n0,ifname=tap0", "type=tap,id=n0,ifname=tap0"] {
        let host = format!("{host},queues=2,throttling.pps-total=7");
        let guest = "virtio-net-device,netdev=n0,mac=52:54:00:00:00:01,iothread=io1,mq=on";
        let spec = try_read(&host, Some(guest)).unwrap();
        assert_eq!((spec.nics, spec.netdevs), (vec![early.clone()], vec![]), "{host}");
    }
    let spec = try_read("tap,id=n0,ifname=t", Some("driver=virtio-net-device,netdev=n0,id=eth")).unwrap();
    assert_eq!(spec.nics[0].id, "eth");
}

#[test]
fn a_device_without_its_netdev_is_refused_with_those_there_are() {
    let refused = |netdev: &str, device: &str| try_read(netdev, Some(device)).expect_err("is refused").to_string();
    assert_eq!(
        refused("tap,id=a,ifname=t", "virtio-net-device,netdev=b"),
        "-device virtio-net-device,netdev=b: no -netdev tap that is free has the id \"b\"; accepted: a"
    );
    let told = refused("id=a,netdev=t", "virtio-net-device,netdev=b");
    assert!(told.ends_with("accepted: with -netdev tap,id=b,ifname=TAP"), "{told}");
    assert!(refused("tap,id=a,ifname=t", "virtio-net-device,id=b").contains("key \"netdev\" is missing"));
    assert!(refused("tap,id=a,ifname=t,queues=2", "virtio-net-device,netdev=a,mq=off").contains("accepted: mq=on"));
}

#[test]
fn two_devices_cannot_have_one_netdev() {
    let mut spec = try_read("tap,id=a,ifname=t", Some("virtio-net-device,netdev=a,id=x")).unwrap();
    assert!(device("virtio-net-device,netdev=a,id=y", &mut spec).is_err());
}

#[test]
fn a_mac_is_six_hex_pairs_of_one_nic() {
    for good in ["52:54:00:12:34:56", "00:00:00:00:00:01", "FE:FF:ff:ff:ff:ff"] {
        assert_eq!(Mac::read(good).unwrap().to_string(), good.to_lowercase());
    }
    let malformed = [
        "",
        "52:54:00:12:34",
        "52:54:00:12:34:56:78",
        "52-54-00-12-34-56",
        "5:54:00:12:34:56",
        "52:54:00:12:34:5g",
        "+2:54:00:12:34:56",
        "525400123456",
        "52:54:00:12:34:56:",
        " 2:54:00:12:34:56",
    ];
    for text in malformed {
        assert!(Mac::read(text).unwrap_err().contains("six pairs of hexadecimal digits"), "{text}");
    }
    for group in ["01:00:5e:00:00:01", "ff:ff:ff:ff:ff:ff", "53:54:00:12:34:56"] {
        assert!(Mac::read(group).unwrap_err().contains("group of NICs"), "{group}");
    }
    assert!(Mac::read("00:00:00:00:00:00").is_err());
    let told = refusal("id=a,netdev=t,mac=ff:ff:ff:ff:ff:ff");
    assert!(told.starts_with("-netdev id=a,netdev=t,mac=ff:ff:ff:ff:ff:ff: \"ff:ff:ff:ff:ff:ff\" is"), "{told}");
}

#[test]
fn the_name_of_a_tap_is_what_the_kernel_takes() {
    assert_eq!(read("id=a,netdev=a-name-of-15-by").tap.name.as_deref(), Some("a-name-of-15-by"));
    for name in ["a-name-of-16-byt", "a/b", "..", "a:b"] {
        let told = refusal(&format!("id=a,netdev={name}"));
        assert!(told.contains("accepted: the name of a tap (1 to 15 bytes"), "{told}");
    }
    assert!(refusal("id=a").ends_with("key \"netdev\" is missing; accepted: netdev=TAP, or fds=N"));
    assert!(refusal("tap,id=a").ends_with("key \"ifname\" is missing; accepted: ifname=TAP, or fds=N"));
}

#[test]
fn descriptors_are_one_a_pair_of_queues() {
    let fds = |text: &str| (read(text).tap.fds, read(text).tap.queue_pairs);
    assert_eq!(fds("id=a,fds=5"), (vec![5], 1));
    assert_eq!(fds("id=a,netdev=t,fds=5:6:7"), (vec![5, 6, 7], 3));
    assert_eq!(fds("id=a,fds=5:6,queues=2"), (vec![5, 6], 2));
    let spec = try_read("tap,id=a,fd=9", Some("virtio-net-device,netdev=a")).unwrap();
    assert_eq!(spec.nics[0].tap.fds, [9]);
    for text in ["id=a,fds=5:6,queues=3", "id=a,fds=5:5", "id=a,fds=-1", "id=a,fds=5:", "id=a,fds=99999999999"] {
        refusal(text);
    }
    assert!(refusal("tap,id=a,fd=5,fds=6").ends_with("are one thing; accepted: one of the two"));
    assert!(refusal("tap,id=a,fd=5:6").contains("is no value of \"fd\""));
}

#[test]
fn scripts_of_a_tap_may_only_be_no() {
    assert!(try_read("tap,id=a,ifname=t,script=no,downscript=no", None).is_ok());
    let told = refusal("tap,id=a,ifname=t,script=/etc/qemu-ifup");
    assert!(told.contains("no: the tap is set up before the start"), "{told}");
}

#[test]
fn vhost_is_refused_with_the_reason_and_off_is_accepted() {
    read("id=a,netdev=t,vhost=off");
    for text in ["vhost=on", "vhostfd=7", "vhostfds=7", "vhost=off,vhostfds=7"] {
        let told = refusal(&format!("id=a,netdev=t,{text}"));
        assert!(
            told.contains("the kernel's vhost is not supported, packets go through this program; accepted: "),
            "{told}"
        );
    }
}

#[test]
fn queues_and_their_sizes_have_bounds() {
    for text in ["queues=0", "queues=17", "queue-size=128", "queue-size=300", "queue-size=8192"] {
        assert!(refusal(&format!("id=a,netdev=t,{text}")).contains("accepted: a "), "{text}");
    }
    assert_eq!(read("id=a,netdev=t,queues=16,queue-size=4096").queue_size, 4096);
}

#[test]
fn limits_are_in_bytes_and_packets_of_each_way() {
    let limits = read(
        "id=a,netdev=t,throttling.bps-total=1M,throttling.pps-read=5,throttling.pps-write=6,throttling.pps-write-max=9",
    )
    .tap
    .limits;
    assert_eq!(limits.of(Quantity::Bps).rate, 1 << 20);
    assert_eq!((limits.of(Quantity::IopsRead).rate, limits.of(Quantity::IopsWrite).rate), (5, 6));
    assert_eq!((limits.of(Quantity::IopsWrite).max, limits.of(Quantity::IopsWrite).max_length), (9, Some(1)));
    assert!(refusal("id=a,netdev=t,throttling.iops-total=5").contains("unknown key"));
    assert!(refusal("id=a,netdev=t,throttling.iops-size=5").contains("unknown key"));
    let told = refusal("id=a,netdev=t,throttling.pps-total=1000001");
    assert!(told.ends_with("is no value of \"throttling.pps-total\"; accepted: a number from 0 to 1000000"), "{told}");
    let told = refusal("id=a,netdev=t,throttling.pps-read-max=9");
    assert!(told.contains("throttling.pps-read-max allows a burst over throttling.pps-read, which"), "{told}");
}

#[test]
fn an_unknown_key_and_an_unknown_backend_are_refused() {
    assert!(refusal("id=a,netdev=t,ifname=u").contains("unknown key \"ifname\""));
    assert!(refusal("tap,id=a,ifname=t,netdev=u").contains("unknown key \"netdev\""));
    assert!(refusal("type=user,id=a,ifname=t").contains("of the kind \"user\" is not supported; accepted: a tap"));
    assert!(refusal("type=x,id=a,ifname=t").contains("\"x\" is no value of \"type\"; accepted: tap"));
    assert!(refusal("netdev=t").contains("key \"id\" is missing"));
}
