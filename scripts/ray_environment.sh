#!/bin/sh
# An environment with Ray, layered over the one whose Python is given: torch and transformers are shared.
#   scripts/ray_environment.sh FOLDER [PYTHON]
# Ray and what it asks for are half a gigabyte, which the other tests do without.
set -eu
folder=${1:?folder of the new environment}
python=${2:-.venv/bin/python}

"$python" -m venv "$folder"
site=$("$folder/bin/python" -c 'import site; print(site.getsitepackages()[0])')
"$python" -c 'import site; print("\n".join(site.getsitepackages()))' > "$site/base.pth"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[ray]'
