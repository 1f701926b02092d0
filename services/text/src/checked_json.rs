//! Reads JSON of a model: depth and the memory of all values are capped and a key that appears twice
//! is refused.

use std::cell::Cell;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::error::{invalid, Result};
use crate::limits::{JSON_BASE_MEMORY, JSON_MEMORY_PER_BYTE, MAX_JSON_DEPTH};

/// What a value takes: its place in a list that grows, a member with its node, a string's block.
const ELEMENT_BYTES: usize = 64;
const MEMBER_BYTES: usize = 112;
const BLOCK_BYTES: usize = 16;

/// Parses `content` of the file called `name`, which has at most `max_bytes` bytes.
pub fn parse(name: &str, content: &[u8], max_bytes: usize) -> Result<Value> {
    if content.len() > max_bytes {
        return Err(invalid(format!("{name}: {} bytes, the limit is {max_bytes}", content.len())));
    }
    let memory = JSON_BASE_MEMORY + JSON_MEMORY_PER_BYTE * content.len();
    let memory_left = Cell::new(memory);
    let mut reader = serde_json::Deserializer::from_slice(content);
    let root = Node { memory_left: &memory_left, depth: 0 };
    let value = root
        .deserialize(&mut reader)
        .and_then(|value| reader.end().map(|()| value))
        .map_err(|e| invalid(format!("{name}: not acceptable JSON: {e}")))?;
    Ok(value)
}

/// A member that must be true or false when it is there; null counts as absent.
pub fn flag(name: &str, members: &Value, key: &str) -> Result<Option<bool>> {
    match members.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(flag)) => Ok(Some(*flag)),
        Some(_) => Err(invalid(format!("{name}: {key} must be true or false"))),
    }
}

/// One value at `depth`; a seed and its own visitor.
#[derive(Clone, Copy)]
struct Node<'a> {
    memory_left: &'a Cell<usize>,
    depth: usize,
}

impl Node<'_> {
    fn child<E: serde::de::Error>(&self) -> std::result::Result<Self, E> {
        if self.depth + 1 > MAX_JSON_DEPTH {
            return Err(E::custom(format_args!("nested deeper than {MAX_JSON_DEPTH}")));
        }
        Ok(Node { memory_left: self.memory_left, depth: self.depth + 1 })
    }

    fn charge<E: serde::de::Error>(&self, bytes: usize) -> std::result::Result<(), E> {
        match self.memory_left.get().checked_sub(bytes) {
            Some(left) => {
                self.memory_left.set(left);
                Ok(())
            }
            None => Err(E::custom("its values take too much memory for a file of its size")),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> std::result::Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("a JSON value")
    }
    fn visit_bool<E>(self, v: bool) -> std::result::Result<Value, E> {
        Ok(Value::Bool(v))
    }
    fn visit_i64<E>(self, v: i64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }
    fn visit_u64<E>(self, v: u64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }
    fn visit_f64<E>(self, v: f64) -> std::result::Result<Value, E> {
        Ok(v.into())
    }
    fn visit_str<E: serde::de::Error>(self, v: &str) -> std::result::Result<Value, E> {
        self.charge(v.len() + BLOCK_BYTES)?;
        Ok(Value::String(v.to_owned()))
    }
    fn visit_unit<E>(self) -> std::result::Result<Value, E> {
        Ok(Value::Null)
    }
    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> std::result::Result<Value, A::Error> {
        let child = self.child()?;
        let mut items = Vec::new();
        while let Some(item) = seq.next_element_seed(child)? {
            self.charge(ELEMENT_BYTES)?;
            items.push(item);
        }
        items.shrink_to_fit();
        Ok(Value::Array(items))
    }
    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Value, A::Error> {
        let child = self.child()?;
        let mut members = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            self.charge(MEMBER_BYTES + key.len())?;
            let value = map.next_value_seed(child)?;
            if members.contains_key(&key) {
                let shown: String = key.chars().take(80).collect();
                return Err(A::Error::custom(format_args!("key {shown:?} appears twice")));
            }
            members.insert(key, value);
        }
        Ok(Value::Object(members))
    }
}
