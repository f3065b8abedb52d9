"""Packs layers into an OCI image archive: the same layers and commit, the same bytes.

    python nix/image/pack.py ENV OUT LAYER.tar.zst...

Beside each layer stands LAYER.tar.zst.diffid, the sha256 of what it holds uncompressed.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import shutil
import tarfile
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
OCI = "application/vnd.oci.image"


class Layer(NamedTuple):
    """One blob of the archive; digests are sha256 in hex."""

    file: Path
    digest: str
    diff_id: str

    @classmethod
    def of(cls, file: Path) -> Layer:
        with file.open("rb") as compressed:
            digest = hashlib.file_digest(compressed, "sha256").hexdigest()
        return cls(file, digest, Path(f"{file}.diffid").read_text().strip())


def config(env: str, *, user: str | None = None, commit: str | None = None) -> dict[str, Any]:
    """The `config` of an image of the environment `env`, as nix/image.nix makes it, too."""
    said = tomllib.loads((HERE / "config.toml").read_text())
    variables = said["env"] | said["env-of"][env]
    made: dict[str, Any] = said["config"]
    made["Env"] = [f"{name}={value}" for name, value in sorted(variables.items())]
    made["Labels"]["org.opencontainers.image.version"] = release()
    if commit:
        made["Labels"]["org.opencontainers.image.revision"] = commit
    if user:
        made["User"] = user
    return made


def release() -> str:
    project = tomllib.loads((HERE.parents[1] / "pyproject.toml").read_text())["project"]
    return str(project["version"])


def write(out: Path, name: str, config: dict[str, Any], created: int, layers: Sequence[Layer]) -> None:
    """An OCI image layout in one tar file; `name` is what it is called once it is loaded, `created` in seconds."""
    image = {
        "created": datetime.fromtimestamp(created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "architecture": "amd64",
        "os": "linux",
        "config": config,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer.diff_id}" for layer in layers]},
    }
    part = Path(f"{out}.part")
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as archive:

        def add(path: str, data: bytes) -> None:
            entry = tarfile.TarInfo(path)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

        def blob(kind: str, content: dict[str, Any]) -> dict[str, Any]:
            data = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
            digest = hashlib.sha256(data).hexdigest()
            add(f"blobs/sha256/{digest}", data)
            return {"mediaType": f"{OCI}.{kind}.v1+json", "digest": f"sha256:{digest}", "size": len(data)}

        blobs = []
        for layer in layers:
            entry = tarfile.TarInfo(f"blobs/sha256/{layer.digest}")
            entry.size = layer.file.stat().st_size
            with layer.file.open("rb") as compressed:
                archive.addfile(entry, compressed)
            blobs.append(
                {"mediaType": f"{OCI}.layer.v1.tar+zstd", "digest": f"sha256:{layer.digest}", "size": entry.size}
            )
        described = blob("config", image)
        manifest = blob(
            "manifest",
            {"schemaVersion": 2, "mediaType": f"{OCI}.manifest.v1+json", "config": described, "layers": blobs},
        )
        # The first is read by Docker and Podman, the second by tools that know the standard alone.
        manifest["annotations"] = {
            "io.containerd.image.name": name,
            "org.opencontainers.image.ref.name": name.rpartition(":")[2],
        }
        manifest["platform"] = {"architecture": "amd64", "os": "linux"}
        add("index.json", json.dumps({"schemaVersion": 2, "manifests": [manifest]}, sort_keys=True).encode())
        add("oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
    shutil.move(part, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="what `git describe` says of the tree")
    parser.add_argument("--created", type=int, default=0, help="SOURCE_DATE_EPOCH")
    parser.add_argument("--user", help="UID:GID instead of that of config.toml")
    parser.add_argument("env", choices=("serve-cpu", "serve-cuda"))
    parser.add_argument("out", type=Path)
    parser.add_argument("layers", type=Path, nargs="+")
    given = parser.parse_args()
    write(
        given.out,
        f"localhost/yap-text:{given.env}",
        config(given.env, user=given.user, commit=given.commit),
        given.created,
        [Layer.of(file) for file in given.layers],
    )


if __name__ == "__main__":
    main()
