//! tokenizer.json (Hugging Face `tokenizers`, version 1.0) -> Recipe.

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use crate::checked_json;
use crate::error::{invalid, unimplemented, Result};
use crate::limits::{MAX_TOKEN_ID, MAX_VOCAB_FILE_BYTES};
use crate::recipe::{Added, Recipe};

pub const FILE: &str = "tokenizer.json";

pub fn read(content: &[u8]) -> Result<Recipe> {
    let mut root = checked_json::parse(FILE, content, MAX_VOCAB_FILE_BYTES)?;
    if root.get("version").is_some_and(|v| v != "1.0") {
        return Err(unimplemented(format!("{FILE}: version is not \"1.0\"")));
    }
    let added = read_added(root.get("added_tokens"))?;
    let Some(Value::Object(model)) = root.get_mut("model").map(Value::take) else {
        return Err(invalid(format!("{FILE}: \"model\" is missing")));
    };
    check_model(&model)?;
    let mut part = |key: &str| root.get_mut(key).map(Value::take).unwrap_or(Value::Null);
    let mut model = Value::Object(model);
    let flag = |key: &str| Ok(checked_json::flag(FILE, &model, key)?.unwrap_or(false));
    let (fuse_unk, byte_fallback, ignore_merges) =
        (flag("fuse_unk")?, flag("byte_fallback")?, flag("ignore_merges")?);
    let unk_token = match model.get("unk_token") {
        None | Some(Value::Null) => None,
        Some(Value::String(token)) => Some(token.to_owned()),
        Some(_) => return Err(invalid(format!("{FILE}: unk_token must be a string or null"))),
    };
    let mut list = |key: &str| model.get_mut(key).map(Value::take).unwrap_or_default();
    Ok(Recipe {
        source: FILE,
        unk_token,
        fuse_unk,
        byte_fallback,
        ignore_merges,
        vocab: read_vocab(FILE, list("vocab"))?,
        merges: read_merges(FILE, list("merges"))?,
        added,
        normalizer: part("normalizer"),
        pre_tokenizer: part("pre_tokenizer"),
        post_processor: part("post_processor"),
        decoder: part("decoder"),
    })
}

fn check_model(model: &Map<String, Value>) -> Result<()> {
    let is_bpe = model.get("type").is_none_or(|kind| kind.is_null() || kind == "BPE");
    if !is_bpe || !model.contains_key("merges") {
        return Err(unimplemented(format!(
            "{FILE}: model.type is not BPE or there are no merges; other kinds are not supported"
        )));
    }
    if model.get("dropout").is_some_and(|d| !d.is_null() && d.as_f64() != Some(0.0)) {
        return Err(unimplemented(format!(
            "{FILE}: BPE dropout would make encoding random; set \"dropout\" to null"
        )));
    }
    for key in ["continuing_subword_prefix", "end_of_word_suffix"] {
        if model.get(key).and_then(Value::as_str).is_some_and(|s| !s.is_empty()) {
            return Err(unimplemented(format!("{FILE}: model.{key} is not supported")));
        }
    }
    Ok(())
}

/// {"token": id, ...}
pub fn read_vocab(file: &str, vocab: Value) -> Result<Vec<(String, u32)>> {
    let Value::Object(vocab) = vocab else {
        return Err(invalid(format!("{file}: the vocabulary is not an object of token -> id")));
    };
    vocab.into_iter().map(|(token, id)| Ok((token, read_id(file, &id)?))).collect()
}

/// ["a b", ...] or [["a", "b"], ...]; both are in use.
pub fn read_merges(file: &str, merges: Value) -> Result<Vec<(String, String)>> {
    let Value::Array(merges) = merges else {
        return Err(invalid(format!("{file}: merges are not a list")));
    };
    let mut pairs = Vec::with_capacity(merges.len());
    for (rank, merge) in merges.into_iter().enumerate() {
        let pair = match merge {
            Value::String(line) if line.starts_with("#version") => continue,
            Value::String(line) => split_merge(&line),
            Value::Array(items) => match <[Value; 2]>::try_from(items) {
                Ok([Value::String(left), Value::String(right)])
                    if !left.is_empty() && !right.is_empty() =>
                {
                    Some((left, right))
                }
                _ => None,
            },
            _ => None,
        };
        pairs.push(
            pair.ok_or_else(|| invalid(format!("{file}: merge {rank} is not a pair of tokens")))?,
        );
    }
    Ok(pairs)
}

/// "a b" -> (a, b); None unless there is exactly one space.
pub fn split_merge(line: &str) -> Option<(String, String)> {
    let (left, right) = line.split_once(' ')?;
    let is_pair = !left.is_empty() && !right.is_empty() && !right.contains(' ');
    is_pair.then(|| (left.to_owned(), right.to_owned()))
}

pub fn read_id(file: &str, id: &Value) -> Result<u32> {
    match id.as_u64() {
        Some(id) if id <= MAX_TOKEN_ID => Ok(id as u32),
        _ => Err(invalid(format!(
            "{file}: token id {id} is not a whole number from 0 to {MAX_TOKEN_ID}"
        ))),
    }
}

fn read_added(list: Option<&Value>) -> Result<Vec<Added>> {
    let list = match list {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(invalid(format!("{FILE}: added_tokens is not a list"))),
    };
    let mut added = Vec::with_capacity(list.len());
    for item in list {
        let Some(content) = item.get("content").and_then(Value::as_str) else {
            return Err(invalid(format!("{FILE}: an added token has no \"content\"")));
        };
        let flag = |key: &str, default| Ok(checked_json::flag(FILE, item, key)?.unwrap_or(default));
        let special = flag("special", false)?;
        let token = AddedToken::from(content, special)
            .single_word(flag("single_word", false)?)
            .lstrip(flag("lstrip", false)?)
            .rstrip(flag("rstrip", false)?)
            .normalized(flag("normalized", !special)?);
        added.push(Added { id: read_id(FILE, item.get("id").unwrap_or(&Value::Null))?, token });
    }
    Ok(added)
}
