# Everything one does here, a word each. The work itself is in cargo and in tools/.
#
# make boot takes CPUS, MEM, DRIVE, APPEND, KERNEL and INITRD; make bench takes BENCH, its arguments, and make bench-qos
# QOS, its part.

CPUS ?= 1
MEM ?= 256M
export CPUS MEM DRIVE APPEND KERNEL INITRD

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help deps build guest linux boot test lint bench bench-qos bench-balloon bench-net bench-nested pages screenshot doc clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s  %s\n", $$1, $$2 }' Makefile

deps: ## install the Debian packages that are missing for any of the targets
	@tools/deps build linux boot lint test bench

build: ## build the monitor: target/x86_64-unknown-linux-gnu/release/loopvisor
	@tools/deps build
	cargo build --release

guest: ## build the bare-metal test guest
	@tools/deps build
	cargo build --release --manifest-path tests/guest/Cargo.toml

linux: ## make the Linux test guest: target/linux
	@tools/deps linux
	@tools/linux-image

boot: ## boot Linux with a disk on an iothread; a shell if standard input is a terminal [CPUS= MEM= DRIVE= APPEND= KERNEL= INITRD=]
	@tools/deps build linux boot
	@cargo build --release
	@tools/linux-image
	@tools/boot

test: ## run every test: unit, property, bare-metal guest on /dev/kvm, Linux end to end
	@tools/deps build linux boot test
	@tools/run-tests

lint: ## check formatting, clippy, documentation, shell and Python scripts; a warning is an error
	@tools/deps build lint
	@tools/lint

bench: ## measure ours beside QEMU, print the tables of docs/performance.md [BENCH=all|loop|boot|memory|disk|qmp]
	@tools/deps build bench
	@cargo build --release
	@cargo build --release --manifest-path tests/guest/Cargo.toml
	@cargo run --release --manifest-path tools/bench/Cargo.toml -- $(BENCH)

bench-qos: ## measure the limits of disks beside QEMU's, draw docs/img/qos.svg: about six minutes [QOS=accuracy|cost|isolation]
	@tools/deps build bench
	@cargo build --release
	@cargo build --release --manifest-path tests/guest/Cargo.toml
	@cargo run --release --manifest-path tools/bench/Cargo.toml -- qos $(QOS)

bench-balloon: ## measure how memory goes back to the host and comes again, beside QEMU's: about three minutes
	@tools/deps build bench
	@cargo build --release
	@cargo build --release --manifest-path tests/guest/Cargo.toml
	@cargo run --release --manifest-path tools/bench/Cargo.toml -- balloon

bench-net: ## measure packets and bits a second through a tap beside QEMU's: about two minutes, as root
	@tools/deps build bench
	@cargo build --release
	@cargo build --release --manifest-path tests/guest/Cargo.toml
	@cargo run --release --manifest-path tools/bench/Cargo.toml -- net

bench-nested: ## measure the boot of Debian's kernel in the nested host, by a clock that counts instructions
	@tools/deps build linux bench
	@cargo build --release
	@tools/linux-image
	@cargo run --release --manifest-path tools/bench/Cargo.toml -- nested

pages: ## make the manual page and the completions of bash, zsh and fish: target/pages
	@tools/deps build
	@mkdir -p target/pages
	@cargo run --quiet --example pages target/pages

screenshot: ## draw docs/img/looptop.svg and qmp-shell.svg from machines that run here: half a minute, as root for the NIC
	@tools/deps build screenshot
	@cargo build --release
	@cargo build --release --manifest-path tests/guest/Cargo.toml
	@tools/screenshot

doc: ## build the documentation of the code, private items too
	cargo doc --no-deps --document-private-items

clean: ## remove everything that was built, downloads included
	rm -rf target tests/guest/target tools/bench/target
