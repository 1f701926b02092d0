//! Tokenizer and chat template of one model, behind the C ABI of ../text_abi.h.
//!
//! Files of a model come in as bytes and are not trusted: sizes, ids and regex patterns are checked
//! by our own code
//! (`checked_json`, `recipe`) before the crate `tokenizers` builds anything from them.
//!
//! Reading order: `model` (what a loaded model can do), `recipe` (the one form all vocabularies
//! take), then the three
//! sources `tokenizer_json`, `vocab_merges`, `gguf_vocab`.

mod abi;
mod chat_template;
mod checked_json;
mod error;
mod gguf_vocab;
mod limits;
mod model;
mod pattern_check;
mod protect;
mod python_json;
mod recipe;
mod special_tokens;
mod stream;
mod strftime;
mod tokenizer_json;
mod vocab_merges;
