//! Reads one request: its `id`, the command's name, the arguments as they are.
//!
//! What the name and the arguments mean is `command`'s.

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::qmp::scanner::not_an_object;

/// One request. The `id` is there even where the rest is wrong, so that the error can carry it.
#[derive(Debug)]
pub struct Request {
    /// Echoed in the answer: any JSON value; none if the client gave none, or if the text is not JSON.
    pub id: Option<Value>,
    /// What is asked.
    pub call: Result<Call>,
}

/// A command by name.
#[derive(Debug)]
pub struct Call {
    /// `execute`.
    pub name: String,
    /// `arguments`; empty if there are none.
    pub arguments: Map<String, Value>,
}

/// The members a request may have. `present` tells `null` from absent.
#[derive(Deserialize)]
struct Members {
    #[serde(default, deserialize_with = "present")]
    execute: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    arguments: Option<Value>,
    #[serde(default, deserialize_with = "present")]
    id: Option<Value>,
    #[serde(flatten)]
    others: Map<String, Value>,
}

fn present<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl Request {
    /// Reads a complete JSON value, as [`Scanner`](crate::qmp::scanner::Scanner) yields it.
    pub fn parse(message: &[u8]) -> Self {
        if message.first() != Some(&b'{') {
            return Request { id: None, call: Err(not_an_object()) };
        }
        match serde_json::from_slice::<Members>(message) {
            Ok(members) => members.into_request(),
            Err(error) => Request { id: None, call: Err(Error::usage(format!("JSON parse error, {error}"))) },
        }
    }
}

impl Members {
    fn into_request(mut self) -> Request {
        let id = self.id.take();
        Request { id, call: self.into_call() }
    }

    fn into_call(self) -> Result<Call> {
        if let Some(name) = self.others.keys().next() {
            let hint = if name == "exec-oob" {
                "out-of-band execution is not offered, use 'execute'"
            } else {
                "accepted: 'execute', 'arguments', 'id'"
            };
            return Err(Error::usage(format!("QMP input member '{name}' is unexpected; {hint}")));
        }
        let name = match self.execute {
            Some(Value::String(name)) => name,
            Some(_) => return Err(Error::usage("QMP input member 'execute' must be a string")),
            None => return Err(Error::usage("QMP input lacks member 'execute'")),
        };
        let arguments = match self.arguments {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(Error::usage("QMP input member 'arguments' must be an object")),
            None => Map::new(),
        };
        Ok(Call { name, arguments })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mistake(text: &str) -> String {
        Request::parse(text.as_bytes()).call.expect_err("is a mistake").to_string()
    }

    #[test]
    fn an_id_of_any_json_type_is_kept() {
        for id in ["null", "true", "-1", "18446744073709551615", "1.5", r#""ä\n""#, r#"[1,{"b":null,"a":[]}]"#] {
            let request = Request::parse(format!(r#"{{"execute":"stop","id":{id}}}"#).as_bytes());
            assert_eq!(request.id.map(|id| id.to_string()).as_deref(), Some(id));
            assert_eq!(request.call.expect("is a call").name, "stop");
        }
        assert!(Request::parse(br#"{"execute":"stop"}"#).id.is_none());
    }

    #[test]
    fn the_id_is_kept_where_the_rest_is_wrong() {
        for text in [r#"{"id":5}"#, r#"{"id":5,"execute":1}"#, r#"{"id":5,"execute":"stop","foo":1}"#] {
            assert_eq!(Request::parse(text.as_bytes()).id, Some(Value::from(5)));
        }
    }

    #[test]
    fn a_mistake_is_told_in_the_words_of_qemu() {
        for text in ["[]", "\"abc\"", "[{\"execute\":\"quit\"}]"] {
            assert_eq!(mistake(text), "QMP input must be a JSON object");
        }
        assert_eq!(mistake("{}"), "QMP input lacks member 'execute'");
        assert_eq!(mistake(r#"{"execute":5}"#), "QMP input member 'execute' must be a string");
        assert_eq!(mistake(r#"{"execute":null}"#), "QMP input member 'execute' must be a string");
        assert_eq!(mistake(r#"{"execute":"a","arguments":[]}"#), "QMP input member 'arguments' must be an object");
        assert_eq!(mistake(r#"{"execute":"a","arguments":null}"#), "QMP input member 'arguments' must be an object");
        assert!(mistake(r#"{"execute":"a","foo":1}"#).starts_with("QMP input member 'foo' is unexpected;"));
        assert!(mistake("{foo}").starts_with("JSON parse error, "));
    }

    #[test]
    fn out_of_band_execution_is_refused_with_the_way_out() {
        let told = "QMP input member 'exec-oob' is unexpected; out-of-band execution is not offered, use 'execute'";
        assert_eq!(mistake(r#"{"exec-oob":"query-status"}"#), told);
    }

    #[test]
    fn a_member_given_twice_is_a_mistake() {
        assert!(mistake(r#"{"execute":"stop","execute":"quit"}"#).contains("duplicate field `execute`"));
    }

    #[test]
    fn text_that_is_not_utf8_is_a_mistake() {
        assert!(Request::parse(b"{\"execute\":\"\xe4\"}").call.is_err());
    }
}
