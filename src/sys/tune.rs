//! What the process asks of its allocator and of the scheduler.
//!
//! Wishes, not needs: a kernel that refuses one costs speed and nothing else. Main thread.

/// One heap for all threads. Nothing allocates on the path of a request, so the threads do not contend for it, and a
/// heap of its own would cost each thread 128 MiB of address space and two dirty pages.
pub fn one_heap() {
    // SAFETY: takes two numbers, before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
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
/// answer while more iothreads and vCPUs are running than there are processors. The kernel's fair scheduler takes a
/// wish for a slice from version 6.12 on; its share of time stays what it was.
pub fn short_slice() {
    let size = size_of::<SchedAttr>() as u32;
    let wish = SchedAttr {
        size,
        policy: 0,
        flags: 0,
        nice: 0,
        priority: 0,
        runtime_ns: SLICE_NS,
        deadline_ns: 0,
        period_ns: 0,
    };
    // SAFETY: the kernel reads `size` bytes from `wish`; 0 is the calling thread.
    unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const wish, 0) };
}
