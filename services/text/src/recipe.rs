//! The one form every vocabulary takes before the crate `tokenizers` builds from it: checked here,
//! built twice.
//!
//! `Spelling::Control` is Hugging Face's own behaviour: a control token spelled in the text becomes
//! that token.
//! `Spelling::Plain` is for user text: the same ids, but every control token is renamed to a
//! spelling that no text reaches, so
//! neither the added-token matcher nor a merge can produce it.

use std::collections::{HashMap, HashSet};

use ahash::AHashMap;
use serde_json::Value;
use tokenizers::models::bpe::BPE;
use tokenizers::{AddedToken, Tokenizer};

use crate::error::{invalid, Result};
use crate::limits::{MAX_MERGES, MAX_TOKEN_BYTES, MAX_TOKEN_ID};
use crate::pattern_check;

pub struct Added {
    pub id: u32,
    pub token: AddedToken,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Spelling {
    Control,
    Plain,
}

/// Parts of a BPE tokenizer. The four JSON values have the form of the same keys in tokenizer.json;
/// Null = absent.
pub struct Recipe {
    pub source: &'static str, // file name, for messages
    pub vocab: Vec<(String, u32)>,
    pub merges: Vec<(String, String)>,
    pub unk_token: Option<String>,
    pub fuse_unk: bool,
    pub byte_fallback: bool,
    pub ignore_merges: bool,
    pub added: Vec<Added>,
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub post_processor: Value,
    pub decoder: Value,
}

impl Recipe {
    /// Every rule of F21; the crate has seen nothing yet.
    pub fn check(&mut self) -> Result<()> {
        let ids = self.check_vocab()?;
        self.check_merges(&ids)?;
        self.check_added(&ids)?;
        let max_id = self.max_id();
        pattern_check::check_normalizer(self.source, &self.normalizer)?;
        pattern_check::check_pre_tokenizer(self.source, &self.pre_tokenizer)?;
        pattern_check::check_post_processor(self.source, &self.post_processor, max_id)?;
        pattern_check::check_decoder(self.source, &self.decoder)
    }

    pub fn max_id(&self) -> u32 {
        let vocab = self.vocab.iter().map(|(_, id)| *id).max().unwrap_or(0);
        self.added.iter().map(|a| a.id).max().unwrap_or(0).max(vocab)
    }

    pub fn special_ids(&self) -> impl Iterator<Item = u32> + '_ {
        self.added.iter().filter(|a| a.token.special).map(|a| a.id)
    }

    fn check_vocab(&self) -> Result<HashMap<String, u32>> {
        let source = self.source;
        if self.vocab.is_empty() {
            return Err(invalid(format!("{source}: the vocabulary is empty")));
        }
        let mut ids = HashMap::with_capacity(self.vocab.len());
        let mut seen = HashSet::with_capacity(self.vocab.len());
        for (token, id) in &self.vocab {
            check_token(source, token, u64::from(*id))?;
            if !seen.insert(*id) {
                return Err(invalid(format!("{source}: two tokens have the id {id}")));
            }
            if ids.insert(token.clone(), *id).is_some() {
                return Err(invalid(format!("{source}: token {token:?} appears twice")));
            }
        }
        Ok(ids)
    }

    fn check_merges(&self, ids: &HashMap<String, u32>) -> Result<()> {
        let source = self.source;
        if self.merges.len() > MAX_MERGES {
            let n = self.merges.len();
            return Err(invalid(format!("{source}: {n} merges, the limit is {MAX_MERGES}")));
        }
        let mut joined = String::new();
        for (rank, (left, right)) in self.merges.iter().enumerate() {
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            for token in [left, right, &joined] {
                if !ids.contains_key(token) {
                    let shown: String = token.chars().take(80).collect();
                    return Err(invalid(format!(
                        "{source}: merge {rank} needs the token {shown:?}, which is not in the vocabulary"
                    )));
                }
            }
        }
        if let Some(unk) = &self.unk_token {
            if !ids.contains_key(unk) {
                return Err(invalid(format!("{source}: unk_token is not in the vocabulary")));
            }
        }
        Ok(())
    }

    fn check_added(&mut self, ids: &HashMap<String, u32>) -> Result<()> {
        let source = self.source;
        // The crate numbers tokens outside the vocabulary in the order given, so that order must be
        // the ids' own.
        self.added.sort_by_key(|a| a.id);
        let mut seen = HashSet::new();
        for (i, Added { id, token }) in self.added.iter().enumerate() {
            check_token(source, &token.content, u64::from(*id))?;
            if token.content.is_empty() {
                return Err(invalid(format!("{source}: added token {id} is empty")));
            }
            let same_id = i > 0 && self.added[i - 1].id == *id;
            if same_id || !seen.insert(token.content.as_str()) {
                return Err(invalid(format!("{source}: added token {id} appears twice")));
            }
            if ids.get(&token.content).is_some_and(|vocab_id| vocab_id != id) {
                return Err(invalid(format!(
                    "{source}: added token {id} has another id in the vocabulary"
                )));
            }
        }
        Ok(())
    }

