"""`/openapi.json` as schemathesis reads it: what it allows is asked for, and what it does not allow, too.

`FUZZ_SECONDS=600` is the full run; without it a minute.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from clients.conftest import KEY, VENV
from fuzz.target import target, watched

from yaptext.server.reference.openapi import document

SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
OPERATIONS = 16
"""All but the document itself."""
pytestmark = [pytest.mark.clients, pytest.mark.subprocess, pytest.mark.timeout(SECONDS + 300)]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [str(VENV / "bin" / command[0]), *command[1:]],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def test_the_document_is_valid(tmp_path: Path) -> None:
    """By the schema of OpenAPI 3.1, which schemathesis has; without the title it is not."""
    script = (
        "import json, sys, urllib.request; import jsonschema_rs, schemathesis; "
        "document = json.load(urllib.request.urlopen(sys.argv[1])); "
        "schemathesis.openapi.from_dict(document).validate(); "
        "del document['info']['title']\n"
        "try: schemathesis.openapi.from_dict(document).validate()\n"
        "except jsonschema_rs.ValidationError as error: print(error.message)"
    )
    with target(tmp_path) as aim:
        ended = run(tmp_path, "python", "-c", script, f"http://127.0.0.1:{aim.port}/openapi.json")
    assert (ended.returncode, ended.stdout) == (0, '"title" is a required property\n')


def _fuzz(folder: Path, document: str, *options: str) -> str:
    config = Path(__file__).with_name("schemathesis.toml")
    keyed = ("--header", f"Authorization: Bearer {KEY}", "--continue-on-failure", "--no-color", "--seed", "1")
    ended = run(folder, "schemathesis", "--config-file", str(config), "run", document, *keyed, *options)
    print(ended.stdout)
    return ended.stdout


def test_every_request_gets_an_answer_of_the_document(tmp_path: Path) -> None:
    """No status, header or body that is not in the document, no 500, and no fault in the log, by whatever requests.
    Wrong keys and wrong bodies are refused, and a sentinel is served all the time."""
    with target(tmp_path, YAP_TEXT_API_KEY=KEY, FAILED_KEYS_PER_MINUTE=0, MAX_CONCURRENT_CONNECTIONS=8) as aim:
        with watched(aim, KEY) as sentinel:
            told = _fuzz(tmp_path, f"http://127.0.0.1:{aim.port}/openapi.json", "--max-time", str(SECONDS))
        after = aim.settled()
        print(sentinel, after)
        assert not aim.complaints()
        assert after["running"] == after["connections"] == 0
    assert f"Tested: {OPERATIONS}" in told
    assert "Failures:" not in told and "Errors:" not in told
    (made,) = re.findall(r"(\d+) generated", told)
    assert int(made) > 500


def test_an_answer_that_is_not_in_the_document_is_found(tmp_path: Path) -> None:
    """The test above can fail: of a document with other bounds, another status and another event."""
    changed = document()
    paths, schemas = changed["paths"], changed["components"]["schemas"]
    schemas["Ticket"]["properties"]["expires_in_s"]["maximum"] = 1
    del paths["/v1/models/{name}"]["get"]["responses"]["404"]
    schemas["Chunk"]["properties"]["object"] = {"const": "text_completion"}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    with target(tmp_path, YAP_TEXT_API_KEY=KEY, FAILED_KEYS_PER_MINUTE=0) as aim:
        at = ("--url", f"http://127.0.0.1:{aim.port}", "--max-examples", "20", "--phases", "coverage,fuzzing")
        told = _fuzz(tmp_path, "changed.json", *at)
    for fault in ("Response violates schema: 1", "Undocumented status code: 1", "SSE event violates schema: 1"):
        assert fault in told
