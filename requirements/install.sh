#!/usr/bin/env bash
# Fill the virtual environment in $1 with this project and what it needs; asks nothing, safe to repeat.
# The torch build follows the machine: CUDA where a GPU answers, otherwise a CPU build and never a CUDA one.
set -euo pipefail
venv=$1
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "install: Python 3.11 or newer is needed, $("$python" --version) was found; set PYTHON=/path/to/python3.11" >&2
    exit 2
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

install_cpu_torch() {
    # a CPU wheel this machine already offers (PIP_FIND_LINKS), then PyTorch's own CPU index
    pip install --no-index --no-deps -r "$here/torch-cpu.txt" 2>/dev/null ||
        pip install --no-deps --index-url https://download.pytorch.org/whl/cpu --retries 1 -r "$here/torch-cpu.txt" || {
        echo "install: no CPU build of $(cat "$here/torch-cpu.txt") was found; put its wheel in a folder and set PIP_FIND_LINKS" >&2
        exit 2
    }
    pip install filelock fsspec jinja2 networkx sympy typing-extensions setuptools
}

if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    torch="$here/torch-cuda.txt"
    pip install -r "$torch"
else
    torch="$here/torch-cpu.txt"
    if [ "$(uname -s)" = Linux ]; then
        install_cpu_torch
    else
        pip install -r "$torch"
    fi
fi
# the torch file is named again so that no dependency can replace the build chosen above
pip install -r "$torch" -r "$here/runtime.txt" -r "$here/dev.txt"
pip install --no-deps -r "$here/demo.txt"
if [ "$(uname -s)" = Linux ] && [ "$torch" = "$here/torch-cpu.txt" ]; then
    # the kernels' tests interpret and compile them without a GPU, with the oldest Triton and with the newest
    pip install --no-deps -r "$here/triton.txt"
    [ -d "$venv/triton-newest" ] || pip install --no-deps --target "$venv/triton-newest" -r "$here/triton-newest.txt"
    # and models of transformers with the oldest version of it that setup.py allows
    oldest=transformers-oldest
    [ -d "$venv/$oldest" ] || pip install --no-deps --target "$venv/$oldest" -r "$here/$oldest.txt"
fi
pip install --no-deps --editable "$here/.."
