"""A model's tokenizer and chat template: what both an engine and the quantizer make prompts with."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from tokenizers import Tokenizer

from yaptext.errors import StartError

_LONG_TEXT = 1000
"""Characters from which a text is tokenized in a thread (about 0.3 ms of the event loop)."""


class HubCodec:
    """The `Codec` of a fast tokenizer as transformers loads it. Raises `StartError` for any other."""

    def __init__(self, tokenizer: Any, *, max_model_len: int, block_size: int) -> None:
        self.max_model_len, self.block_size = max_model_len, block_size
        self._template = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise StartError(f"{type(tokenizer).__name__} is no fast tokenizer: the model needs a tokenizer.json")
        source = backend.to_str()
        self._special, self._content = Tokenizer.from_str(source), Tokenizer.from_str(source)
        for copy in (self._special, self._content):
            copy.no_truncation()
            copy.no_padding()
        self._content.encode_special_tokens = True

    async def encode(self, text: str, *, special: bool = False) -> list[int]:
        return (await _encode(self._special if special else self._content, [text]))[0]

    async def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        return await _encode(self._content, texts)

    async def clip(self, text: str, max_tokens: int, *, keep: Literal["start", "end"]) -> str:
        return await asyncio.to_thread(self._clip, text, max_tokens, keep)

    def _clip(self, text: str, max_tokens: int, keep: Literal["start", "end"]) -> str:
        count = max_tokens
        while True:
            (encoding,) = self._content.encode_batch([text], add_special_tokens=False)
            if len(encoding.ids) <= max_tokens or not text:
                return text
            if count <= 0:
                return ""
            text = text[: encoding.offsets[count - 1][1]] if keep == "start" else text[encoding.offsets[-count][0] :]
            count -= 1  # a cut text can encode into more tokens than it was cut from

    def render(self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> str | None:
        if not self._template.chat_template:
            return None
        try:
            return str(
                self._template.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
            )
        except Exception:  # a template is a program: it refuses roles and tools by raising what it likes
            return None


async def _encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """In batches alone the tokenizer lets go of the interpreter's lock: its `encode` would hold up the loop from a
    thread, too."""
    encode = partial(tokenizer.encode_batch_fast, list(texts), add_special_tokens=False)
    long = sum(map(len, texts)) > _LONG_TEXT
    return [encoding.ids for encoding in (await asyncio.to_thread(encode) if long else encode())]
