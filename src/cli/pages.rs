//! What is printed of the options: the help, the manual page, and what shells complete.
//!
//! All of it is made of the records of the options; only their grouping stands here. `tools/pages` writes the files. Pure
//! functions, main thread.

use argh::{ArgsInfo, FlagInfo, FlagInfoKind};

use super::{Options, flags, names};

/// The options in the order of the help, by what they are for. Each stands in one group (a test sees to that).
const GROUPS: [(&str, &[&str]); 7] = [
    ("Machine", &["name", "machine", "accel", "cpu", "smp", "m", "mem-path"]),
    ("Boot", &["kernel", "initrd", "append", "no-reboot"]),
    ("Devices", &["drive", "netdev", "balloon", "rng", "chardev", "object", "device", "serial"]),
    ("Threads", &["iothread"]),
    ("Management", &["qmp", "api-channel", "mon", "freeze"]),
    ("File", &["config", "check", "dump-config"]),
    ("Process", &["log", "pidfile", "daemonize", "help", "version"]),
];

/// Columns of a terminal.
const COLUMNS: usize = 80;

/// The groups with the options that are in them, in order.
fn groups() -> impl Iterator<Item = (&'static str, Vec<&'static FlagInfo<'static>>)> {
    let flag = |name: &&str| flags().iter().find(|flag| flag.long.strip_prefix("--") == Some(*name));
    GROUPS.iter().map(move |(title, names)| (*title, names.iter().filter_map(flag).collect()))
}

/// The syntax of an option's value; empty for a switch.
pub(super) fn syntax(flag: &FlagInfo<'_>) -> String {
    match flag.kind {
        FlagInfoKind::Option { arg_name } => arg_name.to_owned(),
        FlagInfoKind::Switch => String::new(),
    }
}

/// The keys in the syntax of an option's value, in order: words in lower case before an equals sign.
pub(super) fn keys(flag: &FlagInfo<'_>) -> Vec<String> {
    let syntax = syntax(flag);
    let mut keys: Vec<String> = Vec::new();
    for (at, _) in syntax.match_indices('=') {
        let before = &syntax[..at];
        let key = before.rsplit(|c: char| !(c.is_alphanumeric() || "-_.".contains(c))).next().unwrap_or_default();
        if key.starts_with(|c: char| c.is_ascii_lowercase()) && !keys.iter().any(|known| known == key) {
            keys.push(key.to_owned());
        }
    }
    keys
}

/// `text` in lines of at most `COLUMNS`, each behind `indent`; a line ends at a blank, or before a bracket that opens.
fn wrapped(text: &str, first: &str, indent: &str) -> String {
    let mut lines = vec![first.to_owned()];
    let mut rest = text;
    while !rest.is_empty() {
        let end = rest[1..].find([' ', '[']).map_or(rest.len(), |at| at + 1);
        let (piece, later) = rest.split_at(end);
        let last = lines.len() - 1;
        if lines[last].len() + piece.len() > COLUMNS && lines[last].trim() != "" {
            lines.push(format!("{indent}{}", piece.trim_start()));
        } else {
            lines[last] += piece;
        }
        rest = later;
    }
    lines.iter().map(|line| format!("{}\n", line.trim_end())).collect()
}

/// The help: each option's syntax and what it is for, in groups, as wide as a terminal.
pub(super) fn help() -> String {
    let mut text = format!("Usage: loopvisor -kernel FILE [OPTION]...\n{}\n", Options::get_args_info().description);
    for (title, flags) in groups() {
        text += &format!("\n{title}:\n");
        for flag in flags {
            let names: Vec<String> = names(flag).map(|name| format!("-{name}")).collect();
            text += &wrapped(&syntax(flag), &format!("  {} ", names.join(", ")), "          ");
            text += &wrapped(flag.description, "      ", "      ");
        }
    }
    text + "\nA second dash is accepted. docs/cli.md says more; loopvisor(1) is the same.\n"
}

/// A text as troff takes it.
fn troff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

