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
from yaptext.quantize.source import check_finite, load


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

    def __init__(self, folder: Path, held_out: Sequence[Sequence[int]], group_size: int, *, on_cuda: bool) -> None:
        self._folder, self._held_out, self._on_cuda = folder, held_out, on_cuda
        self._logprobs: list[Any] = []
        self._states: list[Any] = []
        model = load(folder, on_cuda=on_cuda)
        check_finite(model)
        self.float = self._measure(model, on_cuda)
        for _, linear in quantized_linears(model):
            linear.weight.data = rounded(linear.weight.data, group_size)
        self.rounding = self._measure(model, on_cuda)

    def compare(self, quantized: Path) -> Report:
        """Measures the AWQ checkpoint in the folder `quantized`."""
        model = load(self._folder, on_cuda=self._on_cuda)
        weights = fill(model, quantized)
        awq_bytes = _weight_bytes(quantized)
        return Report(
            tokens=sum(map(len, self._held_out)),
            float_=self.float,
            awq=self._measure(model, self._on_cuda),
            rounding=self.rounding,
            float_bytes=_weight_bytes(self._folder),
            awq_bytes=awq_bytes,
            bytes_per_weight=round(awq_bytes / weights, 3),
        )

    def _measure(self, model: Any, on_cuda: bool) -> Quality:
        """The first call's answers are the reference of those after it."""
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
                    continue
                reference = self._logprobs[number].to(device)
                divergence += (reference.exp() * (reference - logprobs)).sum().item()
                same += (reference.argmax(-1) == logprobs.argmax(-1)).sum().item()
                errors += [
                    round(((state - exact).norm() / exact.norm()).item(), 5)
                    for state, exact in zip(states, self._states, strict=False)
                ]
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


def quantized_linears(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers that AWQ turns into 4 bits: every linear one inside the decoder layers, by name."""
    import torch

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
            yield name, module


def rounded(weight: Any, group_size: int) -> Any:
    """Plain rounding to 4 bits: each group of inputs between its least and greatest weight. [out, in] in and out."""
    groups = weight.float().reshape(-1, group_size)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    scale = (high - low).clamp(min=1e-5) / 15
    zero = (-low / scale).round().clamp(0, 15)
    return (((groups / scale).round() + zero).clamp(0, 15) - zero).mul(scale).reshape(weight.shape).to(weight.dtype)


def dequantized(qweight: Any, qzeros: Any, scales: Any) -> Any:
    """The weights that an AWQ layer stands for, [out, in], from qweight [in, out/8], qzeros and scales [in/group, ...].
    The layout is autoawq's `gemm` version, as vLLM reads it."""
    group_size = qweight.shape[0] // scales.shape[0]
    weight = _unpacked(qweight).float() - _unpacked(qzeros).float().repeat_interleave(group_size, 0)
    return (weight * scales.float().repeat_interleave(group_size, 0)).t()


def _unpacked(packed: Any) -> Any:
    import torch

    nibbles = [(packed >> 4 * ORDER.index(column)) & 15 for column in range(8)]
    return torch.stack(nibbles, dim=-1).reshape(packed.shape[0], -1)


def fill(model: Any, quantized: Path) -> int:
    """Puts the weights of an AWQ checkpoint into the float model, decoded. Returns how many weights that were.
    Raises `QuantizeRefused` where the checkpoint lacks one, or holds one that the model has no place for."""
    import torch

    stored = _tensors(quantized)

    def take(name: str) -> Any:
        if name not in stored:
            raise QuantizeRefused(f"the quantized checkpoint does not fit its model: {name}")
        return stored.pop(name)()

    places = dict(model.named_parameters(remove_duplicate=False))
    filled: set[int] = set()
    weights = 0
    packed = {name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")}
    with torch.no_grad():
        for name, place in places.items():
            layer = name.removesuffix(".weight")
            if layer in packed:
                weight = dequantized(*[take(f"{layer}.{part}") for part in ("qweight", "qzeros", "scales")])
            elif name in stored:
                weight = take(name)
            elif id(place) in filled:
                weight = place
            else:
                continue  # a tied weight may follow under its other name
            if weight.shape != place.shape:  # one number would be copied into all places
                raise QuantizeRefused(f"the quantized checkpoint does not fit its model: {name}")
            place.copy_(weight)
            weights += place.numel() if id(place) not in filled else 0
            filled.add(id(place))
    missing = [name for name, place in places.items() if id(place) not in filled]
    if missing or stored:
        raise QuantizeRefused(f"the quantized checkpoint does not fit its model: {(missing or sorted(stored))[0]}")
    return weights


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


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in _weight_files(folder))
