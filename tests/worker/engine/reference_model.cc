#include "tests/worker/engine/reference_model.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"

namespace sluice::worker {
namespace {

using Row = std::vector<double>;
using Rows = std::vector<Row>;

class Reference {
 public:
  Reference(const SmallModel& model, uint32_t prompt_len)
      : model_(model), config_(model.config), prompt_len_(prompt_len) {}

  Rows Logits(const std::vector<uint32_t>& ids) const {
    Rows x;
    for (size_t pos = 0; pos < ids.size(); ++pos) x.push_back(EmbedToken(ids[pos], pos));
    for (uint32_t i = 0; i < config_.num_layers(); ++i) {
      if (IsOpt()) {
        OptLayer(absl::StrCat("layers.", i, "."), &x);
      } else {
        LlamaLayer(absl::StrCat("layers.", i, "."), &x);
      }
    }
    for (Row& row : x) {
      if (!IsOpt()) row = RmsNorm("norm", row);
      if (config_.has_final_norm()) row = LayerNorm("final_layer_norm", row);
      if (Has("project_out.weight")) row = Apply("project_out", row);
      row = Apply("lm_head", row);
    }
    return x;
  }

 private:
  bool IsOpt() const { return config_.architecture() == internal::v1::ARCHITECTURE_OPT; }
  bool Has(const std::string& name) const { return model_.tensors.count(name) > 0; }

  Row TableRow(const std::string& name, size_t row) const {
    const SmallTensor& table = model_.at(name);
    const auto begin = table.values.begin() + static_cast<int64_t>(row) * table.k;
    return Row(begin, begin + table.k);
  }

  Row EmbedToken(uint32_t id, size_t pos) const {
    Row x = TableRow("embed_tokens.weight", id);
    if (!IsOpt()) return x;
    if (Has("project_in.weight")) x = Apply("project_in", x);
    return Add(x, TableRow("embed_positions.weight", pos + 2));
  }

  static Row Add(Row a, const Row& b) {
    for (size_t i = 0; i < a.size(); ++i) a[i] += b[i];
    return a;
  }

  // W x + b
  Row Apply(const std::string& name, const Row& x) const {
    const SmallTensor& weight = model_.at(name + ".weight");
    Row y(weight.n, 0.0);
    for (int64_t n = 0; n < weight.n; ++n) {
      for (int64_t k = 0; k < weight.k; ++k) y[n] += double{weight.values[n * weight.k + k]} * x[k];
    }
    return Has(name + ".bias") ? Add(y, TableRow(name + ".bias", 0)) : y;
  }

  Row RmsNorm(const std::string& name, Row x) const {
    double sum = 0;
    for (const double v : x) sum += v * v;
    const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + config_.norm_eps());
    const Row weight = TableRow(name + ".weight", 0);
    for (size_t i = 0; i < x.size(); ++i) x[i] *= scale * weight[i];
    return x;
  }

  Row LayerNorm(const std::string& name, Row x) const {
    const auto size = static_cast<double>(x.size());
    double mean = 0, variance = 0;
    for (const double v : x) mean += v / size;
    for (const double v : x) variance += (v - mean) * (v - mean) / size;
    const Row weight = TableRow(name + ".weight", 0);
    const Row bias = TableRow(name + ".bias", 0);
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = (x[i] - mean) / std::sqrt(variance + config_.norm_eps()) * weight[i] + bias[i];
    }
    return x;
  }

  double Frequency(size_t i, size_t pos) const {
    const auto& rope = config_.rope();
    const double dim = config_.head_dim();
    double theta = rope.theta();
    const double original = rope.original_max_position_embeddings();
    if (rope.type() == "dynamic") {
      const double length = std::max({static_cast<double>(prompt_len_), pos + 1.0, original});
      theta *= std::pow(rope.factor() * length / original - (rope.factor() - 1), dim / (dim - 2));
    }
    const double f = 1 / std::pow(theta, 2.0 * static_cast<double>(i) / dim);
    if (rope.type() == "linear") return f / rope.factor();
    if (rope.type() != "llama3") return f;
    const double wavelength = 2 * M_PI / f;
    if (wavelength < original / rope.high_freq_factor()) return f;
    if (wavelength > original / rope.low_freq_factor()) return f / rope.factor();
    const double s = (original / wavelength - rope.low_freq_factor()) /
                     (rope.high_freq_factor() - rope.low_freq_factor());
    return (1 - s) * f / rope.factor() + s * f;
  }

