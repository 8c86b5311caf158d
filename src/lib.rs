//! loopvisor: a KVM virtual machine monitor for x86_64 Linux hosts, built around a hand-written epoll loop.
//!
//! The modules stand in floor order: a file imports only from the floors below its own (`tests/floors.rs` holds it).

pub mod error;

pub mod sys;

pub mod config;

pub mod disk;
