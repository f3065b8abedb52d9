"""Downloads of a start: `yap-text serve` on a hub on loopback, up to where an engine would open."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from quantize.hub_server import TOKEN, Account, Fault, HubServer, Stored

from yaptext.engine import demo
from yaptext.engine.underway import duration, size
from yaptext.engine.weight_files import engine_files

pytestmark = pytest.mark.subprocess
SHARDS = {f"model-0000{n}-of-00002.safetensors": bytes([n]) * 3_000_000 for n in (1, 2)}
SMALL = {
    "config.json": b'{"model_type": "llama", "max_position_embeddings": 4096}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"model": {}}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {f"l{n}": name for n, name in enumerate(SHARDS)}}
    ).encode(),
}
MODEL = SMALL | SHARDS
BALLAST = {"README.md": b"# A model", "pytorch_model.bin": b"pickle", "a-Q4.gguf": b"GGUF", "original/a.pth": b"twice"}

SERVE = """
import sys
from yaptext.engine.vllm.engine import VllmEngine
from yaptext.errors import StartError
def open(settings, checkpoint, role, **_):
    raise StartError(f"opened {checkpoint.source}")
VllmEngine.open = open
BEFORE
sys.argv[1:] = ["serve"]
from yaptext.__main__ import main
main()
"""
AT_ONCE = "from yaptext.engine import hub_client; hub_client.PAUSES_S = (0.01, 0.02)"


@dataclass
class Started:
    """`yap-text serve` as a unit of systemd has it: `journal` is its stderr, `status` how it ended."""

    process: subprocess.Popen[bytes]
    folder: Path
    supervisor: socket.socket
    told: list[str] = field(default_factory=list)

    @property
    def journal(self) -> str:
        return (self.folder / "journal").read_text()

    def events(self, name: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.journal.splitlines() if line.startswith("{")]
        return [event for event in found if event["event"] == name]

    def until(self, is_so: Callable[[], Any]) -> Any:
        for _ in range(1200):
            if found := is_so():
                return found
            assert self.process.poll() is None, self.journal
            time.sleep(0.05)
        raise AssertionError(self.journal)

    def end(self, number: int | None = None) -> str:
        """The reason of its end, after a signal if there is a `number`."""
        if number is not None:
            self.process.send_signal(number)
        self.status = self.process.wait(60)
        while True:
            try:
                self.told.append(self.supervisor.recv(4096).decode())
            except BlockingIOError:
                break
        failed = self.events("start.failed")
        return str(failed[-1]["reason"]) if failed else ""


class Box:
    """A machine with a cache, and the hub that it asks."""

    def __init__(self, folder: Path, hub: HubServer) -> None:
        self.folder, self.hub = folder, hub
        self.started: list[Started] = []
        self.cache = folder / "hf" / "hub"
        others = ("HF_", "HUGGING", "HTTP", "ALL_PROXY", "NO_PROXY")
        self.environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(others)}
        self.environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "CHAT_MODEL": "maker/model",
            "DEPLOY_MODELS": "chat",
            "YAP_TEXT_DEVICE": "cpu",
            "YAP_TEXT_STATE_DIR": str(folder / "state"),
            "LOG_FORMAT": "json",
            "PORT": "0",
        }

    def start(self, before: str | None = AT_ONCE, **variables: str) -> Started:
        """Without a `before` the engine opens, too."""
        folder = self.folder / str(len(self.started))
        folder.mkdir()
        command = [sys.executable, "-c", SERVE.replace("BEFORE", before or "")]
        if before is None:
            command = [sys.executable, "-m", "yaptext", "serve"]
        supervisor = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        supervisor.bind(str(folder / "notify"))
        supervisor.setblocking(False)
        environment = self.environment | {"NOTIFY_SOCKET": str(folder / "notify")} | variables
        with (folder / "journal").open("wb") as journal:
            process = subprocess.Popen(command, env=environment, stdout=journal, stderr=journal)
        self.started.append(Started(process, folder, supervisor))
        return self.started[-1]

    def run(self, before: str = AT_ONCE, **variables: str) -> tuple[int, str, Started]:
        """Status and reason of a start that ends by itself."""
        started = self.start(before, **variables)
        reason = started.end()
        assert "\n" not in reason and TOKEN not in started.journal
        return started.status, reason, started

    @property
    def snapshot(self) -> dict[str, bytes]:
        (folder,) = self.cache.glob("models--maker--model/snapshots/*")
        return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}

    @property
    def parts(self) -> list[int]:
        return [file.stat().st_size for file in self.cache.glob("*/blobs/*.incomplete")]


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def box(server: HubServer, tmp_path: Path) -> Iterator[Box]:
    server.reset()
    server.accounts[TOKEN] = Account("ann")
    server.add("maker/model", MODEL | BALLAST)
    box = Box(tmp_path, server)
    yield box
    for started in box.started:
        started.process.kill()
        started.process.wait()
        started.supervisor.close()


# What comes, and what is said of it


def test_a_start_brings_what_an_engine_takes_and_tells_each_file_once(box: Box) -> None:
    """Weights, config, tokenizer and template. What is there costs neither a line nor a byte."""
    status, reason, started = box.run()
    assert (status, reason) == (75, "opened maker/model"), started.journal
    assert box.snapshot == MODEL
    (begun,), (ended,) = started.events("download.started"), started.events("download.finished")
    lacking = {
        name: len(data) for name, data in MODEL.items() if name not in ("config.json", "model.safetensors.index.json")
    }
    assert begun["models"] == ["maker/model"] and begun["files"] == ended["files"] == len(lacking)
    assert begun["bytes"] - begun["there_bytes"] == ended["bytes"] == sum(lacking.values())
    assert {line["file"]: line["bytes"] for line in started.events("download.file")} == lacking
    box.hub.requests.clear()
    _, reason, again = box.run()
    assert reason == "opened maker/model" and "download." not in again.journal
    assert not box.hub.asked("safetensors$")


def test_the_supervisor_hears_how_far_it_is_and_waits(box: Box) -> None:
    """Longer than the start may take otherwise; and clients are told how far it is, but not of what."""
    box.hub.bytes_per_s = 2_000_000
    started = box.start(PORT=str(port := unused_port()))
    started.until(lambda: started.events("download.started"))
    answer: dict[str, Any] = {}

    def looks() -> bool:
        answer.update(readyz(port))
        return "downloads" in answer.get("message", "")

    started.until(looks)
    assert answer["status"] == "starting" and "of 6.0 MB." in answer["message"] and "maker" not in str(answer)
    assert 15_000 <= answer["retry_after_ms"] <= 60_000
    assert started.end() == "opened maker/model"
    told = [message for message in started.told if "Downloading" in message]
    assert told and all("STATUS=Downloading maker/model (CHAT_MODEL): " in message for message in told)
    assert all("EXTEND_TIMEOUT_USEC=120000000" in message for message in told)
    assert "EXTEND_TIMEOUT_USEC=3600000000" in started.told


def test_a_person_has_one_line_a_model(box: Box) -> None:
    """Which changes, and at the end says how much came in what time."""
    import pty

    master, slave = pty.openpty()
    command = [sys.executable, "-c", SERVE.replace("BEFORE", AT_ONCE)]
    subprocess.run(command, env=box.environment | {"LOG_FORMAT": "auto"}, stderr=slave, timeout=120, check=False)
    os.close(slave)
    screen = b""
    while chunk := read(master):
        screen += chunk
    os.close(master)
    lines = [line.split("\r")[-1] for line in screen.decode().replace("\r\n", "\n").split("\n") if line]
    told = [line for line in lines if line.startswith("maker/model")]
    assert len(told) == 1 and "6.0 MB in " in told[0], screen.decode()
    assert "download." not in screen.decode()
    assert "yap-text: opened maker/model" in lines
    assert "yap-text doctor" in lines[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_download_that_was_ended_goes_on_where_it_was(box: Box, number: signal.Signals) -> None:
    """In the middle of files, whatever ended it; a stop of a start is status 143, at once."""
    box.hub.bytes_per_s = 1_000_000
    started = box.start()
    started.until(lambda: sum(box.parts) > 1_000_000)
    begun = time.monotonic()
    started.end(number)
    assert time.monotonic() - begun < 5
    assert started.status == (143 if number == signal.SIGTERM else -9)
    there = sum(box.parts)
    assert 1_000_000 < there < 6_000_000
    box.hub.bytes_per_s = None
    box.hub.requests.clear()
    _, reason, again = box.run()
    assert reason == "opened maker/model" and box.snapshot == MODEL and box.parts == []
    assert {request.range for request in box.hub.asked("^GET .*0000[12]-of")} != {None}
    (begun_again,), (ended,) = again.events("download.started"), again.events("download.finished")
    assert begun_again["there_bytes"] >= there and ended["bytes"] <= 6_000_000 + 1000 - there


def test_what_others_left_behind_is_cleared_away(box: Box) -> None:
    """The client's own halves have names that nobody takes up again; they would fill the disk."""
    file = Stored(SHARDS["model-00001-of-00002.safetensors"], True)
    left = box.cache / "models--maker--model" / "blobs" / f"{file.oid}.0badcafe.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    assert box.run()[1] == "opened maker/model" and not left.exists()


