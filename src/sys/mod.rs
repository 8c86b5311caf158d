//! System calls that no library wraps the way we need them. The home of raw libc: nothing above it calls libc for I/O.

pub mod io;
