"""engine/checkpoints.py, weight_kind.py, model_config.py: which checkpoint serves, its weights, what is refused."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from yaptext.engine import awq_results
from yaptext.engine.awq_results import FAILED
from yaptext.engine.checkpoints import Checkpoint, choose, wants_demo
from yaptext.engine.model_config import context_of
from yaptext.engine.weight_kind import kind_of
from yaptext.errors import SettingsError, StartError, StartRefused
from yaptext.settings import Settings

WHOLE = "model.safetensors"


def model(folder: Path, name: str = "model", **config: Any) -> str:
    """A model folder with this config."""
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def quantized(method: str) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method}}


def store(file: Path, tensors: dict[str, tuple[str, list[int]]], cut: int = 0) -> None:
    """A safetensors file of zeros, by its format: `cut` bytes are left out at its end."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + math.prod(shape) * {"F16": 2, "BF16": 2, "I32": 4, "F8_E4M3": 1}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    told = json.dumps(header).encode()
    file.write_bytes((len(told).to_bytes(8, "little") + told + bytes(end))[: -cut or None])


def chosen(source: str, device: str = "cpu", **variables: str) -> Checkpoint:
    return choose(Settings.load(CHAT_MODEL=source, YAP_TEXT_DEVICE=device, **variables), "chat")


# Which checkpoint


@pytest.mark.parametrize("name", ["CHAT_MODEL", "TOOL_MODEL", "AWQ_CHAT_MODEL", "AWQ_TOOL_MODEL"])
def test_the_demo_serves_where_no_model_is_named(name: str) -> None:
    """Whoever names one model means it."""
    assert wants_demo(Settings.load())
    assert not wants_demo(Settings.load(**{name: "some/model"}))


def test_the_demo_is_both_roles_and_says_so(tmp_path: Path) -> None:
    """The operator reads why this model serves."""
    folder = Path(model(tmp_path, max_position_embeddings=2048))
    for role in ("chat", "tool"):
        found = choose(Settings.load(YAP_TEXT_DEVICE="cpu"), role, folder)
        assert (found.source, found.kind, found.context) == (str(folder), "float", 2048)
        assert "demo" in found.reason


@pytest.mark.parametrize("role", ["chat", "tool"])
def test_an_awq_model_is_served_instead_of_the_plain_one(tmp_path: Path, role: Any) -> None:
    """AWQ_CHAT_MODEL and AWQ_TOOL_MODEL win, each for its role; the reason names the variable."""
    plain, awq = model(tmp_path, "plain"), model(tmp_path, "other", **quantized("awq"))
    name = role.upper()
    settings = Settings.load(YAP_TEXT_DEVICE="cpu", **{f"{name}_MODEL": plain})
    assert (choose(settings, role).source, choose(settings, role).reason) == (plain, f"{name}_MODEL")
    settings = Settings.load(YAP_TEXT_DEVICE="cpu", **{f"{name}_MODEL": plain, f"AWQ_{name}_MODEL": awq})
    found = choose(settings, role)
    assert (found.source, found.kind, found.reason) == (awq, "awq", f"AWQ_{name}_MODEL")


@pytest.mark.parametrize(("role", "other"), [("chat", "TOOL_MODEL"), ("tool", "CHAT_MODEL")])
def test_a_deployed_role_needs_its_model(role: Any, other: str) -> None:
    """The line names the variable that is missing, its AWQ form, and the deployment that needs it."""
    with pytest.raises(StartError) as caught:
        choose(Settings.load(**{other: "some/model"}), role)
    for words in (f"{role.upper()}_MODEL is not set", "DEPLOY_MODELS=both", f"AWQ_{role.upper()}_MODEL"):
        assert words in str(caught.value)


# What kind of weights


