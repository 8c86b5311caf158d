//! `KeyValues`: the pairs of keys and values that most options take, as a text `key=value,key=value`.
//!
//! It knows how such a text is written and which keys an option has; what a value means is the caller's. Pairs that were
//! written otherwise (`json`) come with an [`Origin`], so that one function gives the keys of both their meaning. Pure
//! functions over text, on the main thread before anything is started.

use std::fmt::Debug;

use crate::error::{Error, Result};

/// Where pairs were written: what a message about them begins with, and how one would write them there.
pub trait Origin: Debug {
    /// What a message about `key`, or about all the pairs, begins with.
    fn place(&self, key: Option<&str>) -> String;
    /// How `key` is spelled there.
    fn name(&self, key: &str) -> String {
        key.to_owned()
    }
    /// How one says there that `key` is `value`.
    fn pair(&self, key: &str, value: &str) -> String {
        format!("{key}={value}")
    }
}

/// The pairs of one option's text, or of another origin, in the order written.
#[derive(Debug)]
pub struct KeyValues<'a> {
    origin: Box<dyn Origin + 'a>,
    pairs: Vec<(&'a str, &'a str)>,
}

/// Advice for a value that contains a comma.
const NO_COMMA: &str = " (a comma ends a value; one with a comma can be written in a file for -config)";

/// An option, and the text behind it.
#[derive(Debug)]
struct Typed<'a> {
    option: &'a str,
    text: &'a str,
}

impl Origin for Typed<'_> {
    fn place(&self, _: Option<&str>) -> String {
        format!("{} {}", self.option, self.text)
    }
}

impl<'a> KeyValues<'a> {
    /// Splits `text`, the value given to `option`, at its commas and each item at its first `=`.
    ///
    /// `keys` are all the keys the option has. `bare` says what an item without `=` stands for: it gets the item's
    /// place (from 0) and the item, and `None` refuses it. An empty item, key or value, an unknown key and a key given
    /// twice with different values are errors. Keys may come in families, `family.member`, whose members stand together in
    /// `keys`.
    pub fn read(
        option: &'a str,
        text: &'a str,
        keys: &[&str],
        bare: impl Fn(usize, &'a str) -> Option<(&'a str, &'a str)>,
    ) -> Result<Self> {
        let mut read = KeyValues { origin: Box::new(Typed { option, text }), pairs: Vec::new() };
        for (place, item) in text.split(',').enumerate() {
            if item.is_empty() {
                return Err(read.mistake(format!(
                    "nothing stands before, after or between the commas{NO_COMMA}; accepted: key=value"
                )));
            }
            let Some((key, value)) = item.split_once('=').or_else(|| bare(place, item)) else {
                // Some monitors take a key alone for `key=on`.
                if keys.contains(&item) {
                    return Err(read.mistake(format!("the value of {item:?} is missing; accepted: {item}=VALUE")));
                }
                let path = read.pairs.last().is_some_and(|(_, value)| value.contains('/'));
                let comma = if path { NO_COMMA } else { "" };
                let accepted = keys_for(item, keys);
                return Err(read.mistake(format!("{item:?} is not key=value{comma}; accepted keys: {accepted}")));
            };
            if !keys.contains(&key) {
                let accepted = keys_for(key, keys);
                let hint = hint(key, keys);
                return Err(read.mistake(format!("unknown key {key:?}{hint}; accepted keys: {accepted}")));
            }
            if value.is_empty() {
                return Err(read.mistake(format!("the value of {key:?} is missing; accepted: {key}=value")));
            }
            match read.raw(key) {
                None => read.pairs.push((key, value)),
                Some(before) if before == value => {}
                Some(before) => {
                    return Err(read
                        .mistake(format!("key {key:?} is given twice, as {before:?} and as {value:?}; give it once")));
                }
            }
        }
        Ok(read)
    }

    /// Pairs of another origin, whose keys are known, none twice and no value empty.
    pub fn of(origin: impl Origin + 'a, pairs: Vec<(&'a str, &'a str)>) -> Self {
        KeyValues { origin: Box::new(origin), pairs }
    }

    /// The value of `key` as `parse` reads it, or `None` when the key was not given.
    ///
    /// `accepted` describes every value that `parse` takes, for the error when it takes this one not.
    pub fn get<T>(&self, key: &str, accepted: &str, parse: impl FnOnce(&'a str) -> Option<T>) -> Result<Option<T>> {
        let Some(value) = self.raw(key) else { return Ok(None) };
        match parse(value) {
            Some(value) => Ok(Some(value)),
            None => {
                let (place, name) = (self.origin.place(Some(key)), self.name(key));
                Err(Error::usage(format!("{place}: {value:?} is no value of {name:?}; accepted: {accepted}")))
            }
        }
    }

    /// Like [`KeyValues::get`], for a key that may not be left out.
    pub fn require<T>(&self, key: &str, accepted: &str, parse: impl FnOnce(&'a str) -> Option<T>) -> Result<T> {
        self.get(key, accepted, parse)?.ok_or_else(|| self.missing(key, &self.pair(key, accepted)))
    }

    /// The yes or no of `key`: true, on, yes, false, off, no, in lower case.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "on, yes, true, off, no, false", |value| match value {
            "on" | "yes" | "true" => Some(true),
            "off" | "no" | "false" => Some(false),
            _ => None,
        })
    }

