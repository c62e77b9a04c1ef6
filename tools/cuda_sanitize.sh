#!/usr/bin/env bash
# Every CUDA kernel on a GPU under compute-sanitizer's four tools. Each tool must first report a mistake planted for it
# (tools/cuda_control.cu). Needs a GPU, nvcc and compute-sanitizer.
#
#   tools/cuda_sanitize.sh [PYTHON]        default: .venv/bin/python
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

for tool in nvcc compute-sanitizer; do
  command -v "$tool" >/dev/null || { echo "cuda_sanitize: needs $tool on PATH (it comes with the CUDA toolkit)" >&2; exit 2; }
done
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
  || { echo "cuda_sanitize: needs an NVIDIA GPU and a torch with CUDA; torch sees none" >&2; exit 2; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
nvcc -std=c++17 -arch=native -lineinfo -o "$scratch/control" tools/cuda_control.cu

for tool in memcheck racecheck synccheck initcheck; do
  if compute-sanitizer --tool "$tool" --error-exitcode 1 "$scratch/control" "$tool" >"$scratch/log" 2>&1; then
    echo "cuda_sanitize: $tool says nothing of the mistake planted for it" >&2
    cat "$scratch/log" >&2
    exit 1
  fi
  # initcheck: torch's allocator hands out memory again, so every call gets its own.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 \
    "$python" tools/cuda_calls.py | tail -n 3
  echo "$tool: clean"
done
