"""hub.py against a hub on loopback, by the real client in processes of its own: what it reads at import stays there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from quantize.hub_server import TOKEN, Account, Fault, HubServer, sha256

from yaptext.engine.hub_client import PAUSES_S
from yaptext.quantize.hub import log_progress

pytestmark = pytest.mark.subprocess
SHARDS = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 300_000 for n in (1, 2)}
INDEX = json.dumps({"weight_map": {f"layer{n}": name for n, name in enumerate(SHARDS)}}).encode()
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": INDEX,
    "README.md": b"# A model\n",
    "LICENSE": b"Apache-2.0\n",
    **SHARDS,
}
MORE = {"additional_chat_templates/tool_use.jinja": b"{{ tools }}", "tekken.json": b"{}"}
"""What some models have besides."""
BALLAST = {
    "pytorch_model.bin": b"pickle",
    "model-Q4_K_M.gguf": b"GGUF",
    "onnx/model.onnx": b"onnx",
    "original/model.safetensors": b"twice",
    "consolidated.safetensors": b"thrice",
    "plot.png": b"PNG",
}

# Imports once and then forks, so that every call is a process of its own without a second of imports.
CHILD = """
import json, os, sys, time
from types import SimpleNamespace
from pathlib import Path
import huggingface_hub._snapshot_download, huggingface_hub.hf_api, huggingface_hub._commit_api
from yaptext.engine import download
from yaptext.engine import hub_client as engine_hub
from yaptext.observe import logs
from yaptext.quantize import hub
from yaptext.settings import Settings

