use super::*;
use proptest::prelude::*;

fn text(bytes: impl AsRef<[u8]>) -> Result<Text> {
    Text::new("x.json", bytes.as_ref().to_vec())
}

#[track_caller]
fn refusal(bytes: impl AsRef<[u8]>) -> String {
    let error = text(bytes).and_then(|text| text.value().map(drop)).expect_err("is refused");
    assert_eq!(error.exit_code(), 2, "{error}");
    error.to_string()
}

#[test]
fn every_key_and_value_knows_its_line_and_column() {
    let text = text("{\n  \"a\" : 1,\n\t\"é\\u0041\":[true,\n \"ä\", {}]\n}").unwrap();
    let members = text.value().unwrap().members().unwrap();
    let places: Vec<_> = members.iter().map(|m| (m.key.clone(), text.place(m.at), text.place(m.value.at()))).collect();
    let place = |place: &str| format!("-config x.json:{place}");
    assert_eq!(places[0], ("a".into(), place("2:3"), place("2:9")));
    assert_eq!(places[1], ("éA".into(), place("3:2"), place("3:12")));
    let items = members[1].value.items().unwrap();
    let places: Vec<_> = items.iter().map(|item| (item.kind(), text.place(item.at()))).collect();
    assert_eq!(places, [(Type::Bool, place("3:13")), (Type::Text, place("4:2")), (Type::Object, place("4:7"))]);
}

#[test]
fn a_text_that_is_no_json_is_refused_where_it_goes_wrong() {
    for (text, sentence) in [
        ("", "1:1: the file is empty; accepted: a JSON object, {} at least"),
        (" \n\t", "1:1: the file is empty; accepted: a JSON object, {} at least"),
        ("{", "1:1: EOF while parsing an object; accepted: JSON (RFC 8259)"),
        ("{\"a\": 1\n \"b\": 2}", "2:2: expected `,` or `}`; accepted: JSON (RFC 8259)"),
        ("{\"a\": 01}", "1:8: invalid number; accepted: JSON (RFC 8259)"),
        ("{'a': 1}", "1:2: key must be a string; accepted: JSON (RFC 8259)"),
        ("{}\n{}", "2:1: trailing characters; accepted: JSON (RFC 8259)"),
        ("{} // so", "1:4: trailing characters; accepted: JSON (RFC 8259)"),
        ("{\"a\": [1,]}", "1:10: expected value; accepted: JSON (RFC 8259)"),
        ("\u{feff}{\n? }", "2:1: key must be a string; accepted: JSON (RFC 8259)"),
    ] {
        assert_eq!(refusal(text), format!("-config x.json:{sentence}"), "{text:?}");
    }
}

#[test]
fn a_mark_before_the_first_letter_is_no_letter() {
    let text = text("\u{feff}{\"a\": 1}").unwrap();
    let value = text.value().unwrap();
    assert_eq!(text.place(value.at()), "-config x.json:1:1");
    assert_eq!(text.place(value.members().unwrap()[0].at), "-config x.json:1:2");
}

#[test]
fn bytes_that_are_not_utf_8_are_refused_where_they_stand() {
    assert_eq!(refusal(b"{\n \"\xff\": 1}"), "-config x.json:2:3: this is not UTF-8; accepted: UTF-8 text");
}

#[test]
fn a_text_is_made_of_whole_characters_and_has_no_zero_byte() {
    let read = |bytes: &str| text(bytes).unwrap().value().unwrap().text().map_err(|error| error.to_string());
    assert_eq!(read(r#""a\n\u00e4\ud83d\ude00""#).unwrap(), "a\nä😀");
    assert_eq!(read("12.50").unwrap(), "12.50");
    let half = read(r#""\ud800""#).unwrap_err();
    assert!(half.starts_with("-config x.json:1:1: ") && half.ends_with("a text of whole characters"), "{half}");
    let zero = read(r#""a\u0000b""#).unwrap_err();
    assert_eq!(zero, "-config x.json:1:1: the text has a zero byte in it; accepted: one without");
}

#[test]
fn a_file_that_is_too_long_or_goes_too_deep_is_no_trouble() {
    let mut long = vec![b' '; MAX_FILE_BYTES - 2];
    long.extend(b"{}");
    text(&long).unwrap().value().unwrap();
    long.push(b' ');
    assert_eq!(refusal(long), "-config x.json: the file is too long; accepted: 1048576 bytes");
    let half = MAX_FILE_BYTES / 2;
    let deep = text(["[".repeat(half), "]".repeat(half)].concat()).unwrap();
    assert_eq!(deep.value().unwrap().items().unwrap()[0].kind(), Type::Array);
    assert!(refusal("[".repeat(MAX_FILE_BYTES)).contains("EOF"));
    assert!(refusal("{\"a\":".repeat(MAX_FILE_BYTES / 5)).contains("EOF"));
}

#[test]
fn a_file_that_cannot_be_read_is_the_hosts_trouble() {
    for path in ["/nowhere/x.json", "/"] {
        let error = Text::open(Path::new(path)).expect_err("is refused");
        assert_eq!(error.exit_code(), 1);
        assert!(error.to_string().starts_with(&format!("-config {path}: ")), "{error}");
    }
    let error = Text::open(Path::new("/dev/zero")).expect_err("is refused").to_string();
    assert_eq!(error, "-config /dev/zero: the file is too long; accepted: 1048576 bytes");
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(
        pieces in prop::collection::vec(prop::sample::select(vec![
            "{", "}", "[", "]", "\"a\"", ":", ",", "1", "-", "e9", "true", "nul", "\"", "\\", "\\u", "d800", "\u{feff}", " ", "\n", "ä",
        ]), 0..24),
        cut in 0..64_usize,
    ) {
        let mut bytes = pieces.concat().into_bytes();
        bytes.truncate(cut);
        if let Ok(text) = text(bytes) && let Ok(value) = text.value() {
            let _ = (value.members(), value.items(), value.text());
        }
    }
}
