"""README.md and the pages beside each room: names, links and paths exist, examples run, and the first page is short."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from conftest import service
from fakes import Script, ScriptedEngine
from prometheus_client import Metric

from yaptext.engine.base import CHAT, Engines
from yaptext.observe.metrics import Metrics
from yaptext.wire.frames import CLIENT_MESSAGES, SERVER_MESSAGES, PersonaFields
from yaptext.wire.reading import decode

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
_OURS = (".github", "nix", "systemd", "tests", "yaptext")
PAGES = [ROOT / "README.md", *sorted(page for folder in _OURS for page in (ROOT / folder).rglob("*.md"))]
_NAMED = re.compile(r"`([\w/]+\.py)::([\w:]+)`")
_LINK = re.compile(r"\]\((?!https?:)([^)\s]+)\)")
_QUOTED = re.compile(r"`([\w.-]+(?:/[\w.-]+)+/?)`")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
_TABLE_OF_FILES = re.compile(r"^\| file \|.*\n\|[-|]+\|\n((?:\|.*\n?)+)", re.M)

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def prose(page: Path) -> str:
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Its headings as GitHub links to them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.replace("`", "")).strip().lower().replace(" ", "-") for title in titles}


def test_the_first_page_is_short() -> None:
    """A stranger reads it whole; what it leaves out stands beside its room."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 170


def test_every_room_has_a_page() -> None:
    """It says what the room promises, its files, and what it may import."""
    rooms = [folder for folder in (ROOT / "yaptext").iterdir() if (folder / "__init__.py").is_file()]
    assert [room.name for room in rooms if not (room / "README.md").is_file()] == []


def test_the_named_tests_are_many() -> None:
    """The next test would pass on pages that name none."""
    assert sum(len(_NAMED.findall(page.read_text(encoding="utf-8"))) for page in PAGES) > 60


@each_page
def test_every_test_that_a_page_names_exists(page: Path) -> None:
    """A promise goes with its test; it is renamed, moved and removed with it."""
    for file, name in _NAMED.findall(page.read_text(encoding="utf-8")):
        inside = ast.parse((TESTS / file).read_text(encoding="utf-8")).body
        for part in name.split("::"):
            (found,) = [node for node in inside if getattr(node, "name", None) == part] or [None]
            assert found is not None, f"{file} has no {name}"
            inside = getattr(found, "body", [])


@each_page
def test_every_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    """Relative links, plots among them; addresses of other hosts are not asked."""
    for link in _LINK.findall(prose(page)):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


@each_page
def test_every_path_that_a_page_names_exists(page: Path) -> None:
    """From the root (`yaptext/errors.py`), or from the page's own folder (`server/app.py`)."""
    for path in _QUOTED.findall(prose(page)):
        first = path.split("/")[0]
        if first in _OURS or (page.parent == ROOT / "yaptext" and path.endswith(".py")):
            assert (ROOT / path).exists() or (page.parent / path).exists(), f"{path}: no such file"


@each_page
def test_the_files_of_a_room_are_those_of_its_table(page: Path) -> None:
    """Each Python file of a room has its line, and no line is of a file that has gone."""
    for table in _TABLE_OF_FILES.findall(prose(page)):
        cells = [line.split("|")[1] for line in table.splitlines()]
        named = {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}
        assert not [name for name in named if not (page.parent / name).exists()]
        if page.parent.parent == ROOT / "yaptext":
            files = {file.relative_to(page.parent) for file in page.parent.rglob("*.py") if file.name != "__init__.py"}
            folders = {name.rstrip("/") for name in named if name.endswith("/")}
            missing = [str(file) for file in files if str(file) not in named and file.parts[0] not in folders]
            assert sorted(missing) == []


@each_page
def test_every_example_of_data_can_be_read(page: Path) -> None:
    """JSON, a document a line if it is not one whole, and TOML."""
    for text in blocks(page, "json"):
        for line in text.splitlines():
            json.loads(line)
    for text in blocks(page, "toml"):
        tomllib.loads(text)