    /// An error about these pairs: where they were written, as the option and the text as typed, then `sentence`.
    pub fn mistake(&self, sentence: impl AsRef<str>) -> Error {
        Error::usage(format!("{}: {}", self.origin.place(None), sentence.as_ref()))
    }

    /// The error that `key` is not there, and what would do.
    pub fn missing(&self, key: &str, accepted: &str) -> Error {
        self.mistake(format!("key {:?} is missing; accepted: {accepted}", self.name(key)))
    }

    /// How `key` is spelled where these pairs were written.
    pub fn name(&self, key: &str) -> String {
        self.origin.name(key)
    }

    /// How one says there that `key` is `value`.
    pub fn pair(&self, key: &str, value: &str) -> String {
        self.origin.pair(key, value)
    }

    fn raw(&self, key: &str) -> Option<&'a str> {
        self.pairs.iter().find(|pair| pair.0 == key).map(|pair| pair.1)
    }
}

/// The question whether the nearest of `keys` was meant, with a blank before it; empty if none is near.
pub fn hint(word: &str, keys: &[&str]) -> String {
    near(word, keys).map(|near| format!(" (did you mean {near:?}?)")).unwrap_or_default()
}

/// The keys to name to somebody who wrote `word`: the members of its family if it begins with one, else all keys, and
/// of each family only that there is one.
fn keys_for(word: &str, keys: &[&str]) -> String {
    let family = |key: &str| key.split_once('.').map(|(family, _)| family.to_owned());
    let own = family(word).filter(|own| keys.iter().any(|key| family(key).as_ref() == Some(own)));
    let mut named: Vec<String> = match own {
        Some(own) => keys.iter().filter(|key| family(key).as_ref() == Some(&own)).map(ToString::to_string).collect(),
        None => keys.iter().map(|key| family(key).map_or(key.to_string(), |family| format!("{family}.KEY"))).collect(),
    };
    named.dedup();
    named.join(", ")
}

/// The number that `text` writes in decimal digits, and nothing else (no sign, no blank).
pub fn decimal(text: &str) -> Option<u64> {
    // `parse` alone would take "+4".
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

/// The word of `accepted` that `word` is most likely a slip of: at most two letters wrong, missing or too many.
pub fn near<'w>(word: &str, accepted: &[&'w str]) -> Option<&'w str> {
    accepted
        .iter()
        .map(|candidate| (edits(word, candidate), *candidate))
        .filter(|(edits, candidate)| *edits <= 2 && 2 * edits <= candidate.len())
        .min_by_key(|(edits, _)| *edits)
        .map(|(_, candidate)| candidate)
}

