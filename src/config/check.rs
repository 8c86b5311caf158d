//! The rules between the parts of a machine: what no single option can be wrong about.
//!
//! They hold for every spelling of a machine and are checked before anything is started. Whether the host can give
//! what is asked (a file, memory, KVM) is not known here. Main thread.

use std::collections::HashSet;

use super::chardev;
use super::net::NetdevSpec;
use super::spec::{Access, DriveSpec, MAX_IOTHREADS, SerialSpec, VmSpec};
use crate::error::{Error, Result};

impl VmSpec {
    /// Refuses a machine whose parts contradict each other.
    ///
    /// # Errors
    ///
    /// A mistake of the user's (`Kind::Usage`): a ninth iothread (rule D1.2), a twelfth virtio device (rule D3.4), an
    /// id or a tap used twice, a netdev without its device, an iothread nobody made, a file written by two drives, a group
    /// of drives on several loops or with different limits, a second balloon (rule D3.5), source of random numbers or vsock, a
    /// console and a chardev that do not go together, one socket twice, a background monitor with a serial port on the terminal it
    /// has left.
    pub fn check(&self) -> Result<()> {
        self.check_iothreads()?;
        self.check_drives()?;
        self.check_nics()?;
        self.check_balloon()?;
        self.check_rng()?;
        chardev::check(self)?;
        if let Some(second) = self.vsocks.get(1) {
            let id = &second.id;
            return Err(Error::usage(format!("-device vsock,id={id}: one vsock too many; accepted: one")));
        }
        self.check_slots()?;
        let mut sockets = HashSet::new();
        sockets.extend(self.vsocks.iter().filter_map(|vsock| vsock.carrier.path()));
        if let Some(path) = self.qmp.iter().find(|path| !sockets.insert(*path)) {
            let path = path.display();
            return Err(Error::usage(format!(
                "-qmp unix:{path}: -qmp, -api-channel or a vsock has this socket already; accepted: another path"
            )));
        }
        if let Some(chardev) = self.chardevs.iter().find(|chardev| !sockets.insert(&chardev.path)) {
            let (id, path) = (&chardev.id, chardev.path.display());
            return Err(Error::usage(format!(
                "-chardev id={id}: another option has the socket {path} already; accepted: another path"
            )));
        }
        if self.daemonize && self.serial == SerialSpec::Stdio {
            return Err(Error::usage(
                "-serial stdio: with -daemonize there is no standard input and output; accepted: one of the two",
            ));
        }
        Ok(())
    }

    fn check_iothreads(&self) -> Result<()> {
        if let Some(ninth) = self.iothreads.get(MAX_IOTHREADS) {
            return Err(Error::usage(format!(
                "-iothread id={}: one iothread too many; accepted: at most {MAX_IOTHREADS} (rule D1.2), and several \
                 drives may share one",
                ninth.id
            )));
        }
        let mut ids = HashSet::new();
        if let Some(twice) = self.iothreads.iter().find(|iothread| !ids.insert(&iothread.id)) {
            return Err(Error::usage(format!(
                "-iothread id={}: another iothread has this id; accepted: an id of its own",
                twice.id
            )));
        }
        Ok(())
    }

    fn check_drives(&self) -> Result<()> {
        for (place, drive) in self.drives.iter().enumerate() {
            let earlier = &self.drives[..place];
            if earlier.iter().any(|other| other.id == drive.id) {
                return Err(Error::usage(format!(
                    "-drive id={}: another drive has this id; accepted: an id of its own",
                    drive.id
                )));
            }
            let writes = |access| access == Access::ReadWrite;
            let shared = earlier.iter().find(|other| other.file == drive.file);
            if let Some(other) = shared.filter(|other| writes(other.access) || writes(drive.access)) {
                return Err(Error::usage(format!(
                    "-drive id={},file={}: drive {:?} has this file, and one of them may write; \
                     accepted: another file, or readonly=on for both",
                    drive.id,
                    drive.file.display(),
                    other.id
                )));
            }
            self.check_iothread_of(&format!("-drive id={}", drive.id), drive.iothread.as_deref())?;
            if let (Some(logical), Some(physical)) = (drive.logical_block, drive.physical_block)
                && physical < logical
            {
                return Err(Error::usage(format!(
                    "-drive id={},physical_block_size={physical}: it must not be smaller than \
                     logical_block_size={logical}",
                    drive.id
                )));
            }
            check_group(drive, earlier)?;
        }
        Ok(())
    }

