//! What the process asks of its allocator, of signals and of the scheduler.
//!
//! Wishes, not needs: a kernel that refuses one costs speed and nothing else. Main thread, and `short_slice` iothreads.

/// One heap for all threads. Nothing allocates on the path of a request, so the threads do not contend for it, and a
/// heap of its own would cost each thread 128 MiB of address space and two dirty pages. musl never has more than one.
pub fn one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: takes two numbers, before there is a second thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

/// A write beyond `ulimit -f` is an error of the disk it is for and not the end of the process.
pub fn file_size_limit_is_an_error() {
    // SAFETY: the disposition is a constant, set before there is a second thread.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
}

/// Lets the process open so many descriptors more than it was allowed at its start, as far as its hard limit goes: the
/// usual soft limit is 1024.
pub fn allow_descriptors(more: u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one struct rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } == 0 {
        limit.rlim_cur = limit.rlim_cur.saturating_add(more).min(limit.rlim_max);
        // SAFETY: the kernel reads one.
        unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit) };
    }
}

unsafe extern "C" {
    /// Where the program's first mapping begins, and where its code ends: names of the linker's, whose addresses are their
    /// values.
    static __executable_start: u8;
    static etext: u8;
}

/// Lets go of the pages of code that the process has mapped, most of which were needed to start: what is still needed is
/// mapped again from the page cache as it is run. An idle machine that only waits holds a third of them.
pub fn forget_code() {
    let start = (&raw const __executable_start).addr() & !0xfff;
    let end = (&raw const etext).addr() & !0xfff;
    // SAFETY: between the two names lie the program's constants and its code, mapped from its file, privately and without
    // the right to write: pages that go come back as they were.
    unsafe { libc::madvise(start as *mut libc::c_void, end.saturating_sub(start), libc::MADV_DONTNEED) };
}

/// struct sched_attr of sched_setattr(2), which libc has no name for everywhere.
#[repr(C)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime_ns: u64,
    deadline_ns: u64,
    period_ns: u64,
}

/// The shortest slice that the scheduler grants, in nanoseconds.
const SLICE_NS: u64 = 100_000;

/// Short turns for the calling thread, which it needs soon when it wakes and gives up early: the main loop, which must
/// answer while more iothreads and vCPUs are running than there are processors, and the iothreads, whose disks lose what a
/// limit owes them when its timer is late. The kernel's fair scheduler takes a wish for a slice from version 6.12 on; its
/// share of time stays what it was.
pub fn short_slice() {
    // SAFETY: neither call touches memory; 0 is the calling thread.
    let (policy, nice) = unsafe { (libc::sched_getscheduler(0), libc::getpriority(libc::PRIO_PROCESS, 0)) };
    if policy != libc::SCHED_OTHER {
        // Somebody chose another policy for us and knows why.
        return;
    }
    let wish = SchedAttr {
        size: size_of::<SchedAttr>() as u32,
        policy: 0,
        flags: 0,
        nice,
        priority: 0,
        runtime_ns: SLICE_NS,
        deadline_ns: 0,
        period_ns: 0,
    };
    // SAFETY: the kernel reads `size` bytes from `wish`; 0 is the calling thread.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const wish, 0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `sched_setattr` sets the nice value along with the slice.
    #[test]
    fn short_turns_leave_the_nice_value_as_it_was() {
        // A thread of its own: nice values belong to threads, and one that is raised cannot be lowered again by all.
        let nice = std::thread::spawn(|| {
            // SAFETY: these calls touch no memory; 0 is the calling thread.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, 7) };
            short_slice();
            // SAFETY: as above.
            unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
        });
        assert_eq!(nice.join().unwrap(), 7);
    }
}
