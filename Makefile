# Everything one does here, a word each. The work itself is in cargo and in tools/.
#
# make boot takes CPUS, MEM, DRIVE, APPEND, KERNEL (a file, or the word microvm) and INITRD; make bench takes BENCH, its arguments, and make bench-qos
# QOS, its part; make install takes DESTDIR and PREFIX.

CPUS ?= 1
MEM ?= 256M
PREFIX ?= /usr/local
export CPUS MEM DRIVE APPEND KERNEL INITRD DESTDIR PREFIX

PROGRAM := target/x86_64-unknown-linux-gnu/release/loopvisor

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help deps build musl guest linux microvm-kernel boot test test-powercut test-distro lint bench bench-qos bench-balloon bench-net bench-nested \
    pages screenshot doc \
    licenses install uninstall deb package-test clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s  %s\n", $$1, $$2 }' Makefile

deps: ## install the Debian packages that are missing for any of the targets
	@tools/deps build linux microvm-kernel boot lint test bench deb package-test distro

build: ## build the monitor: target/x86_64-unknown-linux-gnu/release/loopvisor
	@tools/deps build
	cargo build --release

musl: ## build the monitor without glibc: target/x86_64-unknown-linux-musl/release/loopvisor
	@tools/deps build musl
	cargo build --release --target x86_64-unknown-linux-musl

guest: ## build the bare-metal test guest
	@tools/deps build
	cargo build --release --manifest-path tests/guest/Cargo.toml

linux: ## make the Linux test guest: target/linux
	@tools/deps linux
	@tools/linux-image

microvm-kernel: ## build the microVM kernel into ~/.cache/loopvisor: once per machine, about four minutes
	@tools/deps microvm-kernel
	@tools/microvm-kernel

boot: ## boot Linux with a disk on an iothread; a shell if standard input is a terminal [CPUS= MEM= DRIVE= APPEND= KERNEL= INITRD=]
	@tools/deps build linux boot
	@cargo build --release
	@tools/linux-image
	@[ "$(KERNEL)" != microvm ] || tools/deps microvm-kernel
	@tools/boot

test: ## run every test: unit, property, bare-metal guest on /dev/kvm, Linux end to end
	@tools/deps build linux microvm-kernel boot test
	@tools/run-tests

test-powercut: ## cut the power of a Linux guest at every flush and 200 more points: about ten minutes
	@tools/deps build linux boot test
	@tools/run-tests powercut

test-distro: ## boot a Debian 12 with systemd, and Debian's kernels, in the nested host: as root, half an hour [TEST=NAME]
	@tools/deps build linux boot test distro
	@tools/run-tests distro $(TEST)

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

licenses: ## list what the program is linked from: target/licenses.md, their texts, and a CycloneDX file
	@tools/deps build licenses
	@tools/licenses

# Root may have no cargo: what is there is installed as it is.
install: ## install the program, tools, pages and the systemd unit; builds what is missing [DESTDIR= PREFIX=/usr/local]
	@test -e $(PROGRAM) || $(MAKE) build
	@test -e target/pages/loopvisor.fish || $(MAKE) pages
	@test -e target/loopvisor.cdx.json || $(MAKE) licenses
	@tools/package/install add

uninstall: ## remove what make install installed, with the same DESTDIR and PREFIX
	@tools/package/install remove

deb: build pages licenses ## make a Debian package: target/loopvisor_VERSION_amd64.deb
	@tools/deps deb
	@tools/package/deb

package-test: deb ## install the Debian package in a small Debian, try it there, and purge it: as root, half a minute
	@tools/deps package-test
	@tools/package-test

clean: ## remove everything that was built, downloads included, except the microVM kernel in ~/.cache/loopvisor
	rm -rf target tests/guest/target tools/bench/target
