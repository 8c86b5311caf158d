//! Tests of the scanner: any stream, cut anywhere.

use proptest::prelude::*;

use super::*;

/// What the scanner makes of `stream` when it arrives in `pieces`.
fn scan<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<std::result::Result<Vec<u8>, String>> {
    let mut scanner = Scanner::default();
    let mut found = Vec::new();
    for mut piece in pieces {
        while let Some(item) = scanner.next(&mut piece) {
            found.push(item.map(<[u8]>::to_vec).map_err(|error| error.to_string()));
        }
        assert!(piece.is_empty(), "the scanner takes all it is given");
        assert!(scanner.held_bytes() <= MESSAGE_MAX_BYTES, "{} bytes held", scanner.held_bytes());
    }
    found
}

/// The values in `stream`, as text, with mistakes as `!`.
fn values(stream: &[u8]) -> Vec<String> {
    let text = |item: std::result::Result<Vec<u8>, String>| item.map_or("!".into(), |v| String::from_utf8(v).unwrap());
    scan([stream]).into_iter().map(text).collect()
}

#[test]
fn objects_need_no_line_feed_between_them() {
    assert_eq!(
        values(b"{\"a\":1}{\"b\":[{}]}\r\n\r\n \t{\n\"c\":\n2}\n"),
        ["{\"a\":1}", "{\"b\":[{}]}", "{\n\"c\":\n2}"]
    );
}

