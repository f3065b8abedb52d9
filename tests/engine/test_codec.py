"""The tokenizer beside the event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

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
