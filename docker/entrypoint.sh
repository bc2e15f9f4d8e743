#!/bin/bash
# Gadgetron's environment, then ours first on PATH: the server starts the first `python` that it finds there.
# `docker run IMAGE voxelsigma ...` runs our command line in the same environment.
set -eo pipefail

# shellcheck disable=SC1091
. /opt/conda/etc/profile.d/conda.sh
conda activate gadgetron

program=$(command -v gadgetron)
if [ "$1" = voxelsigma ]; then
  shift
  program=/opt/voxelsigma/bin/voxelsigma
fi
export PATH="/opt/voxelsigma/bin:$PATH"
exec "$program" "$@"