/// The manual page, loopvisor(1).
pub fn manual() -> String {
    let (version, what) = (env!("CARGO_PKG_VERSION"), troff(Options::get_args_info().description));
    let mut text = format!(
        ".TH LOOPVISOR 1 \"\" \"loopvisor {version}\" \"User Commands\"\n.ad l\n.nh\n.SH NAME\nloopvisor \\- {what}\n\
         .SH SYNOPSIS\n.B loopvisor\n.B \\-kernel\n.I FILE\n.RI [ OPTION ]...\n\
         .SH DESCRIPTION\nBoots a Linux kernel in a virtual machine with virtio\\-mmio devices: disks and NICs, each on an event \
         loop of its own thread if asked to and within limits that can be changed while the guest runs, a balloon, a \
         console, vsock and random numbers. It is managed by QMP over Unix sockets.\n.PP\n\
         All words up to the next one that begins with a dash belong to the option before them. A value\n\
         .IR KEY = VALUE , KEY = VALUE\nis split at its commas. A second dash is accepted.\n.SH OPTIONS\n"
    );
    for (title, flags) in groups() {
        text += &format!(".SS {title}\n");
        for flag in flags {
            let names: Vec<String> =
                names(flag).map(|name| format!("\\fB{}\\fR", troff(&format!("-{name}")))).collect();
            let syntax = syntax(flag);
            let value = if syntax.is_empty() {
                String::new()
            } else {
                format!(" \\fI{}\\fR", troff(&syntax).replace('[', "\\:["))
            };
            text += &format!(".TP\n{}{value}\n{}\n", names.join(", "), troff(flag.description));
        }
    }
    text + ".SH EXIT STATUS\n.TP\n0\nThe guest powered itself off, or was ended by QMP's quit or a signal.\n\
            .TP\n1\nThe host refused something: the cause stands on standard error.\n\
            .TP\n2\nA mistake in what was typed; nothing was started.\n\
            .SH ENVIRONMENT\n.TP\nLOOPVISOR_LOG\nThe least level that is logged: error, warn, info (the default), debug, trace, or off.\n\
            .SH SIGNALS\n.TP\nSIGTERM, SIGINT\nEnd the machine.\n\
            .TP\nSIGUSR1\nWrite to the log where loops, vCPUs and devices stand.\n\
            .SH FILES\n.TP\n/usr/share/doc/loopvisor\nA page for each device, QMP, and more.\n\
            .SH SEE ALSO\n.BR qemu\\-system\\-x86_64 (1)\n"
}

/// Whether the value is the path of a file.
fn is_path(flag: &FlagInfo<'_>) -> bool {
    matches!(syntax(flag).trim_matches(['[', ']']), "FILE" | "PATH")
}

/// What shells put in for keys: the equals sign too, or the dot of a family.
fn completed(keys: &[String]) -> Vec<String> {
    keys.iter().map(|key| key.strip_suffix("KEY").map_or_else(|| format!("{key}="), str::to_owned)).collect()
}

/// What bash completes: options, files behind those that take one, and keys.
pub fn bash() -> String {
    let all: Vec<String> = flags().iter().flat_map(names).map(|name| format!("-{name}")).collect();
    let mut text = format!(
        "# bash completion of loopvisor. Made by `make pages`.\n_loopvisor() {{\n\
         \x20   local word=${{COMP_WORDS[COMP_CWORD]}} option=${{COMP_WORDS[COMP_CWORD - 1]}} keys=''\n\
         \x20   COMPREPLY=()\n\
         \x20   if [[ $word = -* ]]; then\n\
         \x20       mapfile -t COMPREPLY < <(compgen -W '{}' -- \"$word\")\n\
         \x20       return\n\
         \x20   fi\n\
         \x20   case $option in\n",
        all.join(" ")
    );
    for flag in flags() {
        let (keys, patterns) = (keys(flag), names(flag).map(|name| format!("-{name}")).collect::<Vec<_>>().join(" | "));
        if is_path(flag) {
            text += &format!("    {patterns}) mapfile -t COMPREPLY < <(compgen -f -- \"$word\") ;;\n");
        } else if !keys.is_empty() {
            text += &format!("    {patterns}) keys='{}' ;;\n", completed(&keys).join(" "));
        }
    }
    text + "    esac\n\
            \x20   if [ -n \"$keys\" ]; then\n\
            \x20       # What stands before the last comma is kept.\n\
            \x20       local before=''\n\
            \x20       [[ $word != *,* ]] || before=${word%,*},\n\
            \x20       compopt -o nospace\n\
            \x20       mapfile -t COMPREPLY < <(compgen -P \"$before\" -W \"$keys\" -- \"${word##*,}\")\n\
            \x20   fi\n\
            }\n\
            # An equals sign is part of a word here.\n\
            COMP_WORDBREAKS=${COMP_WORDBREAKS//=/}\n\
            complete -o bashdefault -o filenames -F _loopvisor loopvisor\n"
}

/// The first sentence of what an option is for, without what a shell would read.
fn short(flag: &FlagInfo<'_>) -> String {
    let first = flag.description.split(';').next().unwrap_or_default();
    first.chars().filter(|c| !"'\"[]:\\`$".contains(*c)).collect()
}

/// What zsh completes: `_loopvisor`.
pub fn zsh() -> String {
    let mut text = "#compdef loopvisor\n# Made by `make pages`.\n_arguments \\\n".to_owned();
    for flag in flags() {
        for name in names(flag) {
            let repeatable = if flag.optionality == argh::Optionality::Repeating { "*" } else { "" };
            let keys = completed(&keys(flag));
            let value = match syntax(flag) {
                syntax if syntax.is_empty() => String::new(),
                _ if is_path(flag) => ":file:_files".to_owned(),
                _ if keys.is_empty() => ":value:".to_owned(),
                _ => format!(":keys:_loopvisor_keys {}", keys.join(" ")),
            };
            text += &format!("    '{repeatable}-{name}[{}]{value}' \\\n", short(flag));
        }
    }
    let keys = "_loopvisor_keys() {\n    compset -P '*,'\n    compadd -S '' -- \"$@\"\n}\n";
    text.replacen("_arguments", &format!("{keys}_arguments"), 1).trim_end_matches(" \\\n").to_owned() + "\n"
}

