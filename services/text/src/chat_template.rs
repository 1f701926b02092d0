//! Renders a model's chat template with `minijinja`: no file access, no host objects; instructions,
//! recursion and output are
//! capped (F22). Settings and extra functions are those of transformers' apply_chat_template.

use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{context, Environment, Error, ErrorKind};

use crate::error::{invalid, Code, Result, TextError};
use crate::limits::{
    COMPILE_STACK_BYTES, MAX_ELIFS, MAX_TAG_TOKENS, MAX_TEMPLATE_BYTES, MAX_TEMPLATE_FUEL,
    MAX_TEMPLATE_OUTPUT_BYTES, MAX_TEMPLATE_RECURSION,
};
use crate::python_json;
use crate::strftime;

const NAME: &str = "chat_template";

pub struct Message {
    pub role: String,
    pub content: String,
}

/// Spellings of the tokens a template may name; empty = the model has none.
#[derive(Clone, Default)]
pub struct TokenNames {
    pub bos: String,
    pub eos: String,
    pub unk: String,
    pub pad: String,
}

pub struct ChatTemplate {
    environment: Environment<'static>,
    tokens: TokenNames,
}

impl ChatTemplate {
    /// Compiles `source`; what the template language of transformers does not know is an error
    /// here, at load.
    pub fn compile(source: &str, tokens: TokenNames) -> Result<Self> {
        if source.len() > MAX_TEMPLATE_BYTES {
            return Err(invalid(format!(
                "chat template: {} bytes, the limit is {MAX_TEMPLATE_BYTES}",
                source.len()
            )));
        }
        check_tags(source)?;
        let source = open_generation_blocks(source);
        // The parser is recursive, and the caller's stack may be a small one.
        let compiled = std::thread::Builder::new()
            .stack_size(COMPILE_STACK_BYTES)
            .spawn(move || compile_environment(source))
            .map_err(|e| TextError::new(Code::Internal, format!("chat template: no thread: {e}")))?
            .join();
        let environment = compiled.map_err(|_| {
            TextError::new(Code::Internal, "chat template: the compiler panicked")
        })??;
        Ok(Self { environment, tokens })
    }

    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let messages: Vec<Value> = messages
            .iter()
            .map(|m| context! { role => m.role.as_str(), content => m.content.as_str() })
            .collect();
        let tokens = &self.tokens;
        let variables = context! {
            messages => messages,
            add_generation_prompt => add_generation_prompt,
            bos_token => tokens.bos.as_str(),
            eos_token => tokens.eos.as_str(),
            unk_token => tokens.unk.as_str(),
            pad_token => tokens.pad.as_str(),
            tools => Value::from(()),
            documents => Value::from(()),
        };
        let fail = |e: Error| {
            invalid(format!("chat template: {}; correct it or the messages", describe(&e)))
        };
        let template = self.environment.get_template(NAME).map_err(fail)?;
        let mut output = CappedOutput::default();
        let rendered = template.render_captured_to(variables, &mut output).map(|_| ());
        if output.overflow {
            return Err(invalid(format!(
                "chat template: the prompt is longer than {MAX_TEMPLATE_OUTPUT_BYTES} bytes; shorten the messages"
            )));
        }
        rendered.map_err(fail)?;
        String::from_utf8(output.bytes)
            .map_err(|_| TextError::new(Code::Internal, "chat template: the output is not UTF-8"))
    }
}

fn compile_environment(source: String) -> Result<Environment<'static>> {
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .map_err(|e| TextError::new(Code::Internal, format!("chat template syntax: {e}")))?;
    let mut environment = Environment::new();
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_fuel(Some(MAX_TEMPLATE_FUEL));
    environment.set_recursion_limit(MAX_TEMPLATE_RECURSION);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_filter("tojson", python_json::tojson);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", |format: String| strftime::now(&format));
    environment
        .add_template_owned(NAME, source)
        .map_err(|e| invalid(format!("chat template: does not compile: {}", describe(&e))))?;
    Ok(environment)
}

/// What would take the parser's recursion too deep: long expressions and long chains of elif.
fn check_tags(source: &str) -> Result<()> {
    let mut rest = source;
    let mut elifs = 0;
    while let Some(at) = rest.find('{') {
        let tag = &rest[at..];
        rest = match tag.as_bytes().get(1) {
            Some(b'#') => tag.find("#}").map_or("", |end| &tag[end + 2..]),
            Some(b'{' | b'%') => {
                let inner = &tag[2..];
                let name = inner.trim_start_matches(['-', '+']).trim_start();
                elifs += usize::from(name.starts_with("elif"));
                let (tokens, end) = count_tokens(inner);
                if tokens > MAX_TAG_TOKENS {
                    return Err(invalid(format!(
                        "chat template: a tag of {tokens} tokens, the limit is {MAX_TAG_TOKENS}"
                    )));
                }
                &inner[end..]
            }
            _ => &tag[1..],
        };
    }
    if elifs > MAX_ELIFS {
        return Err(invalid(format!("chat template: {elifs} elif, the limit is {MAX_ELIFS}")));
    }
    Ok(())
}

/// Tokens up to the end of a tag, and where that is. A word and a string are one, a sign is one.
fn count_tokens(inner: &str) -> (usize, usize) {
    let bytes = inner.as_bytes();
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b >= 0x80;
    let mut tokens = 0;
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'}' | b'%' if bytes.get(at + 1) == Some(&b'}') => return (tokens, at + 2),
            quote @ (b'"' | b'\'') => {
                tokens += 1;
                at += 1;
                while at < bytes.len() && bytes[at] != quote {
                    at += 1 + usize::from(bytes[at] == b'\\');
                }
                at += 1;
            }
            b if b.is_ascii_whitespace() => at += 1,
            b if is_word(b) => {
                tokens += 1;
                while at < bytes.len() && is_word(bytes[at]) {
                    at += 1;
                }
            }
            _ => {
                tokens += 1;
                at += 1;
            }
        }
    }
    (tokens, inner.len())
}

fn raise_exception(message: String) -> std::result::Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// The error's own words and its line; never the source around it or values.
fn describe(error: &Error) -> String {
    if error.kind() == ErrorKind::OutOfFuel {
        return format!("more than {MAX_TEMPLATE_FUEL} steps; simplify the template");
    }
    let what = error.detail().map(str::to_owned).unwrap_or_else(|| error.kind().to_string());
    let what: String = what.chars().take(400).collect();
    match error.line() {
        Some(line) => format!("{what} (line {line})"),
        None => what,
    }
}

/// {% generation %} ... {% endgeneration %} marks an answer for training; here it only needs to be
/// a block.
fn open_generation_blocks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        // From the third byte on: "{%}" opens a tag and does not close it.
        let Some(length) = tag[2..].find("%}").map(|end| end + 4) else {
            rest = tag;
            break;
        };
        let inner = &tag[2..length - 2];
        let name = inner.trim_start_matches(['-', '+']).trim_end_matches(['-', '+']).trim();
        match name {
            "generation" => out.push_str(&tag[..length].replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag[..length].replace("endgeneration", "endif")),
            _ => out.push_str(&tag[..length]),
        }
        rest = &tag[length..];
    }
    out.push_str(rest);
    out
}

#[derive(Default)]
struct CappedOutput {
    bytes: Vec<u8>,
    overflow: bool,
}

impl io::Write for CappedOutput {
    fn write(&mut self, piece: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + piece.len() > MAX_TEMPLATE_OUTPUT_BYTES {
            self.overflow = true;
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(piece);
        Ok(piece.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
