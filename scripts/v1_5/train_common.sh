# shellcheck shell=bash
# What the training scripts share: their settings, and train. One process a GPU; without a GPU, the CPU.
# Started again with the same OUTPUT, a script goes on from its last checkpoint.
# Settings are taken from the environment; flags behind a script's name go to llava.train.train, after the script's own.

# MODEL         a language model (with VISION_TOWER) or a whole LLaVA checkpoint: folder or hub id
# VISION_TOWER  the CLIP tower of a language model: folder or hub id
# DATA, IMAGES  LLaVA's JSON and the folder of its pictures
# PROJECTOR     mm_projector.bin of the first stage, for a language model in the second; empty: where pretrain.sh puts it
# OUTPUT        folder for checkpoints and the result
# PER_DEVICE    samples that one device takes at once; steps are accumulated up to the script's batch

# shellcheck source=scripts/v1_5/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/common.sh"

# What is trained where nothing is said: LLaVA-1.5-7B's parts.
VISION_TOWER=${VISION_TOWER:-}
if [[ -z $MODEL ]]; then
  LANGUAGE_MODEL=lmsys/vicuna-7b-v1.5
  VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
else
  LANGUAGE_MODEL=$MODEL
fi
# A whole LLaVA checkpoint brings its own.
tower=()
projector=()
if [[ -n $VISION_TOWER ]]; then
  tower=(--vision_tower "$VISION_TOWER")
  projector=(--pretrain_mm_mlp_adapter "${PROJECTOR:-$ROOT/checkpoints/llava-v1.5-pretrain/mm_projector.bin}")
elif [[ -n ${PROJECTOR:-} ]]; then
  projector=(--pretrain_mm_mlp_adapter "$PROJECTOR")
fi

# train BATCH ZERO [FLAG...]: BATCH samples a step over all devices; ZERO is the DeepSpeed config, used where several
# GPUs and DeepSpeed are there.
train() {
  local batch=$1 zero=$2 python devices
  shift 2
  python=$(find_python)
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  devices=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  local processes=${PROCESSES:-$((devices > 1 ? devices : 1))}
  local per_device=${PER_DEVICE:-16}
  ((per_device * processes > batch)) && per_device=$((batch / processes))
  local precision=()
  ((devices > 0)) && precision=(--bf16 True --tf32 True)
  local launcher=(-m)
  if ((processes > 1)); then
    launcher=(-m torch.distributed.run --standalone "--nproc-per-node=$processes" -m)
    if "$python" -c 'import deepspeed' 2>/dev/null; then precision+=(--deepspeed "$ROOT/scripts/$zero"); fi
  fi
  "$python" "${launcher[@]}" llava.train.train \
    --per_device_train_batch_size "$per_device" \
    --gradient_accumulation_steps "$((batch / (per_device * processes)))" \
    --per_device_eval_batch_size 4 \
    ${precision[@]+"${precision[@]}"} \
    "$@"
}
