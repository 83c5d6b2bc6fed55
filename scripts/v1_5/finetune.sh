#!/bin/bash
# Second stage: the whole language model with the projector, on instructions. Writes a whole checkpoint into OUTPUT.
set -euo pipefail
# shellcheck source=scripts/v1_5/train_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/train_common.sh"

train 128 zero3.json \
  --model_name_or_path "$LANGUAGE_MODEL" \
  --version v1 \
  --data_path "${DATA:-$ROOT/playground/data/llava_v1_5_mix665k.json}" \
  --image_folder "${IMAGES:-$ROOT/playground/data}" \
  ${tower[@]+"${tower[@]}"} \
  ${projector[@]+"${projector[@]}"} \
  --mm_projector_type mlp2x_gelu \
  --mm_vision_select_layer -2 \
  --mm_use_im_start_end False \
  --mm_use_im_patch_token False \
  --image_aspect_ratio pad \
  --group_by_modality_length True \
  --output_dir "${OUTPUT:-$ROOT/checkpoints/llava-v1.5-7b}" \
  --num_train_epochs 1 \
  --save_strategy steps \
  --save_steps 50000 \
  --save_total_limit 1 \
  --learning_rate 2e-5 \
  --weight_decay 0. \
  --warmup_ratio 0.03 \
  --lr_scheduler_type cosine \
  --logging_steps 1 \
  --model_max_length 2048 \
  --gradient_checkpointing True \
  --dataloader_num_workers 4 \
  "$@"
