//! A source of random numbers for the guest, in both spellings of the original: `-rng`, and `-object rng-random` with
//! `-device virtio-rng-device`.
//!
//! Whether the file is there is found out when the machine is built. Main thread, before anything is started.

use std::path::PathBuf;

use super::keyvalue::{KeyValues, decimal};
use super::options::{file_path, short_text};
use crate::error::Result;

/// Where random numbers come from if nothing is said: a device of the kernel's that never blocks.
pub const DEFAULT_SOURCE: &str = "/dev/urandom";
/// The least bytes a second that can be asked for.
pub const MIN_BYTES_PER_SECOND: u64 = 64;
/// The most.
pub const MAX_BYTES_PER_SECOND: u64 = 1_000_000_000;

const PATH: &str = "FILE (at most 4095 bytes)";
const NAME: &str = "NAME (1 to 255 characters)";

/// `-rng`, or a `-device virtio-rng-device`: random numbers for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RngSpec {
    /// What messages call it.
    pub id: String,
    /// A character device.
    pub source: PathBuf,
    /// The most bytes in any second, 64 to 10^9; no limit if none.
    pub bytes_per_second: Option<u64>,
}

impl Default for RngSpec {
    fn default() -> Self {
        RngSpec { id: "rng".into(), source: DEFAULT_SOURCE.into(), bytes_per_second: None }
    }
}

/// `-object rng-random`: a source that a device may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RngSource {
    /// What the device names.
    pub id: String,
    /// A character device.
    pub file: PathBuf,
}

/// `-rng [random_file=FILE][,bytes_per_sec=N]`, which may be empty.
///
/// # Errors
/// A mistake of the user's.
pub fn rng(text: &str) -> Result<RngSpec> {
    if text.is_empty() {
        return Ok(RngSpec::default());
    }
    rng_of(&KeyValues::read("-rng", text, &["random_file", "bytes_per_sec"], |_, _| None)?)
}

/// The source of these pairs. Its id is among them where there is no other way to say it (`json`).
pub(super) fn rng_of(pairs: &KeyValues<'_>) -> Result<RngSpec> {
    let mut spec = RngSpec::default();
    if let Some(id) = pairs.get("id", NAME, short_text)? {
        spec.id = id;
    }
    if let Some(file) = pairs.get("random_file", PATH, file_path)? {
        spec.source = file;
    }
    let accepted = format!("a number from {MIN_BYTES_PER_SECOND} to {MAX_BYTES_PER_SECOND}");
    spec.bytes_per_second =
        pairs.get("bytes_per_sec", &accepted, |rate| decimal(rate).filter(|rate| is_rate(*rate)))?;
    Ok(spec)
}

/// `-object rng-random,id=NAME[,filename=FILE]`.
///
/// # Errors
/// A mistake of the user's.
pub fn object(text: &str) -> Result<RngSource> {
    let keys = ["qom-type", "id", "filename"];
    let pairs = KeyValues::read("-object", text, &keys, |place, item| (place == 0).then_some(("qom-type", item)))?;
    object_of(&pairs)
}

/// The source of these pairs, for a device to name.
pub(super) fn object_of(pairs: &KeyValues<'_>) -> Result<RngSource> {
    let file = pairs.get("filename", PATH, file_path)?;
    Ok(RngSource { id: pairs.require("id", NAME, short_text)?, file: file.unwrap_or_else(|| DEFAULT_SOURCE.into()) })
}

