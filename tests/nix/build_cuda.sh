#!/usr/bin/env bash
# Builds the whole CUDA environment, as `nix run .#serve` does, and imports vllm from it. Not in CI: it takes minutes and
# 16 GB of disk, wheels included. PYTHON names a Python 3.11 with pip and setuptools.
set -euo pipefail
cd "$(dirname "$0")/../.."

"${PYTHON:-.venv/serve-cpu/bin/python}" tests/nix/rehearse.py --wheels serve-cuda \
    build .#serve.environment --out-link .venv/nix-serve-cuda
.venv/nix-serve-cuda/bin/python - <<'EOF'
import sys
from importlib import metadata

import torch
import vllm
import yaptext.server.app

wheels = sum(1 for _ in metadata.distributions())
print(f"vllm {vllm.__version__}, torch {torch.__version__}, {wheels} distributions in {sys.prefix}")
EOF
