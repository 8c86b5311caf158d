//! The answer of `query-qmp-schema`: the tables of commands and events in QEMU's form, with every type they name.
//!
//! The form is QEMU's `SchemaInfo`, described here like any other reply, so that it describes itself too.

use std::collections::BTreeSet;

use serde::Serialize;

use crate::qmp::command::COMMANDS;
use crate::qmp::event::EVENTS;
use crate::qmp::schema::{Alternate, Enum, Member, Object, Type, Typed, Variants, names, object};

/// One command, event or type.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SchemaInfo {
    /// The name of the command or event; that of a type serves only to find it.
    pub name: String,
    /// What it is.
    #[serde(flatten)]
    pub meta: Meta,
}

/// What a [`SchemaInfo`] describes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "meta-type", rename_all = "lowercase")]
pub enum Meta {
    /// A type of JSON itself.
    Builtin(SchemaInfoBuiltin),
    /// One of several strings.
    Enum(SchemaInfoEnum),
    /// A list.
    Array(SchemaInfoArray),
    /// Members by name.
    Object(SchemaInfoObject),
    /// One of several shapes.
    Alternate(SchemaInfoAlternate),
    /// A command.
    Command(SchemaInfoCommand),
    /// An event.
    Event(SchemaInfoEvent),
}

names! {
    /// The value of `meta-type`.
    pub enum SchemaMetaType {
        /// [`Meta::Builtin`]
        "builtin" => Builtin,
        /// [`Meta::Enum`]
        "enum" => Enum,
        /// [`Meta::Array`]
        "array" => Array,
        /// [`Meta::Object`]
        "object" => Object,
        /// [`Meta::Alternate`]
        "alternate" => Alternate,
        /// [`Meta::Command`]
        "command" => Command,
        /// [`Meta::Event`]
        "event" => Event,
    }

    /// A type of JSON itself.
    pub enum JsonType {
        /// A string.
        "string" => String,
        /// A number without fraction.
        "int" => Int,
        /// `true` or `false`.
        "boolean" => Boolean,
        /// `null`.
        "null" => Null,
    }
}

object! {
    /// A type of JSON itself.
    pub struct SchemaInfoBuiltin {
        /// Which.
        "json-type" => json_type: JsonType,
    }

    /// One of several strings.
    pub struct SchemaInfoEnum {
        /// The strings.
        "members" => members: Vec<SchemaInfoEnumMember>,
        /// The same in the older form.
        "values" => values: Vec<String>,
    }

    /// One of the strings.
    pub struct SchemaInfoEnumMember {
        /// The string.
        "name" => name: String,
    }

    /// A list.
    pub struct SchemaInfoArray {
        /// The type of each element.
        "element-type" => element_type: String,
    }

    /// Members by name.
    pub struct SchemaInfoObject {
        /// The members that are always possible.
        "members" => members: Vec<SchemaInfoObjectMember>,
        /// The member that decides about further ones.
        "tag" => tag: Option<String>,
        /// What it decides.
        "variants" => variants: Option<Vec<SchemaInfoObjectVariant>>,
    }

    /// One member.
    pub struct SchemaInfoObjectMember {
        /// Its name.
        "name" => name: String,
        /// Its type.
        "type" => kind: String,
        /// There, and null, if the member may be absent.
        "default" => default: Option<()>,
    }

    /// The further members for one value of the tag.
    pub struct SchemaInfoObjectVariant {
        /// The value.
        "case" => case: String,
        /// The type whose members are added.
        "type" => kind: String,
    }

    /// One of several shapes.
    pub struct SchemaInfoAlternate {
        /// The shapes.
        "members" => members: Vec<SchemaInfoAlternateMember>,
    }

    /// One of the shapes.
    pub struct SchemaInfoAlternateMember {
        /// Its type.
        "type" => kind: String,
    }

    /// A command.
    pub struct SchemaInfoCommand {
        /// The type of `arguments`.
        "arg-type" => arg_type: String,
        /// The type of `return`.
        "ret-type" => ret_type: String,
    }

    /// An event.
    pub struct SchemaInfoEvent {
        /// The type of `data`.
        "arg-type" => arg_type: String,
    }
}

