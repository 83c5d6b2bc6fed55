#!/bin/sh
# Run the tests that depend on transformers with the oldest supported version, in front of the installed one.
#   scripts/test_oldest_transformers.sh [PYTHON] [pytest arguments]
set -eu
version=5.17.0
python=${1:-.venv/bin/python}
[ $# -gt 0 ] && shift
folder=${OLDEST_TRANSFORMERS:-.venv/transformers-$version}

if [ ! -d "$folder/transformers" ]; then
    # 5.17 wants huggingface_hub below 2; all its other requirements fit the installed ones.
    "$python" -m pip install --quiet --disable-pip-version-check --no-deps --target "$folder" \
        "transformers==$version" "huggingface_hub<2"
fi
export PYTHONPATH="$folder"
"$python" -c "import transformers; assert transformers.__version__ == '$version', transformers.__version__"
exec "$python" -m pytest tests/test_golden.py tests/test_engine.py tests/test_families.py tests/test_family_wrappers.py \
    tests/test_same_weights.py tests/test_patches.py tests/test_stock_pages.py tests/test_methods.py \
    tests/test_golden_methods.py tests/test_llava_arch.py "$@"
