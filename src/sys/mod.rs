//! The only home of raw libc: one small safe wrapper a file.

pub mod poll;
pub mod terminal;
mod thread;

pub use thread::gettid;