def run(job):
    os.dup2(os.open(job["log"], os.O_WRONLY | os.O_CREAT), 2)
    logs.configure(level="info", format="json", journald=False)
    time.sleep = lambda _: None  # the pauses of the client, which has tries of its own within each of ours
    for name, value in job["patch"].items():
        setattr(engine_hub, name, value)
    if "free" in job:
        download.shutil.disk_usage = lambda _: SimpleNamespace(free=job["free"])
    pauses, progress, result = [], [], {}
    given = {"pause": pauses.append} if job["call"] != "cached_revision" else {}
    if job["progress"]:
        given["progress"] = lambda *bytes: progress.append(bytes)
    if "stop" in job:
        def stop(done, total):
            if done > job["stop"]:
                raise OSError(job["errno"], os.strerror(job["errno"])) if "errno" in job else KeyboardInterrupt
        given["progress"] = stop
    huggingface_hub.constants.HF_HUB_OFFLINE = job.get("offline", False)
    arguments = job["arguments"]
    if job["call"] == "upload":
        arguments[0] = Path(arguments[0])
    elif job["call"] == "check":
        given |= {"roles": job.get("roles")}
    try:
        result["value"] = getattr(hub, job["call"])(*arguments, settings=Settings.load(**job["settings"]), **given)
    except BaseException as error:
        result |= {"error": type(error).__name__, "text": str(error), "repr": repr(error)}
    print(json.dumps({**result, "pauses": pauses, "progress": progress}, default=str), flush=True)

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            run(json.loads(line))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    print("end", flush=True)
"""


@dataclass
class Result:
    """How a call ended: `value`, or the name and the text of its `error`."""

    journal: str
    pauses: list[float]
    progress: list[list[int]]
    value: Any = None
    error: str | None = None
    text: str = ""
    repr: str = ""

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.journal.splitlines()]

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == name]

    def refuses(self, *words: str, kind: str = "SettingsError") -> None:
        """One line that says `words`, at the first try."""
        assert (self.error, self.pauses) == (kind, []), (self.error, self.text, self.pauses)
        assert "\n" not in self.text
        for word in words:
            assert word in self.text, self.text


class Client:
    """Calls functions of hub.py on one hub, with a cache that is empty at first."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self.folder, self.cache = process, folder, folder / "hf" / "hub"
        self.settings: dict[str, Any] = {"HF_HOME": str(folder / "hf")}

    def __call__(self, call: str, *arguments: str, progress: bool = False, **options: Any) -> Result:
        """`options` in capitals are settings, the others are the child's; one that is None is left out."""
        job: dict[str, Any] = {"call": call, "arguments": arguments, "progress": progress, "patch": {}}
        settings = self.settings | {name: value for name, value in options.items() if name.isupper()}
        job["settings"] = {name: value for name, value in settings.items() if value is not None}
        job["log"] = str(self.folder / "journal")
        Path(job["log"]).write_text("")
        job |= {name: value for name, value in options.items() if not name.isupper()}
        assert self._process.stdin and self._process.stdout
        print(json.dumps(job), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        journal = Path(job["log"]).read_text()
        assert answer != "end\n", journal
        assert self._process.stdout.readline() == "end\n"
        result = Result(journal=journal, **json.loads(answer))
        assert TOKEN not in f"{journal}{result.text}{result.repr}"
        assert "SIGNED" not in f"{journal}{result.text}{result.repr}"
        return result


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture(scope="module")
def process(server: HubServer) -> Iterator[subprocess.Popen[str]]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", CHILD], env=environment, text=True, **pipes) as child:
        yield child
        assert child.stdin
        child.stdin.close()


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    server.reset()
    server.accounts[TOKEN] = Account("ann", orgs={"makers": "write", "readers": "read"})
    return server


@pytest.fixture
def client(hub: HubServer, process: subprocess.Popen[str], tmp_path: Path) -> Client:
    return Client(process, tmp_path)


# --- download


def test_a_model_comes_with_what_quantizing_needs(hub: HubServer, client: Client) -> None:
    """Weights, tokenizer, template, configs, card and licence; no pickles, no GGUF, no second export, no picture."""
    commit = hub.add("maker/model", MODEL | BALLAST).branches["main"][-1]
    result = client("download", "maker/model")
    folder, revision = result.value
    assert {file.name: file.read_bytes() for file in Path(folder).iterdir()} == MODEL
    assert revision == commit.sha
    assert [line["revision"] for line in result.events("hub.downloaded")] == [commit.sha]
    assert not [request for name in BALLAST for request in hub.asked(re.escape(name))]


def test_more_templates_come_along(hub: HubServer, client: Client) -> None:
    """The one folder of a repository that is read, with Mistral's own tokenizer; the other folders are ballast."""
    hub.add("maker/model", MODEL | MORE | BALLAST)
    folder = Path(client("download", "maker/model").value[0])
    files = {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    assert files == MODEL | MORE


def test_a_folder_is_taken_as_it_is(hub: HubServer, client: Client) -> None:
    """Nothing is asked, and it has no revision; but it has to hold weights, and no pickles."""
    source = client.folder / "model"
    source.mkdir()
    for name, data in MODEL.items():
        (source / name).write_bytes(data)
    assert client("download", str(source)).value == [str(source), None]
    (source / "model.safetensors.index.json").write_text("{")
    assert client("download", str(source)).error is None, "what is wrong with it is said by checkpoint.py"
    (source / "model.safetensors.index.json").unlink()
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    client("download", str(source)).refuses(
        f"{source} has no model.safetensors, whole or in shards", kind="QuantizeRefused"
    )
    assert hub.requests == []


def test_a_private_model_comes_with_the_token(hub: HubServer, client: Client) -> None:
    """HF_TOKEN goes with every request; a line end after it, from a file, does no harm."""
    hub.add("ann/model", MODEL, private=True)
    assert client("download", "ann/model", HF_TOKEN=TOKEN + "\n").error is None
    client("download", "ann/model").refuses("ann/model is not on the hub, or is private and needs HF_TOKEN")


def test_what_does_not_pass_is_not_tried_again(hub: HubServer, client: Client) -> None:
    """Missing, gated, wrong token, no name at all: one clear line each, after one request of its kind."""
    client("download", "maker/nothing", HF_TOKEN=TOKEN).refuses("maker/nothing is not on the hub", "may not see it")
    assert len(hub.asked("GET /api/models/maker/nothing")) == 1
    hub.add("maker/gated", MODEL, gated=True)
    for token in (None, TOKEN):
        client("download", "maker/gated", HF_TOKEN=token).refuses(
            "maker/gated is gated", "accept its terms", "HF_TOKEN"
        )
    client("download", "maker/gated", HF_TOKEN="hf_other").refuses("HF_TOKEN is not valid")
    client("download", "no/such/name").refuses("no/such/name is neither a folder nor")
    client("download", "maker/gated", HF_TOKEN="two words").refuses("HF_TOKEN=(hidden)")
    hub.repos["maker/gated"].admitted.add("ann")
    assert client("download", "maker/gated", HF_TOKEN=TOKEN).error is None


def test_a_model_without_safetensors_is_refused(hub: HubServer, client: Client) -> None:
    """As is one whose index names a shard that is not there; pickles are not fetched instead."""
    hub.add("maker/pickle", {"config.json": b"{}", "pytorch_model.bin": b"pickle"})
    client("download", "maker/pickle").refuses("maker/pickle has no model.safetensors", kind="QuantizeRefused")
    hub.add("maker/half", {name: data for name, data in MODEL.items() if "00002-of" not in name})
    hub.requests.clear()
    client("download", "maker/half").refuses(
        "maker/half lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names: the hub's "
        "copy is the same; name another repository",
        kind="QuantizeRefused",
    )
    assert not hub.asked("^GET .*safetensors$"), "before the other shards are fetched"


def test_a_full_disk_is_noticed_before_the_download(hub: HubServer, client: Client) -> None:
    """The line has what is needed and what is free; where it fills up all the same, nothing is tried again."""
    hub.add("maker/model", MODEL)
    client("download", "maker/model", free=1000).refuses(
        f"maker/model needs 600.1 kB more in {client.cache}, and 1.0 kB are free", "HF_HOME", kind="QuantizeDelayed"
    )
    assert not hub.asked("^GET .*safetensors$")
    client("download", "maker/model", stop=1000, errno=errno.ENOSPC).refuses(
        "maker/model: OSError: [Errno 28] No space", f"Free some of {client.cache}", kind="QuantizeDelayed"
    )


def test_a_broken_stream_goes_on_where_it_broke(hub: HubServer, client: Client) -> None:
    """The connection ends in the middle of the weights: the rest comes by a Range, and the bytes are the same."""
    weights = os.urandom(24_000_000)
    hub.add("maker/model", {"config.json": b"{}", "model.safetensors": weights})
    hub.faults.append(Fault("^GET .*/model.safetensors", cut=15_000_000))
    result = client("download", "maker/model")
    assert (Path(result.value[0]) / "model.safetensors").read_bytes() == weights
    first, second = [request.range for request in hub.asked("^GET .*/model.safetensors")]
    assert first is None and second is not None
    (broken,) = result.events("download.broken")
    assert second == f"bytes={broken['at_bytes']}-" and 13_900_000 < broken["at_bytes"] <= 15_000_000
    assert result.pauses == []


def test_the_next_try_keeps_whole_files(hub: HubServer, client: Client) -> None:
    """A reset ends the first try; the second fetches the broken shard alone."""
    hub.add("maker/model", MODEL)
    hub.faults.append(Fault("^GET .*00002-of", cut=1000, reset=True))
    result = client("download", "maker/model", progress=True)
    assert result.error is None and result.pauses == [PAUSES_S[0]]
    assert [len(hub.asked(f"^GET .*{name}")) for name in SHARDS] == [1, 2]
    retry = result.events("hub.retry")[0]
    assert retry["repo"] == "maker/model" and "reset" in retry["error"]


def test_progress_goes_from_what_is_there_to_the_end(hub: HubServer, client: Client) -> None:
    """Bytes done and bytes in all; what was fetched before, as the index is, counts from the first call on."""
    hub.add("maker/model", MODEL)
    total = sum(map(len, set(MODEL.values())))  # what two files hold comes once
    progress = client("download", "maker/model", progress=True).progress
    done = [done for done, _ in progress]
    assert {total for _, total in progress} == {total}
    assert done == sorted(set(done)) and (done[0], done[-1]) == (len(INDEX), total)
    shard = next(iter(SHARDS))
    link = next(client.cache.glob(f"*/snapshots/*/{shard}"))
    link.resolve().unlink()
    link.unlink()
    there = total - len(SHARDS[shard])
    assert client("download", "maker/model", progress=True).progress == [[there, total], [total, total]]
    assert client("download", "maker/model", progress=True).progress == []


def test_the_journal_has_lines_and_nothing_else(hub: HubServer, client: Client) -> None:
    """No bar of the client stands between the JSON lines."""
    hub.add("maker/model", MODEL)
    result = client("download", "maker/model")
    total, files = sum(map(len, set(MODEL.values()))), len(set(MODEL.values())) - 1  # the index came before
    (first,), (last,) = result.events("download.started"), result.events("download.finished")
    named = {"models": ["maker/model"], "files": files, "bytes": total}
    assert (named | {"there_bytes": len(INDEX)}).items() <= first.items()
    assert (named | {"bytes": total - len(INDEX)}).items() <= last.items()
    told = {line["file"]: line["bytes"] for line in result.events("download.file")}
    assert len(told) == files and all(len(MODEL[name]) == bytes_ for name, bytes_ in told.items())
    events = {"download.started", "download.file", "download.finished", "hub.downloaded"}
    assert {line["event"] for line in result.lines} == events
    assert {line["event"] for line in client("download", "maker/model").lines} == {"hub.downloaded"}


def test_a_line_every_ten_seconds_says_how_long_it_takes() -> None:
    """By the speed of this run: what was there before does not count into it."""
    import structlog

    now = iter([0.0, 4.0, 10.0, 15.0, 20.0, 21.0])
    tell = log_progress("hub.uploading", "maker/model", clock=lambda: next(now))
    with structlog.testing.capture_logs() as lines:
        for done in (500, 510, 520, 600, 700, 1000):
            tell(done, 1000)
    assert [(line["done_bytes"], line["left_s"]) for line in lines] == [(500, None), (520, 240), (700, 30), (1000, 0)]


def test_three_tries_and_then_a_line(hub: HubServer, client: Client) -> None:
    """A hub out of order is asked three times, with growing pauses between."""
    hub.add("maker/model", MODEL)
    hub.faults.append(Fault("/api/models/maker/model", times=99, status=503))
    result = client("download", "maker/model")
    assert (result.error, result.pauses) == ("QuantizeDelayed", list(PAUSES_S))
    assert result.text == "the hub cannot be reached for maker/model: 503 out of order"
    assert len(hub.asked("GET /api/models/maker/model")) == 3
    assert [line["pause_s"] for line in result.events("hub.retry")] == list(PAUSES_S)


def test_a_silent_hub_does_not_hang_the_job(hub: HubServer, client: Client) -> None:
    """The client would wait for ever: a limit holds for every request."""
    hub.faults.append(Fault("/api/models/maker/model", times=3))
    result = client("download", "maker/model", patch={"SILENCE_S": 0.2})
    assert result.error == "QuantizeDelayed" and "cannot be reached" in result.text and "timed out" in result.text


def test_without_a_hub_the_cache_serves(hub: HubServer, client: Client) -> None:
    """A whole model is taken at once, with a warning; half a model and none end after three tries."""
    hub.add("maker/model", MODEL)
    hub.add("maker/half", MODEL)
    whole = client("download", "maker/model").value
    assert client("peek_config", "maker/half").value == {"model_type": "llama"}
    with hub.down():
        result = client("download", "maker/model")
        assert result.value == whole and result.pauses == []
        assert [line["cached"] for line in result.events("hub.unreachable")] == [whole[1]]
        assert client("peek_config", "maker/half").value == {"model_type": "llama"}
        shutil.rmtree(client.cache / "models--maker--half" / "trees")  # older clients kept no lists of files
        for name in ("maker/half", "maker/none"):
            result = client("download", name)
            assert (result.error, result.pauses) == ("QuantizeDelayed", list(PAUSES_S))
            assert result.text.startswith(f"the hub cannot be reached for {name}: ") and "refused" in result.text


def test_an_offline_client_does_not_ask(hub: HubServer, client: Client) -> None:
    """HF_HUB_OFFLINE=1: the cache or an error at once."""
    hub.add("maker/model", MODEL)
    whole = client("download", "maker/model").value
    hub.requests.clear()
    assert client("download", "maker/model", offline=True).value == whole
    client("download", "maker/other", offline=True).refuses("maker/other", "HF_HUB_OFFLINE", kind="QuantizeDelayed")
    assert hub.requests == []


def test_a_download_ends_where_its_progress_does(hub: HubServer, client: Client) -> None:
    """How a job that is told to stop gets its files on their way to stop, too; the next run begins there."""
    weights = os.urandom(40_000_000)
    hub.add("maker/model", {"config.json": b"{}", "model.safetensors": weights})
    assert client("download", "maker/model", stop=15_000_000).error == "KeyboardInterrupt"
    (part,) = client.cache.glob("*/blobs/*.incomplete")
    there = part.stat().st_size
    assert 15_000_000 <= there < 17_000_000
    result = client("download", "maker/model", progress=True)
    assert result.error is None and result.progress[0] == [there + 2, 40_000_002]
    assert hub.asked("^GET .*/model.safetensors")[-1].range == f"bytes={there}-"
    assert (Path(result.value[0]) / "model.safetensors").read_bytes() == weights and not part.exists()


def test_a_peek_fetches_config_and_index_alone(hub: HubServer, client: Client) -> None:
    """Before gigabytes: kind and architecture, and what is no model at all."""
    hub.add("maker/model", MODEL)
    assert client("peek_config", "maker/model").value == {"model_type": "llama"}
    files = {request.path.split("/")[-1] for request in hub.asked("resolve")}
    assert files == {"config.json", "model.safetensors.index.json"}
    hub.add("maker/lora", {"adapter_config.json": b'{"base_model_name_or_path": "maker/model"}', **SHARDS})
    client("peek_config", "maker/lora").refuses(
        "maker/lora is a LoRA adapter (adapter_config.json), no model: merge it into maker/model",
        kind="QuantizeRefused",
    )
    assert not hub.asked("lora/resolve.*safetensors")
    hub.add("maker/gguf", BALLAST)
    client("peek_config", "maker/gguf").refuses(
        "maker/gguf has no config.json", "no model to quantize", kind="QuantizeRefused"
    )
    client("peek_config", str(client.folder)).refuses(f"{client.folder} has no config.json", kind="QuantizeRefused")


def test_the_cached_revision_is_known_without_asking(hub: HubServer, client: Client) -> None:
    """None at first and for folders, then the commit that the download saw."""
    hub.add("maker/model", MODEL)
    assert client("cached_revision", "maker/model").value is None
    assert client("cached_revision", str(client.folder)).value is None
    revision = client("download", "maker/model").value[1]
    hub.requests.clear()
    assert client("cached_revision", "maker/model").value == revision
    assert hub.requests == []


def test_the_cached_revision_loads_next_to_nothing(tmp_path: Path) -> None:
    """In a new process that is given HF_HOME: no HTTP, no torch, and none of the client but its constants."""
    repo = tmp_path / "hub" / "models--maker--model"
    (repo / "snapshots" / "c0ffee").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("c0ffee")
    code = """
import sys
from yaptext.quantize.hub import cached_revision
from yaptext.settings import Settings
settings, before = Settings.load(), set(sys.modules)
print(cached_revision("maker/model", settings), *sorted(set(sys.modules) - before))
print([name for name in ("httpx", "httpx2", "torch", "transformers", "tqdm") if name in sys.modules])
"""
    ended = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stdout == "c0ffee huggingface_hub.constants\n[]\n", ended.stdout + ended.stderr


# --- check

PUSH = {
    "HF_AWQ_PUSH": "1",
    "HF_TOKEN": TOKEN,
    "DEPLOY_MODELS": "chat",
    "CHAT_MODEL": "maker/model",
    "HF_AWQ_CHAT_REPO": "ann/model-awq",
}


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"HF_TOKEN": None}, "HF_AWQ_PUSH=1 needs HF_TOKEN"),
        ({"HF_TOKEN": "hf_a b"}, "HF_TOKEN=(hidden) is not allowed"),
        ({"HF_AWQ_CHAT_REPO": None}, "HF_AWQ_PUSH=1 needs HF_AWQ_CHAT_REPO"),
        ({"DEPLOY_MODELS": "both"}, "HF_AWQ_PUSH=1 needs HF_AWQ_TOOL_REPO"),
        ({"HF_AWQ_CHAT_REPO": "model-awq"}, "HF_AWQ_CHAT_REPO='model-awq' is not allowed: write owner/name"),
        ({"HF_AWQ_CHAT_REPO": "a/b/c"}, "HF_AWQ_CHAT_REPO='a/b/c' is not allowed"),
        ({"HF_AWQ_CHAT_REPO": "ann/two--dashes"}, "HF_AWQ_CHAT_REPO='ann/two--dashes' is not allowed"),
        ({"HF_AWQ_CHAT_REPO": "ann/model.git"}, "HF_AWQ_CHAT_REPO='ann/model.git' is not allowed"),
        ({"HF_AWQ_CHAT_REPO": "ann/" + "x" * 93}, "is not allowed"),
        ({"HF_AWQ_CHAT_REPO": "maker/model"}, "HF_AWQ_CHAT_REPO=maker/model is a float model's own repository"),
        ({"HF_AWQ_BRANCH": "a branch"}, "HF_AWQ_BRANCH='a branch' is not allowed"),
        (
            {"DEPLOY_MODELS": "both", "TOOL_MODEL": "maker/tool", "HF_AWQ_TOOL_REPO": "ann/model-awq"},
            "HF_AWQ_CHAT_REPO and HF_AWQ_TOOL_REPO are both ann/model-awq, but the models differ",
        ),
    ],
)
def test_a_wrong_variable_is_told_without_the_hub(
    hub: HubServer, client: Client, settings: dict[str, Any], told: str
) -> None:
    """One line that names it, and no request."""
    client("check", **(PUSH | settings)).refuses(told)
    assert hub.requests == []


