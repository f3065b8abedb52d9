"""How good a quantized checkpoint is: float against AWQ against plain rounding, on text that was not calibrated with.

The checkpoint is read as its files say, by a decoder of our own, so that what is measured is what will be served.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from yaptext.errors import QuantizeRefused
from yaptext.quantize.awq import ORDER
from yaptext.quantize.plan import quantized_weights
from yaptext.quantize.source import check_finite, load

Done = Callable[[int, int], None]
"""Called with the blocks that are measured, and how many there are in all."""


def _untold(_: int, __: int) -> None:
    """For callers that need no progress."""


@dataclass(frozen=True, slots=True)
class Quality:
    """One set of weights on the held-out text. `kl` is the mean divergence from the float model's next-token
    distribution in nats, `top1` the share of tokens with the same best guess, `layer_errors` the relative error of
    the hidden state after each layer."""

    perplexity: float
    kl: float
    top1: float
    layer_errors: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Report:
    """The measurement. Sizes are bytes of all weight files; `tokens` is how much text was measured on."""

    tokens: int
    float_: Quality
    awq: Quality
    rounding: Quality
    float_bytes: int
    awq_bytes: int
    bytes_per_weight: float

    @property
    def worthwhile(self) -> bool:
        """AWQ is nearer to the float model than plain rounding."""
        return self.awq.kl < self.rounding.kl

    def as_data(self) -> dict[str, Any]:
        data = asdict(self)
        data["float"] = data.pop("float_")
        return data


class Reference:
    """The float model's answers to the held-out text, and those of plain rounding measured against them.

    `held_out` are blocks of token ids. Memory: the float model, and 4 bytes a token and vocabulary entry.
    """

    def __init__(
        self,
        folder: Path,
        held_out: Sequence[Sequence[int]],
        group_size: int,
        *,
        on_cuda: bool,
        kept: str = "",
        done: Done = _untold,
    ) -> None:
        """`done` is called during the measurements of the float model and of rounding."""
        self._folder, self._held_out, self._on_cuda = folder, held_out, on_cuda
        self._logprobs: list[Any] = []
        self._states: list[Any] = []
        model = load(folder, on_cuda=on_cuda)
        check_finite(model)
        blocks = len(held_out)
        done(0, 2 * blocks)
        self.float = self.measure(model, on_cuda, lambda block: done(block, 2 * blocks))
        for _, weight in quantized_weights(model, kept):
            weight.data = rounded(weight.data, group_size)
        self.rounding = self.measure(model, on_cuda, lambda block: done(blocks + block, 2 * blocks))

    def compare(self, quantized: Path, done: Done = _untold) -> Report:
        """Measures the AWQ checkpoint in the folder `quantized`."""
        model = load(self._folder, on_cuda=self._on_cuda, stored=decoded(quantized))
        weights = sum(parameter.numel() for parameter in model.parameters())
        awq_bytes = weight_bytes(quantized)
        blocks = len(self._held_out)
        done(0, blocks)
        return Report(
            tokens=sum(map(len, self._held_out)),
            float_=self.float,
            awq=self.measure(model, self._on_cuda, lambda block: done(block, blocks)),
            rounding=self.rounding,
            float_bytes=weight_bytes(self._folder),
            awq_bytes=awq_bytes,
            bytes_per_weight=round(awq_bytes / weights, 3),
        )

    def measure(self, model: Any, on_cuda: bool, done: Callable[[int], None]) -> Quality:
        """The first call's answers are the reference of those after it. `done` is called with the blocks measured."""
        import torch

        first = not self._logprobs
        loss = divergence = same = 0.0
        count = 0
        errors: list[float] = []
        with torch.inference_mode(), _placed(model, on_cuda) as device:
            for number, block in enumerate(self._held_out):
                ids = torch.tensor([list(block)], device=device)
                output = model(ids, output_hidden_states=number == 0, use_cache=False)
                logprobs = torch.log_softmax(output.logits[0].float(), dim=-1)
                loss -= logprobs[:-1].gather(1, ids[0, 1:, None]).sum().item()
                count += len(block)
                states = [state[0].float().cpu() for state in output.hidden_states or ()][1:]
                if first:
                    self._logprobs.append(logprobs.cpu())
                    self._states += states
                    same += len(block)
                    done(number + 1)
                    continue
                reference = self._logprobs[number].to(device)
                divergence += (reference.exp() * (reference - logprobs)).sum().item()
                same += (reference.argmax(-1) == logprobs.argmax(-1)).sum().item()
                errors += [
                    round(((state - exact).norm() / exact.norm()).item(), 5)
                    for state, exact in zip(states, self._states, strict=False)
                ]
                done(number + 1)
        perplexity = math.exp(min(700.0, loss / (count - len(self._held_out))))
        return Quality(round(perplexity, 4), round(divergence / count, 6), round(same / count, 5), errors)


