//! vocab.json + merges.txt (GPT-2's byte-level BPE, the form in which OPT is published) -> Recipe.

use serde_json::{json, Value};
use tokenizers::AddedToken;

use crate::checked_json;
use crate::error::{invalid, Result};
use crate::limits::{MAX_MERGES, MAX_VOCAB_FILE_BYTES, MERGES_PER_TOKEN};
use crate::recipe::{Added, Recipe};
use crate::special_tokens::TokenConfig;
use crate::tokenizer_json::{read_vocab, split_merge};

pub const FILE: &str = "vocab.json";
const MERGES_FILE: &str = "merges.txt";

/// Fills in what `config` leaves open: OPT's </s> (bos = eos = unk) and <pad>, else GPT-2's
/// <|endoftext|>.
pub fn read(vocab: &[u8], merges: &[u8], config: &mut TokenConfig) -> Result<Recipe> {
    let vocab = read_vocab(FILE, checked_json::parse(FILE, vocab, MAX_VOCAB_FILE_BYTES)?)?;
    let merges = read_merges_text(merges, MAX_MERGES.min(MERGES_PER_TOKEN * vocab.len()))?;
    fill_defaults(&vocab, config);
    let mut named =
        vec![&config.bos_token, &config.eos_token, &config.unk_token, &config.pad_token]
            .into_iter()
            .flatten()
            .chain(&config.additional)
            .collect::<Vec<_>>();
    named.sort();
    named.dedup();
    let id_of = |token: &str| vocab.iter().find(|(t, _)| t == token).map(|(_, id)| *id);
    let added: Vec<Added> = named
        .into_iter()
        .filter_map(|t| Some(Added { id: id_of(t)?, token: AddedToken::from(t.clone(), true) }))
        .collect();
    let post_processor = match (&config.bos_token, config.add_bos_token) {
        (Some(bos), Some(true)) => {
            let id = id_of(bos).ok_or_else(|| {
                invalid(format!("{FILE}: bos_token of the configuration is not in the vocabulary"))
            })?;
            around(Some((bos, id)), None)
        }
        _ => Value::Null,
    };
    Ok(Recipe {
        source: FILE,
        vocab,
        merges,
        unk_token: None, // byte-level: every byte has a token
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: false,
        added,
        normalizer: Value::Null,
        pre_tokenizer: byte_level(),
        post_processor,
        decoder: json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true}),
    })
}

/// GPT-2's pre-tokenizer: its split pattern, then bytes as characters.
pub fn byte_level() -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true})
}

/// A post-processor that puts tokens (spelling, id) before and after a text; Null when there is
/// nothing to put.
pub fn around(before: Option<(&str, u32)>, after: Option<(&str, u32)>) -> Value {
    if before.is_none() && after.is_none() {
        return Value::Null;
    }
    let special = |(token, _): (&str, u32)| json!({"SpecialToken": {"id": token, "type_id": 0}});
    let sequence = |id: &str| json!({"Sequence": {"id": id, "type_id": 0}});
    let template = |ids: &[&str]| {
        let middle = ids.iter().map(|id| sequence(id));
        let pieces = before.map(special).into_iter().chain(middle).chain(after.map(special));
        Value::Array(pieces.collect())
    };
    let tokens = before.into_iter().chain(after).map(|(token, id)| {
        (token.to_owned(), json!({"id": token, "ids": [id], "tokens": [token]}))
    });
    json!({
        "type": "TemplateProcessing",
        "single": template(&["A"]),
        "pair": template(&["A", "B"]),
        "special_tokens": Value::Object(tokens.collect()),
    })
}

fn fill_defaults(vocab: &[(String, u32)], config: &mut TokenConfig) {
    let has = |token: &str| vocab.iter().any(|(t, _)| t == token);
    let default = |token: &str| has(token).then(|| token.to_owned());
    let is_opt = has("</s>") && !has("<|endoftext|>");
    if is_opt && config.add_bos_token.is_none() {
        config.add_bos_token = Some(true);
    }
    if !config.says_tokens || config.eos_token.is_none() {
        let eos = if is_opt { default("</s>") } else { default("<|endoftext|>") };
        for slot in [&mut config.bos_token, &mut config.eos_token, &mut config.unk_token] {
            if slot.is_none() {
                slot.clone_from(&eos);
            }
        }
        if is_opt && config.pad_token.is_none() {
            config.pad_token = default("<pad>");
        }
    }
}

/// At most `most` merges, counted before memory is taken for them.
fn read_merges_text(content: &[u8], most: usize) -> Result<Vec<(String, String)>> {
    if content.len() > MAX_VOCAB_FILE_BYTES {
        return Err(invalid(format!(
            "{MERGES_FILE}: {} bytes, the limit is {MAX_VOCAB_FILE_BYTES}",
            content.len()
        )));
    }
    let text = std::str::from_utf8(content)
        .map_err(|_| invalid(format!("{MERGES_FILE}: not valid UTF-8")))?;
    let lines = text.lines().count();
    if lines > most + 1 {
        return Err(invalid(format!(
            "{MERGES_FILE}: {lines} merges, the limit is {most} for this vocabulary"
        )));
    }
    let mut merges = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with("#version") {
            continue;
        }
        let pair = split_merge(line).ok_or_else(|| {
            invalid(format!("{MERGES_FILE}: line {} is not a pair of tokens", number + 1))
        })?;
        merges.push(pair);
    }
    Ok(merges)
}
