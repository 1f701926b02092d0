//! A loaded model's tokenizer and chat template. Immutable, so any number of threads may use it at
//! once.

use tokenizers::Tokenizer;

use crate::chat_template::{ChatTemplate, Message, TokenNames};
use crate::error::{invalid, Code, Result, TextError};
use crate::gguf_vocab;
use crate::limits::MAX_ENCODE_BYTES;
use crate::protect::{Placeholders, Protector, Stretch};
use crate::recipe::{Recipe, Spelling};
use crate::special_tokens::{self, Files, TokenConfig};
use crate::stream::DecodePlan;
use crate::tokenizer_json;
use crate::vocab_merges;

pub struct Model {
    control: Tokenizer, // spelled control tokens become control tokens; also decodes
    plain: Tokenizer,   // they never do
    is_special: Vec<bool>, // by id; its size is the vocabulary's
    unk_id: Option<u32>,
    pub decode_plan: DecodePlan,
    pub bos_id: Option<u32>,
    pub eos_ids: Vec<u32>,
    chat_template: Option<ChatTemplate>,
    protector: Protector,
}

impl Model {
    pub fn load(files: &Files) -> Result<Self> {
        let mut config = special_tokens::read(files)?;
        let mut recipe = read_recipe(files, &mut config)?;
        recipe.check()?;
        let control = recipe.build(Spelling::Control)?;
        let plain = recipe.build(Spelling::Plain)?;
        let mut is_special = vec![false; recipe.max_id() as usize + 1];
        recipe.special_ids().for_each(|id| is_special[id as usize] = true);
        let spellings: Vec<String> = recipe
            .added
            .iter()
            .filter(|a| a.token.special)
            .map(|a| a.token.content.clone())
            .collect();
        let id_of = |token: &Option<String>| token.as_ref().and_then(|t| control.token_to_id(t));
        let in_vocab = |id: &u32| (*id as usize) < is_special.len();
        let bos_id = id_of(&config.bos_token).or(config.bos_id).filter(in_vocab);
        let mut eos_ids: Vec<u32> = id_of(&config.eos_token).into_iter().collect();
        eos_ids.extend(config.eos_ids.iter().filter(|id| in_vocab(id)));
        let mut seen = std::collections::HashSet::new();
        eos_ids.retain(|id| seen.insert(*id));
        let chat_template = match &config.chat_template {
            Some(source) => Some(ChatTemplate::compile(source, token_names(&config))?),
            None => None,
        };
        Ok(Self {
            unk_id: id_of(&recipe.unk_token),
            decode_plan: DecodePlan::from_decoder(&recipe.decoder),
            protector: Protector::new(&spellings)?,
            bos_id,
            eos_ids,
            chat_template,
            control,
            plain,
            is_special,
        })
    }

    pub fn vocab_size(&self) -> usize {
        self.is_special.len()
    }

    pub fn has_chat_template(&self) -> bool {
        self.chat_template.is_some()
    }