@pytest.mark.parametrize(
    ("name", "config", "kind"),
    [
        ("plain", {}, "float"),
        ("plain", quantized("awq"), "awq"),
        ("plain", quantized("gptq"), "gptq"),
        ("plain", quantized("gptq_marlin"), "gptq"),
        ("plain", quantized("fp8"), "fp8"),
        ("plain", {"quantization_config": None}, "float"),
        ("Impish-12B-AWQ", {}, "awq"),
        ("impish-12b-awq", {}, "awq"),
        ("Impish-12B-GPTQ-Int4", {}, "gptq"),
        ("Impish-12B-AWQ", quantized("gptq"), "gptq"),
        ("Impish-12B-GPTQ", quantized("awq"), "awq"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_finds_out_what_the_weights_are(
    tmp_path: Path, device: str, name: str, config: dict[str, Any], kind: str
) -> None:
    """The config decides; without weights the name does if it says nothing; float weights become FP8 on CUDA."""
    found = chosen(model(tmp_path, name, **config), device)
    online = kind == "float" and device == "cuda"
    assert (found.kind, found.online_fp8) == ("fp8" if online else kind, online)


_LINEAR = "model.layers.0.mlp.up_proj"
FLOAT = {f"{_LINEAR}.weight": ("BF16", [128, 256])}
AWQ = {
    f"{_LINEAR}.qweight": ("I32", [256, 16]),
    f"{_LINEAR}.qzeros": ("I32", [2, 16]),
    f"{_LINEAR}.scales": ("F16", [2, 128]),
}
GPTQ = {
    f"{_LINEAR}.qweight": ("I32", [32, 128]),
    f"{_LINEAR}.qzeros": ("I32", [2, 16]),
    f"{_LINEAR}.scales": ("F16", [2, 128]),
}
FP8 = {f"{_LINEAR}.weight": ("F8_E4M3", [128, 256]), f"{_LINEAR}.weight_scale": ("BF16", [1])}


@pytest.mark.parametrize(
    ("name", "tensors", "kind"),
    [
        ("hawqeye-7b", FLOAT, "float"),
        ("my-awq-experiments", FLOAT, "float"),
        ("Impish-12B-GPTQ", FLOAT, "float"),
        ("plain", AWQ, "awq"),
        ("Impish-12B-GPTQ", AWQ, "awq"),
        ("plain", GPTQ, "gptq"),
        ("Impish-12B-AWQ", GPTQ, "gptq"),
        ("plain", GPTQ | {f"{_LINEAR}.g_idx": ("I32", [256])}, "gptq"),
        ("plain", FP8, "fp8"),
        ("plain-awq", FP8, "fp8"),
    ],
)
@pytest.mark.parametrize("index", [False, True], ids=["whole", "sharded"])
def test_what_the_tensors_are_counts_more_than_the_name(
    tmp_path: Path, name: str, tensors: dict[str, Any], kind: str, index: bool
) -> None:
    """Where the config says nothing, or names no method: the server and the quantizer see the same."""
    for config in ({}, {"quantization_config": {"quant_method": None}}, {"quantization_config": [5]}):
        folder = Path(model(tmp_path, name, **config))
        file = "model-00001-of-00001.safetensors" if index else "model.safetensors"
        store(folder / file, tensors)
        if index:
            (folder / f"{WHOLE}.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(tensors, file)}))
        assert chosen(str(folder)).kind == kind
        shutil.rmtree(folder)


@pytest.mark.parametrize("name", ["hawqeye-7b", "Gawq", "awqward", "regptqed", "gptq4all"])
@pytest.mark.parametrize("source", ["{}", "/models/{}", "gptq-lab/{}", "awq.org/{}"])
def test_a_word_within_a_longer_one_is_none(name: str, source: str) -> None:
    """Nor is the name of the folder above, or of the hub's organisation."""
    assert kind_of(source.format(name), {}) == "float"


@pytest.mark.parametrize("config", [{}, quantized("awq")])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", bytes(9), b"\xff" * 99, None],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_broken_file_leaves_config_and_name(
    tmp_path: Path, name: str, content: bytes | None, config: dict[str, Any]
) -> None:
    """The kind is no place to fail: what reads the weights says what is wrong with them."""
    for word in ("plain", "some-awq"):
        folder = Path(model(tmp_path, word, **config))
        if content is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(content)
        assert kind_of(str(folder), config) == ("float" if word == "plain" and not config else "awq")


def test_a_header_is_not_read_past_its_file(tmp_path: Path) -> None:
    """Nor is a FIFO, which would never end."""
    folder = Path(model(tmp_path, "plain"))
    (folder / WHOLE).write_bytes((10**8).to_bytes(8, "little") + b"{" * 50)
    assert kind_of(str(folder), {}) == "float"
    (folder / WHOLE).unlink()
    os.mkfifo(folder / "x.safetensors")
    assert kind_of(str(folder), {}) == "float"


@pytest.mark.parametrize(("tensors", "kind"), [(FLOAT, "float"), (AWQ, "awq"), (GPTQ, "gptq")])
def test_of_a_hub_model_the_cache_counts(tmp_path: Path, tensors: dict[str, Any], kind: str) -> None:
    """What lies there of it: the weights or their index. Nothing is fetched for it; without them its name decides."""
    repo = tmp_path / "models--some--thing-gptq"
    snapshot = repo / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c0ffee")
    assert kind_of("some/thing-gptq", {}, tmp_path) == "gptq"
    assert kind_of("some/thing", {}, tmp_path) == "float"
    index = snapshot / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}))
    assert kind_of("some/thing-gptq", {}, tmp_path) == ("float" if kind == "float" else "gptq")
    index.unlink()
    store(snapshot / WHOLE, tensors)
    assert kind_of("some/thing-gptq", {}, tmp_path) == kind


