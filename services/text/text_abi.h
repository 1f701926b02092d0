/* C ABI of the Rust library in this folder; used by tokenizer.cc, chat.cc and stream_decoder.cc
 * only.
 *
 * Every function that can fail returns a status code with the numbers of absl::StatusCode (0 = OK)
 * and, when it is not 0, fills `error` with a message in UTF-8. A panic inside the library becomes
 * code 13 (INTERNAL) and never crosses this line. Inputs (SluiceTextSlice) are borrowed for the
 * call. Outputs (SluiceTextBytes, SluiceTextIds) are owned by the caller, are empty on failure, and
 * go back through their free function. A model is immutable: any thread may use it. A stream
 * belongs to one thread and keeps its model alive. */
#ifndef SLUICE_SERVICES_TEXT_TEXT_ABI_H_
#define SLUICE_SERVICES_TEXT_TEXT_ABI_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct SluiceTextModel SluiceTextModel;
typedef struct SluiceTextStream SluiceTextStream;

typedef struct {
  const uint8_t* data; /* may be null when size is 0 */
  size_t size;
} SluiceTextSlice;

/* Two strings: (file name, content) or (role, content). */
typedef struct {
  SluiceTextSlice first;
  SluiceTextSlice second;
} SluiceTextPair;

typedef struct {
  uint8_t* data;
  size_t size;
  size_t capacity;
} SluiceTextBytes;

typedef struct {
  uint32_t* data;
  size_t size;
  size_t capacity;
} SluiceTextIds;

typedef struct {
  uint32_t vocab_size;           /* highest id + 1 */
  int64_t bos_token_id;          /* -1 = none */
  const uint32_t* eos_token_ids; /* lives as long as the model */
  size_t num_eos_token_ids;
  uint8_t has_chat_template;
} SluiceTextInfo;

void sluice_text_free_bytes(SluiceTextBytes bytes);
void sluice_text_free_ids(SluiceTextIds ids);

/* Checks and loads the files; on success *model goes back through sluice_text_free_model. */
int32_t sluice_text_load(const SluiceTextPair* files, size_t num_files, SluiceTextModel** model,
                         SluiceTextBytes* error);
void sluice_text_free_model(SluiceTextModel* model);
void sluice_text_info(const SluiceTextModel* model, SluiceTextInfo* info);

int32_t sluice_text_encode(const SluiceTextModel* model, SluiceTextSlice text,
                           uint8_t add_special_tokens, uint8_t parse_special, SluiceTextIds* ids,
                           SluiceTextBytes* error);
int32_t sluice_text_decode(const SluiceTextModel* model, const uint32_t* ids, size_t num_ids,
                           uint8_t skip_special_tokens, SluiceTextBytes* text,
                           SluiceTextBytes* error);
/* The token's spelling; empty for an unknown id. */
SluiceTextBytes sluice_text_token(const SluiceTextModel* model, uint32_t id);

/* The tokenizer as the text of a tokenizer.json. */
int32_t sluice_text_to_json(const SluiceTextModel* model, SluiceTextBytes* json,
                            SluiceTextBytes* error);

/* Messages are (role, content). */
int32_t sluice_text_apply_chat_template(const SluiceTextModel* model,
                                        const SluiceTextPair* messages, size_t num_messages,
                                        uint8_t add_generation_prompt, SluiceTextBytes* prompt,
                                        SluiceTextBytes* error);
int32_t sluice_text_encode_chat(const SluiceTextModel* model, const SluiceTextPair* messages,
                                size_t num_messages, uint8_t add_generation_prompt,
                                SluiceTextIds* ids, SluiceTextBytes* error);

SluiceTextStream* sluice_text_new_stream(const SluiceTextModel* model, uint8_t skip_special_tokens);
SluiceTextBytes sluice_text_stream_add(SluiceTextStream* stream, uint32_t id);
SluiceTextBytes sluice_text_stream_finish(SluiceTextStream* stream);
void sluice_text_free_stream(SluiceTextStream* stream);

#ifdef __cplusplus
}
#endif

#endif /* SLUICE_SERVICES_TEXT_TEXT_ABI_H_ */
