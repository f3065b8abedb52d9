"""card.py: what lies beside the weights for people, and what of the source stands in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from yaptext.quantize import model_card
from yaptext.quantize.verify import Quality, Report

REPORT = Report(
    tokens=2048,
    float_=Quality(10.75, 0.0, 1.0, []),
    awq=Quality(11.875, 0.140625, 0.875, [0.01, 0.02, 0.04]),
    rounding=Quality(14.5, 0.296875, 0.75, [0.02, 0.05, 0.09]),
    float_bytes=269_000_000,
    awq_bytes=114_000_000,
    bytes_per_weight=0.848,
)


def manifest(name: str = "maker/Model-1B", revision: str | None = None) -> dict[str, Any]:
    return {
        "source": {"name": name, "revision": revision},
        "settings": {"bits": 4, "group_size": 64, "tokens": 512},
        "calibration": {"text": "builtin", "samples": 8, "made_of": {"conversation": 72, "decision": 160}},
        "made_by": {"yaptext": "0.1.0", "autoawq": "0.2.9", "device": "cpu"},
    }


def front_of(source: Path, **changes: Any) -> dict[str, Any]:
    text = model_card.text(source, manifest(**changes), REPORT)
    opening, front, _ = text.split("---\n", 2)
    assert opening == ""
    fields: dict[str, Any] = yaml.safe_load(front)
    return fields


def written(source: Path, front: str) -> Path:
    (source / "README.md").write_text(f"---\n{front}\n---\n# Model\n", encoding="utf-8")
    return source


# Front matter


def test_licence_and_language_are_the_sources(tmp_path: Path) -> None:
    """What else its card says is about other files."""
    front = front_of(
        written(
            tmp_path,
            "license: other\nlicense_name: 'a: b'\nlicense_link: LICENSE\nlanguage:\n- en\n- 日本\n"
            "pipeline_tag: text-generation\ndatasets: [x/y]\nmodel-index: []\ntags: [gguf]\nwidget: {a: 1}",
        )
    )
    assert front == {
        "license": "other",
        "license_name": "a: b",
        "license_link": "LICENSE",
        "language": ["en", "日本"],
        "pipeline_tag": "text-generation",
        "base_model": "maker/Model-1B",
        "base_model_relation": "quantized",
        "tags": ["awq", "4-bit", "vllm"],
    }


@pytest.mark.parametrize(
    ("front", "field", "value"),
    [
        ("language: no", "language", "no"),
        ("language: [en, no, 'on']", "language", ["en", "no", "on"]),
        ("license: 2024-01-01", "license", "2024-01-01"),
        ("license: 1.0", "license", "1.0"),
    ],
)
def test_words_stay_words(tmp_path: Path, front: str, field: str, value: object) -> None:
    """Norwegian is no boolean, as older YAML has it; a date or a number does not end an hour's work."""
    assert front_of(written(tmp_path, front))[field] == value


@pytest.mark.parametrize(
    "text",
    [None, "", "# Only text\n", "---\n[unclosed\n---\n", "---\n- a list\n---\n", "---\nlicense: mit\n", "---\n---\n",
     "---\nlicense: !!python/object/apply:os.getcwd []\n---\n", "---\nlicense: {a: mit}\n---\n", b"\xff\xfe"],
)  # fmt: skip
def test_a_card_that_tells_nothing_is_none(tmp_path: Path, text: str | bytes | None) -> None:
    """Missing, empty, broken or hostile: the licence files come along at any rate."""
    if text is not None:
        (tmp_path / "README.md").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert set(front_of(tmp_path)) == {"base_model", "base_model_relation", "tags"}


def test_a_folder_of_ones_own_is_no_base_model(tmp_path: Path) -> None:
    """Its name leads nowhere on the hub."""
    assert set(front_of(tmp_path, name="my-model")) == {"tags"}


# Text


def test_the_figures_are_the_measurements(tmp_path: Path) -> None:
    """One line each for float, AWQ and rounding."""
    text = model_card.text(tmp_path, manifest(), REPORT)
    assert model_card.table(REPORT).splitlines()[2:] == [
        "| float | 0 | 10.75 | 100 % | 269 MB |",
        "| AWQ | 0.1406 | 11.88 | 87.5% | 114 MB, 0.85 bytes a weight |",
        "| rounding | 0.2969 | 14.50 | 75.0% | the same |",
    ]
    assert model_card.table(REPORT) in text and "On 2,048 tokens of held-out text" in text
    assert "8 samples of 512 tokens, taken from 72 conversations, 160 decisions, laid out" in text
    assert "groups of\n64, zero points" in text and "# Model-1B, 4-bit AWQ" in text


def test_the_revision_is_told_where_there_is_one(tmp_path: Path) -> None:
    """A folder has none."""
    assert "weights of `maker/Model-1B` at revision `c0ffee`, made by" in model_card.text(
        tmp_path, manifest(revision="c0ffee"), REPORT
    )
    assert "at revision" not in model_card.text(tmp_path, manifest(), REPORT)


# Files


def test_licence_files_come_along(tmp_path: Path) -> None:
    """However they are spelt; a folder of licences is left, and ends nothing."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    kept = ["LICENSE", "License.txt", "licence.md", "NOTICE", "Notice.txt", "USE_POLICY.md"]
    for name in [*kept, "model.py", "pytorch_model.bin", "UNLICENSED"]:
        (source / name).write_text(name)
    (source / "LICENSES").mkdir()
    model_card.write(target, source, manifest(), REPORT)
    assert {file.name for file in target.iterdir()} == {*kept, "README.md", model_card.PLOT}
    assert all((target / name).read_text() == name for name in kept)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    """Of three layers, and of none: a PNG."""
    for number, errors in enumerate([REPORT.awq.layer_errors, []]):
        file = tmp_path / f"{number}.png"
        awq, rounding = Quality(11.0, 0.1, 0.9, errors), Quality(14.0, 0.3, 0.7, errors)
        model_card.plot(Report(2048, REPORT.float_, awq, rounding, 1, 1, 1.0), file)
        data = file.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