@each_page
def test_every_shell_example_is_a_script(page: Path) -> None:
    """bash reads it; nothing of it runs."""
    for text in blocks(page, "bash"):
        if not re.search(r"\[MODEL \.\.\.\]", text):  # a synopsis
            checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
            assert checked.returncode == 0, checked.stderr


def test_the_frames_of_the_protocol_page_are_frames_of_the_protocol() -> None:
    """The turn that it shows decodes, field by field; its table of what a client sends has every frame and field."""
    page = ROOT / "yaptext" / "wire" / "README.md"
    lines = [json.loads(line) for text in blocks(page, "json") for line in text.splitlines()]
    assert [line["type"] for line in lines] == ["ack", "toolcall", "token", "final", "done"]
    for line in lines:
        (cls,) = [cls for cls in SERVER_MESSAGES if cls.__struct_config__.tag == line["type"]]
        message = msgspec.convert(line, cls)
        assert set(line) <= {"type", *cls.__struct_encode_fields__}
        assert msgspec.to_builtins(message).items() >= {name: line[name] for name in line if name != "usage"}.items()
    (table,) = re.findall(r"^\| you send \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page.read_text(encoding="utf-8"), re.M)
    shown: dict[str, set[str]] = {}
    for row in table.splitlines():
        _, tags, fields, _ = row.split("|")
        shown |= {tag: set(re.findall(r"`(\w+)", fields)) for tag in re.findall(r"`(\w+)`", tags)}
    assert set(shown) == {str(cls.__struct_config__.tag) for cls in CLIENT_MESSAGES}
    for cls in CLIENT_MESSAGES:
        persona = set(PersonaFields.__struct_fields__) if issubclass(cls, PersonaFields) else set()
        assert set(cls.__struct_encode_fields__) - persona <= shown[str(cls.__struct_config__.tag)]


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "yaptext" / "wire" / "README.md"], ids=["first", "wire"])
def test_the_javascript_sends_a_start(page: Path) -> None:
    """What it sends, read as the service reads it; its names are quoted here, which JavaScript does not ask for."""
    (text,) = blocks(page, "javascript")
    found = re.search(r"JSON\.stringify\((\{.*?\})\)", text, re.S)
    assert found is not None
    sent: Any = decode(re.sub(r"(\w+):", r'"\1":', found[1]))
    assert (sent.session_id, sent.persona_style) == ("user-1", "savage")


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "yaptext" / "client" / "README.md"], ids=["first", "client"]
)
async def test_the_python_example_prints_a_reply(capsys: pytest.CaptureFixture[str], page: Path) -> None:
    """As it stands, but for the address, with a whole service."""
    (text,) = [text for text in blocks(page, "python") if "connect(" in text]
    engine = ScriptedEngine(Script(["Paris."]))
    async with service(Engines(engine, engine)) as running:
        assert text.count("ws://127.0.0.1:8000/ws") == 1
        code = text.replace("ws://127.0.0.1:8000/ws", running.ws)
        await asyncio.to_thread(exec, code, {"__name__": "__main__"})
    assert "Paris." in capsys.readouterr().out  # beside the log of the service, which has no text of a turn
    asked = [engine.decode(ids) for ids, _, priority in engine.requests if priority == CHAT]
    assert "What is the capital of France?" in asked[-1]


def test_every_metric_is_documented() -> None:
    """Under the name that Prometheus shows, with its labels and its help text. `make tables` writes the rows."""
    made: list[Metric] = list(Metrics().registry.collect())
    process = ("yaptext_process_", "yaptext_python_")
    names = {m.name + ("_total" if m.type == "counter" else "") for m in made if not m.name.startswith(process)}
    page = (ROOT / "yaptext" / "observe" / "README.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| metric \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.M)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    documented = {name.strip("`"): (tuple(re.findall(r"`(\w+)`", labels)), meaning) for name, labels, meaning in rows}
    assert len(rows) == len(documented)
    assert sorted(names - set(documented)) == [], "exposed, not documented"
    assert sorted(set(documented) - names) == [], "documented, not exposed"
    assert documented == {name: (labels, meaning) for name, labels, meaning in Metrics().documented}
