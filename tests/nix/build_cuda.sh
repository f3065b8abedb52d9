#!/usr/bin/env bash
# Builds the whole CUDA environment, as `nix run .#serve` does, with the tests of that package: vllm is imported from it, and
# a kernel is compiled by the wheels' own programs where there is no /lib64. Not in CI: it takes minutes and 16 GB of disk,
# wheels included. PYTHON names a Python with pip and setuptools.
set -euo pipefail
cd "$(dirname "$0")/../.."

rehearse() { "${PYTHON:-.venv/serve-cpu/bin/python}" tests/nix/rehearse.py --wheels serve-cuda build --print-build-logs "$@"; }
rehearse .#serve --out-link .venv/nix-serve
rehearse .#serve.tests.{imports,programs} --no-link
rehearse .#serve.environment --out-link .venv/nix-serve-cuda
# Each layer: its size, its path, its wheels.
.venv/nix-serve-cuda/bin/python - <<'EOF'
import subprocess
import sys
from importlib import metadata
from pathlib import Path

for site in sys.path:
    if site.endswith("site-packages"):
        size = subprocess.run(["du", "-sh", Path(site).parents[2]], capture_output=True, text=True, check=True).stdout
        print(*size.split(), sum(1 for _ in metadata.distributions(path=[site])), "distributions")
EOF
