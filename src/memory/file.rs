//! The file behind guest memory (`-mem-path`): opened, made large enough, and what it says of the memory's pages.
//!
//! A folder gets a file without a name, which is gone with the monitor; a name is made if it is not there, and stays. On
//! hugetlbfs the memory consists of huge pages. Main thread, before anything else.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use log::warn;
use vm_memory::{FileOffset, GuestMemoryBackend, GuestMemoryRegion};

use super::{GuestRam, PAGE_BYTES};
use crate::error::{Context, Error, Result};
use crate::sys::io::{self as sys_io, FileSystem, file_system};
use crate::sys::lock::{self, Lock};

/// An open file that is as large as the memory.
pub(super) struct Backing {
    file: Arc<File>,
    pub system: FileSystem,
    /// It has no name, so no other process can map it.
    pub nameless: bool,
    /// It is one hole, so its memory is all zeros.
    pub blank: bool,
}

impl Backing {
    /// Opens or makes the file for `bytes` of memory, `shared` with other processes that map it or private to this VM.
    ///
    /// # Errors
    /// The path leads nowhere or to no regular file; the file is shorter than the memory, and not empty; the file system
    /// has no room; the memory is not a multiple of its huge pages.
    pub fn open(path: &Path, bytes: u64, shared: bool) -> Result<Backing> {
        let what = || format!("-mem-path {}", path.display());
        let nameless = path.is_dir();
        let (file, made) = if nameless { nameless_in(path) } else { open_or_make(path) }.context(what)?;
        if made && !nameless {
            log::info!("-mem-path {}: there was no such file or folder, and a file was made", path.display());
        }
        // A private mapping leaves the file as it is, so any number of VMs may start from it.
        lock::take(&file, path, if shared { Lock::Exclusive } else { Lock::Shared }).context(what)?;
        Backing::on(file, bytes, nameless)
            .inspect_err(|_| {
                if made && !nameless {
                    // It was not there before; what it is not good for is the error that is told.
                    let _ = fs::remove_file(path);
                }
            })
            .context(what)
    }

    fn on(file: File, bytes: u64, nameless: bool) -> Result<Backing> {
        let facts = file.metadata().context(|| "look at it")?;
        if !facts.is_file() {
            return Err(Error::host("neither a folder nor a regular file; accepted: one of these"));
        }
        let system = file_system(&file).context(|| "look at its file system")?;
        if system.is_hugetlb && !bytes.is_multiple_of(system.block_bytes) {
            let (mib, page) = (bytes >> 20, system.block_bytes >> 20);
            return Err(Error::host(format!(
                "{mib} MiB of memory are not whole huge pages of {page} MiB; accepted: -m with a multiple of {page}"
            )));
        }
        match facts.len() {
            0 => file.set_len(bytes).context(|| format!("make it {} MiB long", bytes >> 20))?,
            len if len < bytes => {
                return Err(Error::host(format!(
                    "the file has {len} bytes, and {bytes} are needed; accepted: a file at least as long, an empty one, \
                     or a name or folder for a new one"
                )));
            }
            _ => {}
        }
        let missing = bytes.saturating_sub(facts.blocks() * 512);
        // Of huge pages the mapping itself says whether there are enough.
        if !system.is_hugetlb && system.free_bytes < missing {
            return Err(Error::host(format!(
                "the file system has {} MiB free, and {} MiB are needed: use less memory (-m), or a path with more room",
                system.free_bytes >> 20,
                missing.div_ceil(1 << 20)
            )));
        }
        Ok(Backing { file: Arc::new(file), system, nameless, blank: facts.blocks() == 0 })
    }

    /// The part of the file behind the memory that has `offset` bytes before it.
    pub fn at(&self, offset: u64) -> FileOffset {
        FileOffset::from_arc(self.file.clone(), offset)
    }
}

/// How the file of a path was found. Dropped, it makes it so again, if all that has been done since is to open it as memory,
/// privately: a file that was made goes, and one that was empty is.
pub struct Found<'p> {
    path: &'p Path,
    state: State,
}

enum State {
    Missing,
    Empty,
    Other,
}

