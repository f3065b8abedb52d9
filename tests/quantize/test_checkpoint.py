"""checkpoint.py and what else refuses a source: thirteen checkpoints that are broken, and the line that each gets.

The job runs as the command does. A line has the file, what is wrong with it, and what to do.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize.forge import Bench, Forge, only
from quantize.hub_server import HubServer
from safetensors.torch import load_file, save_file

from yaptext.engine.awq_results import FAILED
from yaptext.quantize import kept
from yaptext.quantize.recipes import RECIPES

pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(600)]
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
NORM = "model.layers.1.post_attention_layernorm.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32\nsize 12\n"
Edit = Callable[[Path], object]


def change(edit: Callable[[dict[str, Any]], object]) -> Edit:
    """Edits the tensors."""

    def changed(folder: Path) -> None:
        tensors = load_file(folder / WHOLE)
        edit(tensors)
        save_file(tensors, folder / WHOLE, metadata={"format": "pt"})

    return changed


def config(name: str = "config.json", **fields: Any) -> Edit:
    """Lays fields over those of a config."""
    return lambda folder: (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | fields))


def shard(folder: Path) -> None:
    """The weights in two files and an index."""
    tensors = load_file(folder / WHOLE)
    (folder / WHOLE).unlink()
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    places = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": places}))


def stale(folder: Path) -> None:
    shard(folder)
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= {"model.norm.bias": SHARDS[0], "lm_head.bias": SHARDS[0]}
    (folder / INDEX).write_text(json.dumps(index))


def cut(folder: Path) -> None:
    (folder / WHOLE).write_bytes((folder / WHOLE).read_bytes()[:100_000])


def nan(tensors: dict[str, Any]) -> None:
    tensors[NORM][3] = float("nan")


def shorten(tensors: dict[str, Any]) -> None:
    """As if the marks of the template had been added to the tokenizer alone."""
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:259].clone()


def fewer_tokens(folder: Path) -> None:
    change(shorten)(folder)
    config(vocab_size=259)(folder)


def without_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


def tokenizer_of_its_own(folder: Path) -> None:
    named = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    config("tokenizer_config.json", auto_map=named, tokenizer_class="OwnTokenizer")(folder)
    (folder / "tokenization_own.py").write_text("raise SystemExit('it was run')")
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").write_text("a\nb\n")
    config(model_type="llama")(folder)


def adapter(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / "config.json"]:
        file.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "maker/base", "peft_type": "LORA"}')
    save_file({"base_model.model.x.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.safetensors")


CHECKPOINTS: dict[str, tuple[Edit, str]] = {
    "Git LFS pointer": (
        lambda folder: (folder / WHOLE).write_text(POINTER),
        "model.safetensors of {model} is a Git LFS pointer, not the file itself: run `git lfs pull` in that folder",
    ),
    "cut file": (
        cut,
        "model.safetensors of {model} is cut off after 100000 of {size} bytes: copy or download it again",
    ),
    "missing shard": (
        lambda folder: (shard(folder), (folder / SHARDS[1]).unlink()),
        "{model} lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names: copy or download it "
        "again",
    ),
    "stale index": (
        stale,
        "model.safetensors.index.json of {model} expects model.norm.bias and 1 more in "
        "model-00001-of-00002.safetensors, which has no such tensor: take the index and the weights from the same "
        "place",
    ),
    "NaN": (
        change(nan),
        "bad: the tensor model.layers.1.post_attention_layernorm.weight in model.safetensors holds numbers that are "
        "not finite: the weights are damaged; take an earlier version of them",
    ),
    "tokenizer larger than the embedding": (
        fewer_tokens,
        "the tokenizer of {model} makes token 259 ('<|im_start|>'), and model.embed_tokens.weight in model.safetensors "
        "has 259 rows: take the tokenizer of these weights, or resize the embedding",
    ),
    "no tokenizer": (
        without_tokenizer,
        "{model} has no tokenizer (tokenizer.json or tokenizer.model): copy it from the model that it was made of",
    ),
    "no quant_method": (
        config(quantization_config={"quant_method": None, "bits": 8}),
        "the quantization_config of its config.json names no quant_method, and its weights are float",
    ),
    "a file": (lambda folder: None, "{model}/model.safetensors is a file: name its folder, {model}"),
    "custom tokenizer": (
        tokenizer_of_its_own,
        "tokenizer_config.json of {model} needs code of its own (tokenization_own.py), and no code of a model is run: "
        "save the tokenizer as tokenizer.json, without auto_map",
    ),
    "LoRA": (
        adapter,
        "{model} is a LoRA adapter (adapter_config.json), no model: merge it into maker/base (merge_and_unload of "
        "peft), and name the folder of the merged model",
    ),
    "parallel StableLM": (
        config(model_type="stablelm", use_parallel_residual=True),
        "bad: cannot quantize the architecture 'stablelm': autoawq cannot do stablelm with use_parallel_residual; "
        f"llm-compressor can do {', '.join(sorted(RECIPES))}",
    ),
    "missing weights": (
        change(lambda tensors: tensors.pop(NORM)),
        f"bad: the weights do not fit their config.json: they lack {NORM}. Take both from the same place",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_thirteen_bad_checkpoints_give_thirteen_good_lines(
    forge: Forge, tmp_path: Path, model: Path, name: str
) -> None:
    """One line each, no traceback, nothing kept; and the weights are loaded only if what is wrong lies in them. A
    quantization_config without a method is the one that does no harm: the line is a warning."""
    edit, line = CHECKPOINTS[name]
    folder = Path(shutil.copytree(model, tmp_path / "bad"))
    edit(folder)
    source = folder / WHOLE if name == "a file" else folder
    early = name not in ("NaN", "missing weights", "no quant_method")
    opening = "from yaptext.quantize import source\ndef load(*_, **__): raise SystemExit('loaded')\nsource.load = load"
    before = f"{opening}\nfrom yaptext.quantize import verify\nverify.load = load" if early else ""
    status, events = Bench(forge, tmp_path / "state", source).run(before=before)
    if name == "no quant_method":
        assert status == 0 and f"quantize.config_ignored {line}" in events, events
        return
    size = (model / WHOLE).stat().st_size
    assert (status, events[-1]) == (2, "quantize.failed " + line.format(model=folder, size=size))
    told = ["quantize.begun no finished result", events[-1]]
    assert [event for event in events if event != "quantize.planned"] == told
    assert not list((tmp_path / "state" / "awq").glob("*/[0-9.]*"))


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (change(lambda tensors: tensors.pop(NORM)), "they lack"),
        (
            change(lambda tensors: tensors.update({"model.layers.0.mlp.up_proj.bias": torch.ones(512)})),
            "its model has no",
        ),
        (change(nan), "not finite"),
    ],
    ids=["missing", "unexpected", "NaN"],
)
def test_allow_worse_keeps_nothing_that_does_not_fit(
    forge: Forge, tmp_path: Path, model: Path, edit: Edit, line: str
) -> None:
    """It is about a result that was measured against the right model; and the refusal is remembered."""
    folder = Path(shutil.copytree(model, tmp_path / "bad"))
    edit(folder)
    bench = Bench(forge, tmp_path / "state", folder)
    status, events = bench.run("--allow-worse")
    assert status == 2 and line in events[-1] and not only(events, "quantize.layer")
    bench.check_clean(0)
    assert json.loads((bench.row / FAILED).read_text())["exit_status"] == 2
    assert bench.run("--allow-worse", "--when-wanted", QUANTIZATION="awq")[0] == 2


@pytest.mark.parametrize(
    ("edit", "line"),
    [
        (
            lambda folder: (shard(folder), (folder / SHARDS[1]).unlink()),
            "maker/model lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names: the hub's "
            "copy is the same; name another repository",
        ),
        (
            cut,
            "model.safetensors of maker/model is cut off after 100000 of {size} bytes: the hub's copy is the same; "
            "name another repository",
        ),
        (
            stale,
            "model.safetensors.index.json of maker/model expects model.norm.bias and 1 more in model-00001-of-00002",
        ),
        (adapter, "maker/model is a LoRA adapter (adapter_config.json), no model: merge it into maker/base "),
        (
            change(nan),
            "maker/model: the tensor model.layers.1.post_attention_layernorm.weight in model.safetensors holds",
        ),
    ],
    ids=["missing shard", "cut file", "stale index", "LoRA", "NaN"],
)
def test_a_model_of_the_hub_is_called_by_its_name(
    forge: Forge, tmp_path: Path, model: Path, hub: HubServer, edit: Edit, line: str
) -> None:
    """And not by its place in the cache; the remedy is another."""
    folder = Path(shutil.copytree(model, tmp_path / "bad"))
    edit(folder)
    hub.add("maker/model", {file.name: file.read_bytes() for file in folder.iterdir()})
    bench = Bench(forge, tmp_path / "state", "maker/model", HF_HOME=str(tmp_path / "hf"))
    status, events = bench.run()
    size = (model / WHOLE).stat().st_size
    assert status == 2 and events[-1].startswith("quantize.failed " + line.format(size=size)), events
    assert str(tmp_path) not in events[-1]


def test_the_weights_say_what_the_config_does_not(forge: Forge, tmp_path: Path, model: Path) -> None:
    """Float weights are quantized, whatever is within the folder's name; packed ones are refused."""
    folder = Path(shutil.copytree(model, tmp_path / "hawqeye-7b"))
    config(quantization_config={"quant_method": None})(folder)
    bench = Bench(forge, tmp_path / "state", folder)
    status, events = bench.run()
    assert status == 0, events
    bench.check_clean()
    change(lambda tensors: tensors.update({"x.qweight": torch.ones(8, 1).int(), "x.scales": torch.ones(1, 8)}))(folder)
    status, events = bench.run()
    assert status == 2 and "has awq weights already" in events[-1]


