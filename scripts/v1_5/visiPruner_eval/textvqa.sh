#!/usr/bin/env bash
# TextVQA with visual tokens pruned: its score, the dense score beside it, and what pruning saved.
#   CUDA_VISIBLE_DEVICES=0,1,2,3 bash scripts/v1_5/visiPruner_eval/textvqa.sh
# One process a GPU; without a GPU, the CPU. Started again it goes on where it stopped.
set -euo pipefail

MODEL=${MODEL:-}                   # folder or hub id; empty: the shipped model on mini data, else LLaVA-1.5-7B
DATA=${DATA:-}                     # folder that eval.zip was unpacked into; empty: playground/data/eval, else mini
PRUNING_CONFIG=${PRUNING_CONFIG:-} # JSON or @file; empty: the model's own, else the published one
BATCH_SIZE=${BATCH_SIZE:-8}        # questions asked at once by each process
RESULTS=${RESULTS:-}               # folder for answers and scores; empty: playground/results
DENSE=${DENSE:-auto}               # run dense too: yes, no, auto (on mini data only)
LIMIT=${LIMIT:-}                   # only the first so many questions
PROCESSES=${PROCESSES:-}           # empty: as many as there are GPUs in CUDA_VISIBLE_DEVICES, else one

# shellcheck source=scripts/v1_5/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
run_benchmark textvqa pruned "$@"
