"""A tiny model and its quantized form, made once a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quantize.tiny import make_model, quantized

from yaptext.quantize import awq


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TQDM_DISABLE", "1")
        environment.setenv("OMP_NUM_THREADS", "1")  # tiny layers: threads cost more than they bring
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        awq._architecture("llama")  # imports autoawq without its farewell
        yield
        torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model's folder, for reading."""
    folder = make_model(tmp_path_factory.mktemp("models") / "Tiny-Llama", "llama", outliers=True)
    (folder / "README.md").write_text('---\nlicense: apache-2.0\nlanguage: ["en", "pl"]\nmodel_name: x\n---\n# Tiny\n')
    (folder / "LICENSE").write_text("the licence")
    (folder / "generation_config.json").write_text('{"temperature": 0.37, "do_sample": false}')
    return folder


@pytest.fixture(scope="session")
def result(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model`, quantized; for reading."""
    folder = tmp_path_factory.mktemp("awq") / "result"
    quantized(model, folder)
    return folder
