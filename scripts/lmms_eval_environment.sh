#!/bin/sh
# An environment with lmms-eval, layered over the one whose Python is given: torch and transformers are shared.
#   scripts/lmms_eval_environment.sh FOLDER [PYTHON]
# lmms-eval is installed without its requirements: it asks for torchvision, whose wheel needs CUDA, and for many
# packages that only some of its models use. What its command line and text metrics import is listed here.
set -eu
folder=${1:?folder of the new environment}
python=${2:-.venv/bin/python}

"$python" -m venv "$folder"
site=$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$python" -c 'import site, sys; print("\n".join(site.getsitepackages())); print(sys.argv[1])' "$PWD" > "$site/base.pth"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps lmms-eval \
    datasets evaluate jsonlines pytablewriter sacrebleu loguru pandas pyarrow dill multiprocess xxhash aiohttp \
    tenacity python-dotenv DataProperty mbstrdecoder pathvalidate tabledata tcolorpy typepy tqdm-multiprocess \
    aiosignal frozenlist multidict yarl propcache aiohappyeyeballs portalocker colorama tabulate lxml pytz numexpr \
    openai attrs chardet requests charset-normalizer urllib3 idna certifi python-dateutil six regex sympy mpmath pyyaml
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable .
