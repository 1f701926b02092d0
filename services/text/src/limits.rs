//! What a model's files and a request may ask for (reliability rules F3, F17, F21, F22). Generous
//! against real models: the
//! largest public tokenizer.json is 33 MB with 262,144 tokens and 514,906 merges.

pub const MAX_VOCAB_FILE_BYTES: usize = 64 << 20; // tokenizer.json, gguf_vocab.json, vocab.json, merges.txt
pub const MAX_CONFIG_FILE_BYTES: usize = 4 << 20; // tokenizer_config.json and the other small files
pub const MAX_TEMPLATE_BYTES: usize = 256 << 10; // chat template source
pub const MAX_JSON_DEPTH: usize = 32;
// Memory of the values of one JSON file: enough for any real one, and bounded for one of small values only.
pub const JSON_BASE_MEMORY: usize = 24 << 20;
pub const JSON_MEMORY_PER_BYTE: usize = 5;
pub const MAX_TOKEN_ID: u64 = (1 << 21) - 1;
pub const MAX_MERGES: usize = 1 << 21;
pub const MERGES_PER_TOKEN: usize = 16; // merges.txt; Llama 3 has 2.2
pub const MAX_TOKEN_BYTES: usize = 2048;
pub const MAX_SPM_SPLIT_WORK: usize = 1 << 28; // sum of squared token lengths, while merges are made from scores
pub const MAX_NORMALIZED_GROWTH: usize = 8; // bytes out per byte in of all Replace steps together

pub const MAX_ENCODE_BYTES: usize = 4 << 20; // text of one Encode call
pub const MAX_TEMPLATE_FUEL: u64 = 500_000; // instructions of one rendering, plus 1 per 64 bytes made
pub const MAX_TAG_TOKENS: usize = 1_000; // of one {{ }} or {% %}: the parser goes one level deeper for each
pub const MAX_ELIFS: usize = 1_000; // of one template, for the same reason
pub const COMPILE_STACK_BYTES: usize = 32 << 20; // for the limits above with room to spare
pub const MAX_TEMPLATE_RECURSION: usize = 100;
pub const MAX_TEMPLATE_OUTPUT_BYTES: usize = 1 << 20;
