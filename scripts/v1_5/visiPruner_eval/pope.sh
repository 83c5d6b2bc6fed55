#!/usr/bin/env bash
# POPE with visual tokens pruned: its score, the dense score beside it, and what pruning saved.
#   CUDA_VISIBLE_DEVICES=0,1,2,3 bash scripts/v1_5/visiPruner_eval/pope.sh
# Settings: the variables at the head of scripts/v1_5/common.sh.
set -euo pipefail

# shellcheck source=scripts/v1_5/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
run_benchmark pope pruned "$@"
