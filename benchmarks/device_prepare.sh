#!/usr/bin/env bash
# Makes .device/, which git ignores: what `python -m benchmarks.device` needs on a GPU's machine that has no network and
# only JAX and its like installed. Copy it there with the checkout. Run where uv and this package's environment are:
#
#     bash benchmarks/device_prepare.sh [3.12]        # that machine's Python, on x86-64 Linux
set -euo pipefail
cd "$(dirname "$0")/.."
uv pip install --quiet --target .device/site --python-version "${1:-3.12}" --python-platform x86_64-manylinux_2_28 \
  --only-binary :all: --no-deps pillow safetensors
uv run python -m benchmarks.device.recorded
du -sh .device
