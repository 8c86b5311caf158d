use serde_json::{Value, json};

use super::super::chardev::ChardevSpec;
use super::super::net::{NicSpec, TapSpec};
use super::super::spec::{Access, AutoSpec, BalloonSpec, Cache, DriveSpec, IothreadSpec};
use super::super::vsock::{Carrier, VsockSpec};
use super::*;
use crate::qos::Limits;

const EXAMPLE: &str = include_str!("../../docs/example.json");

fn try_read(text: &str) -> Result<VmSpec> {
    let mut spec = VmSpec::new("");
    read(&Text::new("x.json", text.into())?, &mut spec)?;
    Ok(spec)
}

#[track_caller]
fn refusal(text: &str) -> String {
    let error = try_read(text).expect_err("is refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn the_file_of_the_original_is_read() {
    let text = r#"{
        "boot-source": {"kernel_image_path": "/k", "boot_args": "console=ttyS0 root=PARTUUID=1", "initrd_fs_path": "/i"},
        "machine-config": {"type": "MicroVm", "vcpu_count": 4, "mem_size": 805306368, "mem_path": "/m",
            "mem-share": true, "dump_guest_core": false},
        "drive": [{"drive_id": "rootfs", "path_on_host": "/r", "direct": false, "read_only": true, "serial_num": "11111111",
            "iops": 200000, "iothread": "io1"}],
        "net": [{"iface_id": "tap0", "host_dev_name": "t0", "mac": "0e:90:df:9f:a8:88", "iothread": "io1"}],
        "console": [{"console_id": "charconsole0", "socket_path": "/c"}],
        "serial": {"stdio": true},
        "vsock": {"vsock_id": "v", "guest_cid": 4, "uds_path": "/v"},
        "iothread": [{"id": "io1"}, {"id": "io2"}],
        "balloon": {"deflate_on_oom": true},
        "rng": {"random_file": "/dev/hwrng", "bytes_per_sec": 1000000}
    }"#;
    let tap = TapSpec { name: Some("t0".into()), fds: vec![], queue_pairs: 1, limits: Limits::default() };
    let (io1, io2) = ("io1".to_owned(), "io2".to_owned());
    let expected = VmSpec {
        cpus: 4,
        memory_bytes: 768 << 20,
        mem_path: Some("/m".into()),
        mem_share: true,
        dump_guest_core: false,
        append: "console=ttyS0 root=PARTUUID=1".into(),
        initrd: Some("/i".into()),
        drives: vec![DriveSpec {
            access: Access::ReadOnly,
            cache: Cache::Buffered,
            serial: Some("11111111".into()),
            limits: Limits::iops(200_000),
            iothread: Some(io1.clone()),
            ..DriveSpec::new("rootfs", "/r")
        }],
        nics: vec![NicSpec {
            id: "tap0".into(),
            tap,
            mac: Some(net::Mac([0x0e, 0x90, 0xdf, 0x9f, 0xa8, 0x88])),
            iothread: Some(io1.clone()),
            queue_size: 256,
        }],
        chardevs: vec![ChardevSpec { id: "charconsole0".into(), path: "/c".into() }],
        consoles: vec![ConsoleSpec { id: "charconsole0".into(), chardev: "charconsole0".into() }],
        serial: SerialSpec::Stdio,
        vsocks: vec![VsockSpec { id: "v".into(), cid: 4, carrier: Carrier::Sockets("/v".into()) }],
        iothreads: vec![IothreadSpec { id: io1 }, IothreadSpec { id: io2 }],
        balloons: vec![BalloonSpec { deflate_on_oom: true, ..BalloonSpec::default() }],
        rngs: vec![rng::rng("random_file=/dev/hwrng,bytes_per_sec=1000000").unwrap()],
        ..VmSpec::new("/k")
    };
    assert_eq!(try_read(text).unwrap(), expected);
    expected.check().unwrap();
}

