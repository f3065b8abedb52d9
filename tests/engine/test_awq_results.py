"""engine/awq_results.py: where results lie, and which of them count."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from yaptext.engine import awq_results
from yaptext.quantize import job
from yaptext.settings import Settings

WEIGHTS = bytes(range(256)) * 512


def source_of(folder: Path, weights: bytes = WEIGHTS) -> Path:
    """A float model's folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def put(state: Path, source: object, stamp: str = "20260101T000000Z", **changes: Any) -> Path:
    """A result on the shelf; `changes` are laid over its manifest, where one that is None is left out."""
    folder = awq_results.row(state, str(source)) / stamp
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"four bits")
    told = {"content": awq_results.content(Path(str(source)))} if Path(str(source)).is_dir() else {}
    manifest = {"source": {"name": "x", **told}, "files": {"model.safetensors": {"size": 9}}} | changes
    manifest = {name: value for name, value in manifest.items() if value is not None}
    (folder / awq_results.MANIFEST).write_text(json.dumps(manifest))
    return folder


def found(state: Path, source: object) -> Path | None:
    result = awq_results.finished(state, str(source))
    return result and result.folder


# Where


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("Qwen/Qwen2-1.5B", "Qwen--Qwen2-1.5B-"),
        ("/models/My Model (v2)", "My-Model-v2--"),
        ("/models/.hidden", "hidden-"),
        ("/models/模型", "model-"),
        ("/models/" + "x" * 255, "x" * 80 + "-"),
        ("/models/../..", "model-"),
        ("a/../../b", "a--..--..--b-"),
    ],
)
def test_a_row_is_one_safe_name_below_the_state(tmp_path: Path, source: str, name: str) -> None:
    """Readable, with eight digits that tell models of one name apart; never hidden, never a way out."""
    row = awq_results.row(tmp_path, source)
    assert row.parent == tmp_path / "awq"
    assert row.name.startswith(name) and len(row.name) == len(name) + 8


def test_models_have_rows_of_their_own(tmp_path: Path) -> None:
    """Also where their names are the same, or become so."""
    sources = ["/a/model", "/b/model", "a/model", "a--model", "/a/mo del", "/a/mo-del"]
    assert len({awq_results.row(tmp_path, source) for source in sources}) == len(sources)