def test_files_of_xet_storage_are_the_clients_own(box: Box) -> None:
    """Which counts their bytes in bars; if the storage is not offered after all, it goes back to plain HTTP."""
    box.hub.repos["maker/model"].names_xet = True
    _, reason, started = box.run(HF_HUB_DISABLE_XET="0")
    assert reason == "opened maker/model" and box.snapshot == MODEL, started.journal
    assert {line["file"] for line in started.events("download.file")} > SHARDS.keys()
    (ended,) = started.events("download.finished")
    assert ended["bytes"] > 6_000_000


def test_a_server_without_ranges_sends_all_of_it_again(box: Box) -> None:
    box.hub.knows_ranges = False
    box.hub.faults.append(Fault("^GET .*00001-of", cut=2_000_000))
    status, reason, started = box.run()
    assert (status, reason) == (75, "opened maker/model"), started.journal
    assert box.snapshot == MODEL and started.events("download.broken")


def test_bytes_that_a_crash_of_the_machine_spoilt_are_fetched_again(box: Box) -> None:
    """By the hash that the hub names."""
    file = Stored(SHARDS["model-00001-of-00002.safetensors"], True)
    part = box.cache / "models--maker--model" / "blobs" / f"{file.oid}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(2_000_000))
    _, reason, started = box.run()
    assert reason == "opened maker/model" and box.snapshot == MODEL
    assert [line["file"] for line in started.events("download.damaged")] == ["model-00001-of-00002.safetensors"]


