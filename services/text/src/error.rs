//! Errors that cross the ABI: a canonical status code and a message that names the file, the rule
//! and the way out.

/// Numeric values of absl::StatusCode, the part used here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Code {
    InvalidArgument = 3,
    NotFound = 5,
    FailedPrecondition = 9,
    Unimplemented = 12,
    Internal = 13,
}

#[derive(Debug)]
pub struct TextError {
    pub code: Code,
    pub message: String,
}

pub type Result<T> = std::result::Result<T, TextError>;

impl TextError {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { code, message }
    }
}

/// A file or a request breaks a rule.
pub fn invalid(message: impl Into<String>) -> TextError {
    TextError::new(Code::InvalidArgument, message)
}

/// A file is well formed, but asks for something this service does not do.
pub fn unimplemented(message: impl Into<String>) -> TextError {
    TextError::new(Code::Unimplemented, message)
}
