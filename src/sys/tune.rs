//! What the process asks of its allocator and of the scheduler.
//!
//! Main thread, at start; each iothread for itself.

/// One heap for all threads. Nothing allocates on the path of a request, so the threads do not contend for it, and a
/// heap of its own would cost each thread 128 MiB of address space and two dirty pages.
pub fn memory() {
    // SAFETY: takes two numbers, before there is a second thread.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
