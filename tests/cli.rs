//! The command line of the real binary: mistakes go to standard error with exit code 2, help and version to standard
//! output with exit code 0. Needs no KVM: nothing is started.

#![allow(clippy::expect_used, reason = "the lint's exception for tests does not reach a test's own functions here")]

use std::io::Write;
use std::process::{Command, Output, Stdio};

fn loopvisor(line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_loopvisor")).args(line.split_whitespace()).output().expect("the binary runs")
}

#[test]
fn a_mistake_exits_with_2_and_names_the_option_the_word_and_what_is_accepted() {
    for (line, option, word, accepted) in [
        ("", "-kernel", "missing", "-kernel FILE"),
        ("vmlinux", "-OPTION", "\"vmlinux\"", "-OPTION vmlinux"),
        ("-kernal k", "-kernal", "no such option", "-kernel"),
        ("-kernel k -incoming 7", "-incoming", "no such option", "-name"),
        ("-kernel a b", "-kernel", "\"b\"", "-kernel FILE"),
        ("-kernel a -kernel b", "-kernel", "twice", "once"),
        ("-kernel k -freeze now", "-freeze", "\"now\"", "accepted: -freeze"),
        ("-kernel k -machine q35", "-machine", "\"q35\"", "microvm"),
        ("-kernel k -smp 255", "-smp", "\"255\"", "1 to 254"),
        ("-kernel k -m 8M", "-m", "\"8M\"", "16M to 512G"),
        ("-kernel k -m 268435457", "-m", "\"268435457\"", "whole MiB"),
        ("-kernel k -drive id=a", "-drive", "\"file\"", "file=FILE"),
        ("-kernel k -drive id=a,file=f,", "-drive", "id=a,file=f,", "key=value"),
        ("-kernel k -drive id=a,file=f,size=1", "-drive", "\"size\"", "id, file, readonly"),
        ("-kernel k -drive id=a,file=f,iops=1000001", "-drive", "\"1000001\"", "a number from 0 to 1000000"),
        ("-kernel k -drive id=a,file=f,throttling.bps=1", "-drive", "\"throttling.bps\"", "throttling.bps-total"),
        ("-kernel k -drive id=a,file=f,throttling.iops-read-max=1", "-drive", "iops-read-max", "both, or neither"),
        ("-kernel k -drive id=a,file=f,direct=ON", "-drive", "\"ON\"", "on, yes, true"),
        ("-kernel k -drive id=a,file=f,iothread=io", "-drive", "iothread=io", "-iothread id=io"),
        ("-kernel k -iothread io", "-iothread", "\"io\"", "id"),
        ("-kernel k -serial pty", "-serial", "\"pty\"", "stdio"),
        ("-kernel k -serial stdio -daemonize", "-serial stdio", "-daemonize", "one of the two"),
        ("-kernel k -qmp unix:/s,nowait", "-qmp", "\"server\"", "unix:PATH,server,nowait"),
        ("-kernel k -api-channel tcp:1", "-api-channel", "\"tcp:1\"", "unix:PATH"),
        ("-kernel k -config /dev/null", "-config", "/dev/null:1:1", "a JSON object"),
        ("-kernel k -config /dev/zero", "-config", "/dev/zero", "1048576 bytes"),
        ("-kernel k -check -dump-config", "-check", "-dump-config", "one of the two"),
    ] {
        let output = loopvisor(line);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{line}: {stderr}");
        assert!(output.stdout.is_empty(), "{line}");
        assert_eq!(stderr.lines().count(), 1, "{line}: {stderr}");
        for part in ["loopvisor: ", option, word, accepted] {
            assert!(stderr.contains(part), "{line}: {part} is not in {stderr}");
        }
    }
}

#[test]
fn rule_d1_2_a_ninth_iothread_exits_with_2_before_anything_is_started() {
    let pidfile = std::env::temp_dir().join(format!("loopvisor-cli-{}.pid", std::process::id()));
    let iothreads: String = (0..9).map(|n| format!(" -iothread id=io{n}")).collect();
    let output = loopvisor(&format!("-kernel k -pidfile {}{iothreads}", pidfile.display()));
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("rule D1.2"));
    assert!(!pidfile.exists());
}

#[test]
fn help_and_version_go_to_standard_output_and_exit_with_0() {
    for (line, start) in [("-h", "Usage: loopvisor"), ("--help", "Usage: loopvisor"), ("-V", "loopvisor ")] {
        let output = loopvisor(line);
        assert_eq!(output.status.code(), Some(0), "{line}");
        assert!(output.stderr.is_empty(), "{line}");
        assert!(output.stdout.starts_with(start.as_bytes()), "{line}");
    }
}

#[test]
fn what_is_printed_as_a_file_is_read_back_through_a_pipe_and_nothing_is_started() {
    let line =
        "-kernel k -smp 2 -drive id=a,file=a,iops=5 -iothread id=io -qmp unix:/nowhere/s,server -pidfile /nowhere/p";
    let printed = loopvisor(&format!("{line} -dump-config"));
    assert_eq!((printed.status.code(), printed.stderr.len()), (Some(0), 0));
    let mut again = Command::new(env!("CARGO_BIN_EXE_loopvisor"));
    again.args(["-config", "/dev/stdin", "-dump-config"]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut again = again.spawn().expect("the binary runs");
    again.stdin.take().expect("a pipe").write_all(&printed.stdout).expect("it is read");
    let again = again.wait_with_output().expect("it ends");
    assert_eq!(String::from_utf8_lossy(&again.stdout), String::from_utf8_lossy(&printed.stdout));
    assert!(again.stdout.starts_with(b"{\n"));
}

#[test]
fn a_file_that_is_not_there_exits_with_1() {
    let output = loopvisor("-config /nowhere/x.json");
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("loopvisor: -config /nowhere/x.json: open it: "));
}