def test_all_that_is_wrong_is_told_at_once(hub: HubServer, client: Client) -> None:
    """A line each: who mends one need not wait for the next."""
    none = {"HF_AWQ_CHAT_REPO": None, "HF_TOKEN": None, "HF_AWQ_BRANCH": "a branch", "DEPLOY_MODELS": "both"}
    result = client("check", **(PUSH | none))
    assert (result.error, result.pauses) == ("SettingsError", [])
    assert result.text.splitlines() == [
        "HF_AWQ_PUSH=1 needs HF_TOKEN: a token that may write",
        "HF_AWQ_PUSH=1 needs HF_AWQ_CHAT_REPO: where to push the chat model",
        "HF_AWQ_PUSH=1 needs HF_AWQ_TOOL_REPO: where to push the tool model",
        "HF_AWQ_BRANCH='a branch' is not allowed: git has no such branches",
    ]
    assert hub.requests == []
    absent = {"HF_AWQ_TOOL_REPO": "firm/tool-awq", "HF_AWQ_CHAT_REPO": "others/awq", "DEPLOY_MODELS": "both"}
    assert client("check", **(PUSH | absent)).text.splitlines() == [
        "HF_AWQ_CHAT_REPO=others/awq cannot be created: ann, whose token HF_TOKEN is, is no member of others",
        "HF_AWQ_TOOL_REPO=firm/tool-awq cannot be created: ann, whose token HF_TOKEN is, is no member of firm",
    ]


