// The operators' names and arguments. Each file implements its own.

#include "products.h"

#include <torch/library.h>

namespace {

bool native_bfloat16() {
  return deepseek::native();
}

void set_native_bfloat16(bool wanted) {
  deepseek::set_native(wanted);
}

} // namespace

TORCH_LIBRARY(deepseek_kernels_cpu, library) {
  library.def("native_bfloat16() -> bool", &native_bfloat16);
  library.def("set_native_bfloat16(bool wanted) -> ()", &set_native_bfloat16);
  library.def("dense(Tensor x, Tensor weight) -> Tensor");
  library.def("fp8_weight(Tensor x, Tensor weight, Tensor scale, int block_rows, int block_columns) -> Tensor");
  library.def(
      "experts(Tensor x, Tensor gate_up, Tensor down, Tensor expert_ids, Tensor weights, Tensor? gate_up_scale=None, "
      "Tensor? down_scale=None, int block_rows=1, int block_columns=1) -> Tensor");
  library.def("combine(Tensor y, Tensor? weights, Tensor inverse) -> Tensor");
  library.def(
      "combine_backward(Tensor grad, Tensor y, Tensor weights, Tensor inverse) -> (Tensor, Tensor)");
  library.def("rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps) -> (Tensor, Tensor)");
  library.def(
      "topk_gate(Tensor scores, Tensor? bias, int top_k, int[] groups, bool normalize, float factor) "
      "-> (Tensor, Tensor)");
  library.def(
      "latent_write(Tensor kv, Tensor weight, float eps, Tensor cos, Tensor sin, Tensor(a!) buffer, Tensor slots, "
      "bool paged) -> ()");
  library.def("mla_decode(Tensor q, Tensor states, int kv_lora_rank, float scale, Tensor? mask) -> Tensor");
  library.def(
      "mla_decode_paged(Tensor q, Tensor pages, Tensor block_table, Tensor lengths, int kv_lora_rank, float scale) "
      "-> Tensor");
  library.def("mla_attention(Tensor q, Tensor kv, Tensor key, Tensor? mask, float scale) -> (Tensor, Tensor)");
  library.def(
      "mla_attention_backward(Tensor grad, Tensor q, Tensor kv, Tensor key, Tensor? mask, Tensor out, Tensor log_sum, "
      "float scale) -> (Tensor, Tensor, Tensor)");
  library.def("mla_prefill(Tensor q, Tensor states, int kv_lora_rank, float scale, Tensor? mask) -> Tensor");
  library.def(
      "queries_to_latents(Tensor q, Tensor up, int own, Tensor? scale=None, int block_rows=1, int block_columns=1) "
      "-> Tensor");
  library.def(
      "latents_to_values(Tensor latents, Tensor up, int own, Tensor? scale=None, int block_rows=1, int block_columns=1) "
      "-> Tensor");
  library.def("indexer_scores(Tensor q, Tensor keys, Tensor weights, Tensor? mask) -> Tensor");
  library.def("topk_select(Tensor scores, int top_k, Tensor? mask) -> Tensor");
  library.def("sparse_mla(Tensor q, Tensor states, Tensor ids, int kv_lora_rank, float scale) -> Tensor");
}
