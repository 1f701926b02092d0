//! Which tokens begin and end a text: tokenizer_config.json, special_tokens_map.json and
//! generation_config.json.

use std::collections::BTreeMap;

use serde_json::Value;

use crate::checked_json;
use crate::error::{invalid, Result};
use crate::limits::MAX_CONFIG_FILE_BYTES;
use crate::tokenizer_json::read_id;

pub type Files<'a> = BTreeMap<String, &'a [u8]>;

/// What the small files say; nothing is looked up in a vocabulary yet.
#[derive(Default)]
pub struct TokenConfig {
    pub bos_token: Option<String>,
    pub eos_token: Option<String>,
    pub unk_token: Option<String>,
    pub pad_token: Option<String>,
    pub additional: Vec<String>,
    pub add_bos_token: Option<bool>,
    pub bos_id: Option<u32>,
    pub eos_ids: Vec<u32>,
    pub chat_template: Option<String>,
    pub says_tokens: bool, // One of the two token files was there
}

pub fn read(files: &Files) -> Result<TokenConfig> {
    let mut config = TokenConfig::default();
    if let Some(root) = parse(files, "special_tokens_map.json")? {
        config.take_tokens("special_tokens_map.json", &root)?;
    }
    if let Some(root) = parse(files, "tokenizer_config.json")? {
        config.take_tokens("tokenizer_config.json", &root)?;
        config.add_bos_token = checked_json::flag("tokenizer_config.json", &root, "add_bos_token")?;
        config.chat_template = read_template(root.get("chat_template"))?;
    }
    if let Some(root) = parse(files, "generation_config.json")? {
        config.take_generation(&root)?;
    }
    if let Some(source) = files.get("chat_template.jinja") {
        let source = std::str::from_utf8(source)
            .map_err(|_| invalid("chat_template.jinja: not valid UTF-8"))?;
        config.chat_template = Some(source.to_owned());
    }
    Ok(config)
}

fn parse(files: &Files, name: &str) -> Result<Option<Value>> {
    let Some(content) = files.get(name) else {
        return Ok(None);
    };
    match checked_json::parse(name, content, MAX_CONFIG_FILE_BYTES)? {
        root @ Value::Object(_) => Ok(Some(root)),
        _ => Err(invalid(format!("{name}: must hold one JSON object"))),
    }
}

/// A string, or a list of {name, template} of which "default" counts.
fn read_template(value: Option<&Value>) -> Result<Option<String>> {
    match value {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(source)) => Ok(Some(source.clone())),
        Some(Value::Array(list)) => Ok(list
            .iter()
            .find(|item| item.get("name").is_some_and(|name| name == "default"))
            .and_then(|item| item.get("template"))
            .and_then(Value::as_str)
            .map(str::to_owned)),
        Some(_) => {
            Err(invalid("tokenizer_config.json: chat_template is neither a string nor a list"))
        }
    }
}

impl TokenConfig {
    /// A token is a string or {"content": string, ...}; null means none.
    fn take_tokens(&mut self, file: &str, root: &Value) -> Result<()> {
        self.says_tokens = true;
        let spelling = |value: &Value| {
            value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
        };
        let slots = [
            ("bos_token", &mut self.bos_token),
            ("eos_token", &mut self.eos_token),
            ("unk_token", &mut self.unk_token),
            ("pad_token", &mut self.pad_token),
        ];
        for (key, slot) in slots {
            let Some(value) = root.get(key).filter(|value| !value.is_null()) else {
                continue;
            };
            *slot = Some(spelling(value).ok_or_else(|| {
                invalid(format!("{file}: {key} must be a string or an object with \"content\""))
            })?);
        }
        if let Some(list) = root.get("additional_special_tokens").and_then(Value::as_array) {
            self.additional = list.iter().filter_map(spelling).collect();
        }
        Ok(())
    }

    /// eos_token_id is a number or a list of numbers.
    fn take_generation(&mut self, root: &Value) -> Result<()> {
        const FILE: &str = "generation_config.json";
        if let Some(id) = root.get("bos_token_id").filter(|id| !id.is_null()) {
            self.bos_id = Some(read_id(FILE, id)?);
        }
        let ids = match root.get("eos_token_id") {
            None | Some(Value::Null) => return Ok(()),
            Some(Value::Array(ids)) => ids.as_slice(),
            Some(id) => std::slice::from_ref(id),
        };
        self.eos_ids = ids.iter().map(|id| read_id(FILE, id)).collect::<Result<_>>()?;
        Ok(())
    }
}
