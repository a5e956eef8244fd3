#!/usr/bin/env bash
# install.sh PYTHON VENV cpu|cuda [runtime]: makes the environment and installs the locks into it.
# `runtime` leaves out the test tools and expertgate itself: an image copies that in by itself.
set -euo pipefail
python=$1 venv=$2 variant=$3 what=${4:-all}
cd "$(dirname "$0")/.."

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "expertgate needs Python 3.11 or newer; $python is $("$python" --version 2>&1)" >&2
  echo "another one: make PYTHON=python3.12 ..." >&2
  exit 1
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check)

# --no-deps: the locks are complete, and resolving would bring in what they leave out (lock.py).
locks=(--no-deps --require-hashes -r "requirements/$variant.txt")
[ "$what" = runtime ] || locks+=(-r requirements/dev.txt)
echo "Installing the $variant build of the engine into $venv ..."
if [ "$variant" = cpu ]; then
  # PyPI has no CPU build of torch: first from wherever pip is set up to look, then from PyTorch's.
  torch=(--no-deps -r requirements/torch-cpu.txt)
  "${pip[@]}" install --quiet "${torch[@]}" 2>/dev/null ||
    "${pip[@]}" install --quiet "${torch[@]}" --index-url https://download.pytorch.org/whl/cpu
fi
"${pip[@]}" install --quiet "${locks[@]}"
[ "$what" = runtime ] ||
  "${pip[@]}" install --quiet --no-deps --no-build-isolation --editable .
