#!/usr/bin/env bash
# One command on a machine with a GPU: every test of a kernel there, compute-sanitizer, then times beside the static bounds
# and beside what else computes the same. Stops at the first thing that is wrong: no times of wrong results.
#
#   benchmarks/gpu.sh [PYTHON]             default: .venv/bin/python; writes runs/gpu/
#   QUICK=1 benchmarks/gpu.sh              fewer rounds
#   SANITIZE=0 benchmarks/gpu.sh           without compute-sanitizer (tens of minutes)
set -euo pipefail
cd "$(dirname "$0")/.."
case ${1:-} in
  -h | --help) sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 0 ;;
esac
python=${1:-.venv/bin/python}
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
  || { echo "gpu: needs an NVIDIA GPU and a torch with CUDA; torch sees none" >&2; exit 2; }
"$python" -c 'import sys, synergen_ext; sys.exit(not synergen_ext.build_info()["cuda"])' \
  || { echo "gpu: this build has no CUDA kernels; rebuild with nvcc on PATH and SYNERGEN_CUDA=on" >&2; exit 2; }

out=runs/gpu
mkdir -p "$out"
{ nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv || true
  "$python" -m synergen_ext doctor; } | tee "$out/machine.txt"

"$python" -m pytest -q -p no:benchmark -m cuda python_tests | tee "$out/tests.txt"
if [ "${SANITIZE:-1}" != 0 ]; then tools/cuda_sanitize.sh "$python" | tee "$out/sanitize.txt"; fi
"$python" -m synergen_ext bench --suite cuda ${QUICK:+--quick} --json "$out/times.json" | tee "$out/times.txt"
"$python" -m synergen_ext bench --suite cuda-bound --json "$out/bounds.json" | tee "$out/bounds.txt"