impl Typed for SchemaInfo {
    const TYPE: &'static Type = &Type::Object(&Object {
        name: "SchemaInfo",
        members: &[
            Member { name: "name", kind: String::TYPE, optional: false },
            Member { name: "meta-type", kind: SchemaMetaType::TYPE, optional: false },
        ],
        variants: Some(Variants {
            tag: "meta-type",
            cases: &[
                ("builtin", SchemaInfoBuiltin::OBJECT),
                ("enum", SchemaInfoEnum::OBJECT),
                ("array", SchemaInfoArray::OBJECT),
                ("object", SchemaInfoObject::OBJECT),
                ("alternate", SchemaInfoAlternate::OBJECT),
                ("command", SchemaInfoCommand::OBJECT),
                ("event", SchemaInfoEvent::OBJECT),
            ],
        }),
    });
}

/// The whole schema: commands, events, then every type that one of them leads to, each once.
pub fn schema() -> Vec<SchemaInfo> {
    let mut types = Types::default();
    let mut schema = Vec::new();
    for command in COMMANDS {
        let arg_type = types.object(command.arguments);
        let ret_type = types.any(command.returns);
        let meta = Meta::Command(SchemaInfoCommand { arg_type, ret_type });
        schema.push(SchemaInfo { name: command.name.to_owned(), meta });
    }
    for (name, data) in EVENTS {
        let meta = Meta::Event(SchemaInfoEvent { arg_type: types.object(data) });
        schema.push(SchemaInfo { name: (*name).to_owned(), meta });
    }
    schema.append(&mut types.entries);
    schema
}

/// The types met so far.
#[derive(Default)]
struct Types {
    names: BTreeSet<String>,
    entries: Vec<SchemaInfo>,
}

impl Types {
    /// The name of a type; its entry is made when it is met first.
    fn any(&mut self, kind: &Type) -> String {
        match kind {
            Type::Str => self.builtin("str", JsonType::String),
            Type::Int { .. } => self.builtin("int", JsonType::Int),
            Type::Bool => self.builtin("bool", JsonType::Boolean),
            Type::Null => self.builtin("null", JsonType::Null),
            Type::Array(element) => {
                let element_type = self.any(element);
                self.add(format!("[{element_type}]"), |_| Meta::Array(SchemaInfoArray { element_type }))
            }
            Type::Enum(this) => self.enumeration(this),
            Type::Object(this) => self.object(this),
            Type::Alternate(this) => self.alternate(this),
        }
    }

    fn alternate(&mut self, this: &Alternate) -> String {
        self.add(this.name.to_owned(), |types| {
            let members = this.choices.iter().map(|choice| SchemaInfoAlternateMember { kind: types.any(choice) });
            Meta::Alternate(SchemaInfoAlternate { members: members.collect() })
        })
    }

    fn builtin(&mut self, name: &str, json_type: JsonType) -> String {
        self.add(name.to_owned(), |_| Meta::Builtin(SchemaInfoBuiltin { json_type }))
    }

    fn enumeration(&mut self, this: &Enum) -> String {
        self.add(this.name.to_owned(), |_| {
            let values: Vec<String> = this.values.iter().map(|&value| value.to_owned()).collect();
            let members = values.iter().map(|value| SchemaInfoEnumMember { name: value.clone() }).collect();
            Meta::Enum(SchemaInfoEnum { members, values })
        })
    }

    fn object(&mut self, this: &Object) -> String {
        self.add(this.name.to_owned(), |types| {
            let member = |member: &Member| SchemaInfoObjectMember {
                name: member.name.to_owned(),
                kind: types.any(member.kind),
                default: member.optional.then_some(()),
            };
            let members = this.members.iter().map(member).collect();
            let variant = |(case, object): &(&str, &Object)| SchemaInfoObjectVariant {
                case: (*case).to_owned(),
                kind: types.object(object),
            };
            let variants = this.variants.as_ref().map(|variants| variants.cases.iter().map(variant).collect());
            let tag = this.variants.as_ref().map(|variants| variants.tag.to_owned());
            Meta::Object(SchemaInfoObject { members, tag, variants })
        })
    }

