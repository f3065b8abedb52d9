"""compressor.py and its child: real llm-compressor on CPU on tiny models, and how the child ends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize.forge import Bench, Forge
from quantize.tiny import blocks, compressed, make_model
from safetensors.torch import load_file

from yaptext.engine.weight_kind import kind_of
from yaptext.errors import QuantizeDelayed, QuantizeError, QuantizeRefused
from yaptext.quantize import compressor, compressor_child, recipes, verify
from yaptext.quantize.plan import LAYER

pytestmark = pytest.mark.subprocess
ALL = os.environ.get("YAP_TEXT_ARCHITECTURES") == "1"
SOME = ("gemma3", "qwen3_moe", "mixtral", "qwen3_5")
"""Text and images, dense and routed layers in one stack, names of its own, attention and recurrence."""


@pytest.fixture(scope="module", params=sorted(recipes.RECIPES) if ALL else SOME)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Any, float]:
    """A float model with outliers, what became of it, its report, and how far scaling alone moves it."""
    folder = tmp_path_factory.mktemp(request.param)
    source = make_model(folder / "float", request.param, outliers=True)
    return source, folder / "awq", *compressed(source, folder / "awq", request.param)


def test_scaling_leaves_the_function_and_awq_beats_rounding(made: tuple[Path, Path, Any, float]) -> None:
    """As of autoawq: in 32 bits nothing moves until something is rounded."""
    _, _, report, moved = made
    assert abs(moved) < 1e-4
    assert report.awq.kl < report.rounding.kl / 2


def test_the_result_is_what_vllm_reads(made: tuple[Path, Path, Any, float]) -> None:
    """The source's config with the scheme of compressed-tensors; expert by expert; routers and eyes are in 16 bits."""
    source, result, _, _ = made
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (result, source))
    how = config.pop("quantization_config")
    assert kind_of(str(result), {"quantization_config": how}) == "awq"
    assert how["ignore"] == recipes.RECIPES[before["model_type"]].ignored
    assert config.pop("dtype") == "bfloat16" and config.keys() == before.keys() - {"dtype"}
    stored = load_file(result / "model.safetensors")
    packed = [name for name, tensor in stored.items() if name.endswith("weight_packed")]
    assert packed and not [name for name in packed if "vis" in name or name.endswith(".gate.weight_packed")]
    experts = {name.split("experts.")[1].split(".")[0] for name in packed if "experts." in name}
    assert experts in (set(), {"0", "1", "2", "3"})
    assert {tensor.dtype for name, tensor in stored.items() if name.endswith(".weight")} <= {torch.bfloat16}
    kept = {file.name for file in result.iterdir()}
    assert kept == {file.name for file in source.iterdir()} and "recipe.yaml" not in kept


def test_our_decoder_agrees_with_that_of_compressed_tensors(made: tuple[Path, Path, Any, float]) -> None:
    """The independent reading of the layout is the right one: vLLM's release has a decoder, too."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    stored = load_file(made[1] / "model.safetensors")
    for name in [name for name in stored if name.endswith("weight_packed")][:6]:
        layer = name.removesuffix("weight_packed")
        packed, zeros, scales = (
            stored[layer + part] for part in ("weight_packed", "weight_zero_point", "weight_scale")
        )
        shape = stored[f"{layer}weight_shape"]
        whole = unpack_from_int32(packed, 4, shape).float()
        origin = unpack_from_int32(zeros, 4, torch.Size([shape[0], scales.shape[1]]), packed_dim=0).float()
        size = whole.shape[1] // scales.shape[1]
        theirs = (whole - origin.repeat_interleave(size, 1)) * scales.float().repeat_interleave(size, 1)
        assert torch.equal(verify.decompressed(packed, zeros, scales), theirs), layer


def quantize(source: Path, target: Path, done: Any = lambda layer: None) -> None:
    target.mkdir()
    compressor.quantize(source, target, blocks(2), 64, on_cuda=False, done=done, wheels=compressor.wheels(None))


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("routed") / "float", "qwen3_moe", outliers=False)


def children() -> set[int]:
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {int(pid) for file in found for pid in file.read_text().split()}


def test_groups_that_change_the_function_are_refused(
    routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router that is left out of those that read a norm."""
    right = recipes.RECIPES["qwen3_moe"]
    wrong = [(norm, tuple(name for name in readers if name != "mlp.gate")) for norm, readers in right.groups]
    monkeypatch.setitem(recipes.RECIPES, "qwen3_moe", recipes.Recipe(tuple(wrong), right.kept))
    with pytest.raises(QuantizeRefused, match=r"scaling changes the answers by \S+ nats: its groups do not fit"):
        quantize(routed, tmp_path / "awq")


def test_what_ends_the_job_ends_the_child(routed: Path, tmp_path: Path) -> None:
    """A signal comes as an exception after a layer."""
    before = children()
    seen: set[int] = set()

    def stop(layer: Any) -> None:
        seen.update(children() - before)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(routed, tmp_path / "awq", stop)
    assert len(seen) == 1 and children() == before


def test_a_killed_child_is_no_fault_of_the_model(routed: Path, tmp_path: Path) -> None:
    """As the kernel does it when memory is full: a later try may do."""
    before = children()

    def kill() -> None:
        while not (found := children() - before):
            time.sleep(0.01)
        os.kill(found.pop(), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(
        QuantizeDelayed, match="llm-compressor was ended by SIGKILL: the system may have run out of mem"
    ):
        quantize(routed, tmp_path / "awq")
    killer.join()


def test_an_error_of_the_child_is_one_line(routed: Path, tmp_path: Path) -> None:
    """With its type; memory has a word of its own."""
    with pytest.raises(QuantizeError, match=r"llm-compressor ended with \w*Error: Error no file named model"):
        quantize(make_moved(routed, tmp_path), tmp_path / "awq")


def make_moved(source: Path, folder: Path) -> Path:
    """A folder with a config and no weights."""
    (folder / "empty").mkdir()
    (folder / "empty" / "config.json").write_bytes((source / "config.json").read_bytes())
    return folder / "empty"


def test_no_secret_reaches_the_child(routed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads a folder: it needs no token."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("YAP_TEXT_API_KEY", "secret")
    before = children()
    seen: list[bytes] = []

    def look(layer: Any) -> None:
        seen.extend(Path(f"/proc/{pid}/environ").read_bytes() for pid in children() - before)

    quantize(routed, tmp_path / "awq", look)
    assert seen and not [environment for environment in seen if b"secret" in environment]


def test_the_layers_of_a_name_are_those_of_the_plan() -> None:
    """The child cannot import what it shares with us."""
    assert compressor_child.LAYER + r"\." == LAYER


def test_a_job_takes_llm_compressor_where_autoawq_cannot(forge: Forge, routed: Path, tmp_path: Path) -> None:
    """With the same steps: measured, kept, described, found again."""
    bench = Bench(forge, tmp_path / "state", routed, AWQ_CALIBRATION_TOKENS="64")
    status, events = bench.run()
    assert status == 0, events
    bench.check_clean()
    manifest = bench.finished().manifest
    assert manifest["backend"] == "llmcompressor" and manifest["made_by"]["llmcompressor"] == compressor.VERSION
    assert manifest["verification"]["awq"]["kl"] < manifest["verification"]["rounding"]["kl"]
    assert f"with llmcompressor {compressor.VERSION}: 4 bits" in (bench.finished().folder / "README.md").read_text()
    assert len([event for event in events if event.startswith("quantize.layer")]) == 2
    assert bench.run()[1][0].startswith("quantize.finished_before")
