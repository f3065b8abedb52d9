"""Tiny models with random weights that have an opinion, with and without outlier channels, and their tokenizer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quantize.shapes import shape
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from yaptext.quantize import awq, compressor, mapping, recipes, verify
from yaptext.quantize.plan import LAYER, Layer, plan
from yaptext.quantize.source import load

_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level one without merges: a token a byte, and the marks of the template."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate(["<unk>", "<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    fast.chat_template = _TEMPLATE
    return fast


def make_model(folder: Path, architecture: str, *, outliers: bool, **changes: Any) -> Path:
    """Writes the model into `folder`. Eight channels of each norm carry eight times as much as the others, as in
    trained models; with `outliers` sixteen times that, and the layers behind it sixteen times less: the function is the
    same, and plain rounding loses those channels."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(architecture, **shape(architecture) | changes)
    mappings = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mappings or "vision_config" in shape(architecture):
        mappings = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model = mappings[type(config)](config).float()
    quiet = architecture.startswith(("gemma3", "gemma4", "lfm2"))  # or their tied heads are sure of every token
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed" in name and parameter.dim() == 2:
                parameter.normal_(0, 0.08 if quiet else 1.0)
            elif parameter.dim() in (2, 3) and "conv" not in name:
                parameter.normal_(0, (2.0 if "lm_head" in name else 1.2) / parameter.shape[-1] ** 0.5)
        for name, layer in model.named_modules():
            if re.fullmatch(LAYER, f"{name}."):
                for norm, readers in _norms(layer, architecture):
                    _raise(norm, readers, 16 if outliers else 1)
                if outliers and getattr(mapping.MAPPINGS.get(architecture), "attention_norm", "") is None:
                    gate = layer.mlp.up_proj  # no norm to begin with: the MLP's inner channels
                    channels = torch.randperm(gate.out_features)[:8]
                    gate.weight[channels] *= 16
                    layer.mlp.down_proj.weight[:, channels] /= 16
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _norms(layer: Any, architecture: str) -> Iterator[tuple[Any, list[Any]]]:
    """The norms of a decoder layer, and the weights that read them, [..., channels]."""
    if architecture in mapping.MAPPINGS:
        parts = mapping.MAPPINGS[architecture]
        readers = [getattr(layer.self_attn, name).weight for name in parts.attention]
        gates = [getattr(layer.mlp, name).weight for name in parts.mlp]
        if parts.attention_norm is not None:
            yield getattr(layer, parts.attention_norm), readers + gates if parts.parallel else readers
        if parts.mlp_norm is not None:
            yield getattr(layer, parts.mlp_norm), gates
        return
    weights = {name.removesuffix(".weight"): weight for name, weight in layer.named_parameters()}
    for norm, names in recipes.RECIPES[architecture].groups:
        # transformers holds all experts' gates and ups in one tensor.
        fused = [name.replace("*.gate_proj", "gate_up_proj") for name in names]
        if norm in weights and weights[norm].dim() == 1 and (found := [weights[n] for n in fused if n in weights]):
            yield layer.get_submodule(norm), found


_OFFSET = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3NextRMSNorm", "Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")
"""Norms whose weight is what is added to one."""


def _raise(norm: Any, readers: list[Any], factor: int) -> None:
    channels = torch.randperm(norm.weight.numel())[:8]
    offset = 1 if type(norm).__name__ in _OFFSET else 0
    norm.weight[channels] = (norm.weight[channels] + offset) * 8 * factor - offset
    for weight in readers:
        weight[..., channels] /= factor


def raise_values(folder: Path) -> None:
    """Sixteen times as much in eight channels of each head's values, and sixteen times less behind them: the function
    of the model in `folder` is the same."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shared = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            values = attention.v_proj if hasattr(attention, "v_proj") else attention.qkv_proj
            rows = values.weight[-config.num_key_value_heads * size :].view(-1, size, values.in_features)
            columns = attention.o_proj.weight.view(-1, config.num_key_value_heads, shared, size)
            channels = torch.randperm(size)[:8]
            rows[:, channels] *= 16
            columns[..., channels] /= 16
    model.save_pretrained(folder)


def blocks(count: int, size: int = 128, seed: int = 5) -> list[list[int]]:
    """Token ids that the model has not been built around, in blocks of one length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (size,), generator=generator).tolist() for _ in range(count)]


def quantized(source: Path, target: Path) -> verify.Report:
    """Quantizes `source` into the new folder `target` and measures, as the job does."""
    size = plan(source).group_size
    reference = verify.Reference(source, blocks(4, seed=9), size, on_cuda=False)
    target.mkdir()
    awq.quantize(source, target, blocks(8), size, on_cuda=False, done=lambda layer: None)
    return reference.compare(target)


def scaled_alone(source: Path) -> float:
    """How far autoawq's scaling moves the answers while nothing is rounded, KL in nats."""
    ids = torch.tensor(blocks(2, seed=11))
    with torch.inference_mode():
        before = torch.log_softmax(load(source, on_cuda=False)(ids).logits, -1)
        scaled = awq.search(load(source, on_cuda=False), blocks(8), 64, scales_alone=True).model
        after = torch.log_softmax(scaled(ids).logits, -1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def compressed(source: Path, target: Path, architecture: str) -> tuple[verify.Report, float]:
    """The same by llm-compressor, and how far scaling alone moves the answers, KL in nats."""
    kept = recipes.RECIPES[architecture].kept_pattern
    size = plan(source, kept=kept).group_size
    reference = verify.Reference(source, blocks(4, seed=9), size, on_cuda=False, kept=kept)
    target.mkdir()
    told: list[Layer] = []
    wheels = compressor.wheels(None)
    moved = compressor.quantize(source, target, blocks(8), size, on_cuda=False, done=told.append, wheels=wheels)
    assert [layer.number for layer in told] == [1, 2] and all(layer.count == 2 for layer in told)
    return reference.compare(target), moved
