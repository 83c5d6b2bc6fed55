#!/bin/bash
# Second stage: the whole language model with the projector, on instructions. Writes a whole checkpoint into OUTPUT.
set -euo pipefail
# shellcheck source=scripts/v1_5/train_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/train_common.sh"

settings llava_v1_5_mix665k.json "" questions.json llava-v1.5-7b \
  --learning_rate 1e-3 --max_steps 40
train 128 16 zero3.json \
  --version v1 \
  --image_aspect_ratio pad \
  --group_by_modality_length True \
  --save_steps 50000 \
  --learning_rate 2e-5 \
  --mm_projector_type mlp2x_gelu \
  --mm_vision_select_layer -2 \
  --mm_use_im_start_end False \
  --mm_use_im_patch_token False \
  ${small[@]+"${small[@]}"} \
  "$@"
