//! loopvisor: a KVM virtual machine monitor for x86_64 Linux hosts, built around a hand-written epoll loop.
//!
//! The modules stand in floor order: a file imports only from the floors below its own (`tests/floors.rs` holds it).

pub mod error;
pub mod sys;

pub mod bus;
pub mod config;
pub mod elastic;
pub mod event;
pub mod qmp;
pub mod qos;

pub mod kvm;
pub mod memory;

pub mod virtio;

pub mod devices;
pub mod disk;

pub mod machine;

pub mod control;

pub mod cli;
pub mod logging;
pub mod pidfile;
