"""Tiny models with random weights that have an opinion, with and without outlier channels, and their tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from yaptext.quantize import awq, verify

ARCHITECTURES = ("qwen2", "mistral", "llama")
"""Those whose outlier channels `make_model` knows how to make."""

_VOCABULARY = 320
_SHAPE: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_OWN: dict[str, dict[str, Any]] = {
    **{name: {"head_dim": 32} for name in ("mistral", "qwen3", "gemma")},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
}
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
    """Writes the model into `folder`. With `outliers` eight channels of each norm carry sixteen times as much, and the
    layers after it sixteen times less: the function is the same, and plain rounding loses those channels."""
    torch.manual_seed(3)
    shape = _SHAPE | _OWN.get(architecture, {}) | changes
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                scale = 1.0 if "embed" in name else 2.0 if "lm_head" in name else 1.2
                parameter.normal_(0, scale / parameter.shape[1] ** (0.5 if "embed" not in name else 0.0))
        for layer in model.model.layers if architecture in ARCHITECTURES else []:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, linears in (
                (layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                (layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            ):
                channels = torch.randperm(norm.weight.numel())[:8]
                norm.weight[channels] *= 8  # as in trained models, a few channels say most
                if outliers:
                    norm.weight[channels] *= 16
                    for linear in linears:
                        linear.weight[:, channels] /= 16
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def blocks(count: int, size: int = 128, seed: int = 5) -> list[list[int]]:
    """Token ids that the model has not been built around, in blocks of one length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 259, (size,), generator=generator).tolist() for _ in range(count)]


def quantized(source: Path, target: Path) -> verify.Report:
    """Quantizes `source` into the new folder `target` and measures, as the job does."""
    plan = awq.plan(source)
    reference = verify.Reference(source, blocks(4, seed=9), plan.group_size, on_cuda=False)
    target.mkdir()
    awq.quantize(source, target, blocks(8), plan.group_size, on_cuda=False, done=lambda layer: None)
    return reference.compare(target)
