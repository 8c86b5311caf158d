//! How the shape of a JSON value is described, and the check of a value against its description.
//!
//! Every argument and reply type is written once, with `object!` or `names!`: the macro makes the
//! Rust type, its serde names and its description together, so that what `query-qmp-schema` says is what is sent and
//! accepted. All descriptions are constants.

use serde_json::{Map, Value};

/// The shape of a value.
#[derive(Debug)]
pub enum Type {
    /// A string.
    Str,
    /// An integer from `min` to `max`.
    Int {
        /// The least.
        min: i64,
        /// The greatest.
        max: u64,
    },
    /// `true` or `false`.
    Bool,
    /// `null`.
    Null,
    /// A list of one shape.
    Array(&'static Type),
    /// One of several strings.
    Enum(&'static Enum),
    /// Members by name.
    Object(&'static Object),
    /// One of several shapes.
    Alternate(&'static Alternate),
}

/// A type whose values have one of several shapes.
#[derive(Debug)]
pub struct Alternate {
    /// The type's name.
    pub name: &'static str,
    /// The shapes.
    pub choices: &'static [&'static Type],
    /// What a value means, for who wrote another.
    pub accepted: &'static str,
}

/// A type with a finite number of values, each a string.
#[derive(Debug)]
pub struct Enum {
    /// The type's name.
    pub name: &'static str,
    /// The strings.
    pub values: &'static [&'static str],
}

/// A type with named members.
#[derive(Debug)]
pub struct Object {
    /// The type's name.
    pub name: &'static str,
    /// The members that every value of the type may have.
    pub members: &'static [Member],
    /// What one member decides about the rest.
    pub variants: Option<Variants>,
}

/// The further members of an object, chosen by the value of one.
#[derive(Debug)]
pub struct Variants {
    /// The name of the member that chooses.
    pub tag: &'static str,
    /// Each value of it with the type whose members then belong to the object.
    pub cases: &'static [(&'static str, &'static Object)],
}

/// One member of an object.
#[derive(Debug)]
pub struct Member {
    /// The member's name.
    pub name: &'static str,
    /// Its shape.
    pub kind: &'static Type,
    /// Whether it may be absent.
    pub optional: bool,
}

/// A Rust type that knows its shape.
pub trait Typed {
    /// The shape.
    const TYPE: &'static Type;
    /// Whether a member of this type may be absent.
    const OPTIONAL: bool = false;

    /// Whether this value is written by leaving its member out.
    fn absent(&self) -> bool {
        false
    }
}

macro_rules! typed {
    ($($rust:ty => $shape:expr),* $(,)?) => {
        $(impl Typed for $rust {
            const TYPE: &'static Type = &$shape;
        })*
    };
}

typed! {
    String => Type::Str,
    &str => Type::Str,
    bool => Type::Bool,
    () => Type::Null,
    u16 => Type::Int { min: 0, max: u16::MAX as u64 },
    u32 => Type::Int { min: 0, max: u32::MAX as u64 },
    u64 => Type::Int { min: 0, max: u64::MAX },
}

impl<T: Typed> Typed for Vec<T> {
    const TYPE: &'static Type = &Type::Array(T::TYPE);
}

impl<T: Typed> Typed for Option<T> {
    const TYPE: &'static Type = T::TYPE;
    const OPTIONAL: bool = true;

    fn absent(&self) -> bool {
        self.is_none()
    }
}

/// Defines an object: `"wire-name" => rust_name: Type`. An `Option` member may be absent.
macro_rules! object {
    ($($(#[$doc:meta])* pub struct $name:ident {
        $($(#[$member_doc:meta])* $wire:literal => $member:ident: $kind:ty),* $(,)?
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub struct $name {
            $($(#[$member_doc])*
            #[serde(rename = $wire, skip_serializing_if = "crate::qmp::schema::Typed::absent")]
            pub $member: $kind,)*
        }

        impl $name {
            /// The description of this type.
            pub const OBJECT: &'static crate::qmp::schema::Object = &crate::qmp::schema::Object {
                name: stringify!($name),
                members: &[$(crate::qmp::schema::Member {
                    name: $wire,
                    kind: <$kind as crate::qmp::schema::Typed>::TYPE,
                    optional: <$kind as crate::qmp::schema::Typed>::OPTIONAL,
                }),*],
                variants: None,
            };
        }

        impl crate::qmp::schema::Typed for $name {
            const TYPE: &'static crate::qmp::schema::Type = &crate::qmp::schema::Type::Object(Self::OBJECT);
        }
    )*};
}
pub(crate) use object;

/// Defines a type of which each value is a string: `"wire-name" => RustName`.
macro_rules! names {
    ($($(#[$doc:meta])* pub enum $name:ident {
        $($(#[$value_doc:meta])* $wire:literal => $value:ident),* $(,)?
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
        pub enum $name {
            $($(#[$value_doc])*
            #[serde(rename = $wire)]
            $value,)*
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self {
                    $($name::$value => $wire),*
                })
            }
        }

        impl crate::qmp::schema::Typed for $name {
            const TYPE: &'static crate::qmp::schema::Type =
                &crate::qmp::schema::Type::Enum(&crate::qmp::schema::Enum {
                    name: stringify!($name),
                    values: &[$($wire),*],
                });
        }
    )*};
}
pub(crate) use names;

object! {
    /// No members: what a command without arguments takes, and the reply of one that has nothing to say.
    pub struct Empty {}
}

impl Type {
    /// Whether `value` has this shape; `place` names it in the error.
    ///
    /// # Errors
    /// A sentence that names the member and what it takes.
    pub fn check(&self, value: &Value, place: &str) -> Result<(), String> {
        match (self, value) {
            (Type::Str, Value::String(_)) | (Type::Bool, Value::Bool(_)) | (Type::Null, Value::Null) => Ok(()),
            (Type::Int { min, max }, Value::Number(number)) if number.is_i64() || number.is_u64() => {
                // A number that does not fit the one type is beyond the other end of the range.
                let not_below = number.as_i64().is_none_or(|n| n >= *min);
                let not_above = number.as_u64().is_none_or(|n| n <= *max);
                if not_below && not_above {
                    return Ok(());
                }
                Err(format!("Parameter '{place}' takes an integer from {min} to {max}, not {number}"))
            }
            (Type::Array(element), Value::Array(values)) => {
                let check = |(index, value)| element.check(value, &format!("{place}[{index}]"));
                values.iter().enumerate().try_for_each(check)
            }
            (Type::Enum(this), Value::String(name)) => this.check(name, place),
            (Type::Object(this), Value::Object(members)) => this.check(members, place),
            (Type::Alternate(this), value) => {
                let fits = this.choices.iter().any(|choice| choice.check(value, place).is_ok());
                let told = || format!("Parameter '{place}' takes {}, not {value}", this.accepted);
                if fits { Ok(()) } else { Err(told()) }
            }
            _ => Err(format!("Invalid parameter type for '{place}', expected: {}", self.expected())),
        }
    }

    /// The word for this shape.
    fn expected(&self) -> &'static str {
        match self {
            Type::Str | Type::Enum(_) => "string",
            Type::Int { .. } => "integer",
            Type::Bool => "boolean",
            Type::Null => "null",
            Type::Array(_) => "array",
            Type::Object(_) => "object",
            Type::Alternate(this) => this.accepted,
        }
    }
}

impl Enum {
    fn check(&self, name: &str, place: &str) -> Result<(), String> {
        if self.values.contains(&name) {
            return Ok(());
        }
        Err(format!("Parameter '{place}' does not accept value '{name}'; accepted: {}", quoted(self.values)))
    }
}

impl Object {
    /// Whether `values` are this object's members, all of them and no other. `place` is empty for a command's
    /// arguments themselves.
    ///
    /// # Errors
    /// A sentence that names the member, and what is accepted.
    pub fn check(&self, values: &Map<String, Value>, place: &str) -> Result<(), String> {
        let full = |name: &str| if place.is_empty() { name.to_owned() } else { format!("{place}.{name}") };
        let members: Vec<&Member> = self.members_of(values).collect();
        for (name, value) in values {
            let Some(member) = members.iter().find(|member| member.name == name) else {
                let names: Vec<&str> = members.iter().map(|member| member.name).collect();
                let accepted = if names.is_empty() { "nothing".to_owned() } else { quoted(&names) };
                return Err(format!("Parameter '{}' is unexpected; accepted: {accepted}", full(name)));
            };
            member.kind.check(value, &full(name))?;
        }
        match members.iter().find(|member| !member.optional && !values.contains_key(member.name)) {
            Some(missing) => Err(format!("Parameter '{}' is missing", full(missing.name))),
            None => Ok(()),
        }
    }

    /// The members that an object with these values has: the common ones and those its tag chooses.
    fn members_of(&self, values: &Map<String, Value>) -> impl Iterator<Item = &'static Member> {
        let chosen = self.variants.as_ref().and_then(|variants| {
            let tag = values.get(variants.tag)?.as_str()?;
            variants.cases.iter().find(|(case, _)| *case == tag)
        });
        self.members.iter().chain(chosen.map_or(&[][..], |(_, object)| object.members))
    }
}

fn quoted(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("'{name}'")).collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    names! {
        /// A colour.
        pub enum Colour {
            /// Red.
            "light-red" => LightRed,
            /// Blue.
            "blue" => Blue,
        }
    }

    object! {
        /// A place.
        pub struct Point {
            /// Across.
            "x" => x: u32,
        }

        /// A shape.
        pub struct Shape {
            /// Name.
            "full-name" => full_name: String,
            /// Points.
            "points" => points: Vec<Point>,
            /// Colour.
            "colour" => colour: Option<Colour>,
            /// Size.
            "size" => size: Option<u64>,
            /// Visible.
            "visible" => visible: Option<bool>,
        }
    }

    fn check(value: &Value) -> Result<(), String> {
        Shape::OBJECT.check(value.as_object().expect("an object"), "")
    }

    #[test]
    fn what_serde_writes_and_what_the_description_says_are_the_same() {
        let full = Shape {
            full_name: "a".into(),
            points: vec![Point { x: u32::MAX }],
            colour: Some(Colour::LightRed),
            size: Some(u64::MAX),
            visible: Some(true),
        };
        let bare = Shape { full_name: String::new(), points: vec![], colour: None, size: None, visible: None };
        assert_eq!(serde_json::to_value(&bare).unwrap(), json!({"full-name": "", "points": []}));
        for shape in [full, bare] {
            let value = serde_json::to_value(&shape).unwrap();
            assert_eq!(check(&value), Ok(()));
            assert_eq!(serde_json::from_value::<Shape>(value).unwrap(), shape);
        }
    }

    #[test]
    fn a_mistake_names_the_member_and_what_is_accepted() {
        let cases = [
            (json!({"points": []}), "Parameter 'full-name' is missing"),
            (json!({"full-name": 5}), "Invalid parameter type for 'full-name', expected: string"),
            (json!({"full-name": null}), "Invalid parameter type for 'full-name', expected: string"),
            (json!({"points": {}}), "Invalid parameter type for 'points', expected: array"),
            (json!({"points": [{"x": 1}, 2]}), "Invalid parameter type for 'points[1]', expected: object"),
            (json!({"points": [{"x": "1"}]}), "Invalid parameter type for 'points[0].x', expected: integer"),
            (json!({"points": [{"x": 1.0}]}), "Invalid parameter type for 'points[0].x', expected: integer"),
            (json!({"points": [{"x": -1}]}), "Parameter 'points[0].x' takes an integer from 0 to 4294967295, not -1"),
            (
                json!({"points": [{"x": 4_294_967_296_u64}]}),
                "Parameter 'points[0].x' takes an integer from 0 to 4294967295, not 4294967296",
            ),
            (json!({"points": [{"x": 1, "y": 2}]}), "Parameter 'points[0].y' is unexpected; accepted: 'x'"),
            (json!({"visible": 1}), "Invalid parameter type for 'visible', expected: boolean"),
            (json!({"colour": "red"}), "Parameter 'colour' does not accept value 'red'; accepted: 'light-red', 'blue'"),
            (
                json!({"colours": 1}),
                "Parameter 'colours' is unexpected; accepted: 'full-name', 'points', 'colour', 'size', 'visible'",
            ),
        ];
        for (value, told) in cases {
            assert_eq!(check(&value), Err(told.to_owned()));
        }
        let nothing = json!({"x": 1});
        let told = "Parameter 'x' is unexpected; accepted: nothing";
        assert_eq!(Empty::OBJECT.check(nothing.as_object().unwrap(), ""), Err(told.to_owned()));
    }

    #[test]
    fn integers_are_compared_beyond_both_ends_of_i64() {
        for (value, fits) in [(json!(0), true), (json!(u64::MAX), true), (json!(-1), false), (json!(i64::MIN), false)] {
            assert_eq!(u64::TYPE.check(&value, "n").is_ok(), fits, "{value}");
        }
    }
}
