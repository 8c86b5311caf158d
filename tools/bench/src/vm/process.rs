//! What the kernel knows of a running process: memory, threads, processor time, context switches.

use std::fs;

use super::Result;
use super::monitor::MEMORY_MIB;

/// The memory of a process without the guest's RAM, in KiB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    pub rss: u64,
    pub pss: u64,
    pub private_dirty: u64,
    /// What of the guest's RAM is there.
    pub guest: u64,
}

/// Sums up /proc/PID/smaps. The guest's RAM is the mapping that is large enough for it.
pub fn memory(pid: u32) -> Result<Memory> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let mut memory = Memory::default();
    let mut is_guest = false;
    for line in smaps.lines() {
        let Some((name, rest)) = line.split_once(':') else { continue };
        let Some(kib) = rest.trim().strip_suffix(" kB").and_then(|kib| kib.parse::<u64>().ok()) else { continue };
        match name {
            // The first line about each mapping.
            "Size" => is_guest = kib >= MEMORY_MIB << 10,
            "Rss" if is_guest => memory.guest += kib,
            "Rss" => memory.rss += kib,
            "Pss" if !is_guest => memory.pss += kib,
            "Private_Dirty" if !is_guest => memory.private_dirty += kib,
            _ => {}
        }
    }
    Ok(memory)
}

/// All of a process that is in memory, the guest's RAM included, in KiB.
pub fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    Ok(kib.ok_or("no VmRSS")?.parse()?)
}

/// A thread and what it has used so far.
#[derive(Clone, Debug)]
pub struct Thread {
    pub name: String,
    pub cpu_ns: u64,
    /// How often it went to sleep by itself: once a wake-up.
    pub sleeps: u64,
}

impl Thread {
    /// Both monitors call their vCPUs so.
    fn is_vcpu(&self) -> bool {
        self.name.starts_with("CPU ")
    }
}

/// All threads of a process, the kernel's workers for it included.
pub fn threads(pid: u32) -> Result<Vec<Thread>> {
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = entry?.path();
        // A thread may end between the two.
        let read = |name: &str| fs::read_to_string(path.join(name));
        let (Ok(name), Ok(stat), Ok(status)) = (read("comm"), read("schedstat"), read("status")) else { continue };
        let cpu_ns = stat.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or(0);
        let sleeps = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        let sleeps = sleeps.and_then(|count| count.trim().parse().ok()).unwrap_or(0);
        threads.push(Thread { name: name.trim().to_owned(), cpu_ns, sleeps });
    }
    Ok(threads)
}

/// What the monitor used: all its threads but the vCPUs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Used {
    pub cpu_ns: u64,
    pub sleeps: u64,
}

/// What it has used so far.
pub fn used(pid: u32) -> Result<Used> {
    let threads = threads(pid)?;
    let others = threads.iter().filter(|thread| !thread.is_vcpu());
    Ok(others.fold(Used::default(), |sum, thread| Used {
        cpu_ns: sum.cpu_ns + thread.cpu_ns,
        sleeps: sum.sleeps + thread.sleeps,
    }))
}

/// How many descriptors it has open.
pub fn descriptors(pid: u32) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count())
}
