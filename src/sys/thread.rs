//! What the kernel knows of the calling thread.

#![allow(unsafe_code)] // gettid(2) has no safe wrapper in the standard library.

/// The calling thread's id on the host, as in `/proc/self/task`.
pub fn gettid() -> i32 {
    // SAFETY: takes nothing, touches nothing, cannot fail.
    unsafe { libc::gettid() }
}
