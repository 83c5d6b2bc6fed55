#!/bin/bash
# A LoRA adapter of a whole LLaVA, on data of your own. OUTPUT loads with MODEL as its base.
set -euo pipefail
# shellcheck source=scripts/v1_5/train_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/train_common.sh"

[[ -n $MODEL ]] || MODEL=liuhaotian/llava-v1.5-13b
: "${DATA:?name your data, a JSON file of samples}"
settings "" "" "" llava-v1.5-13b-task-lora
train 128 16 zero3.json \
  --version v1 \
  --image_aspect_ratio pad \
  --group_by_modality_length True \
  --save_steps 50000 \
  --lora_enable True \
  --lora_r 128 \
  --lora_alpha 256 \
  --mm_projector_lr 2e-5 \
  --learning_rate 2e-4 \
  ${small[@]+"${small[@]}"} \
  "$@"
