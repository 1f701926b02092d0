#include "services/controller/model_catalog.h"

#include <grpcpp/client_context.h>

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/core/fault_point.h"
#include "proto/sluice/internal/v1/weights.grpc.pb.h"
#include "services/rpc/channel.h"
#include "services/rpc/crc32c.h"
#include "services/rpc/grpc_status.h"
#include "services/rpc/log.h"

namespace sluice::controller {
namespace {

using internal::v1::PlanShardsResponse;
using internal::v1::Weights;

constexpr std::chrono::seconds kCallTimeout{60};  // Headers of a large checkpoint, cold
constexpr std::chrono::milliseconds kRetrySlice{50};
constexpr int kRetrySlices = 10;
constexpr uint64_t kMaxFileBytes = 256u << 20;

bool IsTokenizerFile(const std::string& name) {
  static const char* const kNames[] = {"tokenizer.json",
                                       "tokenizer_config.json",
                                       "special_tokens_map.json",
                                       "added_tokens.json",
                                       "vocab.json",
                                       "merges.txt",
                                       "chat_template.jinja",
                                       "generation_config.json",
                                       "gguf_vocab.json"};
  return std::any_of(std::begin(kNames), std::end(kNames),
                     [&](const char* known) { return name == known; });
}

absl::StatusOr<std::string> FetchFile(Weights::Stub* stub, const std::string& digest,
                                      const std::string& name) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kCallTimeout);
  internal::v1::FetchFileRequest request;
  request.set_model_digest(digest);
  request.set_name(name);
  auto stream = stub->FetchFile(&context, request);
  internal::v1::FetchFileResponse part;
  std::string content;
  while (stream->Read(&part)) {
    if (rpc::Crc32c(part.data().data(), part.data().size()) != part.crc32c()) {
      context.TryCancel();
      return absl::DataLossError(absl::StrCat(name, ": a part came with a wrong CRC32C"));
    }
    content += part.data();
    if (content.size() > kMaxFileBytes) {
      context.TryCancel();
      return absl::InvalidArgumentError(absl::StrCat(name, " is larger than 256 MiB"));
    }
  }
  if (absl::Status status = rpc::FromGrpcStatus(stream->Finish()); !status.ok()) {
    return status;
  }
  return content;
}

}  // namespace

std::string ModelNameOf(const std::string& source) {
  std::string name = source.substr(0, source.find_last_not_of('/') + 1);
  name = name.substr(name.find_last_of('/') + 1);
  if (name.size() > 5 && name.compare(name.size() - 5, 5, ".gguf") == 0) {
    name.resize(name.size() - 5);
  }
  for (char& c : name) {
    const bool allowed = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') ||
                         (c >= 'A' && c <= 'Z') || c == '.' || c == '_' || c == '-';
    c = allowed ? c : '-';
  }
  name.resize(std::min<size_t>(name.size(), 64));
  return name.empty() ? "model" : name;
}

absl::StatusOr<std::shared_ptr<const ServedModel>> MakeServedModel(
    PlanShardsResponse shards, const text::TokenizerFiles& files, const std::string& name) {
  auto tokenizer = text::Tokenizer::Load(files);
  if (!tokenizer.ok()) {
    return tokenizer.status();
  }
  auto model = std::make_shared<ServedModel>();
  model->tokenizer = *std::move(tokenizer);
  model->name = ModelNameOf(name.empty() ? shards.model_name() : name);
  model->eos_ids.assign(shards.config().eos_token_ids().begin(),
                        shards.config().eos_token_ids().end());
  const auto& more = model->tokenizer->eos_token_ids();
  model->eos_ids.insert(model->eos_ids.end(), more.begin(), more.end());
  // A tokenizer may know more ids than the model has rows. Nothing can sample them, and the workers
  // refuse a step that names one.
  const uint32_t vocab_size = shards.config().vocab_size();
  model->eos_ids.erase(std::remove_if(model->eos_ids.begin(), model->eos_ids.end(),
                                      [vocab_size](uint32_t id) { return id >= vocab_size; }),
                       model->eos_ids.end());
  std::sort(model->eos_ids.begin(), model->eos_ids.end());
  model->eos_ids.erase(std::unique(model->eos_ids.begin(), model->eos_ids.end()),
                       model->eos_ids.end());
  for (const internal::v1::TensorSpec& tensor : shards.tensors()) {
    model->weight_bytes += tensor.bytes();
  }
  model->shards = std::move(shards);
  return std::shared_ptr<const ServedModel>(std::move(model));
}

ModelCatalog::ModelCatalog(const std::string& loader_address, const std::string& name,
                           OnModel on_model, OnError on_error)
    : loader_address_(loader_address),
      name_(name),
      on_model_(std::move(on_model)),
      on_error_(std::move(on_error)) {
  thread_ = std::thread([this] { Run(); });
}

ModelCatalog::~ModelCatalog() {
  stop_ = true;
  thread_.join();
}

void ModelCatalog::Run() {
  std::string last_error;
  while (!stop_) {
    auto model = Fetch();
    if (model.ok()) {
      rpc::LogInfo("model_described", {{"model", (*model)->name},
                                       {"digest", (*model)->shards.model_digest()},
                                       {"layers", (*model)->shards.config().num_layers()},
                                       {"weight_bytes", (*model)->weight_bytes}});
      SLUICE_FAULT_POINT("controller.model_known");
      on_model_(*model);
      return;
    }
    if (std::string error = model.status().ToString(); error != last_error) {
      rpc::LogWarning("loader_not_ready", {{"loader", loader_address_}, {"error", error}});
      last_error = std::move(error);
      on_error_(model.status());
    }
    for (int i = 0; i < kRetrySlices && !stop_; ++i) {
      std::this_thread::sleep_for(kRetrySlice);
    }
  }
}

absl::StatusOr<std::shared_ptr<const ServedModel>> ModelCatalog::Fetch() {
  auto stub = Weights::NewStub(rpc::MakeChannel(loader_address_, rpc::ChannelKind::kControl));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kCallTimeout);
  PlanShardsResponse shards;
  const grpc::Status status = stub->PlanShards(&context, {}, &shards);
  if (!status.ok()) {
    return rpc::FromGrpcStatus(status);
  }
  text::TokenizerFiles files;
  for (const internal::v1::FileInfo& file : shards.files()) {
    if (!IsTokenizerFile(file.name())) {
      continue;
    }
    auto content = FetchFile(stub.get(), shards.model_digest(), file.name());
    if (!content.ok()) {
      return content.status();
    }
    files[file.name()] = *std::move(content);
  }
  return MakeServedModel(std::move(shards), files, name_);
}

}  // namespace sluice::controller
