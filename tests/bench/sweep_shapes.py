"""Model folders of given shapes, with a tokenizer of as many tokens and no weights: for `load_format=dummy`.

Qwen2's vocabulary has `[]` as one token (its number 1294); the one that stands in for it here gets such a token, too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

_COMMON = {"hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}
SHAPES: dict[str, dict[str, Any]] = {
    "chat": _COMMON  # Mistral-Nemo, 12B
    | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 14336,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131072,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    "tool": _COMMON  # Qwen2, 1.5B, as Hammer 2.1
    | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
_TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def make(folder: Path, role: str, tokenizer: Path, *, awq: bool = False) -> Path:
    """The folder of a role's shape, made where it is not there yet; `tokenizer` is a folder that holds one."""
    place = folder / (f"{role}-awq" if awq else role)
    if (place / "config.json").exists():
        return place
    place.mkdir(parents=True, exist_ok=True)
    config = SHAPES[role] | ({"quantization_config": _AWQ, "torch_dtype": "float16"} if awq else {})
    content = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    if role == "tool":
        vocabulary.setdefault("[]", len(vocabulary))
    for number in range(len(vocabulary), config["vocab_size"]):
        vocabulary[f"\u0120x{number}"] = number
    (place / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    for name in _TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, place / name)
    (place / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return place
