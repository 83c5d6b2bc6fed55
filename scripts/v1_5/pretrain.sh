#!/bin/bash
# First stage: the projector alone, on pictures and their captions. Writes mm_projector.bin into OUTPUT.
set -euo pipefail
# shellcheck source=scripts/v1_5/train_common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/train_common.sh"

settings LLaVA-Pretrain/blip_laion_cc_sbu_558k.json LLaVA-Pretrain/images captions.json llava-v1.5-pretrain \
  --learning_rate 3e-3 --max_steps 40
train 256 32 zero2.json \
  --version plain \
  --tune_mm_mlp_adapter True \
  --image_aspect_ratio square \
  --learning_rate 1e-3 \
  --save_steps 24000 \
  --mm_projector_type mlp2x_gelu \
  --mm_vision_select_layer -2 \
  --mm_use_im_start_end False \
  --mm_use_im_patch_token False \
  ${small[@]+"${small[@]}"} \
  "$@"