/// `-device virtio-rng-device,rng=NAME[,id=NAME][,max-bytes=N,period=MS]`, whose source is one of `sources`.
///
/// # Errors
/// A mistake of the user's; a source that is not there.
pub fn device(text: &str, sources: &[RngSource]) -> Result<RngSpec> {
    let keys = ["driver", "rng", "id", "max-bytes", "period"];
    let pairs = KeyValues::read("-device", text, &keys, |place, item| (place == 0).then_some(("driver", item)))?;
    let name = pairs.require("rng", "the id of an -object rng-random", short_text)?;
    let Some(source) = sources.iter().find(|source| source.id == name) else {
        let ids: Vec<&str> = sources.iter().map(|source| source.id.as_str()).collect();
        let accepted = if ids.is_empty() { format!("with -object rng-random,id={name}") } else { ids.join(", ") };
        return Err(pairs.mistake(format!("no -object rng-random is called {name:?}; accepted: {accepted}")));
    };
    let mut spec = RngSpec { source: source.file.clone(), ..RngSpec::default() };
    if let Some(id) = pairs.get("id", NAME, short_text)? {
        spec.id = id;
    }
    let number = |key| pairs.get(key, "a number from 1 up", |number| decimal(number).filter(|number| *number > 0));
    spec.bytes_per_second = match (number("max-bytes")?, number("period")?) {
        (None, None) => None,
        (Some(bytes), Some(period_ms)) => {
            let rate = u128::from(bytes) * 1000 / u128::from(period_ms);
            let Some(rate) = u64::try_from(rate).ok().filter(|rate| is_rate(*rate)) else {
                return Err(pairs.mistake(format!(
                    "max-bytes={bytes} each period={period_ms} ms are {rate} bytes a second; accepted: \
                     {MIN_BYTES_PER_SECOND} to {MAX_BYTES_PER_SECOND}"
                )));
            };
            Some(rate)
        }
        _ => {
            return Err(pairs.mistake("\"max-bytes\" and \"period\" (in ms) are one limit; accepted: both, or neither"));
        }
    };
    Ok(spec)
}

fn is_rate(rate: u64) -> bool {
    (MIN_BYTES_PER_SECOND..=MAX_BYTES_PER_SECOND).contains(&rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refusal<T: std::fmt::Debug>(result: Result<T>) -> String {
        let error = result.expect_err("is refused");
        assert_eq!(error.exit_code(), 2, "{error}");
        error.to_string()
    }

    fn sources() -> [RngSource; 1] {
        [object("rng-random,id=r,filename=/dev/hwrng").unwrap()]
    }

    #[test]
    fn without_a_word_it_is_the_kernels_source_without_a_limit() {
        let spec = RngSpec { id: "rng".into(), source: "/dev/urandom".into(), bytes_per_second: None };
        assert_eq!(rng("").unwrap(), spec);
        assert_eq!(object("rng-random,id=r").unwrap().file, PathBuf::from("/dev/urandom"));
    }

    #[test]
    fn both_spellings_make_the_same_device() {
        let old = rng("random_file=/dev/hwrng,bytes_per_sec=1000").unwrap();
        let new = device("virtio-rng-device,rng=r,max-bytes=100,period=100", &sources()).unwrap();
        assert_eq!(old, new);
        assert_eq!(device("virtio-rng-device,rng=r,id=x", &sources()).unwrap().id, "x");
    }

    #[test]
    fn a_limit_is_64_to_a_thousand_million_bytes_a_second_in_either_spelling() {
        for (text, rate) in [("64", 64), ("1000000000", 1_000_000_000)] {
            assert_eq!(rng(&format!("bytes_per_sec={text}")).unwrap().bytes_per_second, Some(rate));
        }
        for text in ["0", "63", "1000000001", "64K", "-1"] {
            let refused = refusal(rng(&format!("bytes_per_sec={text}")));
            assert!(refused.ends_with("accepted: a number from 64 to 1000000000"), "{refused}");
        }
        let limited = |limit: &str| device(&format!("virtio-rng-device,rng=r,{limit}"), &sources());
        assert_eq!(limited("max-bytes=64,period=1000").unwrap().bytes_per_second, Some(64));
        assert_eq!(limited("period=1,max-bytes=1000000").unwrap().bytes_per_second, Some(1_000_000_000));
        let most = u64::MAX;
        for limit in ["max-bytes=63,period=1000", "max-bytes=1000001,period=1", &format!("max-bytes={most},period=1")] {
            let refused = refusal(limited(limit));
            assert!(refused.ends_with("bytes a second; accepted: 64 to 1000000000"), "{refused}");
        }
        for limit in ["max-bytes=64", "period=1000"] {
            assert!(refusal(limited(limit)).ends_with("accepted: both, or neither"));
        }
        assert!(refusal(limited("max-bytes=0,period=1")).contains("a number from 1 up"));
    }

    #[test]
    fn a_device_names_a_source_that_is_there() {
        let refused = refusal(device("virtio-rng-device,rng=x", &sources()));
        assert_eq!(refused, "-device virtio-rng-device,rng=x: no -object rng-random is called \"x\"; accepted: r");
        assert!(refusal(device("virtio-rng-device,rng=x", &[])).ends_with("accepted: with -object rng-random,id=x"));
        assert!(refusal(device("virtio-rng-device", &[])).contains("key \"rng\" is missing"));
        assert!(refusal(object("rng-random,filename=a")).contains("key \"id\" is missing"));
    }
}
