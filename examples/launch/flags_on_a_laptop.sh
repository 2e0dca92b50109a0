#!/usr/bin/env bash
# examples/megatron_flags.py on two processes of a CPU: a small MoE from Megatron's own flags (0.18 and later).
# Further arguments go to the script, such as --moe-macs-level rank.
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("megatron.training") is None)' || {
  echo "flags_on_a_laptop.sh: found no megatron.training; needs megatron-core 0.18 or later, or a checkout of" \
    "Megatron-LM on PYTHONPATH (Python 3.12: pip install 'megatron-core==0.19.2')" >&2
  exit 2
}

MODEL=(
  --num-layers 2 --hidden-size 64 --num-attention-heads 4 --ffn-hidden-size 128
  --num-experts 8 --moe-router-topk 2 --moe-token-dispatcher-type alltoall
  --normalization RMSNorm --disable-bias-linear --position-embedding-type rope
  --seq-length 256 --max-position-embeddings 256 --tokenizer-type NullTokenizer --vocab-size 128
)
# What Megatron takes from transformer-engine and apex unless it is told otherwise.
PLAIN=(
  --transformer-impl local --attention-backend unfused --no-persist-layer-norm --no-masked-softmax-fusion
  --no-bias-dropout-fusion --no-bias-gelu-fusion --no-rope-fusion --no-gradient-accumulation-fusion
)
MACS=(--moe-macs --moe-macs-image-token-id 5 --moe-macs-capacity-factor 0.8)

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec torchrun --nproc-per-node 2 megatron_flags.py "${MODEL[@]}" "${PLAIN[@]}" \
  --expert-model-parallel-size 2 --micro-batch-size 1 --use-cpu-initialization "${MACS[@]}" "$@"