impl<'p> Found<'p> {
    /// Looks at what is there.
    pub fn look(path: &'p Path) -> Found<'p> {
        let state = match fs::symlink_metadata(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => State::Missing,
            _ if fs::metadata(path).is_ok_and(|facts| facts.is_file() && facts.len() == 0) => State::Empty,
            _ => State::Other,
        };
        Found { path, state }
    }
}

impl Drop for Found<'_> {
    fn drop(&mut self) {
        let restored = match self.state {
            State::Missing => fs::remove_file(self.path),
            State::Empty => File::options().write(true).truncate(true).open(self.path).map(drop),
            State::Other => Ok(()),
        };
        match restored {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                warn!("-mem-path {}: leave it as it was found: {error}", self.path.display());
            }
            _ => {}
        }
    }
}

/// A new file in `folder` that has lost its name already.
fn nameless_in(folder: &Path) -> io::Result<(File, bool)> {
    let path = folder.join(format!("loopvisor-memory-{}", std::process::id()));
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
    fs::remove_file(&path)?;
    Ok((file, true))
}

/// The file of that name, and whether it was made.
fn open_or_make(path: &Path) -> io::Result<(File, bool)> {
    let mut options = OpenOptions::new();
    // A FIFO would make us wait for its other end.
    options.read(true).write(true).mode(0o600).custom_flags(libc::O_NONBLOCK);
    match options.clone().create_new(true).open(path) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok((options.open(path)?, false)),
        made => Ok((made?, true)),
    }
}

/// Allocates the space of a shared file, so that no page of it can be missing later. The balloon gives parts of it back. On
/// hugetlbfs the mapping has reserved the space already.
///
/// # Errors
/// The file system is full; the sentence names it.
pub fn reserve(ram: &GuestRam) -> Result<()> {
    for region in ram.iter().filter(|region| super::discard::is_shared(region)) {
        let Some(part) = region.file_offset() else { continue };
        if file_system(part.file()).is_ok_and(|system| system.is_hugetlb) {
            continue;
        }
        match sys_io::fallocate(part.file().as_fd(), 0, part.start(), region.len()) {
            // A file system that cannot reserve.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            done => done.context(|| {
                format!(
                    "guest memory: reserve {} MiB of {}: use less memory, or another -mem-path",
                    region.len() >> 20,
                    name(part.file())
                )
            })?,
        }
    }
    Ok(())
}

/// Why a page of guest memory is missing, if that is because its file system is full: the sentence names it.
pub fn full_file_system(ram: &GuestRam) -> Option<String> {
    let files = ram.iter().filter_map(|region| region.file_offset());
    let full = |file: &&FileOffset| file_system(file.file()).is_ok_and(|system| system.free_bytes < FULL_BYTES);
    let found = files.into_iter().find(full)?;
    Some(format!("the file system of guest memory is full ({}); make room there", name(found.file())))
}

/// A file system with fewer free bytes counts as full, because the number that it reports is not exact.
const FULL_BYTES: u64 = 1 << 20;

/// Where an open file is.
fn name(file: &File) -> String {
    let path = fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()));
    path.map_or_else(|_| "-mem-path".to_owned(), |path| path.display().to_string())
}

/// The size of the pages that the memory consists of, in bytes: the host's, or those of hugetlbfs.
///
/// # Errors
/// What fstatfs(2) says.
pub fn page_bytes(ram: &GuestRam) -> io::Result<u64> {
    ram.iter().try_fold(PAGE_BYTES, |most, region| {
        let Some(file) = region.file_offset() else { return Ok(most) };
        let system = file_system(file.file())?;
        Ok(if system.is_hugetlb { most.max(system.block_bytes) } else { most })
    })
}

#[cfg(test)]
mod tests {
    use super::super::{allocate_on, total};
    use super::*;
    use crate::memory::{Discard, GAP_START};
    use std::path::PathBuf;
    use vm_memory::{Bytes, GuestAddress};

    const BYTES: u64 = 4 << 20;

    #[test]
    fn a_file_is_left_as_it_was_found() {
        let folder = Folder::new("memory-found");
        let place = |name: &str| folder.0.join(name);
        fs::write(place("empty"), "").unwrap();
        fs::write(place("full"), vec![7; BYTES as usize]).unwrap();
        std::os::unix::fs::symlink("/nowhere/at/all", place("link")).unwrap();
        for name in ["missing", "empty", "full", "link", ""] {
            let path = place(name);
            let found = Found::look(&path);
            let ram = allocate_on(&path, BYTES, false, true);
            assert_eq!(ram.is_ok(), name != "link");
            ram.iter().for_each(|ram| ram.write_obj(9u8, GuestAddress(0)).unwrap());
            drop((ram, found));
        }
        let mut names = folder.names();
        names.sort_unstable();
        assert_eq!(names, ["empty", "full", "link"]);
        assert_eq!(fs::read(place("empty")).unwrap(), b"");
        assert!(fs::read(place("full")).unwrap().iter().all(|&byte| byte == 7));
    }

    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("loopvisor-{name}-{}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Folder(path)
        }

