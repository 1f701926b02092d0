//! Ids to text, one at a time, holding back what may still change. The pieces put together are
//! exactly Model::decode of all ids.
//!
//! Byte-level vocabularies hold back at most 3 bytes (an unfinished character). SentencePiece
//! vocabularies hold back a run of
//! byte tokens until it ends, since the whole run becomes U+FFFD when any of it is invalid. Any
//! other decoder goes through a
//! window of ids that is decoded again with each id (prefix and read offset), at most MAX_HELD_IDS
//! long.

use std::sync::Arc;

use serde_json::Value;

use crate::error::Result;
use crate::model::Model;
use crate::pattern_check;

const REPLACEMENT: &str = "\u{FFFD}";
const MAX_HELD_IDS: usize = 32;

/// How a tokenizer's decoder turns tokens into text, as far as streaming is concerned. Chosen at
/// load.
#[derive(Clone, Debug, PartialEq)]
pub enum DecodePlan {
    ByteLevel,
    Pieces { replace: Vec<(String, String)>, byte_fallback: bool, strip: Option<(char, usize)> },
    Window,
}

impl DecodePlan {
    /// `decoder` as in tokenizer.json, already checked.
    pub fn from_decoder(decoder: &Value) -> Self {
        let known = ["Sequence", "ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip"];
        match pattern_check::flatten("", "decoder", "decoders", decoder, &known) {
            Ok(steps) if !steps.is_empty() => Self::from_steps(&steps).unwrap_or(Self::Window),
            _ => Self::Window,
        }
    }

    fn from_steps(steps: &[&Value]) -> Option<Self> {
        let kind = |step: &Value| step.get("type").and_then(Value::as_str).map(str::to_owned);
        if steps.len() == 1 && kind(steps[0])? == "ByteLevel" {
            return Some(Self::ByteLevel);
        }
        let (mut replace, mut byte_fallback, mut fused, mut strip) =
            (Vec::new(), false, false, None);
        for step in steps {
            match kind(step)?.as_str() {
                "Replace" if !byte_fallback && !fused => {
                    let from = step.get("pattern")?.get("String")?.as_str()?;
                    replace.push((from.to_owned(), step.get("content")?.as_str()?.to_owned()));
                }
                "ByteFallback" if !byte_fallback && !fused => byte_fallback = true,
                "Fuse" => fused = true,
                "Strip" if fused && strip.is_none() && step.get("stop")?.as_u64()? == 0 => {
                    let content = step.get("content")?.as_str()?.chars().next()?;
                    strip = Some((content, step.get("start")?.as_u64()? as usize));
                }
                _ => return None,
            }
        }
        Some(Self::Pieces { replace, byte_fallback, strip })
    }
}

pub struct Stream {
    model: Arc<Model>,
    skip_special_tokens: bool,
    held: Vec<u8>, // ByteLevel: an unfinished character. Pieces: the current run of byte tokens
    strip_left: usize, // Pieces: characters that may still be cut at the start
    window: Vec<u32>, // Window: ids from the prefix offset on
    read_offset: usize, // Window: ids of it whose text is out
}

impl Stream {
    pub fn new(model: Arc<Model>, skip_special_tokens: bool) -> Self {
        let strip_left = match &model.decode_plan {
            DecodePlan::Pieces { strip: Some((_, count)), .. } => *count,
            _ => 0,
        };
        let (held, window) = (Vec::new(), Vec::new());
        Self { model, skip_special_tokens, held, strip_left, window, read_offset: 0 }
    }

    /// Appends to `out` what can be shown now. An id outside the vocabulary has no text.
    pub fn add(&mut self, id: u32, out: &mut String) -> Result<()> {
        let model = self.model.clone();
        let Some(token) = model.shown_token(id, self.skip_special_tokens) else {
            return Ok(());
        };
        match &model.decode_plan {
            DecodePlan::ByteLevel => {
                append_byte_level(&token, &mut self.held);
                self.emit_whole_characters(out);
            }
            DecodePlan::Pieces { replace, byte_fallback, strip } => {
                let text = replace.iter().fold(token, |text, (from, to)| text.replace(from, to));
                match byte_of(&text).filter(|_| *byte_fallback) {
                    Some(byte) => self.held.push(byte),
                    None => {
                        self.emit_byte_run(*strip, out);
                        self.emit_stripped(&text, *strip, out);
                    }
                }
            }
            DecodePlan::Window => self.add_to_window(id, out)?,
        }
        Ok(())
    }

