#!/usr/bin/env bash
# The first thing to run on a machine with a GPU: is the GPU path right here? Meant to take three minutes.
#   benchmarks/gpu_smoke.sh
set -euo pipefail
cd "$(dirname "$0")/.."
python=python
[[ ! -x .venv/bin/python ]] || python=.venv/bin/python
exec "$python" -m benchmarks.gpu_smoke
