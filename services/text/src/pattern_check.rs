//! Normalizer, pre-tokenizer, post-processor and decoder of a model, checked before the crate sees
//! them. The crate's regex
//! engine backtracks, so only the known split patterns may pass (F21); what can multiply the size
//! of a text is bounded.

use serde_json::Value;

use crate::error::{invalid, unimplemented, Result};
use crate::limits::MAX_NORMALIZED_GROWTH;

pub const GPT2_SPLIT: &str =
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
pub const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
pub const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const NORMALIZERS: &[&str] = &[
    "ByteLevel",
    "Lowercase",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Nmt",
    "Prepend",
    "Replace",
    "Sequence",
    "Strip",
    "StripAccents",
];
const PRE_TOKENIZERS: &[&str] = &[
    "BertPreTokenizer",
    "ByteLevel",
    "CharDelimiterSplit",
    "Delimiter",
    "Digits",
    "Metaspace",
    "Punctuation",
    "Sequence",
    "Split",
    "UnicodeScripts",
    "Whitespace",
    "WhitespaceSplit",
];
const POST_PROCESSORS: &[&str] =
    &["BertProcessing", "ByteLevel", "RobertaProcessing", "Sequence", "TemplateProcessing"];
const DECODERS: &[&str] = &[
    "BPEDecoder",
    "ByteFallback",
    "ByteLevel",
    "Fuse",
    "Metaspace",
    "Replace",
    "Sequence",
    "Strip",
];

pub fn check_normalizer(source: &str, part: &Value) -> Result<()> {
    let steps = flatten(source, "normalizer", "normalizers", part, NORMALIZERS)?;
    check_growth(source, "normalizer", &steps)
}

pub fn check_pre_tokenizer(source: &str, part: &Value) -> Result<()> {
    flatten(source, "pre_tokenizer", "pretokenizers", part, PRE_TOKENIZERS).map(|_| ())
}

pub fn check_decoder(source: &str, part: &Value) -> Result<()> {
    let steps = flatten(source, "decoder", "decoders", part, DECODERS)?;
    check_growth(source, "decoder", &steps)
}

/// Ids that a post-processor inserts must exist: no integer anywhere in it may exceed `max_id`.
pub fn check_post_processor(source: &str, part: &Value, max_id: u32) -> Result<()> {
    flatten(source, "post_processor", "processors", part, POST_PROCESSORS)?;
    let mut stack = vec![part];
    while let Some(value) = stack.pop() {
        match value {
            Value::Array(items) => stack.extend(items),
            Value::Object(members) => stack.extend(members.values()),
            Value::Number(n) if n.as_u64().is_none_or(|n| n > u64::from(max_id)) => {
                return Err(invalid(format!(
                    "{source}: post_processor holds {n}, which is no id of the vocabulary"
                )));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Steps of `part` in order, nested Sequences opened; each type must be in `known` and each regex
/// on the allow-list.
pub fn flatten<'a>(
    source: &str,
    part_name: &str,
    list_key: &str,
    part: &'a Value,
    known: &[&str],
) -> Result<Vec<&'a Value>> {
    let mut steps = Vec::new();
    let mut stack = vec![part];
    while let Some(step) = stack.pop() {
        if step.is_null() {
            continue;
        }
        let kind = step.get("type").and_then(Value::as_str).unwrap_or("(none)");
        if !known.contains(&kind) {
            let shown: String = kind.chars().take(40).collect();
            return Err(unimplemented(format!(
                "{source}: {part_name} type {shown:?} is not supported; supported: {}",
                known.join(", ")
            )));
        }
        if kind == "Sequence" {
            let list = step.get(list_key).and_then(Value::as_array).ok_or_else(|| {
                invalid(format!("{source}: {part_name} Sequence has no list \"{list_key}\""))
            })?;
            stack.extend(list.iter().rev());
        } else {
            check_pattern(source, part_name, step)?;
            steps.push(step);
        }
    }
    Ok(steps)
}

fn check_pattern(source: &str, part_name: &str, step: &Value) -> Result<()> {
    let Some(regex) = step.get("pattern").and_then(|p| p.get("Regex")) else {
        return Ok(());
    };
    match regex.as_str() {
        Some(GPT2_SPLIT | LLAMA3_SPLIT | QWEN2_SPLIT) => Ok(()),
        _ => Err(unimplemented(format!(
            "{source}: {part_name} has a regex that is not one of the known split patterns (GPT-2, Llama-3, Qwen2); \
             others are refused because the regex engine backtracks"
        ))),
    }
}

fn check_growth(source: &str, part_name: &str, steps: &[&Value]) -> Result<()> {
    let mut growth = 1usize;
    for step in steps {
        let kind = step.get("type").and_then(Value::as_str);
        let text = |key: &str| step.get(key).and_then(Value::as_str).unwrap_or("");
        if kind == Some("Prepend") && text("prepend").len() > 64 {
            return Err(invalid(format!("{source}: {part_name} prepends more than 64 bytes")));
        }
        if kind != Some("Replace") {
            continue;
        }
        let Some(pattern) =
            step.get("pattern").and_then(|p| p.get("String")).and_then(Value::as_str)
        else {
            return Err(unimplemented(format!(
                "{source}: {part_name} Replace takes a plain string as its pattern here"
            )));
        };
        if pattern.is_empty() {
            return Err(invalid(format!("{source}: {part_name} Replace has an empty pattern")));
        }
        growth = growth.saturating_mul(text("content").len().div_ceil(pattern.len()).max(1));
    }
    if growth > MAX_NORMALIZED_GROWTH {
        return Err(invalid(format!(
            "{source}: {part_name} may multiply the size of a text by {growth}, the limit is {MAX_NORMALIZED_GROWTH}"
        )));
    }
    Ok(())
}