    /// Appends what was held back; U+FFFD for what stayed incomplete.
    pub fn finish(&mut self, out: &mut String) -> Result<()> {
        match self.model.clone().decode_plan {
            DecodePlan::ByteLevel if !self.held.is_empty() => {
                self.held.clear();
                out.push_str(REPLACEMENT);
            }
            DecodePlan::ByteLevel => {}
            DecodePlan::Pieces { strip, .. } => self.emit_byte_run(strip, out),
            DecodePlan::Window => self.emit_window(/*hold_incomplete=*/ false, out)?,
        }
        Ok(())
    }

    /// The rule of String::from_utf8_lossy, applied to a growing string.
    fn emit_whole_characters(&mut self, out: &mut String) {
        let mut start = 0;
        while start < self.held.len() {
            match std::str::from_utf8(&self.held[start..]) {
                Ok(text) => {
                    out.push_str(text);
                    start = self.held.len();
                }
                Err(e) => {
                    let valid = start + e.valid_up_to();
                    out.push_str(&String::from_utf8_lossy(&self.held[start..valid]));
                    start = valid;
                    match e.error_len() {
                        Some(length) => {
                            out.push_str(REPLACEMENT);
                            start += length;
                        }
                        None => break, // unfinished: the next token may complete it
                    }
                }
            }
        }
        self.held.drain(..start);
    }

    fn emit_byte_run(&mut self, strip: Option<(char, usize)>, out: &mut String) {
        if self.held.is_empty() {
            return;
        }
        let run = std::mem::take(&mut self.held);
        match std::str::from_utf8(&run) {
            Ok(text) => self.emit_stripped(text, strip, out),
            Err(_) => self.emit_stripped(&REPLACEMENT.repeat(run.len()), strip, out),
        }
    }

    fn emit_stripped(&mut self, text: &str, strip: Option<(char, usize)>, out: &mut String) {
        let mut rest = text;
        if let Some((content, _)) = strip {
            while self.strip_left > 0 && !rest.is_empty() {
                match rest.strip_prefix(content) {
                    Some(shorter) => {
                        rest = shorter;
                        self.strip_left -= 1;
                    }
                    None => self.strip_left = 0,
                }
            }
        }
        out.push_str(rest);
    }

    fn add_to_window(&mut self, id: u32, out: &mut String) -> Result<()> {
        self.window.push(id);
        let hold = self.window.len() - self.read_offset < MAX_HELD_IDS;
        self.emit_window(hold, out)
    }

    fn emit_window(&mut self, hold_incomplete: bool, out: &mut String) -> Result<()> {
        let skip = self.skip_special_tokens;
        let shown = self.model.decode(&self.window[..self.read_offset], skip)?;
        let text = self.model.decode(&self.window, skip)?;
        if hold_incomplete && text.ends_with(REPLACEMENT) {
            return Ok(());
        }
        out.push_str(
            text.strip_prefix(shown.as_str()).unwrap_or_else(|| after_common(&shown, &text)),
        );
        self.window.drain(..self.read_offset);
        self.read_offset = self.window.len();
        Ok(())
    }
}

/// What `text` adds to `shown` when it does not simply continue it: all after their common start.
fn after_common<'a>(shown: &str, text: &'a str) -> &'a str {
    let common = shown.chars().zip(text.chars()).take_while(|(a, b)| a == b);
    &text[common.map(|(a, _)| a.len_utf8()).sum()..]
}

/// "<0x0A>" -> 10
fn byte_of(token: &str) -> Option<u8> {
    if token.len() != 6 || !token.is_char_boundary(3) || !token.is_char_boundary(5) {
        return None;
    }
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(digits, 16).ok()
}

/// GPT-2's characters back to bytes; a token with any other character stands for its own UTF-8.
fn append_byte_level(token: &str, bytes: &mut Vec<u8>) {
    let start = bytes.len();
    for c in token.chars() {
        match byte_of_char(c) {
            Some(byte) => bytes.push(byte),
            None => {
                bytes.truncate(start);
                bytes.extend_from_slice(token.as_bytes());
                return;
            }
        }
    }
}

/// Printable Latin-1 stands for itself; the other 68 bytes are U+0100 to U+0143 in rising order.
fn byte_of_char(c: char) -> Option<u8> {
    match u32::from(c) {
        code @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8), // 00 to 20
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7F) as u8), // 7F to A0
        0x143 => Some(0xAD),
        _ => None,
    }
}