/// What fish completes.
pub fn fish() -> String {
    let mut text = "# Made by `make pages`.\ncomplete -c loopvisor -f\n".to_owned();
    for flag in flags() {
        for name in names(flag) {
            let kind = if name.len() == 1 { "-s" } else { "-o" };
            let keys = completed(&keys(flag));
            let value = match syntax(flag) {
                syntax if syntax.is_empty() => String::new(),
                _ if is_path(flag) => " -r -F".to_owned(),
                _ if keys.is_empty() => " -x".to_owned(),
                _ => format!(" -x -a '{}'", keys.join(" ")),
            };
            text += &format!("complete -c loopvisor {kind} {name}{value} -d '{}'\n", short(flag));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::ffi::OsString;

    use super::*;

    #[test]
    fn every_option_is_in_one_group() {
        let grouped: Vec<&str> = groups().flat_map(|(_, flags)| flags).map(|flag| flag.long).collect();
        let all: HashSet<&str> = flags().iter().map(|flag| flag.long).collect();
        assert_eq!(grouped.iter().copied().collect::<HashSet<_>>(), all);
        assert_eq!(grouped.len(), all.len());
        assert_eq!(GROUPS.iter().map(|(_, names)| names.len()).sum::<usize>(), all.len());
    }

    #[test]
    fn the_help_fits_a_terminal() {
        let wide: Vec<String> =
            help().lines().filter(|line| line.chars().count() > COLUMNS).map(str::to_owned).collect();
        assert!(wide.is_empty(), "{wide:#?}");
    }

    /// Keys that are read and not shown: those that stand for a bare word, which is shown, and those that are refused.
    const NOT_SHOWN: [&str; 6] = ["backend", "model", "server", "wait", "vhostfd", "vhostfds"];

    /// The syntax that is shown is that which the parser takes: it lists its keys when it refuses one.
    #[test]
    fn the_keys_that_are_shown_are_those_that_are_read() {
        let mut seen = 0;
        for flag in flags() {
            let option = flag.long.replacen("--", "-", 1);
            let shown = keys(flag);
            if shown.is_empty() || syntax(flag).contains("TYPE") || ["-qmp", "-name"].contains(&&*option) {
                continue;
            }
            let line = ["-kernel", "k", &option, "no-such-key=1"].map(OsString::from);
            let refused = super::super::parse(line).unwrap_err().to_string();
            let (_, read) = refused.split_once("accepted keys: ").unwrap_or_else(|| panic!("{refused}"));
            let read: HashSet<&str> = read.split(", ").map(|key| key.trim_end_matches(".KEY")).collect();
            let read: HashSet<&str> = read.difference(&HashSet::from(NOT_SHOWN)).copied().collect();
            let shown: HashSet<&str> = shown.iter().map(|key| key.trim_end_matches(".KEY")).collect();
            assert_eq!(shown, read, "{option}");
            seen += 1;
        }
        assert!(seen > 7, "{seen}");
    }

    #[test]
    fn the_page_of_the_command_line_has_a_row_for_every_option_and_for_none_that_is_not_there() {
        let page = include_str!("../../docs/cli.md");
        let table = page.split("\n## Options\n").nth(1).and_then(|rest| rest.split("\n###").next()).unwrap();
        let shown: Vec<String> = table
            .lines()
            .filter_map(|line| line.strip_prefix("| `-")?.split(" | ").next().map(|cell| format!("`-{cell}")))
            .collect();
        let mut known: Vec<String> = flags()
            .iter()
            .map(|flag| names(flag).map(|name| format!("`-{name}`")).collect::<Vec<_>>().join(", "))
            .collect();
        let mut sorted = shown.clone();
        sorted.sort();
        known.sort();
        assert_eq!(sorted, known);
    }

    #[test]
    fn the_pages_for_shells_and_man_have_every_option() {
        for (page, option) in [
            (manual(), "\\fB\\-mem\\-path\\fR"),
            (bash(), "-mem-path"),
            (zsh(), "-mem-path["),
            (fish(), "-o mem-path "),
        ] {
            assert!(page.contains(option), "{page}");
        }
        for flag in flags() {
            for name in names(flag) {
                assert!(zsh().contains(&format!("-{name}[")) && fish().contains(&format!(" {name} ")), "{name}");
            }
        }
        assert!(bash().contains("-iothread) keys='id=' ;;"), "{}", bash());
        assert!(!manual().contains("\n'") && !fish().contains("''"));
    }
}
