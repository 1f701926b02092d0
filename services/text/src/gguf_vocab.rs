//! gguf_vocab.json (the vocabulary of a GGUF file, written by the loader) -> Recipe. Two kinds:
//! "gpt2" (byte-level BPE with
//! merges) and "llama" (SentencePiece BPE: merges follow from the scores).

use std::collections::HashMap;

use serde_json::{json, Value};
use tokenizers::AddedToken;

use crate::checked_json;
use crate::error::{invalid, unimplemented, Result};
use crate::limits::{MAX_SPM_SPLIT_WORK, MAX_TOKEN_BYTES, MAX_VOCAB_FILE_BYTES};
use crate::pattern_check::{LLAMA3_SPLIT, QWEN2_SPLIT};
use crate::recipe::{Added, Recipe};
use crate::special_tokens::TokenConfig;
use crate::tokenizer_json::{read_id, read_merges};
use crate::vocab_merges::{around, byte_level};

pub const FILE: &str = "gguf_vocab.json";

// tokenizer.ggml.token_type
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const BYTE: u64 = 6; // The largest

struct Vocab {
    root: Value,
    tokens: Vec<String>,
    types: Vec<u64>,
}

/// Overwrites bos, eos and, when `config` has none, the chat template with the GGUF file's own.
pub fn read(content: &[u8], config: &mut TokenConfig) -> Result<Recipe> {
    let mut vocab = read_lists(checked_json::parse(FILE, content, MAX_VOCAB_FILE_BYTES)?)?;
    let mut recipe = match vocab.text("model") {
        Some("gpt2") => read_gpt2(&mut vocab)?,
        Some("llama") => read_llama(&vocab)?,
        other => {
            let shown: String = other.unwrap_or("(none)").chars().take(40).collect();
            return Err(unimplemented(format!(
                "{FILE}: tokenizer model {shown:?} is not supported; supported: gpt2, llama"
            )));
        }
    };
    let bos = vocab.id("bos_token_id")?;
    let eos = vocab.id("eos_token_id")?;
    let is_spm = recipe.byte_fallback;
    let add_bos = vocab.flag("add_bos_token").unwrap_or(is_spm || recipe.ignore_merges);
    let add_eos = vocab.flag("add_eos_token").unwrap_or(false);
    let named = |id: u32| (vocab.tokens[id as usize].as_str(), id);
    recipe.post_processor =
        around(bos.filter(|_| add_bos).map(named), eos.filter(|_| add_eos).map(named));
    let spelling = |id: u32| vocab.tokens[id as usize].clone();
    config.bos_token = bos.map(spelling);
    config.eos_token = eos.map(spelling);
    config.unk_token = vocab.id("unknown_token_id")?.map(spelling);
    config.pad_token = vocab.id("padding_token_id")?.map(spelling);
    config.bos_id = bos;
    config.eos_ids.extend(eos);
    if config.chat_template.is_none() {
        config.chat_template = vocab.text("chat_template").map(str::to_owned);
    }
    recipe.vocab = vocab.tokens.into_iter().zip(0u32..).collect();
    Ok(recipe)
}

impl Vocab {
    fn text(&self, key: &str) -> Option<&str> {
        self.root.get(key).and_then(Value::as_str)
    }
    fn flag(&self, key: &str) -> Option<bool> {
        self.root.get(key).and_then(Value::as_bool)
    }
    fn id(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.root.get(key).filter(|v| !v.is_null()) else {
            return Ok(None);
        };
        let id = read_id(FILE, value)?;
        if id as usize >= self.tokens.len() {
            return Err(invalid(format!("{FILE}: {key} is {id}, outside the vocabulary")));
        }
        Ok(Some(id))
    }
}

fn read_lists(mut root: Value) -> Result<Vocab> {
    let Some(Value::Array(tokens)) = root.get_mut("tokens").map(Value::take) else {
        return Err(invalid(format!("{FILE}: \"tokens\" is missing")));
    };
    let tokens = tokens
        .into_iter()
        .map(|token| match token {
            Value::String(token) => Ok(token),
            _ => Err(invalid(format!("{FILE}: a token is not a string"))),
        })
        .collect::<Result<Vec<_>>>()?;
    let types: Vec<u64> = match root.get("token_type") {
        None | Some(Value::Null) => vec![NORMAL; tokens.len()],
        Some(Value::Array(types)) => types.iter().map(read_type).collect::<Result<_>>()?,
        Some(_) => Vec::new(),
    };
    if types.len() != tokens.len() {
        return Err(invalid(format!(
            "{FILE}: token_type has {} entries for {} tokens",
            types.len(),
            tokens.len()
        )));
    }
    Ok(Vocab { root, tokens, types })
}

/// 0 (undefined) to 6 (a byte).
fn read_type(value: &Value) -> Result<u64> {
    value.as_u64().filter(|kind| *kind <= BYTE).ok_or_else(|| {
        invalid(format!("{FILE}: token_type {value} is not a whole number from 0 to {BYTE}"))
    })
}

/// Control tokens are special; user-defined ones are matched first too, but are ordinary text.
fn added_tokens(vocab: &Vocab) -> Vec<Added> {
    let kinds = vocab.tokens.iter().zip(&vocab.types).zip(0u32..);
    kinds
        .filter_map(|((token, kind), id)| {
            let special = match *kind {
                CONTROL | UNKNOWN => true,
                USER_DEFINED => false,
                _ => return None,
            };
            Some(Added { id, token: AddedToken::from(token.clone(), special).normalized(false) })
        })
        .collect()
}