    pub fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        parse_special: bool,
    ) -> Result<Vec<u32>> {
        if text.len() > MAX_ENCODE_BYTES {
            return Err(invalid(format!(
                "text of {} bytes, the limit is {MAX_ENCODE_BYTES}",
                text.len()
            )));
        }
        let tokenizer = if parse_special { &self.control } else { &self.plain };
        let encoding = tokenizer
            .encode_fast(text, add_special_tokens)
            .map_err(|_| TextError::new(Code::Internal, "the tokenizer failed on this text"))?;
        if !parse_special {
            self.check_plain(encoding.get_ids(), encoding.get_special_tokens_mask())?;
        }
        Ok(encoding.get_ids().to_vec())
    }

    /// Control tokens may only come from the post-processor (mask 1), or be the one for unknown
    /// text.
    fn check_plain(&self, ids: &[u32], mask: &[u32]) -> Result<()> {
        let from_text = ids.iter().zip(mask).filter(|(_, added)| **added == 0).map(|(id, _)| *id);
        for id in from_text {
            if self.is_special.get(id as usize).copied().unwrap_or(true) && Some(id) != self.unk_id
            {
                return Err(invalid("the text spells the tokenizer's own name of a control token"));
            }
        }
        Ok(())
    }

    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.vocab_size()) {
            let size = self.vocab_size();
            return Err(invalid(format!("token id {id} is outside the vocabulary of {size}")));
        }
        self.control
            .decode(ids, skip_special_tokens)
            .map_err(|_| TextError::new(Code::Internal, "the tokenizer failed to decode these ids"))
    }

    /// The tokenizer as a tokenizer.json.
    pub fn to_json(&self) -> Result<String> {
        self.control
            .to_string(/*pretty=*/ false)
            .map_err(|_| TextError::new(Code::Internal, "the tokenizer cannot be written as JSON"))
    }

    pub fn token_text(&self, id: u32) -> Option<String> {
        self.control.id_to_token(id)
    }

    /// The token as decoding sees it; None when it has no text or is skipped.
    pub fn shown_token(&self, id: u32, skip_special_tokens: bool) -> Option<String> {
        let token = self.control.id_to_token(id)?;
        let skipped =
            skip_special_tokens && self.control.get_added_vocabulary().is_special_token(&token);
        (!skipped).then_some(token)
    }

    /// The prompt, control tokens that messages spell included.
    pub fn apply_chat_template(
        &self,
        messages: Vec<Message>,
        add_generation_prompt: bool,
    ) -> Result<String> {
        let stretches = self.render_chat(messages, add_generation_prompt)?;
        Ok(stretches.into_iter().map(|s| s.text).collect())
    }

    /// Ids of the prompt; nothing a message says becomes a control token.
    pub fn encode_chat(
        &self,
        messages: Vec<Message>,
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        let mut ids = Vec::new();
        for Stretch { text, literal } in self.render_chat(messages, add_generation_prompt)? {
            ids.extend(self.encode(
                &text, /*add_special_tokens=*/ false, /*parse_special=*/ !literal,
            )?);
        }
        Ok(ids)
    }

    fn render_chat(
        &self,
        messages: Vec<Message>,
        add_generation_prompt: bool,
    ) -> Result<Vec<Stretch>> {
        let Some(template) = &self.chat_template else {
            return Err(TextError::new(
                Code::FailedPrecondition,
                "the model has no chat template; send a text prompt, or add chat_template.jinja to the model",
            ));
        };
        let mut placeholders = Placeholders::default();
        let hidden: Vec<Message> = messages
            .iter()
            .map(|m| {
                let role = self.protector.hide(&m.role, &mut placeholders)?;
                let content = self.protector.hide(&m.content, &mut placeholders)?;
                Ok(Message { role, content })
            })
            .collect::<Result<_>>()?;
        Ok(placeholders.restore(&template.render(&hidden, add_generation_prompt)?))
    }
}

fn read_recipe(files: &Files, config: &mut TokenConfig) -> Result<Recipe> {
    if let Some(content) = files.get(tokenizer_json::FILE) {
        return tokenizer_json::read(content);
    }
    if let Some(content) = files.get(gguf_vocab::FILE) {
        return gguf_vocab::read(content, config);
    }
    if let (Some(vocab), Some(merges)) = (files.get(vocab_merges::FILE), files.get("merges.txt")) {
        return vocab_merges::read(vocab, merges, config);
    }
    let there: Vec<&str> = files.keys().map(String::as_str).collect();
    let there = if there.is_empty() { "nothing".to_owned() } else { there.join(", ") };
    Err(TextError::new(
        Code::NotFound,
        format!("no tokenizer: need tokenizer.json, or vocab.json and merges.txt, or a GGUF vocabulary; there is {there}"),
    ))
}

fn token_names(config: &TokenConfig) -> TokenNames {
    let name = |token: &Option<String>| token.clone().unwrap_or_default();
    TokenNames {
        bos: name(&config.bos_token),
        eos: name(&config.eos_token),
        unk: name(&config.unk_token),
        pad: name(&config.pad_token),
    }
}