def test_without_push_nothing_is_checked(hub: HubServer, client: Client) -> None:
    """Whatever the companions say."""
    assert client("check", **(PUSH | {"HF_AWQ_PUSH": "0", "HF_AWQ_CHAT_REPO": "?", "HF_TOKEN": None})).error is None
    assert hub.requests == []


@pytest.mark.parametrize(
    ("account", "settings", "told"),
    [
        (None, {}, "HF_TOKEN is not valid"),
        (Account("ann", role="read"), {}, "HF_TOKEN is a read token"),
        (
            Account("ann"),
            {"HF_AWQ_ALLOW_CREATE": "0"},
            "ann/model-awq is not on the hub: create it, or set HF_AWQ_ALLOW",
        ),
        (
            Account("ann"),
            {"HF_AWQ_CHAT_REPO": "others/model-awq"},
            "ann, whose token HF_TOKEN is, is no member of others",
        ),
        (Account("ann", orgs={"firm": "read"}), {"HF_AWQ_CHAT_REPO": "firm/awq"}, "ann may only read in firm"),
        (Account("ann"), {"HF_AWQ_CHAT_REPO": "maker/other"}, "HF_TOKEN may not write to maker/other"),
        (Account("ann", role="fineGrained", scopes={"ann": ["repo.content.read"]}), {}, "has no permission repo.write"),
        (
            Account("ann", role="fineGrained", scopes={"ann/some": ["repo.write"]}),
            {},
            "ann/model-awq cannot be created: HF_TOKEN has no permission repo.write for ann",
        ),
    ],
)
def test_a_push_that_would_fail_is_told_before_the_work(
    hub: HubServer, client: Client, account: Account | None, settings: dict[str, Any], told: str
) -> None:
    """Wrong token, read token, no rights in the namespace or on the repository, a repository that has to be there."""
    hub.accounts = {TOKEN: account} if account else {}
    hub.add("maker/other", MODEL)
    client("check", **(PUSH | settings)).refuses(told)
    assert not hub.asked("^(POST|PUT) ")


