#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: checks the kernels compiled, times them beside their peers, and,
# with `tune`, finds the fastest tiles first. Needs Python with torch and triton (2.11 and 3.6 or
# newer), pytest and hypothesis; vLLM is one of the peers where it is installed.
#   benchmarks/gpu.sh [OUT] [tune]      some minutes; OUT.json, OUT.png, OUT.log (default build/gpu)
set -euo pipefail
out=$(realpath -m "${1:-build/gpu}")
cd "$(dirname "$0")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$(dirname "$out")"
python=${PYTHON:-python3}
check() {  # check WHICH: most of the time goes to compiling, so several run side by side
  "$python" -m pytest -q -p no:cacheprovider -o addopts=--import-mode=importlib -k "$1" \
    tests/kernels/test_triton.py tests/kernels/test_routing.py tests/kernels/test_reference.py
}
{
  nvidia-smi || true
  running=()
  for part in plain swapped persistent 'not (plain or swapped or persistent)'; do
    check "$part" &
    running+=($!)
  done
  for part in "${running[@]}"; do wait "$part"; done
  if [ "${2:-}" = tune ]; then
    running=()
    for tokens in 8 32 64 128 256 8192; do
      "$python" -m benchmarks.tune --compile --tokens "$tokens" >/dev/null &
      running+=($!)
    done
    for part in "${running[@]}"; do wait "$part"; done
    "$python" -m benchmarks.tune
  fi
  "$python" -m benchmarks.kernels --out "$out"
} 2>&1 | tee "$out.log"
