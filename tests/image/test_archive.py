"""What the container images are made of, without making one: nix/image/ and nix/image.nix."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
IMAGE = ROOT / "nix" / "image"
ENVIRONMENTS = ("serve-cpu", "serve-cuda")


def _module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # its annotations are looked up there
    spec.loader.exec_module(module)
    return module


pack = _module(IMAGE / "pack.py")


def variables(env: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in pack.config(env)["Env"])


@pytest.fixture
def archive(tmp_path: Path) -> Callable[[str], Path]:
    """Writes an archive of two layers under a name, and returns it."""
    layers = []
    for name in ("root", "project"):
        file = tmp_path / f"{name}.tar.zst"
        file.write_bytes(name.encode())
        Path(f"{file}.diffid").write_text(hashlib.sha256(name.upper().encode()).hexdigest() + "\n")
        layers.append(file)

    def write(name: str) -> Path:
        out = tmp_path / name
        made = [pack.Layer.of(file) for file in layers]
        pack.write(out, "localhost/yap-text:serve-cpu", pack.config("serve-cpu"), 1_700_000_000, made)
        return out

    return write


def test_an_archive_is_an_oci_layout_whose_digests_hold(archive: Callable[[str], Path]) -> None:
    """Every reference leads to a blob of its size and digest, from the index to the layers."""
    with tarfile.open(archive("image.tar")) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]

    def blob(reference: dict[str, Any]) -> bytes:
        digest = reference["digest"].removeprefix("sha256:")
        data = files[f"blobs/sha256/{digest}"]
        assert hashlib.sha256(data).hexdigest() == digest and len(data) == reference["size"]
        return data

    assert json.loads(files["oci-layout"]) == {"imageLayoutVersion": "1.0.0"}
    (described,) = json.loads(files["index.json"])["manifests"]
    assert described["annotations"]["io.containerd.image.name"] == "localhost/yap-text:serve-cpu"
    manifest = json.loads(blob(described))
    assert [blob(layer) for layer in manifest["layers"]] == [b"root", b"project"]
    image = json.loads(blob(manifest["config"]))
    assert image["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(n).hexdigest()}" for n in (b"ROOT", b"PROJECT")]
    assert image["created"] == "2023-11-14T22:13:20Z" and image["config"] == pack.config("serve-cpu")


def test_the_same_layers_give_the_same_bytes(archive: Callable[[str], Path]) -> None:
    assert archive("once.tar").read_bytes() == archive("again.tar").read_bytes()


@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_what_is_written_is_in_the_volume(env: str) -> None:
    """Each folder that the units name for the process is below /data, and the process is not root."""
    unit = (ROOT / "systemd" / "yap-text.service").read_text()
    named = set(re.findall(r"(\w+)=%[CS]/yap-text", unit))
    assert "VLLM_CACHE_ROOT" in named
    found = variables(env)
    outside = {name for name in named | {"YAP_TEXT_STATE_DIR"} if not found.get(name, "").startswith("/data/")}
    assert outside == set()
    assert pack.config(env)["User"].partition(":")[0] not in ("", "0", "root")


@pytest.mark.subprocess
@pytest.mark.parametrize("env", ENVIRONMENTS)
def test_the_image_brings_no_key_and_no_address_without_one(env: str) -> None:
    """A container without a key ends its start: it listens on every address, and has none of its own."""
    import yaptext.secrets

    found = variables(env)
    assert found.keys().isdisjoint(yaptext.secrets.SECRETS)
    done = subprocess.run(
        [sys.executable, "-m", "yaptext", "serve"],
        cwd=ROOT,
        env=found | {"PATH": os.environ["PATH"], "YAP_TEXT_STATE_DIR": "", "HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "HOST='0.0.0.0' is not allowed with the default API key" in done.stderr


class _Health(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/healthz" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def health() -> Iterator[int]:
    """The port of a server that answers /healthz with `_Health.status`."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Health) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


@pytest.mark.parametrize(("answered", "status"), [(200, 0), (503, 1), (None, 1)])
def test_healthy_is_what_healthz_says(
    health: int, answered: int | None, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past any proxy that the container is given, and not healthy if nothing listens."""
    monkeypatch.setattr(_Health, "status", answered)
    port = health if answered else 1
    told = {"HOST": "0.0.0.0", "PORT": str(port), "http_proxy": "http://127.0.0.1:1"}
    done = subprocess.run([sys.executable, IMAGE / "healthy.py"], env=told, capture_output=True, check=False)
    assert done.returncode == status


@pytest.mark.subprocess
def test_a_machine_that_lacks_a_program_is_told_in_one_line(tmp_path: Path) -> None:
    """Before anything is fetched."""
    for name in ("bash", "sed", "dirname", "env"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        [IMAGE / "build.sh"], env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr.startswith("image: mmd" if os.geteuid() == 0 else "image: mmdebstrap and chroot need root")
    assert done.stderr.count("\n") == 1


@pytest.mark.nix
def test_nix_makes_an_image_of_the_same_config() -> None:
    """nix/image.nix and nix/image/pack.py read the same file to the same end."""
    done = subprocess.run(
        ["nix-instantiate", "--eval", "--strict", "--json", HERE / "config.nix"],
        env=os.environ | {"NIX_REMOTE": "dummy://"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    for env in ENVIRONMENTS:
        assert made[env]["config"] == pack.config(env, commit="0123456789")
        assert f"{made[env]['name']}:{made[env]['tag']}" == f"localhost/yap-text:{env}"
        assert {"healthy", "/tini"} <= set(made[env]["contents"])
