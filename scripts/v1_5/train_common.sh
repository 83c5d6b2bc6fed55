# shellcheck shell=bash
# What the training scripts share: their settings, and train. One process a GPU; without a GPU, the CPU.
# Started again with the same OUTPUT, a script goes on from its last checkpoint.
# Settings are taken from the environment; flags behind a script's name go to llava.train.train, after the script's own.

# MODEL         a language model (with VISION_TOWER) or a whole LLaVA checkpoint: folder or hub id
# VISION_TOWER  the CLIP tower of a language model: folder or hub id
# DATA, IMAGES  LLaVA's JSON and the folder of its pictures
# PROJECTOR     mm_projector.bin of the first stage, for the second; empty: what pretrain.sh wrote
# OUTPUT        folder for checkpoints and the result
# PER_DEVICE    samples that one device takes at once; steps are accumulated up to the script's batch

# shellcheck source=scripts/v1_5/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

python=$(find_python)
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
VISION_TOWER=${VISION_TOWER:-}
small=() # flags of a run on the small data that ships
parts=() # the flags that name tower and projector; a whole LLaVA checkpoint brings its own

# settings LLAVA_DATA LLAVA_IMAGES SMALL_DATA NAME [FLAG...]: fills MODEL, DATA, IMAGES and OUTPUT where they are not
# set: with LLaVA-1.5-7B's; where its data is not there either, with what ships, trained with FLAG... instead.
settings() {
  local llava_data=$ROOT/playground/data/$1 llava_images=$ROOT/playground/data/$2
  local small_data=$ROOT/playground/data/train/$3 name=$4
  shift 4
  if [[ -z $MODEL$DATA && ! -e $llava_data ]]; then
    echo "Small run: $small_data, on the shipped model's parts; LLaVA's data is not in $llava_data"
    local base=$ROOT/checkpoints/small
    if [[ ! -e $base/vision_tower/model.safetensors ]]; then
      "$python" "$ROOT/scripts/take_apart.py" "$ROOT/llava/assets/tiny_llava" "$base"
    fi
    MODEL=$base/language_model VISION_TOWER=$base/vision_tower DATA=$small_data IMAGES=$ROOT/playground/data/train/images
    name=small-${name#llava-v1.5-}
    PROJECTOR=${PROJECTOR:-$ROOT/checkpoints/small-pretrain/mm_projector.bin}
    small=(--mm_vision_select_layer -1 --eval_fraction 0.1 --logging_steps 10 --gradient_checkpointing False
      --dataloader_num_workers 0 "$@")
  elif [[ -z $MODEL ]]; then
    MODEL=lmsys/vicuna-7b-v1.5
    VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
  fi
  DATA=${DATA:-$llava_data}
  IMAGES=${IMAGES:-$llava_images}
  OUTPUT=${OUTPUT:-$ROOT/checkpoints/$name}
  [[ -n $VISION_TOWER ]] && parts+=(--vision_tower "$VISION_TOWER")
  if [[ $name != *pretrain ]]; then
    [[ -n $VISION_TOWER ]] && PROJECTOR=${PROJECTOR:-$ROOT/checkpoints/llava-v1.5-pretrain/mm_projector.bin}
    [[ -n ${PROJECTOR:-} ]] && parts+=(--pretrain_mm_mlp_adapter "$PROJECTOR")
  fi
  return 0
}

# train BATCH AT_ONCE ZERO [FLAG...]: BATCH samples a step over all devices, each taking AT_ONCE of them; ZERO is the
# DeepSpeed config, used where several GPUs and DeepSpeed are there.
train() {
  local batch=$1 per_device=${PER_DEVICE:-$2} zero=$3 devices
  shift 3
  devices=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  local processes=${PROCESSES:-$((devices > 1 ? devices : 1))}
  if ((${#small[@]})); then batch=8; fi
  if ((per_device * processes > batch)); then per_device=$((batch / processes)); fi
  local launcher=(-m) own=()
  if ((devices > 0)); then own=(--bf16 True --tf32 True); fi
  if ((processes > 1)); then
    launcher=(-m torch.distributed.run --standalone "--nproc-per-node=$processes" -m)
    if "$python" -c 'import deepspeed' 2>/dev/null; then own+=(--deepspeed "$ROOT/scripts/$zero"); fi
  fi
  "$python" "${launcher[@]}" llava.train.train \
    --model_name_or_path "$MODEL" \
    --data_path "$DATA" \
    --image_folder "$IMAGES" \
    --output_dir "$OUTPUT" \
    ${parts[@]+"${parts[@]}"} \
    --per_device_train_batch_size "$per_device" \
    --per_device_eval_batch_size 4 \
    --gradient_accumulation_steps "$((batch / (per_device * processes)))" \
    --num_train_epochs 1 \
    --save_strategy steps \
    --save_total_limit 1 \
    --weight_decay 0. \
    --warmup_ratio 0.03 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --model_max_length 2048 \
    --gradient_checkpointing True \
    --dataloader_num_workers 4 \
    ${own[@]+"${own[@]}"} \
    "$@"
}