#[test]
fn rule_d3_7_a_balloon_deflates_on_oom_if_the_file_says_so() {
    for (text, deflate_on_oom) in
        [(r#"{"deflate_on_oom": true}"#, true), (r#"{"deflate_on_oom": "off"}"#, false), ("{}", false)]
    {
        let spec = try_read(&format!(r#"{{"balloon": {text}}}"#)).unwrap();
        assert_eq!(spec.balloons, [BalloonSpec { deflate_on_oom, ..BalloonSpec::default() }]);
    }
    let auto = try_read(r#"{"balloon": {"auto": "yes", "floor": "512M", "free_page_reporting": false}}"#).unwrap();
    let expected = AutoSpec { floor_bytes: 512 << 20, pressure: "/proc/pressure/memory".into() };
    assert_eq!((&auto.balloons[0].auto, auto.balloons[0].free_page_reporting), (&Some(expected), false));
}

#[test]
fn numbers_and_texts_of_them_are_the_same_and_so_are_yes_and_no() {
    let of = |text: &str| try_read(text).unwrap();
    let drive = |member: &str| of(&format!(r#"{{"drive": [{{"drive_id": "a", "path_on_host": "f", {member}}}]}}"#));
    assert_eq!(of(r#"{"machine-config": {"vcpu_count": "4"}}"#), of(r#"{"machine-config": {"vcpu_count": 4}}"#));
    for size in ["268435456", "\"268435456\"", "\"256M\"", "256", "\"256\""] {
        assert_eq!(of(&format!(r#"{{"machine-config": {{"mem_size": {size}}}}}"#)).memory_bytes, 256 << 20, "{size}");
    }
    for yes in ["true", "\"true\"", "\"on\"", "\"yes\""] {
        assert_eq!(drive(&format!(r#""read_only": {yes}"#)).drives[0].access, Access::ReadOnly, "{yes}");
    }
    assert_eq!(drive(r#""iops": "7""#), drive(r#""throttling": {"iops_total": 7}"#));
}

#[test]
fn what_the_command_line_says_beyond_the_original_has_its_key() {
    let text = r#"{
        "name": "vm1", "qmp": ["/a", "/b"], "log": "l", "pidfile": "p", "daemonize": "on", "freeze": true, "no_reboot": true,
        "machine-config": {"disk_slots": 3, "nic_slots": "1"},
        "drive": [{"drive_id": "a", "path_on_host": "f", "aio": "threads", "throttling": {"group": "g", "bps_read": "1M",
            "bps_read_max": 2097152, "bps_read_max_length": 3, "iops_write": 5, "iops_size": "4K"}}],
        "net": [{"iface_id": "n", "tap_fds": [5, "6"], "queue_size": 512, "vhost": false, "throttling": {"pps_total": 9}}],
        "chardev": [{"id": "c", "socket_path": "/c"}], "console": [{"console_id": "d", "chardev": "c"}],
        "rng_source": [{"id": "r"}], "rng": {"rng_id": "s"},
        "$schema": "loopvisor.schema.json"
    }"#;
    let spec = try_read(text).unwrap();
    assert_eq!(
        (spec.name.as_str(), &spec.log, spec.disk_slots, spec.nic_slots),
        ("vm1", &LogSpec::File("l".into()), Some(3), Some(1))
    );
    assert_eq!((spec.qmp, spec.pidfile), (vec!["/a".into(), "/b".into()], Some("p".into())));
    assert!(spec.daemonize && spec.freeze && spec.no_reboot);
    let line = "id=a,file=f,aio=threads,throttling.group=g,throttling.bps-read=1M,throttling.bps-read-max=2M,\
                throttling.bps-read-max-length=3,throttling.iops-write=5,throttling.iops-size=4K";
    assert_eq!(spec.drives, [options::drive(line).unwrap()]);
    let mut other = VmSpec::new("");
    net::netdev("id=n,fds=5:6,queue-size=512,throttling.pps-total=9", &mut other).unwrap();
    assert_eq!(spec.nics, other.nics);
    assert_eq!(spec.consoles, [ConsoleSpec { id: "d".into(), chardev: "c".into() }]);
    assert_eq!((spec.rngs[0].id.as_str(), spec.rng_sources[0].id.as_str()), ("s", "r"));
}

#[test]
fn an_empty_object_says_nothing() {
    assert_eq!(try_read("{}").unwrap(), VmSpec::new(""));
}

#[test]
fn what_is_wrong_is_said_with_its_place_and_with_what_is_accepted() {
    let flag = "true or false, or a text: on, yes, true, off, no, false";
    let keys = "drive_id, path_on_host, read_only, direct, serial_num, logical_block_size, physical_block_size, iothread, iops, aio, throttling";
    for (text, sentence) in [
        ("[]", "1:1: this is an array; accepted: an object, {...}".to_owned()),
        (r#"{"drives": []}"#, "1:2: unknown key \"drives\" (did you mean \"drive\"?); accepted keys: boot-source, machine-config, drive, net, console, vsock, serial, iothread, balloon, rng, rng_source, chardev, name, qmp, log, pidfile, daemonize, freeze, no_reboot, $schema".into()),
        ("{\"drive\": [{}, {\"drive_id\": \"a\",\n\"path_on_hots\": 1}]}", format!("2:1: unknown key \"path_on_hots\" in \"drive\" (did you mean \"path_on_host\"?); accepted keys: {keys}")),
        (r#"{"drive": [{"throttling.iops_total": 5}]}"#, format!("1:13: unknown key \"throttling.iops_total\" in \"drive\"; accepted keys: {keys}")),
        (r#"{"name": "a", "name": "b"}"#, "1:15: key \"name\" is given twice; accepted: once".into()),
        (r#"{"balloon": {}, "balloon": {}}"#, "1:17: key \"balloon\" is given twice; accepted: once".into()),
        (r#"{"balloon": {"auto": false, "auto": false}}"#, "1:29: key \"auto\" is given twice; accepted: once".into()),
        (r#"{"machine-config": {"mem_share": true, "mem-share": true}}"#, "1:40: key \"mem-share\" is given twice; accepted: once".into()),
        (r#"{"drive": [{"throttling": {}, "throttling": {}}]}"#, "1:31: key \"throttling\" is given twice; accepted: once".into()),
        (r#"{"drive": [{"throttling": {"iops_total": 1, "iops_total": 1}}]}"#, "1:45: key \"iops_total\" is given twice; accepted: once".into()),
        (r#"{"drive": [{"throttling": {"iops_totl": 1}}]}"#, "1:28: unknown key \"iops_totl\" in \"throttling\" (did you mean \"iops_total\"?); accepted keys: iops_size, group, iops_total, ".into()),
        (r#"{"drive": {}}"#, "1:11: \"drive\" is an object; accepted: an array of objects, [...]".into()),
        (r#"{"drive": [1]}"#, "1:12: \"drive\" is a number; accepted: an object, {...}".into()),
        (r#"{"drive": [{"throttling": 5}]}"#, "1:27: \"throttling\" is a number; accepted: an object, {...}".into()),
        (r#"{"serial": null}"#, "1:12: \"serial\" is null; accepted: an object, {...}".into()),
        (r#"{"qmp": "/s"}"#, "1:9: \"qmp\" is a text; accepted: an array of texts, [...]".into()),
        (r#"{"qmp": ["/s", 5]}"#, "1:16: \"qmp\" is a number; accepted: a text, in quotes".into()),
        (r#"{"name": 5}"#, "1:10: \"name\" is a number; accepted: a text, in quotes".into()),
        (r#"{"name": ""}"#, "1:10: the value of \"name\" is empty; accepted: a text, in quotes".into()),
        (r#"{"name": "\u0000"}"#, "1:10: the text has a zero byte in it; accepted: one without".into()),
        (r#"{"freeze": 1}"#, format!("1:12: \"freeze\" is a number; accepted: {flag}")),
        (r#"{"freeze": "maybe"}"#, "1:12: \"maybe\" is no value of \"freeze\"; accepted: on, yes, true, off, no, false".into()),
        (r#"{"machine-config": {"vcpu_count": true}}"#, "1:35: \"vcpu_count\" is true or false; accepted: a number, in quotes or not".into()),
        (r#"{"machine-config": {"vcpu_count": 255}}"#, "1:35: \"255\" is no value of \"vcpu_count\"; accepted: a number from 1 to 254".into()),
        (r#"{"machine-config": {"vcpu_count": 4.0}}"#, "1:35: \"4.0\" is no value of \"vcpu_count\"; accepted: a number from 1 to 254".into()),
        (r#"{"machine-config": {"mem_size": -1}}"#, "1:33: \"-1\" is no value of \"mem_size\"; accepted: 16M to 512G".into()),
        (r#"{"machine-config": {"type": "q35"}}"#, "1:29: \"q35\" is no value of \"type\"; accepted: microvm".into()),
        (r#"{"boot-source": {"kernel_image_path": ["k"]}}"#, "1:39: \"kernel_image_path\" is an array; accepted: a text, in quotes".into()),
        (r#"{"drive": [{"drive_id": "a"}]}"#, "1:12: key \"path_on_host\" is missing; accepted: \"path_on_host\": FILE (at most 4095 bytes)".into()),
        (r#"{"drive": [{"drive_id": "a", "path_on_host": "f", "iops": 1000001}]}"#, "1:59: \"1000001\" is no value of \"iops\"; accepted: a number from 0 to 1000000".into()),
        (r#"{"drive": [{"drive_id": "a", "path_on_host": "f", "throttling": {"iops_read_max": 9}}]}"#, "1:12: throttling.iops_read_max allows a burst over throttling.iops_read, which is not limited; accepted: both, or neither".into()),
        (r#"{"drive": [{"drive_id": "a", "path_on_host": "f", "iops": 1, "throttling": {"iops_total": 1}}]}"#, "1:12: \"iops\" and \"throttling.iops_total\" are one limit; accepted: one of the two".into()),
        (r#"{"net": [{"iface_id": "a"}]}"#, "1:10: key \"host_dev_name\" is missing; accepted: \"host_dev_name\": TAP, or \"tap_fds\": N".into()),
        (r#"{"net": [{"iface_id": "a", "tap_fd": 5, "tap_fds": [6]}]}"#, "1:10: \"tap_fd\" and \"tap_fds\" are one thing; accepted: one of the two".into()),
        (r#"{"net": [{"iface_id": "a", "tap_fds": [5, true]}]}"#, "1:43: a member of \"tap_fds\" is true or false; accepted: a number".into()),
        (r#"{"net": [{"iface_id": "a", "host_dev_name": "t", "vhost_type": "vhost-kernel"}]}"#, "1:10: the kernel's vhost is not supported, packets go through this program; accepted: no \"vhost_type\"".into()),
        (r#"{"net": [{"iface_id": "a", "host_dev_name": "t", "vhost": true}]}"#, "1:10: the kernel's vhost is not supported, packets go through this program; accepted: \"vhost\": off, or no \"vhost\"".into()),
        (r#"{"net": [{"iface_id": "a", "host_dev_name": "t", "mac": "1"}]}"#, "1:10: \"1\" is no MAC address; accepted: six pairs".into()),
        (r#"{"vsock": {"vhost_fd": 3}}"#, "1:11: key \"vsock_id\" is missing; accepted: \"vsock_id\": NAME (1 to 255 characters)".into()),
        (r#"{"console": [{"console_id": "c"}]}"#, "1:14: key \"socket_path\" is missing; accepted: \"socket_path\": PATH, or \"chardev\": the id of a chardev".into()),
        (r#"{"console": [{"console_id": "c", "socket_path": "/c", "chardev": "d"}]}"#, "1:14: \"socket_path\" makes a chardev".into()),
        (r#"{"serial": {}}"#, "1:12: key \"stdio\" is missing; accepted: \"stdio\": true".into()),
        (r#"{"balloon": {"auto": true}}"#, "1:13: \"auto\" needs to know how far it may go; accepted: \"floor\": the memory".into()),
        (r#"{"balloon": {"floor": "64M"}}"#, "1:13: \"floor\" and \"pressure\" say how \"auto\" works; accepted: with \"auto\": on".into()),
        (r#"{"iothread": [{}]}"#, "1:15: key \"id\" is missing; accepted: \"id\": NAME (1 to 255 characters)".into()),
    ] {
        let refused = refusal(text);
        assert!(refused.starts_with(&format!("-config x.json:{sentence}")), "{text}\n{refused}\n{sentence}");
    }
    let long = format!(r#"{{"qmp": ["{}"]}}"#, "s".repeat(108));
    assert!(
        refusal(&long).ends_with("is no value of \"qmp\"; accepted: the path of a Unix socket (at most 107 bytes)")
    );
}

#[test]
fn rules_d1_2_and_d1_8_hold_for_a_file_too() {
    let iothreads = |count| (0..count).map(|n| format!(r#"{{"id": "io{n}"}}"#)).collect::<Vec<_>>().join(",");
    let spec = |count| try_read(&format!(r#"{{"iothread": [{}]}}"#, iothreads(count))).unwrap();
    spec(8).check().unwrap();
    assert!(spec(9).check().unwrap_err().to_string().contains("rule D1.2"));
    let twice = try_read(r#"{"iothread": [{"id": "a"}, {"id": "a"}]}"#).unwrap();
    assert!(twice.check().unwrap_err().to_string().contains("another iothread has this id"));
    let nobodys = try_read(r#"{"drive": [{"drive_id": "a", "path_on_host": "f", "iothread": "b"}]}"#).unwrap();
    assert!(nobodys.check().unwrap_err().to_string().contains("no such iothread"));
}

/// The schema of the value called `name` in an object's schema.
fn property<'s>(schema: &'s Value, name: &str) -> &'s Value {
    &schema["properties"][name]
}

fn schema() -> Value {
    serde_json::from_str(include_str!("../../docs/loopvisor.schema.json")).unwrap()
}

/// The names of all values in an object's schema, those in objects in it with a dot between.
fn names(schema: &Value) -> Vec<String> {
    let members = schema["properties"].as_object().unwrap();
    let names = members.iter().flat_map(|(name, value)| match value.get("properties") {
        Some(_) => names(value).into_iter().map(|inner| format!("{name}.{inner}")).collect(),
        None => vec![name.clone()],
    });
    let mut names: Vec<String> = names.collect();
    names.sort_unstable();
    names
}

/// What a key's schema says of its type, as it must be for the kind.
fn types(kind: Kind) -> Value {
    match kind {
        Kind::Text | Kind::Words => json!("string"),
        Kind::Number | Kind::Size => json!(["integer", "string"]),
        Kind::Numbers => json!(["array", "integer", "string"]),
        Kind::Bool => Value::Null,
    }
}

#[test]
fn the_schema_has_the_keys_that_are_read_and_no_others() {
    let schema = schema();
    let parts = parts();
    let top: Vec<&String> = schema["properties"].as_object().unwrap().keys().collect();
    assert_eq!(top.len(), parts.len());
    for (name, part) in &parts {
        let described = property(&schema, name);
        let (keys, object) = match part {
            Part::Value(kind) => {
                assert_eq!(described.get("type").unwrap_or(&Value::Null), &types(*kind), "{name}");
                continue;
            }
            Part::Texts => {
                assert_eq!((&described["type"], &described["items"]["type"]), (&json!("array"), &json!("string")));
                continue;
            }
            Part::One(keys) => (keys, described),
            Part::Many(keys) => (keys, &described["items"]),
        };
        assert_eq!((&object["type"], &object["additionalProperties"]), (&json!("object"), &json!(false)), "{name}");
        let mut read: Vec<String> = keys.iter().map(|key| key.name.clone()).collect();
        read.sort_unstable();
        assert_eq!(names(object), read, "{name}");
        for Key { name, kind, .. } in keys {
            let mut described = object;
            for word in name.split('.') {
                described = property(described, word);
            }
            assert_eq!(described.get("type").unwrap_or(&Value::Null), &types(*kind), "{name}");
            assert_eq!(described.get("enum").is_some_and(|values| values[0] == true), *kind == Kind::Bool, "{name}");
            assert_eq!(described.get("minLength").is_some(), *kind == Kind::Text && described.get("enum").is_none());
        }
    }
}

/// A file with one object of the part called `name`: what must be there, and `more`.
fn with(schema: &Value, name: &str, more: &[(&str, Value)]) -> String {
    let described = property(schema, name);
    let object = described.get("items").unwrap_or(described);
    let required = object["required"].as_array().into_iter().flatten();
    let mut members: serde_json::Map<String, Value> =
        required.map(|key| (key.as_str().unwrap().to_owned(), json!("3"))).collect();
    match name {
        "net" => drop(members.insert("host_dev_name".into(), json!("t"))),
        "console" => drop(members.insert("socket_path".into(), json!("/c"))),
        "serial" => drop(members.insert("stdio".into(), json!(true))),
        _ => {}
    }
    members.extend(more.iter().map(|(key, value)| ((*key).to_owned(), value.clone())));
    let object = Value::Object(members);
    json!({ name: if described["type"] == "array" { json!([object]) } else { object } }).to_string()
}

#[test]
fn what_the_schema_requires_is_required_and_nothing_else() {
    let schema = schema();
    for (name, part) in parts() {
        if !matches!(part, Part::One(_) | Part::Many(_)) {
            continue;
        }
        try_read(&with(&schema, name, &[])).unwrap();
        let described = property(&schema, name);
        let required = described.get("items").unwrap_or(described)["required"].as_array().into_iter().flatten();
        for key in required.map(|key| key.as_str().unwrap()) {
            let mut file: Value = serde_json::from_str(&with(&schema, name, &[])).unwrap();
            let object = if described["type"] == "array" { &mut file[name][0] } else { &mut file[name] };
            object.as_object_mut().unwrap().remove(key);
            assert!(refusal(&file.to_string()).contains(&format!("key {key:?} is missing")), "{name} {key}");
        }
    }
}

#[test]
fn the_bounds_in_the_schema_are_those_that_hold() {
    let schema = schema();
    let mut bounds = 0;
    for (name, part) in parts() {
        let (Part::One(keys) | Part::Many(keys)) = part else { continue };
        let described = property(&schema, name);
        let object = described.get("items").unwrap_or(described);
        for Key { name: key, .. } in keys {
            let path: Vec<&str> = key.split('.').collect();
            let described = path.iter().fold(object, |object, word| property(object, word));
            let (Some(least), Some(most)) = (described.get("minimum"), described.get("maximum")) else { continue };
            let (least, most) = (least.as_u64().unwrap(), most.as_u64().unwrap());
            let file = |number: i128| {
                let number: Value = serde_json::from_str(&number.to_string()).unwrap();
                match path[..] {
                    [outer, inner] => {
                        let rate = inner.trim_end_matches("_max_length");
                        let max = format!("{rate}_max");
                        let of_burst = [(rate, json!(1)), (&max, json!(1))];
                        let others = of_burst.into_iter().filter(|_| inner != rate);
                        let members = others.chain([(inner, number)]).map(|(key, value)| (key.to_owned(), value));
                        with(&schema, name, &[(outer, Value::Object(members.collect()))])
                    }
                    _ => with(&schema, name, &[(&key, number)]),
                }
            };
            for good in [least, most] {
                try_read(&file(good.into())).unwrap();
            }
            for bad in [i128::from(least) - 1, i128::from(most) + 1] {
                refusal(&file(bad));
            }
            bounds += 1;
        }
    }
    assert!(bounds > 20, "{bounds}");
}

#[test]
fn the_example_is_a_machine_and_uses_most_top_keys() {
    let spec = try_read(EXAMPLE).unwrap();
    spec.check().unwrap();
    let example: Value = serde_json::from_str(EXAMPLE).unwrap();
    let used = example.as_object().unwrap().keys().filter(|key| parts().iter().any(|(name, _)| name == key)).count();
    assert!(used >= 13, "{used}");
}
