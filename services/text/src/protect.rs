//! Keeps the content of chat messages from becoming control tokens (reliability A6) although the
//! prompt
//! around it must.
//!
//! Before a template is rendered, every control token that a message spells is replaced by one
//! private-use
//! character. After rendering the spelling is put back and its place is remembered, so the prompt
//! can be
//! encoded in stretches: template text with control tokens, remembered places without. A message
//! without
//! such a spelling takes none of this: its prompt is encoded in one go, as Hugging Face does.

use std::collections::HashMap;

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, MatchKind};

use crate::error::{invalid, Result};

// Private-use plane 15. A message that holds such characters itself has them replaced too.
const FIRST: u32 = 0xF0000;
const LAST: u32 = 0xFFFFD;

/// Finds the spellings of all control tokens.
pub struct Protector {
    finder: AhoCorasick,
}

/// What was taken out of the messages of one prompt; a spelling has one placeholder, however often
/// it occurs.
#[derive(Default)]
pub struct Placeholders {
    originals: Vec<String>,
    by_original: HashMap<String, char>,
}

/// A stretch of a prompt; `literal` text must not become control tokens.
#[derive(Debug, PartialEq)]
pub struct Stretch {
    pub text: String,
    pub literal: bool,
}

impl Protector {
    pub fn new(control_tokens: &[String]) -> Result<Self> {
        let finder = AhoCorasickBuilder::new()
            .match_kind(MatchKind::LeftmostLongest)
            .build(control_tokens)
            .map_err(|e| invalid(format!("the control tokens cannot be indexed: {e}")))?;
        Ok(Self { finder })
    }

    pub fn hide(&self, text: &str, placeholders: &mut Placeholders) -> Result<String> {
        let mut out = String::with_capacity(text.len());
        let mut end = 0;
        for found in self.finder.find_iter(text) {
            hide_reserved(&text[end..found.start()], placeholders, &mut out)?;
            out.push(placeholders.get(&text[found.range()])?);
            end = found.end();
        }
        hide_reserved(&text[end..], placeholders, &mut out)?;
        Ok(out)
    }
}

fn hide_reserved(text: &str, placeholders: &mut Placeholders, out: &mut String) -> Result<()> {
    for c in text.chars() {
        let reserved = (FIRST..=LAST).contains(&u32::from(c));
        out.push(if reserved { placeholders.get(c.encode_utf8(&mut [0; 4]))? } else { c });
    }
    Ok(())
}

impl Placeholders {
    fn get(&mut self, original: &str) -> Result<char> {
        if let Some(placeholder) = self.by_original.get(original) {
            return Ok(*placeholder);
        }
        let code = FIRST + self.originals.len() as u32;
        let placeholder = char::from_u32(code).filter(|_| code <= LAST).ok_or_else(|| {
            invalid(
                "the messages hold too many different control tokens and private-use characters",
            )
        })?;
        self.originals.push(original.to_owned());
        self.by_original.insert(original.to_owned(), placeholder);
        Ok(placeholder)
    }

    /// The prompt in stretches; put together they are the prompt as the template would have made
    /// it.
    pub fn restore(&self, rendered: &str) -> Vec<Stretch> {
        let mut stretches = Vec::new();
        let mut plain = String::new();
        for c in rendered.chars() {
            let number = u32::from(c).checked_sub(FIRST).map(|n| n as usize);
            match number.and_then(|n| self.originals.get(n)) {
                Some(original) => {
                    if !plain.is_empty() {
                        let text = std::mem::take(&mut plain);
                        stretches.push(Stretch { text, literal: false });
                    }
                    stretches.push(Stretch { text: original.clone(), literal: true });
                }
                None => plain.push(c),
            }
        }
        if !plain.is_empty() || stretches.is_empty() {
            stretches.push(Stretch { text: plain, literal: false });
        }
        stretches
    }
}
