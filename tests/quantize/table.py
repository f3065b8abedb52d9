"""Every architecture that can be quantized, on tiny models with outlier channels: how near AWQ and plain rounding are
to the float model, and whether vLLM serves the result with the same answers. A Markdown table, 15 minutes on 2 cores.

    .venv/serve-cpu/bin/python tests/quantize/table.py [ARCHITECTURE ...]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from quantize.tiny import blocks, make_model, quantized

from yaptext.quantize import mapping, verify
from yaptext.quantize.source import load

_SERVE = """
import json, sys
from vllm import LLM, SamplingParams

folder, ids = sys.argv[1], json.loads(sys.argv[2])
engine = LLM(folder, max_model_len=512, enforce_eager=True, max_num_seqs=2, disable_log_stats=True)
asked = SamplingParams(max_tokens=1, prompt_logprobs=0)
told = engine.generate({"prompt_token_ids": ids}, asked, use_tqdm=False)[0].prompt_logprobs
print("TOLD", json.dumps([next(iter(token.values())).logprob for token in told[1:]]))
"""


def served(source: Path, result: Path) -> str:
    """yes, or what is wrong: vLLM's log probabilities of a text beside those of the decoder of verify.py."""
    import torch

    ids = blocks(1, seed=12)[0]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [sys.executable, "-c", _SERVE, str(result), json.dumps(ids)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=600)
    told = next((line[5:] for line in run.stdout.splitlines() if line.startswith("TOLD ")), None)
    if told is None:
        lines = [line for line in run.stderr.splitlines() if "Error: " in line] or ["it ended without an answer"]
        return "no: " + lines[0].rpartition("Error: ")[2].strip()[:160]
    model = load(source, on_cuda=False)
    verify.fill(model, result)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    expected = logprobs[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    apart = (torch.tensor(json.loads(told)) - expected).abs().mean().item()
    return f"{'yes' if apart < 0.1 else 'no'}, {apart:.3f} nats apart"


def main() -> None:
    print("| architecture | KL of AWQ | KL of rounding | served by vLLM |\n|---|---|---|---|", flush=True)
    for name in sys.argv[1:] or sorted(mapping.MAPPINGS):
        with tempfile.TemporaryDirectory() as scratch:
            source, result = Path(scratch, "float"), Path(scratch, "awq")
            report = quantized(make_model(source, name, outliers=True), result)
            answer = served(source, result)
            print(f"| {name} | {report.awq.kl:.4f} | {report.rounding.kl:.4f} | {answer} |", flush=True)


if __name__ == "__main__":
    main()
