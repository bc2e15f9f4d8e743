#!/bin/sh
# An environment of our own: a virtual environment with the torch build that was asked for and the wheel beside this file.
#   install.sh PYTHON FOLDER, with TORCH_BUILD (cpu, cu126, cu130) and TORCH_INDEX_URL in the environment
set -eu
python=$1
folder=$2
here=$(cd "$(dirname "$0")" && pwd)

case "${TORCH_BUILD:-}" in
  cpu | cu126 | cu130) ;;
  *)
    echo "install.sh: TORCH_BUILD must be cpu, cu126 or cu130, got '${TORCH_BUILD:-}'" >&2
    exit 1
    ;;
esac
torch=$(sed -n 's/^torch==//p' "$here/constraints.txt")

"$python" -m venv "$folder"
# from torch's own index and nothing else from there: the local version names the build
if ! "$folder/bin/python" -m pip install --no-cache-dir --no-deps \
  ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "torch==$torch+$TORCH_BUILD"; then
  echo "install.sh: no torch $torch+$TORCH_BUILD there: give TORCH_INDEX_URL, the index of torch's $TORCH_BUILD builds" >&2
  exit 1
fi
"$folder/bin/python" -m pip install --no-cache-dir --constraint "$here/constraints.txt" "$here"/voxelsigma-*.whl
"$folder/bin/python" -m pip check
"$folder/bin/python" -c "
import torch
found = torch.version.cuda
wanted = {'cpu': None, 'cu126': '12.6', 'cu130': '13.0'}['$TORCH_BUILD']
assert found == wanted, f'torch is built for CUDA {found}, asked for $TORCH_BUILD'
"