    /// The name is noted before the entry is made, so that a type may lead back to itself.
    fn add(&mut self, name: String, entry: impl FnOnce(&mut Self) -> Meta) -> String {
        if self.names.insert(name.clone()) {
            let meta = entry(self);
            self.entries.push(SchemaInfo { name: name.clone(), meta });
        }
        name
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use serde_json::Value;

    use super::*;

    fn entries() -> Vec<Value> {
        schema().iter().map(|entry| serde_json::to_value(entry).expect("has a JSON form")).collect()
    }

    /// Every type that an entry names.
    fn references(entry: &Value) -> Vec<String> {
        let mut names = Vec::new();
        for key in ["arg-type", "ret-type", "element-type"] {
            names.extend(entry.get(key).cloned());
        }
        for list in ["members", "variants"] {
            let items = entry.get(list).and_then(Value::as_array).into_iter().flatten();
            names.extend(items.filter_map(|item| item.get("type").cloned()));
        }
        names.iter().map(|name| name.as_str().expect("a name").to_owned()).collect()
    }

    #[test]
    fn every_type_that_is_named_is_described_once_and_every_description_is_reached() {
        let entries = entries();
        let name = |entry: &Value| entry["name"].as_str().expect("a name").to_owned();
        let mut types = BTreeSet::new();
        let mut named = BTreeSet::new();
        for entry in &entries {
            if !["command", "event"].contains(&entry["meta-type"].as_str().expect("a meta-type")) {
                assert!(types.insert(name(entry)), "{} is described twice", name(entry));
            }
            named.extend(references(entry));
        }
        assert_eq!(types, named);
    }

    #[test]
    fn two_types_of_one_name_have_one_shape() {
        fn walk(kind: &Type, shapes: &mut BTreeMap<&'static str, String>) {
            let (name, shape) = match kind {
                Type::Array(element) => return walk(element, shapes),
                Type::Enum(this) => (this.name, format!("{this:?}")),
                Type::Alternate(this) => (this.name, format!("{this:?}")),
                Type::Object(this) => {
                    let cases = this.variants.iter().flat_map(|variants| variants.cases);
                    this.members.iter().for_each(|member| walk(member.kind, shapes));
                    cases.for_each(|(_, object)| walk(&Type::Object(object), shapes));
                    (this.name, format!("{this:?}"))
                }
                _ => return,
            };
            assert_eq!(shapes.entry(name).or_insert(shape.clone()), &shape, "{name} means two things");
        }
        let mut shapes = BTreeMap::new();
        for command in COMMANDS {
            walk(&Type::Object(command.arguments), &mut shapes);
            walk(command.returns, &mut shapes);
        }
        EVENTS.iter().for_each(|(_, data)| walk(&Type::Object(data), &mut shapes));
        assert!(shapes.len() > 10);
    }

    #[test]
    fn the_schema_describes_itself() {
        let list = Value::Array(entries());
        assert_eq!(Vec::<SchemaInfo>::TYPE.check(&list, "schema"), Ok(()));
    }

    #[test]
    fn an_entry_looks_as_qemu_writes_it() {
        let find = |name: &str| entries().into_iter().find(|entry| entry["name"] == name).expect(name).to_string();
        let status = r#"{"name":"query-status","meta-type":"command","arg-type":"Empty","ret-type":"StatusInfo"}"#;
        assert_eq!(find("query-status"), status);
        assert_eq!(find("STOP"), r#"{"name":"STOP","meta-type":"event","arg-type":"Empty"}"#);
        assert_eq!(find("str"), r#"{"name":"str","meta-type":"builtin","json-type":"string"}"#);
        assert_eq!(find("[CpuInfo]"), r#"{"name":"[CpuInfo]","meta-type":"array","element-type":"CpuInfo"}"#);
        let name =
            r#"{"name":"NameInfo","meta-type":"object","members":[{"name":"name","type":"str","default":null}]}"#;
        let size = r#"{"name":"MemorySize","meta-type":"alternate","members":[{"type":"int"},{"type":"str"}]}"#;
        assert_eq!(find("MemorySize"), size);
        assert_eq!(find("NameInfo"), name);
        assert_eq!(find("CommandInfo"), name.replace("NameInfo", "CommandInfo").replace(",\"default\":null", ""));
    }
}
