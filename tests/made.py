"""Tokenizers and chat templates made for tests, of the kinds that people's models have. None is a copy of a model's."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[TOOLS]", "[/TOOLS]", "<turn>", "</turn>"]
SPECIAL += ["<|head|>", "<|/head|>", "<|eot|>", "<|sys|>", "<|usr|>", "<|bot|>", "<|fin|>"]
PLAIN = ["<think>", "</think>", "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<tool_call>"]
"""Control tokens that are not marked special, as DeepSeek's role marks and Qwen's `<tool_call>`."""
CONTROL = SPECIAL + PLAIN
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SLASH = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
KINDS = ["gpt2", "qwen", "slash", "metaspace", "prepend", "unigram"]


@cache
def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """`gpt2`, `qwen` (NFC) and `slash` are byte-level BPE with other ways to cut words; `metaspace` and `prepend` are
    SentencePiece's BPE in its two forms, `unigram` its other model. Their vocabularies hold control tokens as words."""
    made = _made(kind)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN])
    fast.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    return fast


def _made(kind: str) -> Tokenizer:
    root = Path(__file__).parents[1]
    pages = [root / "README.md", *sorted((root / "yaptext").rglob("*.md")), root / "yaptext/dialogue/persona.py"]
    corpus = [page.read_text(encoding="utf-8") for page in pages]
    corpus += [
        "User: Hi!\nAssistant: Hello... Now: Sunday, 21:46.\n<|history|>\n" * 20,
        "\u4f60\u597d\u3002 \U0001f642 caf\u00e9" * 20,
    ]
    if kind in ("gpt2", "qwen", "slash"):
        made = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
        words = {"qwen": _QWEN, "slash": _SLASH}.get(kind)
        made.pre_tokenizer = (
            level if words is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), level])
        )
        if kind == "qwen":
            made.normalizer = normalizers.NFC()
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            corpus, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
        )
        made.add_special_tokens(SPECIAL[:2])
        made.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
        return made
    if kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=600,
            special_tokens=["<unk>", "<s>", "</s>", *SPECIAL[2:]],
            unk_token="<unk>",
            show_progress=False,
        )
    else:
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        if kind == "metaspace":
            made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        else:
            made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
        octets = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(
            vocab_size=900, special_tokens=["<unk>", "<s>", "</s>", *SPECIAL[2:], *octets], show_progress=False
        )
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    lines = [line for text in corpus for line in text.splitlines()]  # words do not go over the ends of lines
    made.train_from_iterator(lines, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return made


_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ALTERNATES = (
    "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}{% for m in talk %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
TEMPLATES: dict[str, str] = {
    "chatml": _CHATML,
    "heads with a date": (
        "<s>{% for m in messages %}<|head|>{{ m.role }}<|/head|>\n\n{% if loop.first %}Today Date: {{ strftime_now('%d %b %Y') }}"
        "\n\n{% endif %}{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|head|>assistant<|/head|>\n\n{% endif %}"
    ),
    "brackets": (
        "<s>"
        + _ALTERNATES
        + _NO_SYSTEM
        + "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    ),
    "brackets with tools": (
        "<s>"
        + _ALTERNATES
        + "{% set talk = messages[1:] if messages[0].role == 'system' else messages %}{% for m in talk %}"
        "{% if m.role == 'user' %}{% if loop.last and tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}[INST]"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
    ),
    "system in the first message": (
        "<s>" + _ALTERNATES + "{% set s = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% set talk = messages[1:] if s else messages %}{% for m in talk %}{% if m.role == 'user' %}[INST] "
        "{% if loop.first and s %}<<SYS>>\n{{ s }}\n<</SYS>>\n\n{% endif %}{{ m.content | trim }} [/INST]"
        "{% else %} {{ m.content | trim }} </s><s>{% endif %}{% endfor %}"
    ),
    "turns": (
        "<s>"
        + _NO_SYSTEM
        + _ALTERNATES
        + "{% for m in messages %}<turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}</turn>\n{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
    ),
    "marks": (
        "{% for m in messages %}{{ {'system': '<|sys|>', 'user': '<|usr|>', 'assistant': '<|bot|>'}[m.role] }}\n{{ m.content }}"
        "<|fin|>\n{% endfor %}{% if add_generation_prompt %}<|bot|>\n{% endif %}"
    ),
    "marks of text": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "tools in the system message": (
        "{% if tools %}<|im_start|>system\n{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}Tools:\n"
        "{% for t in tools %}{{ t | tojson }}\n{% endfor %}Answer in <tool_call></tool_call>.<|im_end|>\n"
        "{% endif %}{% for m in messages %}{% if not (tools and loop.first and m.role == 'system') %}<|im_start|>{{ m.role }}\n"
        "{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "thinking with a switch": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
    ),
    "thinking without a switch": (
        "<s>{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}<\uff5cUser\uff5c>{{ m.content }}"
        "{% else %}<\uff5cAssistant\uff5c>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<\uff5cAssistant\uff5c><think>\n{% endif %}"
    ),
    "for tools alone": (
        "<s><|im_start|>system\nCall functions:{% for t in tools %} {{ t.function.name }}: {{ t.function.description }}{% endfor %}"
        "<|im_end|>\n" + _CHATML
    ),
    "calls in roles": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>"
        "{{ c.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "strict alternation": _ALTERNATES + _CHATML,
    "no system role": _NO_SYSTEM + _CHATML,
    "labels": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% else %}{{ '### ' + m.role }}:\n{{ m.content }}\n\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}### assistant:\n{% endif %}"
    ),
    "the time of day": "It is {{ strftime_now('%H:%M:%S') }}.\n" + _CHATML,
}


def with_template(kind: str, template: Any) -> PreTrainedTokenizerFast:
    """The tokenizer of a kind, with a template of its own."""
    made = PreTrainedTokenizerFast.from_pretrained(_saved(kind))
    made.chat_template = template
    return made


@cache
def _saved(kind: str) -> str:
    from tempfile import mkdtemp

    folder = mkdtemp(prefix="yap-text-made.")
    tokenizer(kind).save_pretrained(folder)
    return folder