@pytest.mark.engine
def test_a_real_engine_opens_what_came_and_asks_for_no_more(box: Box, state_folder: Path) -> None:
    """The demo model of a hub: killed in the middle of its weights, and started again."""
    folder = demo.folder(state_folder)
    ballast = {"pytorch_model.bin": b"pickle", "onnx/model.onnx": b"onnx", "a.gguf": b"GGUF"}
    box.hub.add("maker/demo", {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()} | ballast)
    weights_bytes = (folder / "model.safetensors").stat().st_size
    variables = {"CHAT_MODEL": "maker/demo", "TOOL_MODEL": "maker/demo", "DEPLOY_MODELS": "both"}
    variables |= {"QUANTIZATION": "none"}
    box.hub.bytes_per_s = weights_bytes // 4
    started = box.start(None, **variables)
    started.until(lambda: sum(box.parts) > weights_bytes // 4)
    started.end(signal.SIGKILL)
    there = sum(box.parts)
    box.hub.bytes_per_s = None
    box.hub.requests.clear()
    started = box.start(None, **variables)
    started.until(lambda: started.events("server.ready"))
    started.end(signal.SIGTERM)
    assert started.status == 0, started.journal
    asked = [(request.path.split("/")[-1], request.range) for request in box.hub.asked("^GET .*/resolve/")]
    fetched = [one for one in asked if one[1] != "bytes=0-100000"]  # vLLM looks at the types of the tensors
    assert [range for name, range in fetched if name == "model.safetensors"] == [f"bytes={there}-"]
    names = [name for name, _ in fetched]
    assert len(set(names)) == len(names) and not {"pytorch_model.bin", "model.onnx", "a.gguf"} & set(names)
    assert set(names) == {line["file"] for line in started.events("download.file")}, "engines fetch nothing themselves"


# What goes wrong


class Lying(Stored):
    """Other bytes than its hash says."""

    oid = "a" * 64


def test_each_failure_is_one_line_with_the_model_and_what_to_do(box: Box) -> None:
    """2 for what has to be mended, 75 for what may pass."""

    def ends(status: int, *words: str, before: str = AT_ONCE, **variables: str) -> Started:
        ended, reason, started = box.run(before, **variables)
        assert ended == status and all(word in reason for word in words), (ended, reason, words)
        return started

    hub = box.hub
    ends(2, "maker/none (CHAT_MODEL) is not on the hub", "needs HF_TOKEN: check the name", CHAT_MODEL="maker/none")
    ends(2, "HF_TOKEN is not valid", HF_TOKEN="hf_other")
    hub.repos["maker/model"].gated = True
    for token in ({}, {"HF_TOKEN": TOKEN}):
        page = f"accept its terms on its page, {hub.url}/maker/model, and set HF_TOKEN"
        ends(2, "maker/model (CHAT_MODEL) is gated", page, **token)
    ends(2, "set /etc/yap-text/hf-token (HF_TOKEN)", STATE_DIRECTORY=str(box.folder / "state"))
    hub.repos["maker/model"].gated = False
    hub.add("maker/empty", {"config.json": SMALL["config.json"], "a.gguf": b"GGUF"})
    ends(2, "maker/empty (CHAT_MODEL) has no weights that an engine loads", CHAT_MODEL="maker/empty")
    hub.add("maker/half", {name: data for name, data in MODEL.items() if "00001-of" not in name})
    ends(2, "maker/half (CHAT_MODEL) lacks 1 of 2 files of its weights: model-00001", CHAT_MODEL="maker/half")
    full = AT_ONCE + "\nfrom yaptext.engine import download\nfrom types import SimpleNamespace\n"
    full += "download.shutil.disk_usage = lambda _: SimpleNamespace(free=1_500_000)"
    ends(75, f"maker/model (CHAT_MODEL) needs 6.0 MB more in {box.cache}, and 1.5 MB are free", before=full)
    hub.faults.append(Fault("^GET .*00001-of", times=99, status=429, message="too many", retry_after="0"))
    started = ends(75, "the hub cannot be reached for maker/model (CHAT_MODEL): 429 too many")
    assert len(started.events("hub.retry")) == 2
    hub.faults[:] = [Fault("^GET .*00001-of", times=99, cut=0)]
    ends(75, "the hub cannot be reached for maker/model (CHAT_MODEL)")
    hub.faults[:] = [Fault("^GET .*00001-of", times=2, status=503)]
    assert box.run()[1] == "opened maker/model"
    files = hub.add("maker/lying", MODEL).branches["main"][-1].files
    files["model-00001-of-00002.safetensors"] = Lying(b"x" * 1000, True)
    ends(75, "model-00001-of-00002.safetensors of maker/lying (CHAT_MODEL) comes with other", CHAT_MODEL="maker/lying")


def test_without_a_hub_a_cache_that_lacks_files_is_named(box: Box) -> None:
    """With whose wish that is: HF_HUB_OFFLINE, or a hub that does not answer."""
    box.run()
    (weights,) = box.cache.glob("*/snapshots/*/model-00002-of-00002.safetensors")
    kept = weights.readlink()
    weights.unlink()
    lacks = f"{box.cache} lacks 1 files of maker/model (CHAT_MODEL), among them model-00002-of-00002.safetensors"
    box.hub.requests.clear()
    assert box.run(HF_HUB_OFFLINE="1")[:2] == (
        75,
        f"{lacks}, and HF_HUB_OFFLINE is set. Unset it, or copy the model into the cache",
    )
    assert box.hub.requests == []
    status, reason, _ = box.run(HF_HUB_OFFLINE="1", CHAT_MODEL="maker/other")
    assert status == 75 and "config of maker/other (CHAT_MODEL): it is not in the cache, and HF_HUB_OFFLINE" in reason
    with box.hub.down():
        status, reason, _ = box.run()
    assert status == 75 and reason == f"{lacks}, and the hub {box.hub.url} does not answer. Check the network"
    weights.symlink_to(kept)
    assert box.run(HF_HUB_OFFLINE="1")[1] == "opened maker/model"


def test_a_tool_model_that_may_lack_ends_no_start(box: Box) -> None:
    """TOOL_OPTIONAL=1: the chat model opens all the same."""
    variables = {"DEPLOY_MODELS": "both", "TOOL_MODEL": "maker/tool", "TOOL_OPTIONAL": "1"}
    box.hub.add("maker/tool", MODEL, gated=False)
    box.hub.faults.append(Fault("^GET /maker/tool/.*of-00002", times=99, status=403))
    _, reason, started = box.run(**variables)
    assert reason == "opened maker/model", started.journal


# Whose settings the client goes by


def test_a_proxy_is_asked_for_the_hub_that_is_named(box: Box) -> None:
    """HTTP_PROXY, not for hosts of NO_PROXY. Its password, and one in HF_ENDPOINT, stay out of the log."""
    proxy = box.hub.url.replace("://", "://someone:secret@")
    named = {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": proxy}
    _, reason, started = box.run(**named)
    assert reason == "opened maker/model" and box.snapshot == MODEL
    assert "secret" not in started.journal
    named |= {"HF_ENDPOINT": "http://me:hidden@hub.invalid", "NO_PROXY": "hub.invalid", "CHAT_MODEL": "maker/other"}
    status, reason, started = box.run(**named)
    assert status == 75 and "the hub http://***@hub.invalid does not answer" in reason
    assert "secret" not in started.journal and "hidden" not in started.journal


def test_a_tunnel_and_a_certificate_of_the_companys_own(box: Box, tmp_path: Path) -> None:
    """HTTPS_PROXY, which is asked to CONNECT, and SSL_CERT_FILE; without that the certificate is refused."""
    authority, context = certified("hub.invalid", tmp_path)
    with tunnel(box.hub, context) as (proxy, asked):
        named = {"HF_ENDPOINT": "https://hub.invalid", "HTTPS_PROXY": proxy}
        status, reason, _ = box.run(**named)
        assert status == 75 and "the hub https://hub.invalid does not answer" in reason
        _, reason, started = box.run(SSL_CERT_FILE=str(authority), **named)
        assert reason == "opened maker/model" and box.snapshot == MODEL, started.journal
    assert set(asked) == {"CONNECT hub.invalid:443"}


# The choice


@pytest.mark.parametrize(
    ("paths", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "consolidated.00.pth"], ["model.safetensors"]),
        (["pytorch_model-1.bin", "pytorch_model-2.bin", "x.pt"], ["pytorch_model-1.bin", "pytorch_model-2.bin"]),
        (["model.pt", "a.gguf"], ["model.pt"]),
        (["consolidated.safetensors", "model-1.safetensors", "params.json"], ["consolidated.safetensors"]),
        (["model.safetensors", "original/a/b.safetensors"], ["model.safetensors"]),
        (["model.safetensors.index.json", "m-1.safetensors", "other.safetensors"], ["m-1.safetensors"]),
    ],
)
def test_weights_are_those_that_vllm_takes(paths: list[str], weights: list[str]) -> None:
    """One kind alone, the shards that an index names, Mistral's own export if there is one."""
    index = json.dumps({"weight_map": {"a": "m-1.safetensors"}}).encode()
    found = engine_files([*paths, "config.json"], lambda _: index)
    assert [path for path in found if not path.endswith(".json")] == weights and "config.json" in found


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_a_shard_that_the_index_names_is_missed(index: str) -> None:
    shards = ["a.bin", "b.bin"]
    with pytest.raises(LookupError, match=r"lacks 1 of 2 files of its weights: b\.bin"):
        engine_files([index, "a.bin"], lambda _: json.dumps({"weight_map": dict(enumerate(shards))}).encode())


