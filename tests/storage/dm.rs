//! Devices of the device mapper (Linux, include/uapi/linux/dm-ioctl.h), which are removed with their value.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::host;

/// `struct dm_ioctl`: its bytes, and where its fields are.
const HEADER: usize = 312;
const DATA_SIZE: usize = 12;
const DATA_START: usize = 16;
const TARGET_COUNT: usize = 20;
const FLAGS: usize = 28;
const DEVICE: usize = 40;
const NAME: usize = 48;
const SUSPEND_FLAG: u32 = 2;

#[derive(Clone, Copy)]
enum Command {
    Create = 3,
    Remove = 4,
    Suspend = 6,
    Load = 9,
    Status = 12,
    Message = 14,
}

/// A mapped device.
pub struct Dm {
    name: String,
    pub path: PathBuf,
}

impl Dm {
    /// A device of that many sectors, made by one target with these parameters.
    #[track_caller]
    pub fn new(name: &str, sectors: u64, target: &str, parameters: &str) -> Dm {
        let answer = ask(name, Command::Create, 0, 0, &[]).unwrap();
        let number = u64::from_ne_bytes(answer[DEVICE..DEVICE + 8].try_into().unwrap());
        let dm = Dm { name: name.into(), path: format!("/dev/dm-{}", number & 0xff).into() };
        dm.load(sectors, target, parameters);
        let until = Instant::now() + Duration::from_secs(10);
        while !dm.path.exists() {
            assert!(Instant::now() < until, "{:?} does not appear", dm.path);
        }
        dm
    }

    /// Replaces the target. What is in flight in the old one completes first.
    #[track_caller]
    pub fn load(&self, sectors: u64, target: &str, parameters: &str) {
        // struct dm_target_spec, then the parameters to a multiple of eight bytes.
        let mut table = [&0_u64.to_ne_bytes()[..], &sectors.to_ne_bytes(), &[0; 8], target.as_bytes()].concat();
        table.resize(40, 0);
        table.extend(parameters.bytes());
        table.resize((table.len() + 1).next_multiple_of(8), 0);
        ask(&self.name, Command::Load, 0, 1, &table).unwrap_or_else(|e| panic!("{target} {parameters}: {e}"));
        self.suspend();
        self.resume();
    }

    /// From now on requests wait.
    pub fn suspend(&self) {
        ask(&self.name, Command::Suspend, SUSPEND_FLAG, 0, &[]).unwrap();
    }

    pub fn resume(&self) {
        ask(&self.name, Command::Suspend, 0, 0, &[]).unwrap();
    }

    #[track_caller]
    pub fn message(&self, text: &str) {
        let message = [&[0; 8], text.as_bytes(), &[0]].concat();
        ask(&self.name, Command::Message, 0, 0, &message).unwrap_or_else(|e| panic!("{}: {text}: {e}", self.name));
    }

    /// What the target says of itself.
    pub fn status(&self) -> String {
        let answer = ask(&self.name, Command::Status, 0, 0, &[0; 1024]).unwrap();
        let start = u32::from_ne_bytes(answer[DATA_START..DATA_START + 4].try_into().unwrap()) as usize;
        let text = answer[start + 40..].split(|&byte| byte == 0).next().unwrap();
        String::from_utf8_lossy(text).into_owned()
    }
}

impl Drop for Dm {
    fn drop(&mut self) {
        // The monitor that had it open may be on its way out.
        let until = Instant::now() + Duration::from_secs(30);
        while let Err(error) = ask(&self.name, Command::Remove, 0, 0, &[]) {
            if error.raw_os_error() != Some(libc::EBUSY) || Instant::now() > until {
                eprintln!("remove {}: {error}", self.name);
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// One request to the device mapper; its answer.
fn ask(name: &str, command: Command, flags: u32, targets: u32, data: &[u8]) -> io::Result<Vec<u8>> {
    let control = File::options().read(true).write(true).open("/dev/mapper/control")?;
    let mut request = vec![0; HEADER + data.len().max(1024)];
    let mut put = |at: usize, bytes: &[u8]| request[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, &4_u32.to_ne_bytes());
    put(TARGET_COUNT, &targets.to_ne_bytes());
    put(FLAGS, &flags.to_ne_bytes());
    put(DATA_START, &(HEADER as u32).to_ne_bytes());
    put(NAME, name.as_bytes());
    put(HEADER, data);
    let size = request.len() as u32;
    request[DATA_SIZE..DATA_SIZE + 4].copy_from_slice(&size.to_ne_bytes());
    // _IOWR(0xfd, command, struct dm_ioctl)
    host::ioctl_on(&control, 0xc138_fd00 | command as u64, &mut request)?;
    Ok(request)
}

/// How many sectors a device has.
pub fn sectors(device: &Path) -> u64 {
    const BLKGETSIZE64: u64 = 0x8008_1272;
    let file = File::open(device).unwrap();
    let mut answer = [0; 8];
    host::ioctl_on(&file, BLKGETSIZE64, &mut answer).unwrap();
    u64::from_ne_bytes(answer) / 512
}
