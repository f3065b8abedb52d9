"""nix/lock/audit.py and sbom.py, run by the Python of their own environment."""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.subprocess
ROOT = Path(__file__).resolve().parents[1]
LOCKS = ROOT / "nix" / "lock"
PYTHON = ROOT / ".venv" / "audit" / "bin" / "python"
VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
sys.exit(JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read()) is not None)
"""


@pytest.fixture(scope="module", autouse=True)
def _installed() -> None:
    if not PYTHON.exists():
        pytest.skip("make .venv/audit/lock.txt installs what this runs (make test does)")


def run(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(PYTHON), *arguments],
        input=stdin,
        env=os.environ | {"NO_PROXY": "127.0.0.1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def pins(lock: str) -> list[tuple[str, str, str]]:
    """Name, version and sha256 of each line."""
    lines = [line.split() for line in (LOCKS / f"{lock}.txt").read_text().splitlines() if not line.startswith("#")]
    return [(*pin.split("=="), sha256.rpartition(":")[2]) for pin, sha256, *_ in lines]  # type: ignore[misc]


# --- the bill of materials


def sbom(env: str = "serve-cpu", **environment: str) -> subprocess.CompletedProcess[str]:
    return run(str(LOCKS / "sbom.py"), env, "--installed", sysconfig.get_path("purelib"), **environment)


def test_a_bill_holds_what_the_lock_pins_and_the_schema_holds_it() -> None:
    """Every line with its sha256 and its package URL, licences where the packages tell them, and nothing else."""
    written = sbom()
    assert written.returncode == 0, written.stderr
    bill = json.loads(written.stdout)
    components = {part["name"]: part for part in bill["components"]}
    found = [(name, part["version"], part["hashes"][0]["content"]) for name, part in components.items()]
    assert sorted(found) == sorted(pins("serve-cpu"))
    assert components["torch"]["purl"].startswith("pkg:pypi/torch@2.13.0%2Bcpu?file_name=torch-2.13.0")
    assert components["starlette"]["licenses"] == [{"license": {"id": "BSD-3-Clause"}}]
    assert sum("licenses" in part for part in components.values()) > 0.9 * len(components)
    assert run("-c", VALIDATE, stdin=written.stdout).returncode == 0
    assert run("-c", VALIDATE, stdin=written.stdout.replace("SHA-256", "SHA-0")).returncode == 1


def test_the_same_lock_gives_the_same_bytes() -> None:
    """Whatever the order of sets and whatever the time."""
    assert sbom(PYTHONHASHSEED="1").stdout == sbom(PYTHONHASHSEED="2").stdout != ""


def test_no_bill_of_what_is_not_installed() -> None:
    """Its licences would be guesses."""
    refused = sbom("serve-cuda")
    assert refused.returncode == 1 and refused.stdout == "" and "does not hold" in refused.stderr


def test_an_environment_lies_where_the_python_of_its_lock_puts_it() -> None:
    """Each lock has its own."""
    if (ROOT / ".venv" / "serve-cuda").exists():
        pytest.skip("it is installed here")
    refused = run(str(LOCKS / "sbom.py"), "serve-cuda")
    assert refused.returncode == 1
    assert ".venv/serve-cuda/lib/python3.12/site-packages does not hold accelerate" in refused.stderr


# --- the audit


class Advisories(BaseHTTPRequestHandler):
    """As much of an OSV server as pip-audit asks."""

    known: dict[str, Any]
    asked: set[tuple[str, str]]

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.asked.add((name, query["version"]))
        answer = json.dumps({"vulns": [self.known[name]]} if name in self.known else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def advisories() -> Iterator[tuple[type[Advisories], str]]:
    class Own(Advisories):
        known: dict[str, Any] = {}  # noqa: RUF012
        asked: set[tuple[str, str]] = set()  # noqa: RUF012

    with ThreadingHTTPServer(("127.0.0.1", 0), Own) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Own, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def audit(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    return run(str(LOCKS / "audit.py"), "-s", "osv", "--osv-url", url, *options)


def test_an_audit_asks_about_every_pin_and_names_what_is_known(advisories: tuple[type[Advisories], str]) -> None:
    """Local builds under the release that they are built of; status 1, and 0 once the finding is accepted."""
    server, url = advisories
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}]
    package = {"name": "torch", "ecosystem": "PyPI"}
    affected = [{"package": package, "ranges": ranges}]
    server.known["torch"] = {"id": "PYSEC-1", "aliases": ["CVE-1"], "summary": "bad", "affected": affected}
    found = audit(url)
    assert found.returncode == 1, found.stderr
    assert found.stdout.splitlines() == [
        f"{env}: torch 2.13.0: PYSEC-1, CVE-1; fixed in 99.0" for env in ("serve-cpu", "serve-cuda")
    ]
    every = {(name, version.partition("+")[0]) for path in LOCKS.glob("*.txt") for name, version, _ in pins(path.stem)}
    assert server.asked == every
    accepted = audit(url, "--ignore-vuln", "PYSEC-1")
    assert (accepted.returncode, accepted.stdout) == (0, "")


@pytest.mark.parametrize(("url", "why"), [("http://127.0.0.1:9/", "refused"), (None, "it knows none of them")])
def test_a_service_that_cannot_be_asked_is_no_clean_audit(tmp_path: Path, url: str | None, why: str) -> None:
    """Its own status, and a line that says why. A mirror that has no feed of vulnerabilities knows no package."""
    skipping = tmp_path / "pip_audit.py"  # in the place of pip-audit on such a mirror
    skipping.write_text("""print('{"dependencies": [{"name": "ant", "skip_reason": "not found"}]}')""")
    ended = audit(url) if url else run(str(LOCKS / "audit.py"), PYTHONPATH=str(tmp_path))
    assert ended.returncode == 75 and ended.stdout == ""
    assert ended.stderr.count("\n") == 1 and "could not be asked" in ended.stderr and why in ended.stderr