def test_what_is_beside_the_weights_is_kept_or_left_out_with_a_word(
    forge: Forge, tmp_path: Path, model: Path, hub: HubServer
) -> None:
    """More templates and Mistral's tokenizer byte for byte, in the manifest and on the hub; code of the model's own is
    named in the log, and no longer in config.json, where it would stop a loader that trusts code."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / kept.TEMPLATES).mkdir()
    more = {"additional_chat_templates/tool_use.jinja": "{{ tools }}", "tekken.json": '{"config": {}}'}
    for name, text in more.items():
        (folder / name).write_text(text)
    (folder / "modeling_own.py").write_text("raise SystemExit('it was run')")
    config(auto_map={"AutoConfig": "maker/other--configuration_own.C", "AutoModel": "modeling_own.M"})(folder)
    push = {"HF_TOKEN": "hf_aTokenOfTheTest", "HF_AWQ_PUSH": "1", "HF_AWQ_CHAT_REPO": "someone/own-awq"}
    bench = Bench(forge, tmp_path / "state", folder, **push)
    job = bench.start()
    left_out = [line for line in job.lines() if line["event"] == "quantize.left_out"]
    assert job.end() == 0, job.events
    assert left_out[0]["code"] == ["maker/other/configuration_own.py", "modeling_own.py"]
    found = bench.finished()
    bench.check_clean()
    for name, text in more.items():
        assert (found.folder / name).read_text() == text and name in found.manifest["files"]
        assert (found.folder / name).stat().st_mode & 0o777 == 0o644
    assert (found.folder / kept.TEMPLATES).stat().st_mode & 0o777 == 0o755
    assert not (found.folder / "modeling_own.py").exists()
    written = json.loads((found.folder / "config.json").read_text())
    assert "auto_map" not in written and written["model_type"] == "llama"
    there = hub.repos["someone/own-awq"].at("main")
    assert there is not None and set(more) <= set(there.files)
    (found.folder / kept.TEMPLATES / "tool_use.jinja").write_text("")
    _, events = bench.run(before="from yaptext.quantize import job; job.make = lambda *_: None", HF_AWQ_PUSH="0")
    assert only(events, "quantize.begun") == ["quantize.begun no finished result"], "a damaged template counts, too"


@pytest.mark.parametrize(
    ("auto_map", "files"),
    [
        (None, []),
        ("x", []),
        ({}, []),
        ({"AutoTokenizer": [None, "tokenization_x.XFast"]}, ["tokenization_x.py"]),
        ({"AutoTokenizer": ["tokenization_x.X", None], "AutoModel": "modeling_x.X"},
         ["modeling_x.py", "tokenization_x.py"]),
        ({"AutoConfig": "Own-er/Model-2.5--configuration_x.X"}, ["Own-er/Model-2.5/configuration_x.py"]),
        ({"AutoModel": 5, "AutoConfig": {"a": 1}}, []),
    ],
)  # fmt: skip
def test_the_code_that_a_config_names(tmp_path: Path, auto_map: Any, files: list[str]) -> None:
    """By file, also of another repository."""
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": auto_map}))
    assert kept.code(tmp_path / "config.json") == files