@contextmanager
def _placed(model: Any, on_cuda: bool) -> Iterator[Any]:
    """The device to compute on: a card that holds the whole model, or one layer of it at a time."""
    import torch

    if not on_cuda:
        yield torch.device("cpu")
        return
    device = torch.device("cuda:0")
    size = sum(parameter.nbytes for parameter in model.parameters())
    if size * 1.2 < torch.cuda.mem_get_info(device)[0]:
        model.to(device)
    else:
        from accelerate import cpu_offload

        cpu_offload(model, device)
    yield device
    model.to("cpu") if not hasattr(model, "_hf_hook") else _take_back(model)
    torch.cuda.empty_cache()


def _take_back(model: Any) -> None:
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)


def rounded(weight: Any, group_size: int) -> Any:
    """Plain rounding to 4 bits: each group of inputs between its least and greatest weight. [..., in] in and out."""
    groups = weight.float().reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / 15
    zero = (-low / scale).round().clamp(0, 15)
    return (((groups / scale).round() + zero).clamp(0, 15) - zero).mul(scale).reshape(weight.shape).to(weight.dtype)


def dequantized(qweight: Any, qzeros: Any, scales: Any) -> Any:
    """The weights that an AWQ layer stands for, [out, in], from qweight [in, out/8], qzeros and scales [in/group, ...].
    The layout is autoawq's `gemm` version, as vLLM reads it."""
    group_size = qweight.shape[0] // scales.shape[0]
    weight = _unpacked(qweight, ORDER).float() - _unpacked(qzeros, ORDER).float().repeat_interleave(group_size, 0)
    return (weight * scales.float().repeat_interleave(group_size, 0)).t()


def decompressed(packed: Any, zeros: Any, scales: Any) -> Any:
    """The same of a layer of compressed-tensors: packed is [out, in/8], zeros [out/8, groups], scales [out, groups].
    The layout is that of `pack-quantized`: nibble i of an int32 holds column i (of the zeros, row i) of its eight."""
    group_size = 8 * packed.shape[1] // scales.shape[1]
    origin = _unpacked(zeros.t(), range(8)).t().float().repeat_interleave(group_size, 1)
    return (_unpacked(packed, range(8)).float() - origin) * scales.float().repeat_interleave(group_size, 1)


def _unpacked(packed: Any, order: Sequence[int]) -> Any:
    import torch

    nibbles = [(packed >> 4 * order.index(column)) & 15 for column in range(8)]
    return torch.stack(nibbles, dim=-1).reshape(packed.shape[0], -1)


_FORMS = {
    "qweight": (dequantized, ("qweight", "qzeros", "scales"), ()),
    "weight_packed": (decompressed, ("weight_packed", "weight_zero_point", "weight_scale"), ("weight_shape",)),
}
"""By the part that only it has: how a layer is decoded, of which parts, and what it holds besides."""


class Stored:
    """A tensor that is read, and decoded, when transformers takes it: with `[...]`, as it does with safetensors' own
    slices."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read

    def __getitem__(self, _: Any) -> Any:
        return self._read()


def decoded(quantized: Path) -> dict[str, Stored]:
    """The float weights that a checkpoint in 4 bits stands for, by name. Raises `QuantizeRefused` if one is missing."""
    stored = _tensors(quantized)
    for name in list(stored):
        layer, _, part = name.rpartition(".")
        if part not in _FORMS:
            continue
        decode, parts, others = _FORMS[part]
        lacking = [f"{layer}.{part}" for part in parts if f"{layer}.{part}" not in stored]
        if lacking:
            raise QuantizeRefused(f"the quantized checkpoint does not fit its model: {lacking[0]}")
        reads = [stored.pop(f"{layer}.{part}") for part in parts]
        for other in others:
            stored.pop(f"{layer}.{other}", None)
        stored[f"{layer}.weight"] = partial(_decode, decode, reads)
    return {name: Stored(read) for name, read in stored.items()}


def _decode(decode: Callable[..., Any], reads: list[Callable[[], Any]]) -> Any:
    return decode(*[read() for read in reads])


def _tensors(folder: Path) -> dict[str, Callable[[], Any]]:
    """Every tensor of a checkpoint by name, read when it is asked for."""
    from safetensors import safe_open

    found: dict[str, Callable[[], Any]] = {}
    for file in _weight_files(folder):
        opened: Any = safe_open(file, framework="pt")
        found.update({name: partial(opened.get_tensor, name) for name in list(opened.keys())})
    return found


def _weight_files(folder: Path) -> list[Path]:
    """Those that a loader reads: some models come with their weights twice."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return [folder / "model.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _weight_files(folder))
