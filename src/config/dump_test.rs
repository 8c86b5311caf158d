use super::super::{chardev, device, file, json::Text, object};
use super::*;

#[track_caller]
fn read_back(spec: &VmSpec) -> VmSpec {
    let mut read = VmSpec::new("");
    file::read(&Text::new("x.json", dump(spec).into_bytes()).unwrap(), &mut read).unwrap();
    read
}

#[test]
fn a_plain_machine_is_a_short_file() {
    let text = r#"{
  "boot-source": {
    "kernel_image_path": "k"
  },
  "machine-config": {
    "type": "MicroVm",
    "vcpu_count": 1,
    "mem_size": 268435456
  }
}
"#;
    assert_eq!(dump(&VmSpec::new("k")), text);
}

#[test]
fn consoles_are_written_as_in_the_original_unless_they_go_together_otherwise() {
    let chardevs = |texts: &[&str], devices: &[&str]| {
        let mut spec = VmSpec::new("k");
        texts.iter().for_each(|text| chardev::chardev(text, &mut spec).unwrap());
        devices.iter().for_each(|text| device::device(text, &mut spec, &mut Vec::new()).unwrap());
        spec.check().unwrap();
        assert_eq!(read_back(&spec), spec);
        dump(&spec)
    };
    let socket = |id: &str| format!("socket,id={id},path=/{id},server");
    let early = chardevs(&["id=a,path=/a", "id=b,path=/b"], &[]);
    assert!(early.contains("\"socket_path\"") && !early.contains("\"chardev\""), "{early}");
    let console = |id: &str, chardev: &str| format!("virtconsole,id={id},chardev={chardev}");
    let (a, b) = (socket("a"), socket("b"));
    assert_eq!(chardevs(&[&a, &b], &[&console("a", "a"), &console("b", "b")]), early);
    for devices in [[console("b", "b"), console("a", "a")], [console("b", "a"), console("a", "b")]] {
        let late = chardevs(&[&a, &b], &[&devices[0], &devices[1]]);
        assert!(late.contains("\"chardev\": ["), "{late}");
    }
}

#[test]
fn sources_that_no_device_names_are_kept() {
    let mut spec = VmSpec::new("k");
    object::object("rng-random,id=r,filename=/dev/hwrng", &mut spec).unwrap();
    assert_eq!(read_back(&spec), spec);
}
