//! Writes what is made of the records of the options: the manual page, and what shells complete. `make pages` runs it.

use std::path::Path;
use std::process::ExitCode;

use loopvisor::cli::pages;

fn main() -> ExitCode {
    let Some(folder) = std::env::args().nth(1) else {
        eprintln!("usage: pages FOLDER");
        return ExitCode::from(2);
    };
    let files = [
        ("loopvisor.1", pages::manual()),
        ("loopvisor.bash", pages::bash()),
        ("_loopvisor", pages::zsh()),
        ("loopvisor.fish", pages::fish()),
    ];
    for (name, text) in files {
        let path = Path::new(&folder).join(name);
        if let Err(e) = std::fs::write(&path, text) {
            eprintln!("pages: {}: {e}", path.display());
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
