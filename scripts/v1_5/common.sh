# shellcheck shell=bash
# What the scripts in eval/ (dense) and visiPruner_eval/ (pruned) share: their settings, and run_benchmark.
# One process a GPU; without a GPU, the CPU. Started again, a script goes on where it stopped.

ROOT=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

# Settings, each taken from the environment where it is set there.
MODEL=${MODEL:-}                              # folder or hub id; empty: the shipped model on mini data, else LLaVA-1.5-7B
DATA=${DATA:-}                                # folder that eval.zip was unpacked into; empty: playground/data/eval, else mini
BATCH_SIZE=${BATCH_SIZE:-8}                   # questions asked at once by each process
RESULTS=${RESULTS:-$ROOT/playground/results}  # folder for answers and scores
LIMIT=${LIMIT:-}                              # only the first so many questions
PROCESSES=${PROCESSES:-}                      # empty: as many as there are GPUs in CUDA_VISIBLE_DEVICES, else one
# Of the pruned runs:
PRUNING_CONFIG=${PRUNING_CONFIG:-} # JSON or @file; empty: the model's own, else the published one
DENSE=${DENSE:-auto}               # run dense too: yes, no, auto (on mini data only)

# The project's own environment (`make demo` makes it), unless another is active or PYTHON is set.
find_python() {
  if [[ -n ${PYTHON:-} ]]; then
    printf '%s\n' "$PYTHON"
  elif [[ -z ${VIRTUAL_ENV:-}${CONDA_PREFIX:-} && -x $ROOT/.venv/bin/python ]]; then
    printf '%s\n' "$ROOT/.venv/bin/python"
  else
    command -v python3 || command -v python || {
      echo "error: no python found; run 'make demo' in $ROOT first, or set PYTHON" >&2
      return 2
    }
  fi
}

on_signal() {
  echo "Interrupted. What was answered is on disk; to go on, start this script again." >&2
  exit 130
}

# answer NAME_OF_FOLDER [FLAG...]: answers.jsonl (and what goes with it) in that folder.
answer() {
  local folder=$1
  shift
  local launcher=(-m)
  if ((processes > 1)); then
    launcher=(-m torch.distributed.run --standalone "--nproc-per-node=$processes" -m)
  fi
  "$python" "${launcher[@]}" llava.eval.model_vqa_loader \
    --model-path "$model" \
    --question-file "$questions" \
    --image-folder "$images" \
    --answers-file "$folder/answers.jsonl" \
    --batch-size "$BATCH_SIZE" \
    "$@" &
  # In the background and waited for, so that a signal reaches this shell while it runs.
  local child=$! status=0
  trap 'kill -TERM "$child" 2>/dev/null; wait "$child" || true; on_signal' INT TERM
  wait "$child" || status=$?
  trap - INT TERM
  if ((status == 130)); then on_signal; fi
  return "$status"
}

# run_benchmark NAME dense|pruned [FLAG...]: flags go to llava.eval.model_vqa_loader.
run_benchmark() {
  local benchmark=$1 way=$2
  shift 2
  local python plan line fields=()
  python=$(find_python)
  export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
  local data=() config=()
  [[ -n $DATA ]] && data=(--data "$DATA")
  [[ -n $PRUNING_CONFIG ]] && config=(--pruning-config "$PRUNING_CONFIG")
  plan=$("$python" -m llava.eval.benchmarks plan "$benchmark" --model "$MODEL" \
    ${data[@]+"${data[@]}"} ${config[@]+"${config[@]}"})
  # Not mapfile: the bash of macOS has none.
  while IFS= read -r line; do fields+=("$line"); done <<<"$plan"
  local root=${fields[0]} kind=${fields[1]} model=${fields[2]} questions=${fields[3]} images=${fields[4]}
  local pruning=${fields[5]}
  local dense_folder=$RESULTS/${fields[6]} pruned_folder=$RESULTS/${fields[7]} processes=${fields[8]}
  processes=${PROCESSES:-$processes}

  echo "Benchmark  $benchmark, $kind data in $root"
  echo "Model      $model"
  local partial=()
  [[ -n $LIMIT ]] && set -- --limit "$LIMIT" "$@" && partial=(--allow-partial)

  if [[ $way == dense ]]; then
    echo "Dense      $dense_folder"
    answer "$dense_folder" "$@"
    "$python" -m llava.eval.benchmarks score "$benchmark" --data "$root" --model "$model" \
      --answers "$dense_folder/answers.jsonl" ${partial[@]+"${partial[@]}"}
    return
  fi
  echo "Pruned     $pruned_folder"
  echo "Config     $pruning"
  answer "$pruned_folder" --pruning-config "$pruning" --trace-file "$pruned_folder/traces.jsonl" "$@"
  # The dense run beside it takes moments on the small benchmarks and hours on the real ones.
  if [[ $DENSE == yes || ($DENSE == auto && $kind == mini) ]]; then
    answer "$dense_folder" "$@"
  fi
  "$python" -m llava.eval.benchmarks score "$benchmark" --data "$root" --model "$model" \
    --answers "$pruned_folder/answers.jsonl" --trace-file "$pruned_folder/traces.jsonl" \
    --dense-answers "$dense_folder/answers.jsonl" ${partial[@]+"${partial[@]}"}
}
