//! Keeps the content of chat messages from becoming control tokens (reliability A6) although the prompt around it must.
//!
//! Before a template is rendered, every control token that a message spells is replaced by a placeholder of two
//! noncharacters with a number between. After rendering the spelling is put back and its place is remembered, so the prompt
//! can be encoded in stretches: template text with control tokens, remembered places without. A message without such a
//! spelling takes none of this: its prompt is encoded in one go, as Hugging Face does.

use aho_corasick::{AhoCorasick, AhoCorasickBuilder, MatchKind};

use crate::error::{invalid, Result};

const OPEN: char = '\u{FDD0}';
const CLOSE: char = '\u{FDD1}';

/// Finds the spellings of all control tokens, and the placeholder characters themselves.
pub struct Protector {
    finder: AhoCorasick,
}

/// Text with placeholders taken out of the messages of one prompt.
#[derive(Default)]
pub struct Placeholders {
    originals: Vec<String>,
}

/// A stretch of a prompt; `literal` text must not become control tokens.
#[derive(Debug, PartialEq)]
pub struct Stretch {
    pub text: String,
    pub literal: bool,
}

impl Protector {
    pub fn new(control_tokens: &[String]) -> Result<Self> {
        let reserved = [OPEN.to_string(), CLOSE.to_string()];
        let finder = AhoCorasickBuilder::new()
            .match_kind(MatchKind::LeftmostLongest)
            .build(control_tokens.iter().chain(&reserved))
            .map_err(|e| invalid(format!("the control tokens cannot be indexed: {e}")))?;
        Ok(Self { finder })
    }

    pub fn hide(&self, text: &str, placeholders: &mut Placeholders) -> String {
        let mut out = String::with_capacity(text.len());
        let mut end = 0;
        for found in self.finder.find_iter(text) {
            out.push_str(&text[end..found.start()]);
            let number = placeholders.originals.len();
            placeholders.originals.push(text[found.range()].to_owned());
            out.push_str(&format!("{OPEN}{number}{CLOSE}"));
            end = found.end();
        }
        out.push_str(&text[end..]);
        out
    }
}

impl Placeholders {
    /// The prompt in stretches; put together they are the prompt as the template would have made it.
    pub fn restore(&self, rendered: &str) -> Vec<Stretch> {
        let mut stretches = Vec::new();
        let mut plain = String::new();
        let mut rest = rendered;
        while let Some(at) = rest.find(OPEN) {
            plain.push_str(&rest[..at]);
            let after = &rest[at + OPEN.len_utf8()..];
            let original = after.split_once(CLOSE).and_then(|(number, tail)| {
                Some((self.originals.get(number.parse::<usize>().ok()?)?, tail))
            });
            match original {
                Some((original, tail)) => {
                    if !plain.is_empty() {
                        stretches
                            .push(Stretch { text: std::mem::take(&mut plain), literal: false });
                    }
                    stretches.push(Stretch { text: original.clone(), literal: true });
                    rest = tail;
                }
                None => rest = after, // cut in two by the template: drop the noncharacter
            }
        }
        plain.push_str(rest);
        if !plain.is_empty() || stretches.is_empty() {
            stretches.push(Stretch { text: plain, literal: false });
        }
        stretches
    }
}
