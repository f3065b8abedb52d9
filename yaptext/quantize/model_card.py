"""Files for people beside the weights: README.md with the figures, their plot, the licence of the source."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from yaptext.quantize.verify import Report

PLOT = "layer_errors.png"
_KEPT_FIELDS = ("license", "license_name", "license_link", "language", "pipeline_tag")
_LEGAL = re.compile(r"(licen[cs]e|notice|use_policy)([._-].*)?", re.IGNORECASE)


def write(folder: Path, source: Path, manifest: dict[str, Any], report: Report) -> None:
    """README.md, the plot, and the source's licence files, into the checkpoint's folder. `source` is the float
    model's folder; `manifest` names it for people."""
    for file in source.iterdir():
        if _LEGAL.fullmatch(file.name) and file.is_file():
            shutil.copyfile(file, folder / file.name)
    plot(report, folder / PLOT)
    (folder / "README.md").write_text(text(source, manifest, report), encoding="utf-8")


def text(source: Path, manifest: dict[str, Any], report: Report) -> str:
    """The model card: the source's front matter about licence and language, then what was done."""
    name, settings = manifest["source"]["name"], manifest["settings"]
    library = manifest.get("backend", "autoawq")
    layout = "gemm" if library == "autoawq" else "compressed-tensors"
    made_of = ", ".join(f"{count} {kind}s" for kind, count in manifest["calibration"]["made_of"].items())
    revision = manifest["source"]["revision"]
    return f"""{_front_matter(source, name)}
# {Path(name).name}, 4-bit AWQ

[AWQ](https://arxiv.org/abs/2306.00978) weights of `{name}`{f" at revision `{revision}`" if revision else ""}, made by
Yap Text {manifest["made_by"]["yaptext"]} with {library} {manifest["made_by"][library]}: 4 bits, groups of
{settings["group_size"]}, zero points, {layout} layout. Calibrated on {manifest["calibration"]["samples"]} samples of \
{settings["tokens"]} tokens, taken from {made_of}, laid out as the service's prompts are.

## Measured

On {report.tokens:,} tokens of held-out text, against the float model:

{table(report)}

KL is the mean divergence of the next-token distribution, in nats; "rounding" is the same format without AWQ.

![Error of the hidden state after each layer]({PLOT})

## Serve

```bash
AWQ_CHAT_MODEL=THIS_REPOSITORY yap-text serve     # or AWQ_TOOL_MODEL
vllm serve THIS_REPOSITORY
```

The licence is that of `{name}`.
"""


def table(report: Report) -> str:
    """The three sets of weights as a Markdown table."""
    rows = [
        "| | KL | perplexity | same best token | size |",
        "|---|---|---|---|---|",
        f"| float | 0 | {report.float_.perplexity:.2f} | 100 % | {report.float_bytes / 1e6:,.0f} MB |",
    ]
    awq_size = f"{report.awq_bytes / 1e6:,.0f} MB, {report.bytes_per_weight:.2f} bytes a weight"
    for label, quality, size in (("AWQ", report.awq, awq_size), ("rounding", report.rounding, "the same")):
        rows.append(f"| {label} | {quality.kl:.4f} | {quality.perplexity:.2f} | {quality.top1:.1%} | {size} |")
    return "\n".join(rows)


def plot(report: Report, file: Path) -> None:
    """The relative error after each layer, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, quality, marker in (("plain rounding", report.rounding, "s"), ("AWQ", report.awq, "o")):
        numbers = range(1, len(quality.layer_errors) + 1)
        axes.plot(numbers, quality.layer_errors, marker=marker, markersize=3, label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative error of the hidden state")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=150)


def _front_matter(source: Path, name: str) -> str:
    kept = {field: value for field, value in _fields(source / "README.md").items() if field in _KEPT_FIELDS}
    tags = ["awq", "4-bit", "vllm"]
    lines = [f"{field}: {json.dumps(value, ensure_ascii=False)}" for field, value in kept.items()]
    if "/" in name:  # on the hub
        lines.append(f"base_model: {name}")
        lines.append("base_model_relation: quantized")
    return "\n".join(["---", *lines, f"tags: {json.dumps(tags)}", "---"])


def _fields(card: Path) -> dict[str, str | list[str]]:
    """The texts and lists of texts of a card's front matter; none if the card is missing or broken, since the licence
    files are copied anyway. Every scalar is a text: to YAML 1.1, `no`, which is Norwegian, is a boolean."""
    try:
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card.read_text(encoding="utf-8-sig"), re.DOTALL)
        fields = yaml.load(match[1], yaml.BaseLoader) if match else None
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    if not isinstance(fields, dict):
        return {}
    texts = {field: value for field, value in fields.items() if value and isinstance(value, str)}
    lists = {field: value for field, value in fields.items() if value and isinstance(value, list)}
    return texts | {field: value for field, value in lists.items() if all(isinstance(one, str) for one in value)}