    fn check_nics(&self) -> Result<()> {
        for (place, nic) in self.nics.iter().enumerate() {
            let (id, earlier) = (&nic.id, &self.nics[..place]);
            let taken = if self.drives.iter().any(|drive| drive.id == *id) { Some("a drive") } else { None };
            if let Some(who) = taken.or(earlier.iter().any(|other| other.id == *id).then_some("another NIC")) {
                return Err(Error::usage(format!("-netdev id={id}: {who} has this id; accepted: an id of its own")));
            }
            let shared = earlier.iter().find(|other| nic.tap.name.is_some() && other.tap.name == nic.tap.name);
            if let (Some(other), Some(tap)) = (shared, &nic.tap.name) {
                return Err(Error::usage(format!(
                    "-netdev id={id},netdev={tap}: NIC {:?} has this tap; accepted: a tap of its own, or queues=N there",
                    other.id
                )));
            }
            if let Some((other, fd)) = earlier.iter().find_map(|other| {
                let fd = nic.tap.fds.iter().find(|fd| other.tap.fds.contains(fd))?;
                Some((other, fd))
            }) {
                return Err(Error::usage(format!(
                    "-netdev id={id},fds={fd}: NIC {:?} has this descriptor; accepted: one of its own",
                    other.id
                )));
            }
            self.check_iothread_of(&format!("-netdev id={id}"), nic.iothread.as_deref())?;
        }
        match self.netdevs.first() {
            None => Ok(()),
            Some(NetdevSpec { id, .. }) => Err(Error::usage(format!(
                "-netdev tap,id={id}: no device uses it; accepted: with -device virtio-net-device,netdev={id}"
            ))),
        }
    }

    fn check_balloon(&self) -> Result<()> {
        let Some(balloon) = self.balloons.first() else { return Ok(()) };
        if self.balloons.len() > 1 {
            return Err(Error::usage("-balloon: one balloon too many; accepted: one (rule D3.5)"));
        }
        if let Some(auto) = &balloon.auto
            && auto.floor_bytes > self.memory_bytes
        {
            let (floor, memory) = (auto.floor_bytes >> 20, self.memory_bytes >> 20);
            return Err(Error::usage(format!(
                "-balloon floor={floor}M: the guest has less; accepted: at most its memory (-m), which is {memory}M"
            )));
        }
        Ok(())
    }

    fn check_rng(&self) -> Result<()> {
        if self.rngs.len() > 1 {
            return Err(Error::usage(
                "-rng: one source of random numbers too many; accepted: one -rng, or one -device virtio-rng-device",
            ));
        }
        let mut ids = HashSet::new();
        match self.rng_sources.iter().find(|source| !ids.insert(&source.id)) {
            Some(twice) => Err(Error::usage(format!(
                "-object rng-random,id={}: another object has this id; accepted: an id of its own",
                twice.id
            ))),
            None => Ok(()),
        }
    }

    /// Every virtio device as it is written on the command line, in the order in which they are plugged in.
    pub(super) fn virtio_devices(&self) -> impl Iterator<Item = String> {
        let drives = self.drives.iter().map(|drive| format!("-drive id={}", drive.id));
        let nics = self.nics.iter().map(|nic| format!("-netdev id={}", nic.id));
        let balloons = self.balloons.iter().map(|_| "-balloon".to_owned());
        let rngs = self.rngs.iter().map(|_| "-rng".to_owned());
        let consoles = self.consoles.iter().map(|console| format!("-device virtconsole,id={}", console.id));
        let vsocks = self.vsocks.iter().map(|vsock| format!("-device vsock,id={}", vsock.id));
        drives.chain(nics).chain(balloons).chain(rngs).chain(consoles).chain(vsocks)
    }

    /// Rules D1.6 and D1.8: a device names one iothread, which exists.
    fn check_iothread_of(&self, device: &str, iothread: Option<&str>) -> Result<()> {
        let Some(wanted) = iothread else { return Ok(()) };
        if self.iothreads.iter().any(|iothread| iothread.id == wanted) {
            return Ok(());
        }
        let ids: Vec<&str> = self.iothreads.iter().map(|iothread| iothread.id.as_str()).collect();
        let accepted = if ids.is_empty() { format!("with -iothread id={wanted}") } else { ids.join(", ") };
        Err(Error::usage(format!("{device},iothread={wanted}: no such iothread; accepted: {accepted}")))
    }
}

