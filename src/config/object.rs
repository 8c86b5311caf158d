//! `-object TYPE,...`: things that devices name, which are no devices themselves.
//!
//! A type is an arm here; what its keys mean stands with what it is for. Main thread, before anything is started.

use super::spec::VmSpec;
use super::{options, rng};
use crate::error::{Error, Result};

/// The types there are, for who asks for another.
const TYPES: [&str; 2] = ["iothread", "rng-random"];

/// `-object TYPE[,KEY=VALUE,...]`, written into `spec`.
///
/// # Errors
/// A mistake of the user's: an unknown type, or what is wrong with its keys.
pub fn object(text: &str, spec: &mut VmSpec) -> Result<()> {
    let kind = text.split(',').next().unwrap_or_default();
    match kind.trim_start_matches("qom-type=") {
        "iothread" => spec.iothreads.push(options::iothread_object(text)?),
        "rng-random" => spec.rng_sources.push(rng::object(text)?),
        _ => {
            let accepted = TYPES.join(", ");
            return Err(Error::usage(format!("-object {text}: no such type {kind:?}; accepted: {accepted}")));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_that_is_not_there_is_refused_with_those_that_are() {
        let refused = object("rng-egd,id=r", &mut VmSpec::new("k")).unwrap_err().to_string();
        assert_eq!(refused, "-object rng-egd,id=r: no such type \"rng-egd\"; accepted: iothread, rng-random");
    }
}