  void Turn(Row* heads, size_t pos) const {
    const size_t dim = config_.head_dim(), half = dim / 2;
    for (size_t begin = 0; begin < heads->size(); begin += dim) {
      for (size_t i = 0; i < half; ++i) {
        const double angle = static_cast<double>(pos) * Frequency(i, pos);
        double& a = (*heads)[begin + i];
        double& b = (*heads)[begin + i + half];
        const double turned = a * std::cos(angle) - b * std::sin(angle);
        b = b * std::cos(angle) + a * std::sin(angle);
        a = turned;
      }
    }
  }

  Rows Attention(const std::string& layer, const Rows& x) const {
    Rows q, k, v;
    for (size_t pos = 0; pos < x.size(); ++pos) {
      q.push_back(Apply(layer + "self_attn.q_proj", x[pos]));
      k.push_back(Apply(layer + "self_attn.k_proj", x[pos]));
      v.push_back(Apply(layer + "self_attn.v_proj", x[pos]));
      if (IsOpt()) continue;
      Turn(&q.back(), pos);
      Turn(&k.back(), pos);
    }
    Rows out;
    for (size_t pos = 0; pos < x.size(); ++pos) {
      Row row(q[pos].size(), 0.0);
      for (uint32_t h = 0; h < config_.num_heads(); ++h) AttendHead(q[pos], k, v, pos, h, &row);
      out.push_back(Apply(layer + (IsOpt() ? "self_attn.out_proj" : "self_attn.o_proj"), row));
    }
    return out;
  }

  void AttendHead(const Row& q, const Rows& k, const Rows& v, size_t pos, uint32_t head,
                  Row* out) const {
    const size_t dim = config_.head_dim();
    const size_t kv_head = head / (config_.num_heads() / config_.num_kv_heads());
    Row weights;
    double total = 0;
    for (size_t other = 0; other <= pos; ++other) {
      double score = 0;
      for (size_t i = 0; i < dim; ++i) score += q[head * dim + i] * k[other][kv_head * dim + i];
      weights.push_back(std::exp(score / std::sqrt(static_cast<double>(dim))));
      total += weights.back();
    }
    for (size_t other = 0; other <= pos; ++other) {
      for (size_t i = 0; i < dim; ++i) {
        (*out)[head * dim + i] += weights[other] / total * v[other][kv_head * dim + i];
      }
    }
  }

  void LlamaLayer(const std::string& layer, Rows* x) const {
    Rows normed;
    for (const Row& row : *x) normed.push_back(RmsNorm(layer + "input_layernorm", row));
    const Rows attention = Attention(layer, normed);
    for (size_t pos = 0; pos < x->size(); ++pos) {
      Row& row = (*x)[pos];
      row = Add(row, attention[pos]);
      const Row in = RmsNorm(layer + "post_attention_layernorm", row);
      Row gate = Apply(layer + "mlp.gate_proj", in);
      const Row up = Apply(layer + "mlp.up_proj", in);
      for (size_t i = 0; i < gate.size(); ++i) gate[i] = gate[i] / (1 + std::exp(-gate[i])) * up[i];
      row = Add(row, Apply(layer + "mlp.down_proj", gate));
    }
  }

  void OptLayer(const std::string& layer, Rows* x) const {
    const std::string attention_norm = layer + "self_attn_layer_norm";
    const std::string mlp_norm = layer + "final_layer_norm";
    const bool before = config_.norm_before();
    Rows in;
    for (const Row& row : *x) in.push_back(before ? LayerNorm(attention_norm, row) : row);
    const Rows attention = Attention(layer, in);
    for (size_t pos = 0; pos < x->size(); ++pos) {
      Row& row = (*x)[pos];
      row = Add(row, attention[pos]);
      if (!before) row = LayerNorm(attention_norm, row);
      Row inner = Apply(layer + "fc1", before ? LayerNorm(mlp_norm, row) : row);
      for (double& value : inner) value = std::max(value, 0.0);
      row = Add(row, Apply(layer + "fc2", inner));
      if (!before) row = LayerNorm(mlp_norm, row);
    }
  }

  const SmallModel& model_;
  const internal::v1::ModelConfig& config_;
  const uint32_t prompt_len_;
};

}  // namespace

std::vector<std::vector<double>> ReferenceLogits(const SmallModel& model,
                                                 const std::vector<uint32_t>& ids,
                                                 uint32_t prompt_len) {
  return Reference(model, prompt_len).Logits(ids);
}

double ReferenceLogprob(const std::vector<double>& logits, uint32_t id) {
  const double highest = *std::max_element(logits.begin(), logits.end());
  double total = 0;
  for (const double logit : logits) total += std::exp(logit - highest);
  return logits[id] - highest - std::log(total);
}

}  // namespace sluice::worker