/// How many letters have to be changed, added or removed to make `from` into `to` (the Levenshtein distance).
fn edits(from: &str, to: &str) -> usize {
    let mut row: Vec<usize> = (0..=to.chars().count()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, b) in to.chars().enumerate() {
            let changed = diagonal + usize::from(a != b);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.chars().count()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KEYS: [&str; 3] = ["id", "file", "readonly"];

    fn read(text: &str) -> Result<KeyValues<'_>> {
        KeyValues::read("-drive", text, &KEYS, |place, item| (place == 0).then_some(("id", item)))
    }

    fn refusal(text: &str) -> String {
        read(text).expect_err("is refused").to_string()
    }

    #[test]
    fn a_value_is_split_from_its_key_at_the_first_equals_sign_only() {
        let pairs = read("file=/dev/disk/by-uuid=7,id=a").unwrap();
        assert_eq!(pairs.get("file", "FILE", Some).unwrap(), Some("/dev/disk/by-uuid=7"));
        assert_eq!(pairs.get("readonly", "", Some).unwrap(), None);
    }

    #[test]
    fn an_item_without_equals_sign_stands_for_what_the_option_says_or_is_refused() {
        assert_eq!(read("a,file=b").unwrap().require("id", "ID", Some).unwrap(), "a");
        assert_eq!(refusal("id=a,b"), "-drive id=a,b: \"b\" is not key=value; accepted keys: id, file, readonly");
        let path = refusal("id=a,file=/a,b");
        assert!(
            path.contains("\"b\" is not key=value (a comma ends a value; one with a comma can be written in a"),
            "{path}"
        );
        assert!(refusal("a,id=b").contains("key \"id\" is given twice, as \"a\" and as \"b\"; give it once"));
        assert_eq!(
            refusal("a,readonly"),
            "-drive a,readonly: the value of \"readonly\" is missing; accepted: readonly=VALUE"
        );
    }

    #[test]
    fn key_given_twice_with_the_same_value_is_accepted() {
        assert_eq!(read("id=a,file=b,id=a").unwrap().get("id", "", Some).unwrap(), Some("a"));
    }

    #[test]
    fn a_stray_comma_and_an_empty_key_or_value_are_refused() {
        for text in ["", ",", ",id=a", "id=a,", "id=a,,file=b"] {
            assert!(refusal(text).contains("before, after or between the commas"), "{text}");
        }
        assert!(refusal("=a").contains("unknown key \"\""));
        assert_eq!(refusal("id=,file=a"), "-drive id=,file=a: the value of \"id\" is missing; accepted: id=value");
    }

    #[test]
    fn an_unknown_key_is_refused_with_the_nearest_and_with_all_keys() {
        assert_eq!(
            refusal("id=a,fiel=b"),
            "-drive id=a,fiel=b: unknown key \"fiel\" (did you mean \"file\"?); accepted keys: id, file, readonly"
        );
        assert!(refusal("ID=a").contains("unknown key \"ID\""));
    }

    #[test]
    fn keys_of_a_family_are_named_to_those_who_ask_for_one() {
        let keys = ["id", "a.x", "a.y", "b.z"];
        let refusal = |text| KeyValues::read("-o", text, &keys, |_, _| None).expect_err("is refused").to_string();
        assert!(refusal("ids=1").ends_with("accepted keys: id, a.KEY, b.KEY"));
        assert!(refusal("a=1").ends_with("accepted keys: id, a.KEY, b.KEY"));
        assert!(refusal("c.x=1").ends_with("accepted keys: id, a.KEY, b.KEY"));
        assert!(refusal("a.q=1").ends_with("accepted keys: a.x, a.y"));
        assert_eq!(refusal("b.q"), "-o b.q: \"b.q\" is not key=value; accepted keys: b.z");
    }

    #[test]
    fn a_missing_key_and_a_value_that_does_not_parse_say_what_would_be_accepted() {
        let pairs = read("id=a").unwrap();
        assert_eq!(
            pairs.require("file", "FILE", Some).unwrap_err().to_string(),
            "-drive id=a: key \"file\" is missing; accepted: file=FILE"
        );
        assert_eq!(
            read("readonly=On").unwrap().get_bool("readonly").unwrap_err().to_string(),
            "-drive readonly=On: \"On\" is no value of \"readonly\"; accepted: on, yes, true, off, no, false"
        );
    }

    #[test]
    fn booleans_are_the_six_lower_case_words() {
        for (word, meaning) in [("on", true), ("yes", true), ("true", true), ("off", false), ("no", false)] {
            let text = format!("readonly={word}");
            assert_eq!(read(&text).unwrap().get_bool("readonly").unwrap(), Some(meaning));
        }
        assert_eq!(read("readonly=false").unwrap().get_bool("readonly").unwrap(), Some(false));
    }

    #[test]
    fn a_number_is_digits_and_nothing_else() {
        assert_eq!(decimal("18446744073709551615"), Some(u64::MAX));
        for text in ["", "+4", "-4", " 4", "4 ", "0x4", "18446744073709551616", "٤"] {
            assert_eq!(decimal(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_near_word_is_two_slips_away_at_most() {
        assert_eq!(near("kenrel", &["kernel", "initrd"]), Some("kernel"));
        assert_eq!(near("n", &["m"]), None);
        assert_eq!(near("daemon", &["daemonize"]), None);
    }

    proptest! {
        #[test]
        fn no_text_makes_the_reader_panic(text in any::<String>()) {
            let _ = read(&text);
        }

        #[test]
        fn what_is_written_is_read_back(id in "[^,]{1,20}", file in "[^,]{1,20}") {
            let text = format!("file={file},id={id}");
            let pairs = read(&text).unwrap();
            prop_assert_eq!(pairs.require("id", "", Some).unwrap(), &id);
            prop_assert_eq!(pairs.require("file", "", Some).unwrap(), &file);
        }
    }
}
