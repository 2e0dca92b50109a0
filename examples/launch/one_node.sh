#!/usr/bin/env bash
# A Megatron-LM inference script with MACS on the 8 GPUs of one node.
#
#   MEGATRON_LM=~/Megatron-LM CHECKPOINT=/models/qwen3_vl bash one_node.sh --prompts "..."        # EP 8
#   TP=2 EP=8 MEGATRON_LM=... CHECKPOINT=... bash one_node.sh --prompts "..."                     # TP 2 x EP 8
#
# Further arguments go to the script, MACS's own among them: --moe-macs-capacity-factor 1.2
set -euo pipefail
source "$(dirname "$0")/qwen3_vl_30b_a3b.sh"

export CUDA_DEVICE_MAX_CONNECTIONS=1 PYTHONPATH=${MEGATRON_LM:-}:${PYTHONPATH:-}
exec torchrun --nproc-per-node "${GPUS:-8}" -m megatron_macs.launch "$SCRIPT" \
  "${MODEL[@]}" "${ENGINE[@]}" "${LAYOUT[@]}" "${MACS[@]}" "$@"
