"""Every architecture that can be quantized, on tiny models with outlier channels: by which library, how far scaling
alone moves the answers, how near AWQ and plain rounding are to the float model, and whether vLLM serves the result on
this machine with the answers of our own decoder. A Markdown table, 30 minutes on 2 cores.

    .venv/serve-cpu/bin/python tests/quantize/table.py [--no-vllm] [ARCHITECTURE ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantize.tiny import blocks, compressed, make_model, quantized, scaled_alone

from yaptext.quantize import mapping, recipes, verify
from yaptext.quantize.source import load

_SERVE = """
import json, sys
from vllm import LLM, SamplingParams

folder, ids = sys.argv[1], json.loads(sys.argv[2])
asked_of = {"max_model_len": 512, "enforce_eager": True, "max_num_seqs": 2, "disable_log_stats": True}
if "vision_config" in json.load(open(folder + "/config.json")):
    asked_of["language_model_only"] = True  # there is no processor of images in the folder
engine = LLM(folder, **asked_of)
asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
told = engine.generate({"prompt_token_ids": ids}, asked, use_tqdm=False)[0].prompt_logprobs
print("TOLD", json.dumps([next(iter(token.values())).logprob for token in told[1:]]))
"""
_APART = 0.1
"""Nats that kernels of 16 bits may differ, besides what 16 bits make of the same weights in transformers."""


def served(source: Path, result: Path) -> str:
    """yes, or what is wrong: vLLM's log probabilities of a text beside those of the decoder of verify.py."""
    import torch

    ids = blocks(1, seed=12)[0]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", _SERVE, str(result), json.dumps(ids)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    told = next((line[5:] for line in run.stdout.splitlines() if line.startswith("TOLD ")), None)
    if told is None:
        lines = [line for line in (run.stdout + run.stderr).splitlines() if "Error: " in line]
        known = [line for line in lines if "ModuleNotFoundError" in line or "NotImplementedError" in line]
        reason = (known + lines or ["it ended without an answer"])[0].rpartition("Error: ")[2].strip()
        return f"no: {reason.rstrip('.')[:100]}"
    model = load(source, on_cuda=False, stored=verify.decoded(result))

    def logprobs(model: Any) -> Any:
        with torch.inference_mode():
            found = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
        return found[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]

    exact = logprobs(model)
    noise = (logprobs(model.bfloat16()) - exact).abs().mean().item()
    apart = (torch.tensor(json.loads(told)) - exact).abs().mean().item()
    return f"{'yes' if apart < _APART + noise else 'no'}, {apart:.3f} nats apart"


def main() -> None:
    every = sorted(set(mapping.MAPPINGS) | set(recipes.RECIPES))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="*", help="default: all")
    parser.add_argument("--no-vllm", action="store_true", help="leave the last column out")
    options = parser.parse_args()
    print("| architecture | library | scaling alone | AWQ | rounding | served by vLLM |\n|---|---|---|---|---|---|")
    for name in options.architecture or every:
        with tempfile.TemporaryDirectory() as scratch:
            source, result = make_model(Path(scratch, "float"), name, outliers=True), Path(scratch, "awq")
            if name in mapping.MAPPINGS:
                library, moved, report = "autoawq", scaled_alone(source), quantized(source, result)
            else:
                library, (report, moved) = "llm-compressor", compressed(source, result, name)
            kept = report.worthwhile and abs(moved) < 1e-4
            answer = "" if options.no_vllm else served(source, result)
            row = [name, library, f"{abs(moved):.0e}", f"{report.awq.kl:.4f}", f"{report.rounding.kl:.4f}", answer]
            print("| " + " | ".join(row) + " |" + ("" if kept else " NOT KEPT"), flush=True)


if __name__ == "__main__":
    main()