#[test]
fn brackets_and_quotes_inside_strings_do_not_count() {
    let stream = br#"{"a":"}]{[\"}\\"}{"b":"\\\""}"#;
    assert_eq!(values(stream), [r#"{"a":"}]{[\"}\\"}"#, r#"{"b":"\\\""}"#]);
}

#[test]
fn an_object_inside_an_array_or_string_is_not_a_request() {
    assert_eq!(values(br#"[1,{"execute":"quit"}]"{\"execute\":\"quit\"}"{}"#).len(), 3);
}

#[test]
fn anything_else_at_the_top_level_is_answered_once_and_skipped_to_the_next_brace_or_line() {
    assert_eq!(values(b"GET / HTTP/1.1\r\nHost: x\r\n{}"), ["!", "!", "{}"]);
    assert_eq!(values(b"@@@ 5 null }]]{\"a\":1}"), ["!", "{\"a\":1}"]);
    assert_eq!(values(b"5\n[]\n"), ["!", "[]"]);
}

#[test]
fn the_byte_0xff_gives_up_a_half_sent_request() {
    assert_eq!(values(b"{\"execute\":\"qu\xff{\"a\":1}"), ["!", "{\"a\":1}"]);
    assert_eq!(values(b"{\"execute\":\xff\xff\xff\n{\"a\":1}"), ["!", "{\"a\":1}"]);
}

#[test]
fn a_line_feed_inside_a_string_gives_up_that_request_only() {
    assert_eq!(values(b"{\"a\":\"b\n{\"c\":1}"), ["!", "{\"c\":1}"]);
    assert_eq!(values(b"{\"a\":\"b\\\n{\"c\":1}"), ["!", "{\"c\":1}"]);
    assert_eq!(values(b"{\"a\":\"b\n[1]"), ["!", "[1]"]);
}

#[test]
fn a_value_of_the_greatest_length_passes_and_one_byte_more_is_refused_once() {
    let object = |length: usize| format!("{{\"a\":\"{}\"}}", "x".repeat(length - 8)).into_bytes();
    let mut stream = object(MESSAGE_MAX_BYTES);
    assert_eq!(scan([&stream[..]]).len(), 1);
    assert!(scan([&stream[..]])[0].is_ok());
    stream = object(MESSAGE_MAX_BYTES + 1);
    stream.extend_from_slice(b"{}");
    let found = scan([&stream[..]]);
    assert_eq!(found.len(), 2);
    assert!(found[0].as_ref().unwrap_err().contains("longer than 1048576 bytes"));
    assert_eq!(found[1].as_deref(), Ok(&b"{}"[..]));
}

#[test]
fn a_value_of_the_greatest_depth_passes_and_one_level_more_is_refused_once() {
    let nested = |depth: usize| "[".repeat(depth) + &"]".repeat(depth);
    assert_eq!(values(nested(NESTING_MAX).as_bytes()), [nested(NESTING_MAX)]);
    assert_eq!(values((nested(NESTING_MAX + 1) + &nested(5000) + "{}").as_bytes()), ["!", "!", "{}"]);
}

#[test]
fn a_hundred_megabytes_are_answered_once_and_not_kept() {
    for garbage in [&b"x"[..], b"{\"a\":\"", b"[", b"\x00", b"}"] {
        let mut scanner = Scanner::default();
        let mut answers = 0;
        let chunk: Vec<u8> = garbage.iter().copied().chain(std::iter::repeat(garbage[0])).take(1 << 16).collect();
        for _ in 0..100 * 16 {
            let mut input = &chunk[..];
            while let Some(item) = scanner.next(&mut input) {
                assert!(item.is_err());
                answers += 1;
            }
            assert!(scanner.held_bytes() <= MESSAGE_MAX_BYTES);
        }
        assert_eq!(answers, 1, "{garbage:?}");
        assert_eq!(scanner.held_bytes(), 0);
    }
}

#[test]
fn a_long_request_is_not_kept_in_memory_behind_its_answer() {
    let mut scanner = Scanner::default();
    let long = format!("{{\"a\":\"{}\"}}", "x".repeat(100_000)).into_bytes();
    assert!(scanner.next(&mut &long[..]).is_some());
    assert!(scanner.next(&mut &b"\n"[..]).is_none());
    assert!(scanner.held_bytes() <= IDLE_BYTES);
}

/// Pieces of which streams are made: good, bad and half.
fn fragment() -> impl Strategy<Value = Vec<u8>> {
    let fixed = prop::sample::select(vec![
        &br#"{"execute":"query-status","id":"\"}{"}"#[..],
        "{\"execute\":\"stop\",\"id\":\"\u{e4}\u{1f600}\"}\r\n".as_bytes(),
        b"{ \"a\" : [ { } , [ 1 , \"]\" ] ] }",
        b"[{\"execute\":\"quit\"}]",
        b"\"a string\\\\\"",
        b"\n",
        b" ",
        b"\\",
        b"\"",
        b"{",
        b"}",
        b"foo",
        b"\xff",
        b"\x01",
        b"\xc3",
    ])
    .prop_map(<[u8]>::to_vec);
    let deep = (60usize..70).prop_map(|depth| ("[".repeat(depth) + &"]".repeat(depth)).into_bytes());
    let long = (0usize..4)
        .prop_map(|more| format!("{{\"a\":\"{}\"}}", "x".repeat(MESSAGE_MAX_BYTES - 10 + more)).into_bytes());
    prop_oneof![40 => fixed, 4 => deep, 1 => long, 4 => prop::collection::vec(any::<u8>(), 0..20)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_cut_of_any_stream_gives_the_same_values(
        fragments in prop::collection::vec(fragment(), 0..24),
        lengths in prop::collection::vec(1usize..40, 1..64),
    ) {
        let stream = fragments.concat();
        let whole = scan([&stream[..]]);
        let mut pieces = Vec::new();
        let mut rest = &stream[..];
        for length in lengths.into_iter().cycle() {
            let (piece, behind) = rest.split_at(length.min(rest.len()));
            pieces.push(piece);
            rest = behind;
            if rest.is_empty() {
                break;
            }
        }
        prop_assert_eq!(scan(pieces), whole);
    }

    #[test]
    fn a_request_is_found_behind_any_garbage_once_the_byte_0xff_is_sent(garbage in prop::collection::vec(any::<u8>(), 0..200)) {
        let mut stream = garbage;
        stream.extend_from_slice(b"\xff\n{\"execute\":\"stop\"}");
        let found = scan([&stream[..]]);
        prop_assert_eq!(found.last(), Some(&Ok(b"{\"execute\":\"stop\"}".to_vec())));
    }
}