def test_only_the_name_of_the_folder_counts(tmp_path: Path) -> None:
    """A model does not become AWQ by lying in a folder that is called so."""
    both = tmp_path / "awq-and-gptq"
    both.mkdir()
    assert chosen(model(both)).kind == "float"


def compressed(**scheme: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": scheme, "input_activations": None}}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ({"num_bits": 4, "type": "int", "symmetric": False, "group_size": 128}, "awq"),
        ({"num_bits": 8, "type": "float"}, "fp8"),
        ({"num_bits": 8, "type": "int"}, "other"),
        ({}, "other"),
    ],
)
def test_compressed_tensors_are_what_their_scheme_says(tmp_path: Path, scheme: dict[str, Any], kind: str) -> None:
    """llm-compressor's AWQ is one, and is taken where AWQ is asked for."""
    folder = model(tmp_path, **compressed(**scheme))
    assert chosen(folder).kind == kind
    settings = Settings.load(AWQ_TOOL_MODEL=folder, AWQ_CHAT_MODEL=folder, YAP_TEXT_DEVICE="cpu")
    for role in ("chat", "tool"):
        if kind == "awq":
            assert choose(settings, role).kind == "awq"
        else:
            with pytest.raises(StartError, match=f"AWQ_{role.upper()}_MODEL.* has {kind} weights"):
                choose(settings, role)


def test_a_gptq_chat_model_stands_beside_a_float_tool_model(tmp_path: Path) -> None:
    """QUANTIZATION=gptq is about the chat model, as in the guide; by role each says what it wants."""
    chat, tool = model(tmp_path, "chat", **quantized("gptq_marlin")), model(tmp_path, "tool")
    names = {"CHAT_MODEL": chat, "TOOL_MODEL": tool, "YAP_TEXT_DEVICE": "cuda"}
    settings = Settings.load(QUANTIZATION="gptq", **names)
    assert (choose(settings, "chat").kind, choose(settings, "tool").kind) == ("gptq", "fp8")
    settings = Settings.load(CHAT_QUANTIZATION="gptq", TOOL_QUANTIZATION="none", **names)
    assert (choose(settings, "chat").kind, choose(settings, "tool").kind) == ("gptq", "float")
    with pytest.raises(StartError, match=r"QUANTIZATION=gptq, but .* has float weights"):
        choose(Settings.load(TOOL_QUANTIZATION="gptq", **names), "tool")


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"n_positions": 1024}, 1024),
        ({"max_seq_len": 2048}, 2048),
        ({"seq_length": 32768}, 32768),
        ({"text_config": {"max_position_embeddings": 131072}}, 131072),
        ({"max_position_embeddings": 8192, "model_max_length": 131072}, 131072),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 4.0}}, 8192),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 2048),
        ({"max_position_embeddings": 131072, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 131072),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
        ({}, 8192),
    ],
)
def test_the_context_is_what_the_config_calls_it(config: dict[str, Any], context: int) -> None:
    """By the names that models have for it, as vLLM reads them."""
    assert context_of(config) == context


@pytest.mark.parametrize("method", ["compressed-tensors", "bitsandbytes", "mxfp4"])
def test_weights_quantized_in_another_way_are_not_quantized_again(tmp_path: Path, method: str) -> None:
    """What is quantized already is left to the engine, which reads the config too."""
    assert not chosen(model(tmp_path, **quantized(method)), "cuda").online_fp8


