#!/bin/bash
# First stage: the projector alone, on pictures and their captions. Writes mm_projector.bin into OUTPUT.
set -euo pipefail
# shellcheck source=scripts/v1_5/train_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/train_common.sh"

PER_DEVICE=${PER_DEVICE:-32}
train 256 zero2.json \
  --model_name_or_path "$LANGUAGE_MODEL" \
  --version plain \
  --data_path "${DATA:-$ROOT/playground/data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}" \
  --image_folder "${IMAGES:-$ROOT/playground/data/LLaVA-Pretrain/images}" \
  ${tower[@]+"${tower[@]}"} \
  --mm_projector_type mlp2x_gelu \
  --tune_mm_mlp_adapter True \
  --image_aspect_ratio square \
  --mm_vision_select_layer -2 \
  --mm_use_im_start_end False \
  --mm_use_im_patch_token False \
  --output_dir "${OUTPUT:-$ROOT/checkpoints/llava-v1.5-pretrain}" \
  --num_train_epochs 1 \
  --save_strategy steps \
  --save_steps 24000 \
  --save_total_limit 1 \
  --learning_rate 1e-3 \
  --weight_decay 0. \
  --warmup_ratio 0.03 \
  --lr_scheduler_type cosine \
  --logging_steps 1 \
  --model_max_length 2048 \
  --gradient_checkpointing True \
  --dataloader_num_workers 4 \
  "$@"
