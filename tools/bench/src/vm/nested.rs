//! Debian's kernel in the nested host, whose clock counts instructions (a nanosecond each): from the start of the
//! monitor to the line that init prints, and to the exit.
//!
//! Where KVM is emulated by software a stock kernel does not boot in any useful time; here the figures mean something
//! because two runs agree, whatever else the host does.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::Result;
use super::programs::{Programs, ROOT};
use super::running::number;
use super::scratch::Scratch;
use super::table::{Table, median};
use super::target::{Figure, Limit};

const RUNS: &str = "2";
const WORDS: &str = "console=ttyS0 reboot=k panic=-1 quiet";
const LINE: &str = "bench: init";
/// In place of the Linux guest's own: nothing comes before the line.
const INIT: &str = "#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
read -r uptime _ </proc/uptime
echo \"bench: init uptime_s=$uptime\"
poweroff -f
";
/// The same behind the drivers of all devices there are, empty slots too.
const INIT_WITH_DRIVERS: &str = "#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t devtmpfs dev /dev
while read -r module; do insmod $module; done </lib/modules/all
[ -b /dev/vda ] && read -r uptime _ </proc/uptime && echo \"bench: init uptime_s=$uptime\"
poweroff -f
";
/// A disk of 4 MiB.
const DISK_BYTES: u64 = 4 << 20;

/// Files for the nested host, as its `--file` takes them.
type Files = Vec<String>;

pub fn report(programs: &Programs) -> Result<Vec<Figure>> {
    let linux = Path::new(ROOT).join("target/linux").canonicalize().map_err(|_| "no target/linux: run make linux")?;
    let scratch = Scratch::new("/tmp")?;
    let [bare, drivers] =
        [(INIT, "bare"), (INIT_WITH_DRIVERS, "drivers")].map(|(init, name)| initrd(&linux, &scratch, init, name));
    let (bare, drivers) = (bare?, drivers?);
    let disk = scratch.path("disk");
    fs::File::create(&disk)?.set_len(DISK_BYTES)?;
    let guest = |kernel: &str, initrd: &Path| -> Files {
        let kernel = linux.join(kernel);
        let files = [(&*kernel, "kernel"), (initrd, "initrd"), (&disk, "disk"), (&programs.bench, "bench")];
        files.iter().map(|(path, name)| format!("{}:{name}", path.display())).collect()
    };
    let ours = format!(
        "./loopvisor -no-reboot -m 256M -kernel kernel -initrd initrd -append {WORDS} -serial stdio -iothread id=io \
         -drive id=d0,file=disk,direct=off,iothread=io"
    );
    let ours: Vec<&str> = ours.split_whitespace().collect();
    let mut figures = Vec::new();
    let mut table = Table::new(&["", "to init, s", "uptime at init, s", "to exit, s"]);
    for (name, kernel) in [("loopvisor, bzImage", "vmlinuz"), ("loopvisor, ELF vmlinux", "vmlinux")] {
        let mut files = guest(kernel, &bare);
        files.push(format!("{}:loopvisor", programs.loopvisor.display()));
        let (row, to_init) = measure(name, &files, &ours)?;
        figures.push(Figure::new(format!("{name}: exec to init, s"), to_init, None, Limit::AtMost(1.5)));
        table.row(row);
    }
    for (name, machine) in [
        ("ELF, drivers loaded", None),
        ("ELF, drivers loaded, no empty slots", Some("microvm,disk-slots=1,nic-slots=0")),
    ] {
        let mut files = guest("vmlinux", &drivers);
        files.push(format!("{}:loopvisor", programs.loopvisor.display()));
        let slots = machine.into_iter().flat_map(|machine| ["-machine", machine]);
        let command: Vec<&str> = ours.iter().copied().chain(slots).collect();
        table.row(measure(name, &files, &command)?.0);
    }
    let mut files = guest("vmlinuz", &bare);
    files.extend(qemu_files(&programs.qemu)?);
    let qemu: Vec<&str> = QEMU.split_whitespace().chain(["-append", WORDS]).collect();
    table.row(measure("QEMU microvm, acpi=on, bzImage", &files, &qemu)?.0);
    table.print(
        "Debian's kernel in the nested host with -icount shift=0: from exec to the first line of init and to the exit, \
         on a clock of 1 ns an instruction; two runs each. 256 MiB, 1 vCPU, a disk on an iothread. *Drivers loaded*: \
         to the line that init prints when it has loaded the drivers of all virtio devices.",
    );
    Ok(figures)
}

