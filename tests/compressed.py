"""A model's weights as llm-compressor writes its AWQ: 4 bits with zero points, packed, in `compressed-tensors`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from compressed_tensors.compressors import pack_to_int32
from safetensors.torch import load_file, save_file

_GROUP = 64
_SCHEME = {
    "num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": _GROUP, "dynamic": False,
}  # fmt: skip


def compress(source: Path, target: Path) -> Path:
    """Writes the model of folder `source`, its linear layers rounded to 4 bits, into the folder `target`."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": _SCHEME, "input_activations": None}},
    }
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    packed: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            packed[name] = weight
            continue
        stem = name.removesuffix(".weight")
        rows, columns = weight.shape
        groups = weight.float().reshape(rows, columns // _GROUP, _GROUP)
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((high - low) / 15).clamp(min=1e-6)
        zero = (-8 - low / scale).round().clamp(-8, 7)
        whole = ((groups / scale[..., None]).round() + zero[..., None]).clamp(-8, 7).reshape(rows, columns)
        packed[f"{stem}.weight_packed"] = pack_to_int32(whole.to(torch.int8), 4)
        packed[f"{stem}.weight_scale"] = scale.to(weight.dtype)
        packed[f"{stem}.weight_zero_point"] = pack_to_int32(zero.to(torch.int8), 4, packed_dim=0).contiguous()
        packed[f"{stem}.weight_shape"] = torch.tensor([rows, columns])
    save_file(packed, target / "model.safetensors", metadata={"format": "pt"})
    return target
