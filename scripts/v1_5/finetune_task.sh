#!/bin/bash
# A whole LLaVA, tuned further on data of your own. Writes a whole checkpoint into OUTPUT.
set -euo pipefail
# shellcheck source=scripts/v1_5/train_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/train_common.sh"

[[ -n $MODEL ]] || MODEL=liuhaotian/llava-v1.5-13b
: "${DATA:?name your data, a JSON file of samples}"
settings "" "" "" llava-v1.5-13b-task
train 128 16 zero3.json \
  --version v1 \
  --image_aspect_ratio pad \
  --group_by_modality_length True \
  --save_steps 50000 \
  --learning_rate 2e-5 \
  ${small[@]+"${small[@]}"} \
  "$@"