@pytest.mark.parametrize(
    ("account", "repo"),
    [
        (Account("ann"), "ann/new"),
        (Account("ann"), "ann/there"),
        (Account("ann", orgs={"firm": "contributor"}), "firm/new"),
        (Account("ann", role="fineGrained", scopes={"firm": ["repo.write"]}), "firm/new"),
        (Account("ann", role="fineGrained", scopes={"ann/there": ["repo.write"]}), "ann/there"),
    ],
)
def test_a_push_that_can_work_passes(hub: HubServer, client: Client, account: Account, repo: str) -> None:
    """And the check itself changes nothing on the hub."""
    hub.accounts = {TOKEN: account}
    hub.add("ann/there", MODEL)
    result = client("check", **(PUSH | {"HF_AWQ_CHAT_REPO": repo}))
    assert result.error is None, result.text
    assert not hub.asked("^(POST|PUT) ")


def test_only_what_is_quantized_needs_a_repository(hub: HubServer, client: Client) -> None:
    """Both are deployed, and the tool model is pre-quantized: the job names its roles."""
    assert client("check", roles=["chat"], **(PUSH | {"DEPLOY_MODELS": "both"})).error is None


def test_one_model_for_both_roles_may_have_one_repository(hub: HubServer, client: Client) -> None:
    """The same folder goes there twice, the second time without a commit."""
    both = {"DEPLOY_MODELS": "both", "TOOL_MODEL": "maker/model", "HF_AWQ_TOOL_REPO": "ann/model-awq"}
    assert client("check", **(PUSH | both)).error is None