const QEMU: &str = "/usr/bin/qemu-system-x86_64 -M microvm,accel=kvm,acpi=on,rtc=off,isa-serial=on -cpu host -m 256 \
     -global virtio-mmio.force-legacy=false -nodefaults -no-user-config -no-reboot -display none -serial stdio \
     -kernel kernel -initrd initrd -object iothread,id=io -drive id=d0,if=none,format=raw,file=disk \
     -device virtio-blk-device,drive=d0,iothread=io";

/// The Linux guest's initramfs with that init behind it, in a directory called `name`: the later of two files of a name
/// counts.
fn initrd(linux: &Path, scratch: &Scratch, init: &str, name: &str) -> Result<PathBuf> {
    use std::os::unix::fs::PermissionsExt;
    let directory = scratch.path(name);
    fs::create_dir(&directory)?;
    let file = directory.join("init");
    fs::write(&file, init)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    let mut cpio = Command::new("cpio")
        .args(["--quiet", "-o", "-H", "newc", "-D"])
        .arg(&directory)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| format!("cpio: {error}"))?;
    cpio.stdin.take().ok_or("no input")?.write_all(b"init\n")?;
    let ours = cpio.wait_with_output()?.stdout;
    let mut archive = fs::read(linux.join("initramfs.cpio"))?;
    archive.extend_from_slice(&ours);
    let path = directory.join("initrd");
    fs::write(&path, archive)?;
    Ok(path)
}

/// QEMU with its libraries and firmware, under the paths they have here.
fn qemu_files(qemu: &Path) -> Result<Files> {
    const FIRMWARE: [&str; 3] =
        ["/usr/share/qemu/bios-microvm.bin", "/usr/share/qemu/linuxboot_dma.bin", "/usr/share/qemu/kvmvapic.bin"];
    let which = Command::new("sh").arg("-c").arg(format!("command -v '{}'", qemu.display())).output()?;
    let qemu = String::from_utf8_lossy(&which.stdout).trim().to_owned();
    let libraries = Command::new("ldd").arg(&qemu).output().map_err(|error| format!("ldd: {error}"))?;
    let libraries = String::from_utf8_lossy(&libraries.stdout).into_owned();
    let libraries = libraries.split_whitespace().filter(|word| word.starts_with('/'));
    let same = libraries.chain(FIRMWARE).map(|path| format!("{path}:{path}"));
    Ok([format!("{qemu}:/usr/bin/qemu-system-x86_64")].into_iter().chain(same).collect())
}

/// Runs the monitor in the nested host; a row of the table, and the seconds to init.
fn measure(name: &str, files: &Files, monitor: &[&str]) -> Result<(Vec<String>, f64)> {
    let mut command = Command::new(Path::new(ROOT).join("tools/nested-host"));
    command.args(["run", "--icount", "--mem", "1536", "--timeout", "600"]).stdin(Stdio::null());
    for file in files {
        command.args(["--file", file]);
    }
    command.args(["--", "./bench", "stopwatch", RUNS, LINE]).args(monitor);
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(format!("{name}: {text}{}", String::from_utf8_lossy(&output.stderr)).into());
    }
    let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("stopwatch: ")).map(str::trim).collect();
    let column = |key: &str, digits: usize| -> Result<String> {
        let cells = lines.iter().map(|line| Ok(format!("{:.digits$}", number(line, key)?)));
        Ok(cells.collect::<Result<Vec<_>>>()?.join(" / "))
    };
    let row = vec![name.to_owned(), column("line_s", 3)?, column("uptime_s", 2)?, column("exit_s", 3)?];
    let to_init = lines.iter().map(|line| number(line, "line_s")).collect::<Result<Vec<_>>>()?;
    Ok((row, median(&to_init)))
}
