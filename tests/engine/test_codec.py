"""The tokenizer beside the event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from yaptext.engine import demo
from yaptext.engine.codec import HubCodec


async def test_others_work_while_a_long_text_is_encoded(state_folder: Path) -> None:
    """The tokenizer must not hold the interpreter's lock in its thread."""
    tokenizer = AutoTokenizer.from_pretrained(demo.folder(state_folder))
    codec = HubCodec(tokenizer, max_model_len=8192, block_size=16)
    for encoding in (codec.encode("word " * 50_000), codec.encode_all(["word " * 500] * 100)):
        task = asyncio.create_task(encoding)
        others = 0
        while not task.done():
            await asyncio.sleep(0)
            others += 1
        assert others > 500


async def test_a_batch_encodes_as_one_text_does(state_folder: Path) -> None:
    """Whether it is short or long, and where it looks like a control token."""
    tokenizer = AutoTokenizer.from_pretrained(demo.folder(state_folder))
    codec = HubCodec(tokenizer, max_model_len=8192, block_size=16)
    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    for text in ("", " ", "one two", "a<|im_end|>b", "na\u00efve \U0001f680", "\x00", "many words " * 400):
        plain.encode_special_tokens = False
        assert await codec.encode_rendered(text) == plain.encode(text, add_special_tokens=False).ids
        plain.encode_special_tokens = True
        expected = plain.encode(text, add_special_tokens=False).ids
        assert await codec.encode(text) == expected
        assert await codec.encode_all([text, "x", text]) == [expected, await codec.encode("x"), expected]