    /// REQUIRES: check() has passed.
    pub fn build(&self, spelling: Spelling) -> Result<Tokenizer> {
        let source = self.source;
        let fail = |part: &'static str| {
            move |e: Box<dyn std::error::Error + Send + Sync>| {
                invalid(format!("{source}: {part} is not acceptable: {e}"))
            }
        };
        let json_fail = |part: &'static str| {
            move |e: serde_json::Error| invalid(format!("{source}: {part} is not acceptable: {e}"))
        };
        let mut tokenizer = Tokenizer::new(self.build_bpe(spelling).map_err(fail("model"))?);
        if !self.normalizer.is_null() {
            let part: tokenizers::NormalizerWrapper =
                serde_json::from_value(self.normalizer.clone()).map_err(json_fail("normalizer"))?;
            tokenizer.with_normalizer(Some(part)).map_err(fail("normalizer"))?;
        }
        if !self.pre_tokenizer.is_null() {
            let part: tokenizers::PreTokenizerWrapper =
                serde_json::from_value(self.pre_tokenizer.clone())
                    .map_err(json_fail("pre_tokenizer"))?;
            tokenizer.with_pre_tokenizer(Some(part));
        }
        if !self.post_processor.is_null() {
            let part: tokenizers::PostProcessorWrapper =
                serde_json::from_value(self.post_processor.clone())
                    .map_err(json_fail("post_processor"))?;
            tokenizer.with_post_processor(Some(part));
        }
        if !self.decoder.is_null() {
            let part: tokenizers::DecoderWrapper =
                serde_json::from_value(self.decoder.clone()).map_err(json_fail("decoder"))?;
            tokenizer.with_decoder(Some(part));
        }
        self.add_tokens(&mut tokenizer, spelling)?;
        tokenizer.set_encode_special_tokens(spelling == Spelling::Plain);
        Ok(tokenizer)
    }

    fn build_bpe(&self, spelling: Spelling) -> tokenizers::Result<BPE> {
        let special: HashMap<&str, u32> = match spelling {
            Spelling::Control => HashMap::new(),
            Spelling::Plain => self
                .added
                .iter()
                .filter(|a| a.token.special)
                .map(|a| (a.token.content.as_str(), a.id))
                .collect(),
        };
        let renamed = |token: &str| match special.get(token) {
            Some(id) => unreachable_spelling(*id),
            None => token.to_owned(),
        };
        let vocab: AHashMap<String, u32> =
            self.vocab.iter().map(|(token, id)| (renamed(token), *id)).collect();
        let reaches_special = |left: &str, right: &str| {
            !special.is_empty()
                && (special.contains_key(left)
                    || special.contains_key(right)
                    || special.contains_key(format!("{left}{right}").as_str()))
        };
        let merges = self
            .merges
            .iter()
            .filter(|(left, right)| !reaches_special(left, right))
            .cloned()
            .collect();
        let mut builder = BPE::builder()
            .vocab_and_merges(vocab, merges)
            .fuse_unk(self.fuse_unk)
            .byte_fallback(self.byte_fallback)
            .ignore_merges(self.ignore_merges);
        if let Some(unk) = &self.unk_token {
            builder = builder.unk_token(renamed(unk));
        }
        builder.build()
    }

    fn add_tokens(&self, tokenizer: &mut Tokenizer, spelling: Spelling) -> Result<()> {
        let source = self.source;
        let listed = self.added.iter().map(|Added { id, token }| {
            let mut token = token.clone();
            if spelling == Spelling::Plain && token.special {
                token.content = unreachable_spelling(*id);
                token.normalized = false;
            }
            token
        });
        let listed: Vec<AddedToken> = listed.collect();
        tokenizer
            .add_tokens(listed.iter().cloned())
            .map_err(|e| invalid(format!("{source}: added_tokens: {e}")))?;
        for (Added { id, .. }, token) in self.added.iter().zip(&listed) {
            let got = tokenizer.token_to_id(&token.content);
            if got != Some(*id) {
                return Err(invalid(format!(
                    "{source}: added token {id} cannot keep its id; ids outside the vocabulary must follow it without gaps"
                )));
            }
        }
        Ok(())
    }
}

fn check_token(source: &str, token: &str, id: u64) -> Result<()> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(invalid(format!(
            "{source}: token {id} is longer than {MAX_TOKEN_BYTES} bytes"
        )));
    }
    if id > MAX_TOKEN_ID {
        return Err(invalid(format!("{source}: token id {id}, the limit is {MAX_TOKEN_ID}")));
    }
    Ok(())
}

/// Contains NUL, which no byte-level alphabet has; a text that spells it anyway is refused by
/// Model::encode.
fn unreachable_spelling(id: u32) -> String {
    format!("\u{0}control {id}\u{0}")
}