def test_however_a_folder_is_written_its_row_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a slash at the end, from where one stands, through a link as systemd makes one of a state folder."""
    source = source_of(tmp_path / "private" / "model")
    (tmp_path / "lib").symlink_to(tmp_path / "private")
    monkeypatch.chdir(tmp_path / "private")
    ways = [str(source), f"{source}/", "model", "./model", str(tmp_path / "lib" / "model")]
    assert len({awq_results.row(tmp_path, way) for way in ways}) == 1


# Which


def test_the_newest_counts(tmp_path: Path) -> None:
    """While the one before it is being deleted, there are two."""
    source = source_of(tmp_path / "model")
    assert found(tmp_path, source) is None
    older = put(tmp_path, source)
    assert found(tmp_path, source) == older
    newer = put(tmp_path, source, "20260102T000000Z")
    assert found(tmp_path, source) == newer


@pytest.mark.parametrize("newest", ["20990101T000000Z", "20990101T000000Z.1", "99999999T999999Z", "now"])
def test_a_clock_that_was_set_back_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newest: str
) -> None:
    """What a job has just made is the newest, whatever the time is of what lies there; the cleaning takes the older."""
    source = source_of(tmp_path / "model")
    stamp = f"{datetime.now(UTC) + timedelta(seconds=1):%Y%m%dT%H%M%SZ}" if newest == "now" else newest
    older = put(tmp_path, source, stamp)

    def fill(settings: Settings, task: job.Task, options: job.Options, partial: Path, *_: Any) -> None:
        (partial / "model.safetensors").write_bytes(b"four bits")
        (partial / awq_results.MANIFEST).write_text(
            json.dumps({"files": {"model.safetensors": {"size": 9}}, "made": "now"})
        )

    monkeypatch.setattr(job, "fill", fill)
    settings, task = Settings.load(YAP_TEXT_STATE_DIR=tmp_path), job.Task(str(source), ("chat",), "model")
    for _ in range(2):
        job.make(settings, task, job.Options(), lambda: None)
        job.clear(settings, [task])
        made = awq_results.finished(tmp_path, str(source))
        assert made is not None and made.manifest["made"] == "now"
        assert [folder.name for folder in made.folder.parent.iterdir()] == [made.folder.name] != [older.name]


def test_unfinished_work_is_none(tmp_path: Path) -> None:
    """Whatever it holds: its name begins with a dot."""
    source = source_of(tmp_path / "model")
    put(tmp_path, source, ".partial-20260101T000000Z")
    assert found(tmp_path, source) is None


@pytest.mark.parametrize(
    "manifest", ["", "{", "[]", "5", "{}", '{"files": []}', '{"files": {}}', '{"files": {"a": 5}}']
)
def test_a_folder_without_its_manifest_is_none(tmp_path: Path, manifest: str) -> None:
    """The next older one may be whole."""
    source = source_of(tmp_path / "model")
    whole = put(tmp_path, source)
    (put(tmp_path, source, "20260102T000000Z") / awq_results.MANIFEST).write_text(manifest)
    assert found(tmp_path, source) == whole


def test_a_result_that_lost_something_is_none(tmp_path: Path) -> None:
    """A file, or the end of one."""
    source = source_of(tmp_path / "model")
    weights = put(tmp_path, source) / "model.safetensors"
    weights.write_bytes(b"four bit")
    assert found(tmp_path, source) is None
    weights.unlink()
    assert found(tmp_path, source) is None


@pytest.mark.parametrize("size", [1000, len(WEIGHTS), 10_000_000])
def test_a_result_of_other_weights_is_none(tmp_path: Path, size: int) -> None:
    """Who trains on, and puts the new weights where the old ones were, is not served the old ones in four bits. A copy
    with another time is the same, and a result whose source is gone serves on."""
    weights = (WEIGHTS * (size // len(WEIGHTS) + 1))[:size]
    source = source_of(tmp_path / "model", weights)
    result = put(tmp_path, source)
    (source / "model.safetensors").write_bytes(weights)
    assert found(tmp_path, source) == result
    (source / "model.safetensors").write_bytes(bytes(byte ^ 1 for byte in weights))
    assert found(tmp_path, source) is None
    (source / "model.safetensors").unlink()
    (source / "config.json").unlink()
    source.rmdir()
    assert found(tmp_path, source) == result


def test_a_result_that_does_not_tell_its_source_counts(tmp_path: Path) -> None:
    """As one of a hub model, whose revision is looked at where results are made."""
    source = source_of(tmp_path / "model")
    folder = put(tmp_path, source)
    manifest = json.loads((folder / awq_results.MANIFEST).read_text())
    for told, counts in (({"content": "other"}, False), ({"name": "x"}, True), ({}, True), (5, False)):
        (folder / awq_results.MANIFEST).write_text(json.dumps(manifest | {"source": told}))
        assert (found(tmp_path, source) == folder) == counts, told
    folder = put(tmp_path, "some/model")
    assert found(tmp_path, "some/model") == folder


def test_a_source_that_cannot_be_looked_at_is_no_folder(tmp_path: Path) -> None:
    """As /home is for the units; here by a name too long for any file system."""
    source = "/" + "x" * 5000
    folder = put(tmp_path, "/y")
    folder.parent.rename(awq_results.row(tmp_path, source))
    assert found(tmp_path, source) is not None


def test_other_weights_are_told_at_a_glance(tmp_path: Path) -> None:
    """By pieces from all over them, and by the config: a start does not read gigabytes."""
    source = source_of(tmp_path / "model", bytes(100))
    with (source / "model.safetensors").open("r+b") as file:
        file.truncate(64 * 2**30)  # a hole, and as long to read as if it were none
    first = awq_results.content(source)
    with (source / "model.safetensors").open("r+b") as file:
        for place in range(0, 64 * 2**30, 2**30):
            file.seek(place)
            file.write(b"x")
    assert awq_results.content(source) != first
    (source / "tokenizer.json").write_text("{}")
    before = awq_results.content(source)
    (source / "config.json").write_text('{"rope_theta": 1}')
    assert awq_results.content(source) != before
