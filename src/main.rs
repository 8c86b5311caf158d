//! The program: parse, log, build the machine, run the main loop, join, exit code.
fn main() {}
