#!/usr/bin/env bash
# Fetch the sets of drawings that the pictures are made of (npm, about 11 MB); licenses: docs/smollm2.md.
#   bash scripts/smollm2/drawings.sh runs/smollm2/drawings
set -euo pipefail
mkdir -p "$1"
cd "$1"
for set in openmoji@1.2.29 noto@1.2.9 noto-v1@1.2.5 twemoji@1.2.5 emojione@1.2.3 fluent-emoji-flat@1.2.6; do
  [[ -f iconify-json-${set/@/-}.tgz ]] || npm pack --silent "@iconify-json/$set"
done