def test_a_hub_that_cannot_be_asked_ends_the_check(hub: HubServer, client: Client) -> None:
    """After three tries, as an error that is not the variables'."""
    with hub.down():
        result = client("check", **PUSH)
    assert (result.error, result.pauses) == ("QuantizeDelayed", list(PAUSES_S))


# --- upload

AWQ = {
    "config.json": b'{"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}',
    "README.md": b"---\nlicense: apache-2.0\n---\n# AWQ\n",
    "model.safetensors.index.json": INDEX,
    "error.png": bytes(range(256)),
    **SHARDS,
}


@pytest.fixture
def folder(client: Client) -> str:
    made = client.folder / "awq"
    made.mkdir()
    for name, data in AWQ.items():
        (made / name).write_bytes(data)
    client.settings |= PUSH
    return str(made)


def stored(hub: HubServer, repo: str = "ann/model-awq", branch: str = "main") -> dict[str, bytes]:
    files = hub.repos[repo].branches[branch][-1].files
    return {path: file.data for path, file in files.items() if path != ".gitattributes"}


@pytest.mark.parametrize("private", [True, False])
def test_an_upload_creates_its_repository(hub: HubServer, client: Client, folder: str, private: bool) -> None:
    """Private or public, with the same bytes, in one commit whose message names model and settings."""
    result = client("upload", folder, "chat", HF_AWQ_PRIVATE=str(int(private)))
    assert result.error is None, result.text
    repo = hub.repos["ann/model-awq"]
    commits = repo.branches["main"]
    assert repo.private is private and stored(hub) == AWQ and len(commits) == 2
    assert commits[-1].message == "Upload model as AWQ, 4 bits in groups of 128"
    assert result.value == [f"{hub.url}/ann/model-awq/commit/{commits[-1].sha}", commits[-1].sha, len(AWQ)]
    assert {file.oid for path, file in commits[-1].files.items() if file.lfs} == set(map(sha256, SHARDS.values()))
    assert result.events("hub.uploading")[-1]["done_bytes"] == sum(map(len, AWQ.values()))
    assert result.events("hub.uploaded")[0]["revision"] == commits[-1].sha