def test_sizes_and_times_are_for_people() -> None:
    assert [size(n) for n in (512, 600_183, 3_100_000, 24_500_000_000)] == [
        "512 bytes",
        "600.2 kB",
        "3.1 MB",
        "24.5 GB",
    ]
    assert [duration(s) for s in (9.6, 75, 4000)] == ["10 s", "1 min 15 s", "1 h 6 min"]


# Around it


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def readyz(port: int) -> dict[str, Any]:
    import urllib.error

    try:
        with urlopen(f"http://127.0.0.1:{port}/readyz", timeout=10) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as error:
        with error:
            return dict(json.load(error))


def read(master: int) -> bytes:
    try:
        return os.read(master, 65_536)
    except OSError:  # the other side is closed, and all is read
        return b""


def certified(host: str, folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate that certifies itself: the file to trust, and a server's side."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, host)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    authority, secret = folder / "authority.pem", folder / "key.pem"
    authority.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(authority, secret)
    return authority, context


@contextmanager
def tunnel(hub: HubServer, context: ssl.SSLContext) -> Iterator[tuple[str, list[str]]]:
    """A proxy that takes CONNECT alone; behind it the hub speaks TLS. Yields its address and what it was asked."""
    asked: list[str] = []
    port = int(hub.url.rpartition(":")[2])

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while came := source.recv(65_536):
                sink.sendall(came)
        except OSError:
            pass
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve(client: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (came := client.recv(65_536)):
                return
            head += came
        asked.append(head.split(b" HTTP")[0].decode())
        client.sendall(b"HTTP/1.1 200 Connection established\r\n\r\n")
        try:
            inner = context.wrap_socket(client, server_side=True)
        except OSError:  # the certificate was refused
            client.close()
            return
        with inner, socket.create_connection(("127.0.0.1", port)) as behind:
            back = threading.Thread(target=pump, args=(behind, inner), daemon=True)
            back.start()
            pump(inner, behind)
            back.join(10)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        listener.shutdown(socket.SHUT_RDWR)


def test_errors_are_named_before_anything_loaded_the_clients() -> None:
    """The client's module of errors is no attribute of it at first: a folder that may not be read ended in a crash."""
    code = "import sys; from yaptext.engine import hub_client; assert 'huggingface_hub.errors' not in sys.modules\n"
    code += "print(hub_client.status_of(OSError()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "None\n"
