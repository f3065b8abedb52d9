"""A tiny model and its quantized form, made once a run; the command over them, and a hub on loopback."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quantize.forge import Bench, Forge
from quantize.hub_server import TOKEN, Account, HubServer
from quantize.tiny import make_model, quantized

from yaptext.quantize import awq


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TQDM_DISABLE", "1")
        environment.setenv("OMP_NUM_THREADS", "1")  # tiny layers: threads cost more than they bring
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        awq.bring_autoawq()  # imports autoawq without its farewell
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


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as hub:
        yield hub


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    server.reset()
    server.accounts[TOKEN] = Account("someone")
    return server


@pytest.fixture(scope="module")
def forge(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forge]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with Forge(tmp_path_factory.mktemp("logs"), environment) as forge:
        yield forge


@pytest.fixture
def fresh(forge: Forge, tmp_path: Path, model: Path) -> Bench:
    return Bench(forge, tmp_path / "fresh", model)
