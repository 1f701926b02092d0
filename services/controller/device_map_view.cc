#include "services/controller/device_map_view.h"

namespace sluice::controller {

v1::DeviceMap ToDeviceMap(const plan::DeviceMapPlan& plan, uint32_t block_size) {
  v1::DeviceMap map;
  for (const auto& [module, device] : plan.hf_device_map) {
    v1::ModulePlacement* placement = map.add_hf_device_map();
    placement->set_module(module);
    placement->set_device(device);
  }
  for (const plan::StagePlan& planned : plan.stages) {
    v1::DeviceMapStage* stage = map.add_stages();
    stage->set_stage(static_cast<uint32_t>(map.stages_size() - 1));
    stage->set_device(planned.device);
    stage->set_layer_begin(planned.layer_begin);
    stage->set_layer_end(planned.layer_end);
    stage->set_has_embedding(planned.has_embedding);
    stage->set_has_head(planned.has_head);
    stage->set_limit_bytes(planned.limit_bytes);
    stage->set_weight_bytes(planned.weight_bytes);
    stage->set_kv_bytes(planned.kv_bytes);
    stage->set_kv_bytes_per_block(planned.kv_bytes_per_block);
    stage->set_workspace_bytes(planned.workspace_bytes);
    stage->set_reason(planned.reason);
  }
  map.set_num_blocks(plan.num_blocks);
  map.set_block_size(block_size);
  map.set_max_model_len(plan.max_model_len);
  map.set_max_concurrency(plan.max_concurrency);
  for (const std::string& note : plan.notes) {
    map.add_notes(note);
  }
  return map;
}

void AddWorker(const AttachedWorker& worker, v1::DeviceMapStage* stage) {
  stage->set_worker_id(worker.hello.worker_id());
  stage->set_device_name(worker.hello.device_name());
  stage->set_transport(worker.ready.transport());
  stage->set_step_us_p50(worker.stats.step_us_p50());
  stage->set_step_us_p99(worker.stats.step_us_p99());
  stage->set_busy(worker.stats.busy());
}

v1::Worker ToWorker(const AttachedWorker& worker, int stage) {
  v1::Worker message;
  message.set_worker_id(worker.hello.worker_id());
  message.set_host_id(worker.hello.host_id());
  message.set_device(worker.device);
  message.set_device_kind(worker.hello.device_kind());
  message.set_device_name(worker.hello.device_name());
  message.set_memory_bytes(worker.hello.memory_bytes());
  *message.mutable_addresses() = worker.hello.addresses();
  message.set_state(worker.state);
  if (stage >= 0) {
    message.set_stage(static_cast<uint32_t>(stage));
  }
  message.set_loaded_bytes(worker.progress.bytes_done());
  message.set_shard_bytes(worker.progress.bytes_total());
  message.set_steps(worker.stats.steps());
  message.set_step_us_p50(worker.stats.step_us_p50());
  message.set_step_us_p99(worker.stats.step_us_p99());
  message.set_busy(worker.stats.busy());
  message.set_resident_bytes(worker.stats.resident_bytes());
  message.set_fault(worker.fault);
  return message;
}

v1::Model ToModel(const ServedModel& model, v1::ModelState state, uint32_t max_model_len) {
  const internal::v1::ModelConfig& config = model.shards.config();
  const internal::v1::QuantSummary& quant = model.shards.quant();
  v1::Model message;
  message.set_name(model.name);
  message.set_architecture(config.model_type());
  message.set_state(state);
  message.set_num_layers(config.num_layers());
  message.set_hidden_size(config.hidden_size());
  message.set_vocab_size(config.vocab_size());
  message.set_max_model_len(max_model_len == 0 ? config.max_position_embeddings() : max_model_len);
  message.mutable_quantization()->set_method(quant.method());
  message.mutable_quantization()->set_bits(quant.bits());
  message.mutable_quantization()->set_group_size(quant.group_size());
  message.mutable_quantization()->set_act_order(quant.act_order());
  message.mutable_quantization()->set_detail(quant.detail());
  message.set_weight_bytes(model.weight_bytes);
  message.set_digest(model.shards.model_digest());
  message.set_has_chat_template(model.tokenizer->has_chat_template());
  *message.mutable_warnings() = model.shards.warnings();
  return message;
}

}  // namespace sluice::controller