        fn names(&self) -> Vec<String> {
            fs::read_dir(&self.0).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn memory_in_a_folder_leaves_no_name_and_a_named_file_stays_and_has_what_the_guest_wrote_if_shared() {
        let folder = Folder::new("memory-file");
        let ram = allocate_on(&folder.0, BYTES, true, true).unwrap();
        ram.write_obj(7u8, GuestAddress(4096)).unwrap();
        assert!(folder.names().is_empty());
        let path = folder.0.join("ram");
        for (share, found) in [(false, 0), (true, 9)] {
            let ram = allocate_on(&path, BYTES, share, true).unwrap();
            ram.write_obj(9u8, GuestAddress(4096)).unwrap();
            drop(ram);
            let content = fs::read(&path).unwrap();
            assert_eq!((content.len() as u64, content[4096]), (BYTES, found));
        }
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_shared_files_pages_are_given_back_to_its_file_system() {
        let folder = Folder::new("memory-hole");
        let path = folder.0.join("ram");
        let ram = allocate_on(&path, BYTES, true, true).unwrap();
        super::super::can_discard(&ram).unwrap();
        ram.write_slice(&[1; 1 << 20], GuestAddress(0)).unwrap();
        let mut discard = Discard::new(ram.clone());
        discard.add(GuestAddress(0), 1 << 20).unwrap();
        assert_eq!(discard.give_back().unwrap(), 1 << 20);
        let facts = fs::metadata(&path).unwrap();
        assert_eq!((facts.len(), facts.blocks()), (BYTES, 0));
    }

    #[test]
    fn both_pieces_of_a_large_memory_lie_in_one_file_one_behind_the_other() {
        let folder = Folder::new("memory-pieces");
        let path = folder.0.join("ram");
        let file = File::create(&path).unwrap();
        // On a file system too small for it the file's length says that it is there.
        file.set_len(GAP_START + BYTES).unwrap();
        let Ok(ram) = allocate_on(&path, GAP_START + BYTES, true, true) else {
            eprintln!("skipped: {} has no room for 3 GiB", folder.0.display());
            return;
        };
        assert_eq!(total(&ram), GAP_START + BYTES);
        ram.write_obj(5u8, GuestAddress(crate::memory::GAP_END + 17)).unwrap();
        drop(ram);
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&File::open(&path).unwrap(), &mut byte, GAP_START + 17).unwrap();
        assert_eq!(byte, [5]);
    }

    #[test]
    fn a_file_that_will_not_do_is_refused_with_the_reason_and_a_new_one_leaves_nothing() {
        let folder = Folder::new("memory-refused");
        let short = folder.0.join("short");
        fs::write(&short, "abc").unwrap();
        let refusal = |path: &Path, bytes| allocate_on(path, bytes, true, true).expect_err("is refused").to_string();
        let told = refusal(&short, BYTES);
        assert!(
            told.starts_with(&format!("-mem-path {}: the file has 3 bytes, and {BYTES}", short.display())),
            "{told}"
        );
        assert_eq!(fs::read(&short).unwrap(), b"abc");
        assert!(refusal(Path::new("/nowhere/ram"), BYTES).ends_with("No such file or directory (os error 2)"));
        assert!(refusal(Path::new("/dev/null"), BYTES).contains("neither a folder nor a regular file"));
        let new = folder.0.join("new");
        // Longer than any file may be, and than what is free in the host's memory.
        let told = refusal(&new, 1 << 62);
        assert!(told.contains("MiB long"), "{told}");
        assert_eq!(folder.names(), ["short"]);
        let new = PathBuf::from(format!("/dev/shm/loopvisor-memory-large-{}", std::process::id()));
        let told = refusal(&new, 1 << 43);
        assert!(told.contains(" MiB free, and 8388608 MiB are needed") && !new.exists(), "{told}");
    }
}