@pytest.mark.parametrize(
    ("wanted", "config", "kind"),
    [
        ("none", {}, "float"),
        ("none", quantized("fp8"), "fp8"),
        ("fp8", quantized("fp8"), "fp8"),
        ("awq", quantized("awq"), "awq"),
        ("gptq", quantized("gptq"), "gptq"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_asked_for_and_there_is_served(
    tmp_path: Path, device: str, wanted: str, config: dict[str, Any], kind: str
) -> None:
    """No weights change on the way."""
    found = chosen(model(tmp_path, **config), device, QUANTIZATION=wanted)
    assert (found.kind, found.online_fp8) == (kind, False)


@pytest.mark.parametrize(("device", "kind", "online"), [("cuda", "fp8", True), ("cpu", "float", False)])
def test_fp8_of_float_weights_is_made_on_cuda(tmp_path: Path, device: str, kind: str, online: bool) -> None:
    """On CPU, where it cannot be, float weights serve and the reason says so."""
    found = chosen(model(tmp_path), device, QUANTIZATION="fp8")
    assert (found.kind, found.online_fp8) == (kind, online)
    assert ("FP8 weights need CUDA" in found.reason) == (not online)


@pytest.mark.parametrize(
    ("wanted", "config"),
    [
        ("awq", {}),
        ("awq", quantized("gptq")),
        ("gptq", {}),
        ("gptq", quantized("awq")),
        ("none", quantized("awq")),
        ("fp8", quantized("gptq")),
    ],
)
def test_weights_that_are_not_what_was_asked_for_are_refused(
    tmp_path: Path, wanted: str, config: dict[str, Any]
) -> None:
    """The line says what was asked for, what is there, and what to do."""
    with pytest.raises(StartError) as caught:
        chosen(model(tmp_path, **config), QUANTIZATION=wanted)
    line = str(caught.value)
    assert line.startswith(f"QUANTIZATION={wanted}, but ")
    assert f"has {config['quantization_config']['quant_method'] if config else 'float'} weights: " in line


def fail(tmp_path: Path, source: str, content: str | None) -> Path:
    """Writes down, as the quantizer does, that `source` could not be quantized."""
    row = awq_results.row(tmp_path / "state", source)
    row.mkdir(parents=True)
    note = {
        "wanted": {"source": {"name": "plain", "revision": None, "content": content}},
        "reason": "AWQ is no better than plain rounding for plain",
        "exit_status": 2,
        "failed_at": "2026-02-03T04:05:06Z",
    }
    (row / FAILED).write_text(json.dumps(note))
    return row / FAILED


def refusal(tmp_path: Path, source: str, *, unit: bool) -> str:
    """The line of a start that wants AWQ weights of `source`."""
    place = {"STATE_DIRECTORY" if unit else "YAP_TEXT_STATE_DIR": str(tmp_path / "state")}
    with pytest.raises(StartRefused) as caught:
        chosen(source, QUANTIZATION="awq", **place)
    return str(caught.value)


@pytest.mark.parametrize(
    ("unit", "log"), [(True, "journalctl -u yap-text-quantize"), (False, "run `yap-text quantize --again`")]
)
def test_a_failed_quantization_is_the_reason(tmp_path: Path, unit: bool, log: str) -> None:
    """What the quantizer wrote down, when it was, and where the whole log is. Under systemd the line names no command
    that would write into another state folder. It is no start that a later try mends."""
    source = model(tmp_path, "plain")
    fail(tmp_path, source, awq_results.content(Path(source)))
    line = refusal(tmp_path, source, unit=unit)
    assert line == (
        f"QUANTIZATION=awq, but {source} has float weights: quantizing it failed at 2026-02-03T04:05:06Z: AWQ is no "
        f"better than plain rounding for plain. The whole log: {log}"
    )
    assert StartRefused.exit_status == 2


def test_a_unit_without_awq_weights_names_the_journal_of_the_other(tmp_path: Path) -> None:
    """If nothing was written down; by hand the command is the advice."""
    source = model(tmp_path, "plain")
    line = refusal(tmp_path, source, unit=True)
    assert f"no finished AWQ folder lies in {tmp_path}/state/awq. " in line
    assert "journalctl -u yap-text-quantize" in line and "yap-text quantize`" not in line
    assert "Run `yap-text quantize`, or name an AWQ checkpoint" in refusal(tmp_path, source, unit=False)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"wanted": 5}', '{"reason": "x"}', None])
def test_a_note_of_other_weights_or_none_is_no_reason(tmp_path: Path, content: str | None) -> None:
    """The folder holds another model by now, or the note is broken."""
    source = model(tmp_path, "plain")
    note = fail(tmp_path, source, "0123456789abcdef")
    if content is not None:
        note.write_text(content)
    assert "no finished AWQ folder lies in " in refusal(tmp_path, source, unit=True)


@pytest.mark.parametrize(
    ("config", "context"),
    [
        ({"max_position_embeddings": 4096}, 4096),
        ({"text_config": {"max_position_embeddings": 32768}, "max_position_embeddings": 1}, 32768),
        ({}, 8192),
    ],
)
def test_the_context_is_the_models_own(tmp_path: Path, config: dict[str, Any], context: int) -> None:
    """Models that see keep it one level deeper; one that does not say has 8192."""
    assert chosen(model(tmp_path, **config)).context == context


# Reading it


@pytest.mark.parametrize("content", [None, "", "{", "[]", "5"])
def test_a_folder_without_a_config_is_no_model(tmp_path: Path, content: str | None) -> None:
    """The line names the folder."""
    path = tmp_path / "model"
    path.mkdir()
    if content is not None:
        (path / "config.json").write_text(content)
    with pytest.raises(StartError, match=str(path)):
        chosen(str(path))


@pytest.mark.parametrize("source", ["/no/such/folder", "./no-such-folder", "~/no-such-folder"])
def test_a_path_is_not_looked_for_on_the_hub(source: str) -> None:
    """Who writes a path means a folder."""
    with pytest.raises(StartError, match=rf"^{source} is not a folder \(CHAT_MODEL\)$"):
        chosen(source)


def test_a_file_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names its folder."""
    folder = Path(model(tmp_path))
    (folder / WHOLE).write_bytes(b"")
    with pytest.raises(StartError, match=rf"^{folder}/{WHOLE} is a file \(CHAT_MODEL\): name its folder, {folder}$"):
        chosen(f"{folder}/{WHOLE}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StartError, match=rf"^model/{WHOLE} is a file \(CHAT_MODEL\): name its folder, model$"):
        chosen(f"model/{WHOLE}")


@pytest.mark.parametrize("closed", ["", "model", "model/config.json"])
def test_what_is_closed_is_named_with_how_to_open_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str
) -> None:
    """The first part of the path, be it above the model."""
    place, access = tmp_path / closed if closed else tmp_path, os.access
    source = model(tmp_path)

    def reads(*_: Any, **__: Any) -> str:
        raise PermissionError(13, "Permission denied", f"{source}/config.json")

    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != place and access(path, mode))
    monkeypatch.setattr(Path, "read_text", reads)
    how = "o+r" if closed.endswith("json") else "o+rx"
    with pytest.raises(StartError, match=rf"\(CHAT_MODEL\).*{place} is closed to .*: chmod {re.escape(how)} {place}$"):
        chosen(str(source))


class Hub:
    """Stands in for the hub client: one file, or an error."""

    def __init__(self, answer: str | Exception) -> None:
        self.answer = answer
        self.asked: list[tuple[Any, ...]] = []

    def download(self, repo: str, file: str, *, token: str | None) -> str:
        self.asked.append((repo, file, token))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize("token", [None, "hf_secret"])
def test_a_hub_model_is_asked_for_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    """With the token where there is one. If only the name says that the weights are quantized, their index is asked
    for, too, and no more."""
    hub = Hub(f"{model(tmp_path)}/config.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    found = chosen("yapwithai/impish-12b-awq", **({"HF_TOKEN": token} if token else {}))
    assert (found.source, found.kind) == ("yapwithai/impish-12b-awq", "awq")
    files = ["config.json", "model.safetensors.index.json"]
    assert hub.asked == [("yapwithai/impish-12b-awq", file, token) for file in files]
    hub.asked.clear()
    assert chosen("yapwithai/hawqeye-12b", **({"HF_TOKEN": token} if token else {})).kind == "float"
    assert hub.asked == [("yapwithai/hawqeye-12b", "config.json", token)]


def test_a_line_end_after_the_token_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a file leaves it; a token that cannot be sent is refused before the client quotes it."""
    hub = Hub(f"{model(tmp_path)}/config.json")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    chosen("some/model", HF_TOKEN=" hf_secret\n")
    assert hub.asked == [("some/model", "config.json", "hf_secret")]
    for token in ("hf_se\ncret", "hf_se cret", "hf_s\u00e9cret"):
        with pytest.raises(
            SettingsError, match=r"^HF_TOKEN=\(hidden\) is not allowed: a token is one word of printable"
        ):
            chosen("some/model", HF_TOKEN=token)
    assert len(hub.asked) == 1


@pytest.mark.parametrize(
    ("error", "detail"), [(OSError("\n401 Unauthorized\nlong story"), "401 Unauthorized"), (KeyError(), "KeyError")]
)
def test_what_the_hub_refuses_ends_the_start_with_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, detail: str
) -> None:
    """The model and the first line of the reason; never the token."""
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Hub(error).download)
    with pytest.raises(StartError) as caught:
        chosen("some/model", HF_TOKEN="hf_secret")
    assert str(caught.value) == f"cannot read the config of some/model (CHAT_MODEL): {detail}"
