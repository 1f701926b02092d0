//! The functions of ../text_abi.h, which documents them. All unsafe code of the crate is here: it
//! turns C arguments into
//! slices and results into buffers, and keeps panics on this side.

use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;

use crate::chat_template::Message;
use crate::error::{invalid, Code, Result, TextError};
use crate::model::Model;
use crate::special_tokens::Files;
use crate::stream::Stream;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Slice {
    data: *const u8,
    size: usize,
}

#[repr(C)]
pub struct Pair {
    first: Slice,
    second: Slice,
}

/// A Vec<T> in the caller's hands: `Bytes` and `Ids` of the header.
#[repr(C)]
pub struct Owned<T> {
    data: *mut T,
    size: usize,
    capacity: usize,
}

#[repr(C)]
pub struct Info {
    vocab_size: u32,
    bos_token_id: i64,
    eos_token_ids: *const u32,
    num_eos_token_ids: usize,
    has_chat_template: u8,
}

pub struct ModelHandle(Arc<Model>);

impl<T> Owned<T> {
    fn new(items: Vec<T>) -> Self {
        let mut items = std::mem::ManuallyDrop::new(items);
        Self { data: items.as_mut_ptr(), size: items.len(), capacity: items.capacity() }
    }

    /// SAFETY: `self` came from new() and is freed once.
    unsafe fn free(self) {
        if self.capacity > 0 {
            drop(Vec::from_raw_parts(self.data, self.size, self.capacity));
        }
    }
}

/// SAFETY: data points to `size` items that live for 'a, or size is 0.
unsafe fn items<'a, T>(data: *const T, size: usize) -> &'a [T] {
    if size == 0 {
        return &[];
    }
    std::slice::from_raw_parts(data, size)
}

impl Slice {
    unsafe fn bytes<'a>(self) -> &'a [u8] {
        items(self.data, self.size)
    }

    unsafe fn text<'a>(self, what: &str) -> Result<&'a str> {
        std::str::from_utf8(self.bytes()).map_err(|_| invalid(format!("{what} is not valid UTF-8")))
    }
}

/// Runs `body`; an error or a panic becomes a code and a message in `error`.
unsafe fn guard(error: *mut Owned<u8>, body: impl FnOnce() -> Result<()>) -> i32 {
    let outcome = catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|_| {
        Err(TextError::new(
            Code::Internal,
            "the text library panicked; please report the model's files",
        ))
    });
    match outcome {
        Ok(()) => 0,
        Err(TextError { code, message }) => {
            *error = Owned::new(message.into_bytes());
            code as i32
        }
    }
}

/// What to do about a file that is refused, unless the error says so itself.
fn with_way_out(error: TextError) -> TextError {
    let message = match error.message.contains("; ") {
        true => error.message,
        false => format!("{}; use the file as its author published it", error.message),
    };
    TextError { message, ..error }
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_free_bytes(bytes: Owned<u8>) {
    bytes.free();
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_free_ids(ids: Owned<u32>) {
    ids.free();
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_load(
    files: *const Pair,
    num_files: usize,
    model: *mut *mut ModelHandle,
    error: *mut Owned<u8>,
) -> i32 {
    silence_panics();
    guard(error, || {
        let mut named = Files::new();
        for file in items(files, num_files) {
            named.insert(file.first.text("a file name")?.to_owned(), file.second.bytes());
        }
        let loaded = Model::load(&named).map_err(with_way_out)?;
        *model = Box::into_raw(Box::new(ModelHandle(Arc::new(loaded))));
        Ok(())
    })
}

/// A caught panic is reported as a status; it must not also write to standard error, where only log
/// lines belong.
fn silence_panics() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| std::panic::set_hook(Box::new(|_| {})));
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_free_model(model: *mut ModelHandle) {
    if !model.is_null() {
        drop(Box::from_raw(model));
    }
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_info(model: *const ModelHandle, info: *mut Info) {
    let model = &(*model).0;
    *info = Info {
        vocab_size: model.vocab_size() as u32,
        bos_token_id: model.bos_id.map_or(-1, i64::from),
        eos_token_ids: model.eos_ids.as_ptr(),
        num_eos_token_ids: model.eos_ids.len(),
        has_chat_template: u8::from(model.has_chat_template()),
    };
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_encode(
    model: *const ModelHandle,
    text: Slice,
    add_special_tokens: u8,
    parse_special: u8,
    ids: *mut Owned<u32>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let text = text.text("the text")?;
        *ids = Owned::new((*model).0.encode(text, add_special_tokens != 0, parse_special != 0)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_decode(
    model: *const ModelHandle,
    ids: *const u32,
    num_ids: usize,
    skip_special_tokens: u8,
    text: *mut Owned<u8>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let decoded = (*model).0.decode(items(ids, num_ids), skip_special_tokens != 0)?;
        *text = Owned::new(decoded.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_token(model: *const ModelHandle, id: u32) -> Owned<u8> {
    Owned::new((*model).0.token_text(id).unwrap_or_default().into_bytes())
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_to_json(
    model: *const ModelHandle,
    json: *mut Owned<u8>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        *json = Owned::new((*model).0.to_json()?.into_bytes());
        Ok(())
    })
}

unsafe fn read_messages(messages: *const Pair, num_messages: usize) -> Result<Vec<Message>> {
    items(messages, num_messages)
        .iter()
        .map(|m| {
            Ok(Message {
                role: m.first.text("a message's role")?.to_owned(),
                content: m.second.text("a message's content")?.to_owned(),
            })
        })
        .collect()
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_apply_chat_template(
    model: *const ModelHandle,
    messages: *const Pair,
    num_messages: usize,
    add_generation_prompt: u8,
    prompt: *mut Owned<u8>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let messages = read_messages(messages, num_messages)?;
        let text = (*model).0.apply_chat_template(messages, add_generation_prompt != 0)?;
        *prompt = Owned::new(text.into_bytes());
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_encode_chat(
    model: *const ModelHandle,
    messages: *const Pair,
    num_messages: usize,
    add_generation_prompt: u8,
    ids: *mut Owned<u32>,
    error: *mut Owned<u8>,
) -> i32 {
    guard(error, || {
        let messages = read_messages(messages, num_messages)?;
        *ids = Owned::new((*model).0.encode_chat(messages, add_generation_prompt != 0)?);
        Ok(())
    })
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_new_stream(
    model: *const ModelHandle,
    skip_special_tokens: u8,
) -> *mut Stream {
    Box::into_raw(Box::new(Stream::new((*model).0.clone(), skip_special_tokens != 0)))
}

/// Text of a stream step; what a step made before it failed is kept, and a failure itself has no
/// text.
unsafe fn stream_text(step: impl FnOnce(&mut String) -> Result<()>) -> Owned<u8> {
    let mut text = String::new();
    let _ = catch_unwind(AssertUnwindSafe(|| step(&mut text)));
    Owned::new(text.into_bytes())
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_stream_add(stream: *mut Stream, id: u32) -> Owned<u8> {
    stream_text(|text| (*stream).add(id, text))
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_stream_finish(stream: *mut Stream) -> Owned<u8> {
    stream_text(|text| (*stream).finish(text))
}

#[no_mangle]
pub unsafe extern "C" fn sluice_text_free_stream(stream: *mut Stream) {
    if !stream.is_null() {
        drop(Box::from_raw(stream));
    }
}
