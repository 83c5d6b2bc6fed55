#!/usr/bin/env bash
# POPE with the model as it is, dense.
#   CUDA_VISIBLE_DEVICES=0,1,2,3 bash scripts/v1_5/eval/pope.sh
# Settings: the variables at the head of scripts/v1_5/common.sh.
set -euo pipefail

# shellcheck source=scripts/v1_5/common.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/../common.sh"
run_benchmark pope dense "$@"