def test_a_repository_that_is_there_is_used(hub: HubServer, client: Client, folder: str) -> None:
    """409 is no error; with HF_AWQ_ALLOW_CREATE=0 nothing is created at all."""
    hub.add("ann/model-awq", {"notes.md": b"mine"})
    assert client("upload", folder, "chat").error is None
    assert stored(hub) == AWQ | {"notes.md": b"mine"}
    assert client("upload", folder, "chat", HF_AWQ_ALLOW_CREATE="0").value[2] == 0
    assert len(hub.asked("POST /api/repos/create")) == 1
    client("upload", folder, "chat", HF_AWQ_ALLOW_CREATE="0", HF_AWQ_CHAT_REPO="ann/none").refuses(
        "ann/none is not on the hub"
    )


def test_the_other_role_has_its_own_repository_and_message(hub: HubServer, client: Client, folder: str) -> None:
    """HF_AWQ_TOOL_REPO and HF_AWQ_COMMIT_MSG_TOOL."""
    tool = {"HF_AWQ_TOOL_REPO": "makers/tool-awq", "HF_AWQ_COMMIT_MSG_TOOL": "Upload Hammer"}
    assert client("upload", folder, "tool", **tool).error is None
    assert hub.repos["makers/tool-awq"].branches["main"][-1].message == "Upload Hammer"
    assert list(hub.repos) == ["makers/tool-awq"]


def test_a_branch_is_made_and_main_left_alone(hub: HubServer, client: Client, folder: str) -> None:
    """The second upload finds the branch there."""
    for files in (len(AWQ), 0):
        result = client("upload", folder, "chat", HF_AWQ_BRANCH="builds/awq")
        assert result.error is None and result.value[2] == files
    assert stored(hub, branch="builds/awq") == AWQ and stored(hub) == {}


def test_a_second_upload_makes_no_commit(hub: HubServer, client: Client, folder: str) -> None:
    """All is there: nothing is sent, and the answer is the commit that has it."""
    first = client("upload", folder, "chat").value
    hub.requests.clear()
    assert client("upload", folder, "chat").value == [*first[:2], 0]
    assert not hub.asked("^PUT|commit|preupload")
    assert len(hub.asked("/tree/")) == 1, "the files are hashed once"