/// The drives of a group have one bucket, so they live in one loop and have one set of limits.
fn check_group(drive: &DriveSpec, earlier: &[DriveSpec]) -> Result<()> {
    let members = || earlier.iter().filter(|member| member.shares_limits_with(drive));
    let group = drive.group.as_deref().unwrap_or_default();
    if let Some(other) = members().find(|member| member.iothread != drive.iothread) {
        let loop_of = |drive: &DriveSpec| match &drive.iothread {
            Some(iothread) => format!("iothread {iothread:?}"),
            None => "the main loop".to_owned(),
        };
        return Err(Error::usage(format!(
            "-drive id={},throttling.group={group}: served by {}, and drive {:?} of this group by {}; what limits a \
             group lives in one loop, because two threads would have to wait for each other; accepted: one iothread \
             for all drives of a group, or a group for each iothread",
            drive.id,
            loop_of(drive),
            other.id,
            loop_of(other)
        )));
    }
    let differs = |member: &&DriveSpec| !member.limits.is_none() && member.limits != drive.limits;
    if let Some(other) = members().find(differs).filter(|_| !drive.limits.is_none()) {
        return Err(Error::usage(format!(
            "-drive id={},throttling.group={group}: its limits are not those of drive {:?}, and a group has one set; \
             accepted: limits at one drive of the group, or the same at several",
            drive.id, other.id
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::net::{NicSpec, TapSpec};
    use super::super::rng::{RngSource, RngSpec};
    use super::super::spec::{AutoSpec, BalloonSpec, IothreadSpec};
    use super::super::vsock::{Carrier, VsockSpec};
    use super::*;
    use crate::qos::Limits;

    fn with_drives(drives: impl IntoIterator<Item = DriveSpec>) -> VmSpec {
        VmSpec { drives: drives.into_iter().collect(), ..VmSpec::new("vmlinux") }
    }

    fn with_iothreads(ids: impl IntoIterator<Item = String>) -> VmSpec {
        let iothreads = ids.into_iter().map(|id| IothreadSpec { id }).collect();
        VmSpec { iothreads, ..VmSpec::new("vmlinux") }
    }

    fn read_only(id: &str, file: &str) -> DriveSpec {
        DriveSpec { access: Access::ReadOnly, ..DriveSpec::new(id, file) }
    }

    fn member(id: &str, iops: u64) -> DriveSpec {
        DriveSpec { group: Some("g".into()), limits: Limits::iops(iops), ..DriveSpec::new(id, id) }
    }

    fn refusal(spec: &VmSpec) -> String {
        let error = spec.check().expect_err("is refused");
        assert_eq!(error.exit_code(), 2);
        error.to_string()
    }

    #[test]
    fn rule_d1_2_eight_iothreads_are_accepted_and_the_ninth_is_refused() {
        with_iothreads((0..8).map(|n| format!("io{n}"))).check().unwrap();
        let refused = refusal(&with_iothreads((0..9).map(|n| format!("io{n}"))));
        assert!(refused.starts_with("-iothread id=io8: ") && refused.contains("rule D1.2"), "{refused}");
    }

    #[test]
    fn two_iothreads_of_one_id_are_refused_and_ids_alike_in_fifteen_bytes_are_not() {
        assert!(refusal(&with_iothreads(["a".into(), "a".into()])).starts_with("-iothread id=a: "));
        with_iothreads(["an-iothread-long1".into(), "an-iothread-long2".into()]).check().unwrap();
    }

    #[test]
    fn rule_d3_4_eleven_drives_are_accepted_and_the_twelfth_device_is_refused() {
        let drives = |count| (0..count).map(|n| DriveSpec::new(format!("d{n}"), format!("{n}.img")));
        with_drives(drives(11)).check().unwrap();
        let refused = refusal(&with_drives(drives(12)));
        assert!(refused.starts_with("-drive id=d11: ") && refused.contains("rule D3.4"), "{refused}");
    }

    #[test]
    fn rule_d1_6_several_drives_may_share_an_iothread() {
        let on = |id: &str| DriveSpec { iothread: Some("io".into()), ..DriveSpec::new(id, id) };
        VmSpec { drives: vec![on("a"), on("b")], ..with_iothreads(["io".into()]) }.check().unwrap();
    }

    #[test]
    fn rule_d1_8_a_drive_on_an_iothread_nobody_made_is_refused_with_those_there_are() {
        let drives = vec![DriveSpec { iothread: Some("io9".into()), ..DriveSpec::new("a", "a.img") }];
        let mut spec = VmSpec { drives, ..with_iothreads(["io0".into(), "io1".into()]) };
        assert_eq!(refusal(&spec), "-drive id=a,iothread=io9: no such iothread; accepted: io0, io1");
        spec.iothreads.clear();
        assert_eq!(refusal(&spec), "-drive id=a,iothread=io9: no such iothread; accepted: with -iothread id=io9");
    }

    #[test]
    fn two_drives_of_one_id_are_refused() {
        let spec = with_drives([DriveSpec::new("a", "1.img"), DriveSpec::new("a", "2.img")]);
        assert!(refusal(&spec).starts_with("-drive id=a: another drive has this id"));
    }

    #[test]
    fn one_file_serves_two_drives_only_if_nobody_writes() {
        with_drives([read_only("a", "x.img"), read_only("b", "x.img")]).check().unwrap();
        for drives in [
            [DriveSpec::new("a", "x.img"), DriveSpec::new("b", "x.img")],
            [read_only("a", "x.img"), DriveSpec::new("b", "x.img")],
            [DriveSpec::new("a", "x.img"), read_only("b", "x.img")],
        ] {
            assert!(refusal(&with_drives(drives)).starts_with("-drive id=b,file=x.img: drive \"a\" has this file"));
        }
    }

    #[test]
    fn physical_block_below_the_logical_one_is_refused() {
        let drive = |physical| DriveSpec {
            logical_block: Some(4096),
            physical_block: Some(physical),
            ..DriveSpec::new("a", "a.img")
        };
        let told = with_drives([drive(512)]).check().expect_err("is refused").to_string();
        assert!(told.contains("physical_block_size=512") && told.contains("logical_block_size=4096"), "{told}");
        with_drives([drive(4096)]).check().unwrap();
    }

    #[test]
    fn the_drives_of_a_group_have_the_limits_that_one_or_several_of_them_were_given() {
        for (given, iops) in [([200, 0, 0], 200), ([0, 0, 200], 200), ([200, 0, 200], 200), ([0, 0, 0], 0)] {
            let outside = DriveSpec { limits: Limits::iops(7), ..DriveSpec::new("d", "d") };
            let other = DriveSpec { group: Some("h".into()), ..member("e", 8) };
            let [a, b, c] = given;
            let spec = with_drives([outside, other, member("a", a), member("b", b), member("c", c)]);
            spec.check().unwrap();
            let limits: Vec<Limits> = spec.drives.iter().map(|drive| spec.limits_of(drive)).collect();
            assert_eq!(limits, [7, 8, iops, iops, iops].map(Limits::iops), "{given:?}");
        }
        let alone =
            with_drives([DriveSpec::new("a", "a"), DriveSpec { limits: Limits::iops(7), ..DriveSpec::new("b", "b") }]);
        assert!(alone.limits_of(&alone.drives[0]).is_none(), "drives without a group are no group");
    }

    #[test]
    fn a_drive_whose_limits_are_not_those_of_its_group_is_refused_with_both_names() {
        let sentence = "-drive id=b,throttling.group=g: its limits are not those of drive \"a\", and a group has one set; \
                        accepted: limits at one drive of the group, or the same at several";
        assert_eq!(refusal(&with_drives([member("a", 200), member("b", 201)])), sentence);
        let between = [member("a", 200), member("c", 0), DriveSpec::new("d", "d"), member("b", 100)];
        assert_eq!(refusal(&with_drives(between)), sentence);
        let mut size = member("b", 200);
        size.limits.iops_size = 4096;
        assert_eq!(refusal(&with_drives([member("a", 200), size])), sentence);
        let elsewhere = DriveSpec { group: Some("h".into()), ..member("b", 201) };
        with_drives([member("a", 200), elsewhere]).check().unwrap();
    }

    #[test]
    fn a_group_on_two_loops_is_refused_with_the_reason_and_the_way_out() {
        let on = |id: &str, iothread: Option<&str>| DriveSpec { iothread: iothread.map(Into::into), ..member(id, 0) };
        let spec = |drives| VmSpec { drives, ..with_iothreads(["io0".into(), "io1".into()]) };
        spec(vec![on("a", Some("io1")), on("b", Some("io1"))]).check().unwrap();
        spec(vec![on("a", None), on("b", None)]).check().unwrap();
        let apart = DriveSpec { group: Some("h".into()), ..on("b", Some("io1")) };
        spec(vec![on("a", Some("io0")), apart]).check().unwrap();
        let ungrouped = DriveSpec { group: None, ..on("b", Some("io1")) };
        spec(vec![DriveSpec { group: None, ..on("a", None) }, ungrouped]).check().unwrap();
        let why = "what limits a group lives in one loop, because two threads would have to wait for each other; accepted: \
                   one iothread for all drives of a group, or a group for each iothread";
        for (first, second, sentence) in [
            (Some("io0"), Some("io1"), "served by iothread \"io1\", and drive \"a\" of this group by iothread \"io0\""),
            (None, Some("io1"), "served by iothread \"io1\", and drive \"a\" of this group by the main loop"),
            (Some("io0"), None, "served by the main loop, and drive \"a\" of this group by iothread \"io0\""),
        ] {
            let refused = refusal(&spec(vec![on("a", first), on("b", second)]));
            assert_eq!(refused, format!("-drive id=b,throttling.group=g: {sentence}; {why}"));
        }
    }

    #[test]
    fn rule_d3_5_a_second_balloon_is_refused() {
        let balloons = |count| VmSpec { balloons: vec![BalloonSpec::default(); count], ..VmSpec::new("vmlinux") };
        balloons(1).check().unwrap();
        assert_eq!(refusal(&balloons(2)), "-balloon: one balloon too many; accepted: one (rule D3.5)");
    }

    #[test]
    fn rule_d3_4_the_balloon_counts_among_the_eleven_devices() {
        let drives = |count| (0..count).map(|n| DriveSpec::new(format!("d{n}"), format!("{n}.img")));
        let spec = |count| VmSpec { balloons: vec![BalloonSpec::default()], ..with_drives(drives(count)) };
        spec(10).check().unwrap();
        let refused = refusal(&spec(11));
        assert!(refused.starts_with("-balloon: ") && refused.contains("rule D3.4"), "{refused}");
    }

    fn nic(id: &str, tap: &str) -> NicSpec {
        let tap = TapSpec { name: Some(tap.into()), fds: vec![], queue_pairs: 1, limits: Limits::default() };
        NicSpec { id: id.into(), tap, mac: None, iothread: None, queue_size: 256 }
    }

    fn with_nics(nics: impl IntoIterator<Item = NicSpec>) -> VmSpec {
        VmSpec { nics: nics.into_iter().collect(), ..VmSpec::new("vmlinux") }
    }

    #[test]
    fn ids_are_unique_among_nics_and_drives_and_a_tap_has_one_nic() {
        with_nics([nic("a", "t0"), nic("b", "t1")]).check().unwrap();
        let told = refusal(&with_nics([nic("a", "t0"), nic("a", "t1")]));
        assert_eq!(told, "-netdev id=a: another NIC has this id; accepted: an id of its own");
        let drives = vec![DriveSpec::new("a", "f")];
        let told = refusal(&VmSpec { drives, ..with_nics([nic("a", "t0")]) });
        assert_eq!(told, "-netdev id=a: a drive has this id; accepted: an id of its own");
        let told = refusal(&with_nics([nic("a", "t0"), nic("b", "t0")]));
        assert!(told.starts_with("-netdev id=b,netdev=t0: NIC \"a\" has this tap; accepted: "), "{told}");
        let with_fd = |id: &str| {
            let mut nic = nic(id, id);
            (nic.tap.name, nic.tap.fds) = (None, vec![7]);
            nic
        };
        let told = refusal(&with_nics([with_fd("a"), with_fd("b")]));
        assert!(told.starts_with("-netdev id=b,fds=7: NIC \"a\" has this descriptor"), "{told}");
    }

    #[test]
    fn rules_d1_6_and_d1_8_a_nic_names_an_iothread_that_is_there_and_shares_it_with_a_drive() {
        let on = |io: &str| NicSpec { iothread: Some(io.into()), ..nic("n", "t0") };
        let drives = vec![DriveSpec { iothread: Some("io".into()), ..DriveSpec::new("a", "a") }];
        let spec = |io| VmSpec { nics: vec![on(io)], drives: drives.clone(), ..with_iothreads(["io".into()]) };
        spec("io").check().unwrap();
        assert_eq!(refusal(&spec("io9")), "-netdev id=n,iothread=io9: no such iothread; accepted: io");
    }

    #[test]
    fn rule_d3_4_nics_count_among_the_eleven_devices() {
        let nics = |count| (0..count).map(|n| nic(&format!("n{n}"), &format!("t{n}"))).collect();
        let drives: Vec<_> = (0..9).map(|n| DriveSpec::new(format!("d{n}"), format!("{n}.img"))).collect();
        let spec = |count| VmSpec { nics: nics(count), drives: drives.clone(), ..VmSpec::new("vmlinux") };
        spec(2).check().unwrap();
        let refused = refusal(&spec(3));
        assert!(refused.starts_with("-netdev id=n2: ") && refused.contains("rule D3.4"), "{refused}");
    }

    #[test]
    fn a_netdev_that_no_device_uses_is_refused() {
        let tap = nic("a", "t0").tap;
        let spec = VmSpec { netdevs: vec![NetdevSpec { id: "a".into(), tap }], ..VmSpec::new("vmlinux") };
        assert_eq!(
            refusal(&spec),
            "-netdev tap,id=a: no device uses it; accepted: with -device virtio-net-device,netdev=a"
        );
    }

    #[test]
    fn the_floor_of_a_balloon_is_at_most_the_memory() {
        let auto = |floor_bytes| Some(AutoSpec { floor_bytes, pressure: "p".into() });
        let balloon = |floor_bytes| BalloonSpec { auto: auto(floor_bytes), ..BalloonSpec::default() };
        let spec = |floor_bytes| VmSpec { balloons: vec![balloon(floor_bytes)], ..VmSpec::new("vmlinux") };
        spec(256 << 20).check().unwrap();
        assert_eq!(
            refusal(&spec(257 << 20)),
            "-balloon floor=257M: the guest has less; accepted: at most its memory (-m), which is 256M"
        );
    }

    #[test]
    fn one_source_of_random_numbers_is_enough() {
        let rngs = |count| VmSpec { rngs: vec![RngSpec::default(); count], ..VmSpec::new("vmlinux") };
        rngs(1).check().unwrap();
        assert!(refusal(&rngs(2)).ends_with("accepted: one -rng, or one -device virtio-rng-device"));
        let source = RngSource { id: "r".into(), file: "f".into() };
        let spec = VmSpec { rng_sources: vec![source; 2], ..VmSpec::new("vmlinux") };
        assert!(refusal(&spec).starts_with("-object rng-random,id=r: another object has this id"));
        let drives = (0..11).map(|n| DriveSpec::new(format!("d{n}"), format!("{n}.img")));
        let spec = VmSpec { rngs: vec![RngSpec::default()], ..with_drives(drives) };
        let refused = refusal(&spec);
        assert!(refused.starts_with("-rng: ") && refused.contains("rule D3.4"), "{refused}");
    }

    #[test]
    fn a_second_vsock_is_refused() {
        let vsock = |id: &str| VsockSpec { id: id.into(), cid: 3, carrier: Carrier::Sockets("/v".into()) };
        let spec = |ids: &[&str]| VmSpec { vsocks: ids.iter().map(|id| vsock(id)).collect(), ..VmSpec::new("vmlinux") };
        spec(&["a"]).check().unwrap();
        assert_eq!(refusal(&spec(&["a", "b"])), "-device vsock,id=b: one vsock too many; accepted: one");
        let mut mixed = spec(&["a", "b"]);
        mixed.vsocks[1].carrier = Carrier::Kernel(None);
        assert!(refusal(&mixed).ends_with("one vsock too many; accepted: one"), "of either kind");
        let shared = VmSpec { qmp: vec!["/v".into()], ..spec(&["a"]) };
        assert!(refusal(&shared).starts_with("-qmp unix:/v: "));
    }

    #[test]
    fn one_socket_twice_is_refused() {
        let spec = VmSpec { qmp: vec!["/s".into(), "/s".into()], ..VmSpec::new("vmlinux") };
        assert!(refusal(&spec).starts_with("-qmp unix:/s: "));
    }

    #[test]
    fn a_serial_port_on_the_terminal_and_a_background_monitor_exclude_each_other() {
        let mut spec = VmSpec { serial: SerialSpec::Stdio, daemonize: true, ..VmSpec::new("vmlinux") };
        assert!(refusal(&spec).starts_with("-serial stdio: "));
        spec.serial = SerialSpec::None;
        spec.check().unwrap();
    }
}
