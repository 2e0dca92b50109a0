# The language model of Qwen3-VL-30B-A3B in Megatron's flags; sourced by the launch scripts beside this.
# Edit: another model's sizes, its tokenizer, its image token.
MODEL=(
  --num-layers 48 --hidden-size 2048 --num-attention-heads 32 --group-query-attention --num-query-groups 4
  --kv-channels 128 --qk-layernorm --ffn-hidden-size 6144 --normalization RMSNorm --norm-epsilon 1e-6
  --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --make-vocab-size-divisible-by 1187
  --position-embedding-type rope --rotary-base 5000000 --rotary-percent 1.0
  --seq-length 32768 --max-position-embeddings 262144
  --num-experts 128 --moe-ffn-hidden-size 768 --moe-router-topk 8 --moe-router-dtype fp32
  --moe-router-load-balancing-type none --moe-token-dispatcher-type alltoall --moe-grouped-gemm
  --bf16 --tokenizer-type HuggingFaceTokenizer --tokenizer-model "${TOKENIZER:-Qwen/Qwen3-VL-30B-A3B-Instruct}"
)
ENGINE=(
  --load "${CHECKPOINT:?the folder of a Megatron checkpoint}" --micro-batch-size 1
  --inference-dynamic-batching-buffer-size-gb 20 --num-tokens-to-generate 128
)
MACS=(--moe-macs --moe-macs-image-token-id 151655 --moe-macs-video-token-id 151656)
if [ -n "${MACS_CONFIG:-}" ]; then MACS+=(--moe-macs-config "$MACS_CONFIG"); fi
if [ -n "${MACS_PROFILE:-}" ]; then MACS+=(--moe-macs-profile "$MACS_PROFILE"); fi

LAYOUT=(
  --tensor-model-parallel-size "${TP:=1}" --pipeline-model-parallel-size "${PP:=1}"
  --expert-model-parallel-size "${EP:=8}" --expert-tensor-parallel-size 1
)
# With tensor parallelism every rank gets its own part of the sequence, and plans only that.
if [ "$TP" -gt 1 ]; then LAYOUT+=(--sequence-parallel); fi

SCRIPT=${SCRIPT:-${MEGATRON_LM:?a checkout of Megatron-LM}/examples/inference/advanced/gpt_dynamic_inference.py}
