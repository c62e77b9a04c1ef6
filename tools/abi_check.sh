#!/usr/bin/env bash
# Builds a wheel with the oldest supported torch (the one in the environment that calls this), installs it beside a later
# torch in a throw-away environment, and runs the op tests there: one binary must serve both.
#   tools/abi_check.sh [later torch, default 2.14.1]
# Needs about 7 GB below TMPDIR while it runs and 5 to 15 minutes.
set -euo pipefail

later=${1:-2.14.1}
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

built=$("$python" -c 'import importlib.metadata as m; print(m.version("torch"))')
echo "abi-check: building a wheel with torch $built"
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" "$root"

echo "abi-check: installing it beside torch $later"
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --no-compile "torch==$later" numpy pytest setuptools
# With the package's other requirements: the tests of `unfold_head` compare it with the model's head.
"$work/venv/bin/pip" install --quiet "$work"/synergen_ext-*.whl

# Away from the source tree, so that the installed package is the one that is imported.
cp -r "$root/python_tests" "$work/tests"
cd "$work"
venv/bin/python - <<EOF
import torch, synergen_ext
info = synergen_ext.build_info()
print("abi-check: built with torch", info["torch_built"], "runs with torch", torch.__version__, "from", synergen_ext.__file__)
assert torch.__version__.split("+")[0] == "$later" and "site-packages" in synergen_ext.__file__
EOF
tests=()
for source in "$root"/csrc/ops/*.cpp; do
  tests+=("tests/test_$(basename "$source" .cpp).py")
done
OMP_NUM_THREADS=1 venv/bin/python -P -m pytest -q -p no:cacheprovider "${tests[@]}" tests/test_kernels_dlpack.py
echo "abi-check: passed: built with torch $built, ops tested with torch $later"