def test_only_what_changed_is_sent(hub: HubServer, client: Client, folder: str) -> None:
    """A new card does not send gigabytes."""
    client("upload", folder, "chat")
    hub.requests.clear()
    Path(folder, "README.md").write_text("# Better\n")
    assert client("upload", folder, "chat").value[2] == 1
    assert not hub.asked("^PUT") and stored(hub)["README.md"] == b"# Better\n"


def test_weights_of_an_earlier_build_go(hub: HubServer, client: Client, folder: str) -> None:
    """One file where there were shards: loaders would read the old ones, too. What else is there stays."""
    client("upload", folder, "chat")
    for name in (*SHARDS, "model.safetensors.index.json", "error.png"):
        Path(folder, name).unlink()
    Path(folder, "model.safetensors").write_bytes(b"new")
    assert client("upload", folder, "chat").value[2] == 4
    assert set(stored(hub)) == {"config.json", "README.md", "error.png", "model.safetensors"}


def test_templates_in_their_folder_go_there_and_away(hub: HubServer, client: Client, folder: str) -> None:
    """A template that is no longer here would still be read from the hub."""
    more = Path(folder, "additional_chat_templates")
    more.mkdir()
    (more / "tool_use.jinja").write_bytes(b"{{ tools }}")
    assert client("upload", folder, "chat").error is None
    assert stored(hub) == AWQ | {"additional_chat_templates/tool_use.jinja": b"{{ tools }}"}
    shutil.rmtree(more)
    assert client("upload", folder, "chat").value[2] == 1
    assert stored(hub) == AWQ


def test_a_cut_upload_goes_on_by_itself(hub: HubServer, client: Client, folder: str) -> None:
    """The connection breaks within a shard: that shard is sent again, and no other."""
    second = sha256(SHARDS["model-00002-of-00002.safetensors"])
    hub.faults.append(Fault(f"PUT .*{second}", cut=100_000))
    assert client("upload", folder, "chat").error is None
    assert stored(hub) == AWQ
    assert [len(hub.asked(f"PUT .*{sha256(data)}")) for data in SHARDS.values()] == [1, 2]


def test_the_next_try_sends_what_is_missing(hub: HubServer, client: Client, folder: str) -> None:
    """The client gives up after six cuts, our next try does not begin anew; the same holds for the next process."""
    second = sha256(SHARDS["model-00002-of-00002.safetensors"])
    hub.faults.append(Fault(f"PUT .*{second}", times=6 * 3 + 6, cut=100_000))
    result = client("upload", folder, "chat")
    assert (result.error, result.pauses) == ("QuantizeDelayed", list(PAUSES_S))
    assert "ann/model-awq" in result.text and stored(hub) == {}
    result = client("upload", folder, "chat")
    assert result.error is None and result.pauses == [PAUSES_S[0]]
    assert stored(hub) == AWQ
    assert [len(hub.asked(f"PUT .*{sha256(data)}")) for data in SHARDS.values()] == [1, 6 * 3 + 6 + 1]


def test_a_lost_answer_does_not_commit_twice(hub: HubServer, client: Client, folder: str) -> None:
    """The commit is made, and the connection breaks before its answer: the next try finds all there."""
    hub.faults.append(Fault("POST .*/commit/main", cut=0, late=True))
    result = client("upload", folder, "chat")
    assert result.error is None and result.pauses == [PAUSES_S[0]]
    commits = hub.repos["ann/model-awq"].branches["main"]
    assert len(commits) == 2 and result.value[1:] == [commits[-1].sha, 0]


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_other_bytes_on_the_hub_are_noticed(hub: HubServer, client: Client, folder: str, name: str) -> None:
    """In LFS and out of it; the line names the file."""
    hub.flipped.add(name)
    result = client("upload", folder, "chat")
    assert result.error == "QuantizeDelayed" and "ann/model-awq holds other bytes" in result.text
    assert result.text.endswith(f": {name}")


def test_a_refused_upload_quotes_no_secret(hub: HubServer, client: Client, folder: str) -> None:
    """Neither the token nor a signed address (`Client` looks for both) stands in the error or in the journal."""
    hub.faults.append(Fault("PUT /storage", times=99, status=403))
    client("upload", folder, "chat").refuses("HF_TOKEN may not write to ann/model-awq", "403")
    hub.faults = [Fault("PUT /storage", times=99, cut=5)]
    assert client("upload", folder, "chat").error == "QuantizeDelayed"
    hub.faults = [Fault("POST /api/repos/create", times=99, status=500, message=f"{TOKEN} for http://x/?y=SIGNED")]
    result = client("upload", folder, "chat")
    assert result.text == "the hub cannot be reached for ann/model-awq: 500 *** for http://x/"
    assert len(result.events("hub.retry")) == 2