fn empty_recipe(vocab: &Vocab) -> Recipe {
    Recipe {
        source: FILE,
        vocab: Vec::new(),
        merges: Vec::new(),
        unk_token: None,
        fuse_unk: false,
        byte_fallback: false,
        ignore_merges: false,
        added: added_tokens(vocab),
        normalizer: Value::Null,
        pre_tokenizer: Value::Null,
        post_processor: Value::Null,
        decoder: Value::Null,
    }
}

fn read_gpt2(vocab: &mut Vocab) -> Result<Recipe> {
    let merges = vocab.root.get_mut("merges").map(Value::take).unwrap_or_default();
    let split = |pattern: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        ]})
    };
    let mut recipe = Recipe { merges: read_merges(FILE, merges)?, ..empty_recipe(vocab) };
    recipe.decoder = byte_level();
    recipe.pre_tokenizer = match vocab.text("pre").unwrap_or("default") {
        "gpt-2" | "gpt2" | "default" => byte_level(),
        "smollm" => json!({"type": "Sequence", "pretokenizers": [
            {"type": "Digits", "individual_digits": true}, byte_level()]}),
        "llama-bpe" | "llama3" | "llama-v3" => {
            recipe.ignore_merges = true;
            split(LLAMA3_SPLIT)
        }
        "qwen2" => {
            recipe.normalizer = json!({"type": "NFC"});
            split(QWEN2_SPLIT)
        }
        other => {
            let shown: String = other.chars().take(40).collect();
            return Err(unimplemented(format!(
                "{FILE}: pre-tokenizer {shown:?} is not supported; supported: default, gpt-2, smollm, llama-bpe, qwen2"
            )));
        }
    };
    Ok(recipe)
}

fn read_llama(vocab: &Vocab) -> Result<Recipe> {
    let space_prefix = vocab.flag("add_space_prefix").unwrap_or(true);
    let to_space = |from: &str, to: &str| json!({"type": "Replace", "pattern": {"String": from}, "content": to});
    let mut normalizers = vec![to_space(" ", "▁")];
    let mut decoders =
        vec![to_space("▁", " "), json!({"type": "ByteFallback"}), json!({"type": "Fuse"})];
    if space_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let by_type = || vocab.types.iter().position(|kind| *kind == UNKNOWN).map(|i| i as u32);
    let unk = vocab.id("unknown_token_id")?.or_else(by_type);
    Ok(Recipe {
        merges: merges_from_scores(vocab)?,
        unk_token: unk.map(|id| vocab.tokens[id as usize].clone()),
        fuse_unk: true,
        byte_fallback: true,
        normalizer: json!({"type": "Sequence", "normalizers": normalizers}),
        decoder: json!({"type": "Sequence", "decoders": decoders}),
        ..empty_recipe(vocab)
    })
}

/// Every way to cut a piece into two pieces is a merge; higher scores of the whole go first, then
/// of left and right.
/// The same list, in the same order, as transformers makes for a SentencePiece model.
fn merges_from_scores(vocab: &Vocab) -> Result<Vec<(String, String)>> {
    let scores = read_scores(vocab)?;
    let mut piece_score = HashMap::with_capacity(vocab.tokens.len());
    let mut work = 0usize;
    for ((token, score), kind) in vocab.tokens.iter().zip(&scores).zip(&vocab.types) {
        if *kind == NORMAL || *kind == USER_DEFINED {
            piece_score.insert(token.as_str(), *score);
            let length = token.len().min(MAX_TOKEN_BYTES);
            work = work.saturating_add(length * length);
        }
    }
    if work > MAX_SPM_SPLIT_WORK {
        return Err(invalid(format!(
            "{FILE}: the tokens are too long to make merges from their scores"
        )));
    }
    let mut merges = Vec::new();
    for ((token, score), kind) in vocab.tokens.iter().zip(&scores).zip(&vocab.types) {
        if (*kind != NORMAL && *kind != USER_DEFINED) || token.len() > MAX_TOKEN_BYTES {
            continue;
        }
        let first = merges.len();
        for (cut, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(cut);
            if let (Some(l), Some(r)) = (piece_score.get(left), piece_score.get(right)) {
                merges.push((*score, *l, *r, left, right));
            }
        }
        merges[first..].sort_by(|a, b| b.1.total_cmp(&a.1).then(b.2.total_cmp(&a.2)));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0));
    Ok(merges.into_iter().map(|(_, _, _, l, r)| (l.to_owned(), r.to_owned())).collect())
}

fn read_scores(vocab: &Vocab) -> Result<Vec<f64>> {
    let scores: Vec<f64> = match vocab.root.get("scores") {
        Some(Value::Array(scores)) => {
            scores.iter().filter_map(Value::as_f64).map(|s| s + 0.0).collect()
        } // no -0.0
        _ => Vec::new(),
    };
    if scores.len() != vocab.tokens.len() {
        return Err(invalid(format!(
            "{FILE}: a llama vocabulary needs a number in \"scores\" for each token; {} of {} are there",
            scores.len(),
            vocab.tokens.len()
        )));
    }
    Ok(scores)
}
