"""job.py: what is done and what is not, and what is left whatever ends a job."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from quantize.hub_server import Account, HubServer
from quantize.tiny import make_model

from yaptext.engine import shelf, weights
from yaptext.errors import StartError
from yaptext.settings import Settings

pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(600)]

CALIBRATION = {"AWQ_CALIBRATION_SAMPLES": "4", "AWQ_CALIBRATION_TOKENS": "128"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_model(tmp_path_factory.mktemp("models") / "Tiny-Llama", "llama", outliers=True)
    (folder / "README.md").write_text('---\nlicense: apache-2.0\nlanguage: ["en", "pl"]\nmodel_name: x\n---\n# Tiny\n')
    (folder / "LICENSE").write_text("the licence")
    return folder


class Bench:
    """A state folder and the command over it."""

    def __init__(self, state: Path, model: Path) -> None:
        self.state, self.model = state, model
        self.environment = os.environ | CALIBRATION | {
            "YAP_TEXT_STATE_DIR": str(state),
            "YAP_TEXT_DEVICE": "cpu",
            "CHAT_MODEL": str(model),
            "DEPLOY_MODELS": "chat",
            "LOG_FORMAT": "json",
            "OMP_NUM_THREADS": "1",
            "TQDM_DISABLE": "1",
        }  # fmt: skip

    @property
    def row(self) -> Path:
        return shelf.row(self.state, str(self.model))

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "yaptext", "quantize", *arguments]
        return subprocess.Popen(
            command, env=self.environment | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, list[str]]:
        """Exit status, and the events of the log; a line that is none stands as it is."""
        with self.start(*arguments, **environment) as process:
            text, _ = process.communicate(timeout=300)
        return process.returncode, [_event(line) for line in text.splitlines() if line]

    def finished(self) -> shelf.Finished:
        found = shelf.finished(self.state, str(self.model))
        assert found is not None
        return found

    def check_clean(self, results: int) -> None:
        """So many results and nothing else on the shelf; each is whole by its own manifest."""
        lying = [path.name for path in self.row.iterdir()] if self.row.exists() else []
        assert len(lying) == results and not [name for name in lying if name.startswith(".")], lying
        if results:
            from yaptext.quantize.job import _sha256

            found = self.finished()
            files = {path.name for path in found.folder.iterdir()} - {shelf.MANIFEST}
            assert files == set(found.manifest["files"])
            for name, entry in found.manifest["files"].items():
                assert _sha256(found.folder / name) == entry["sha256"], name


def _event(line: str) -> str:
    try:
        entry: dict[str, Any] = json.loads(line)
    except ValueError:
        return line
    return f"{entry['event']} {entry.get('reason') or entry.get('error') or ''}".strip()


def lines_of(events: list[str], name: str) -> list[str]:
    return [event for event in events if event.startswith(name)]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Bench:
    """One finished result, which tests may look at and add to."""
    # As systemd's DynamicUser= has it: the state folder is a link.
    real = tmp_path_factory.mktemp("private")
    state = tmp_path_factory.mktemp("lib") / "yap-text"
    state.symlink_to(real)
    bench = Bench(state, model)
    status, events = bench.run()
    assert status == 0, events
    assert lines_of(events, "quantize.begun") == ["quantize.begun no finished result"]
    return bench


@pytest.fixture
def fresh(tmp_path: Path, model: Path) -> Bench:
    return Bench(tmp_path / "state", model)


# What is done, and what is not


def test_a_result_is_whole_and_tells_what_it_is(bench: Bench) -> None:
    """Manifest, card with the source's licence, plot; no path of this machine in what may be pushed."""
    bench.check_clean(1)
    found = bench.finished()
    assert found.manifest["source"] == {"name": "Tiny-Llama", "revision": None}
    assert found.manifest["verification"]["awq"]["kl"] < found.manifest["verification"]["rounding"]["kl"]
    card = (found.folder / "README.md").read_text()
    from huggingface_hub import metadata_load

    front = metadata_load(found.folder / "README.md")
    assert front == {"license": "apache-2.0", "language": ["en", "pl"], "tags": ["awq", "4-bit", "vllm"]}
    assert f"{found.manifest['verification']['awq']['kl']:.4f}" in card and "layer_errors.png" in card
    assert (found.folder / "layer_errors.png").read_bytes().startswith(b"\x89PNG")
    assert (found.folder / "LICENSE").read_text() == "the licence"
    for file in found.folder.iterdir():
        assert file.stat().st_mode & 0o777 in (0o644,), file
        if file.suffix in (".md", ".json"):
            assert str(bench.model.parent) not in file.read_text()


def test_finished_work_is_not_done_again(bench: Bench) -> None:
    """The second run says where the result is, and loads none of what is heavy."""
    driver = (
        "import sys; from yaptext.cli import run; status = run(['quantize']);"
        "print(status, *({'torch', 'transformers', 'awq', 'datasets', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", driver], env=bench.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"
    assert '"quantize.finished_before"' in done.stderr and str(bench.finished().folder) in done.stderr


def test_the_service_asks_without_costing_a_start(bench: Bench, fresh: Bench) -> None:
    """It is not wanted unless QUANTIZATION=awq; then any finished result will do, whatever it was made with."""
    assert fresh.run("--when-wanted") == (0, ["quantize.not_wanted QUANTIZATION=auto"])
    status, events = bench.run("--when-wanted", QUANTIZATION="awq", AWQ_CALIBRATION_SAMPLES="7")
    assert (status, events) == (0, ["quantize.finished_before"])


def test_the_server_finds_the_result(bench: Bench, tmp_path: Path) -> None:
    """Under auto and awq, with the reason; `none` serves the float model; without a result awq is refused."""
    given = {"CHAT_MODEL": str(bench.model), "YAP_TEXT_DEVICE": "cpu", "YAP_TEXT_STATE_DIR": bench.state}
    for wanted in ("auto", "awq"):
        chosen = weights.choose(Settings.load(QUANTIZATION=wanted, **given), "chat")
        assert (chosen.source, chosen.kind) == (str(bench.finished().folder), "awq")
        assert "a finished AWQ folder for Tiny-Llama" in chosen.reason
    plain = weights.choose(Settings.load(QUANTIZATION="none", **given), "chat")
    assert (plain.source, plain.kind) == (str(bench.model), "float")
    with pytest.raises(StartError, match=r"no finished AWQ folder lies in .*\. Run `yap-text quantize`"):
        weights.choose(Settings.load(QUANTIZATION="awq", **(given | {"YAP_TEXT_STATE_DIR": tmp_path})), "chat")


def test_another_recipe_or_force_makes_it_anew(bench: Bench) -> None:
    """Why is said; the new result takes the place of the old one."""
    before = bench.finished().folder
    status, events = bench.run("--samples", "5")
    assert (status, lines_of(events, "quantize.begun")) == (0, ["quantize.begun samples was 4, is 5"])
    after = bench.finished().folder
    assert after != before and not before.exists()
    status, events = bench.run("--force", "--samples", "5")
    assert (status, lines_of(events, "quantize.begun")) == (0, ["quantize.begun --force"])
    bench.check_clean(1)
    assert bench.run("--samples", "4")[0] == 0  # as the other tests know it


def test_a_damaged_result_counts_as_none(bench: Bench) -> None:
    """A file that lost its end is not served."""
    weights_file = bench.finished().folder / "model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[:-1])
    assert shelf.finished(bench.state, str(bench.model)) is None
    weights_file.write_bytes(whole)
    bench.check_clean(1)


def test_one_model_for_both_roles_is_quantized_once(fresh: Bench) -> None:
    """On talk and decisions alike."""
    status, events = fresh.run(DEPLOY_MODELS="both", TOOL_MODEL=str(fresh.model))
    assert status == 0 and len(lines_of(events, "quantize.kept")) == 1
    manifest = fresh.finished().manifest
    assert manifest["recipe"]["roles"] == ["chat", "tool"]
    assert set(manifest["calibration"]["made_of"]) == {"conversation", "decision"}


def test_a_role_with_awq_weights_of_its_own_is_left_out(fresh: Bench) -> None:
    """Nothing is to do then."""
    status, events = fresh.run(AWQ_CHAT_MODEL="some/awq-model")
    assert (status, events) == (0, ["quantize.given AWQ_CHAT_MODEL"])


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_what_is_quantized_already_is_refused(tmp_path: Path, method: str) -> None:
    """In one line, before any weight is read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    status, events = Bench(tmp_path / "state", folder).run()
    assert status == 1
    assert re.fullmatch(rf"yap-text: {folder} has \w+ weights already: AWQ is made of float weights, .*", events[-1])


def test_a_deployed_role_needs_a_model(fresh: Bench) -> None:
    """Wrong settings end with 2."""
    status, events = fresh.run(DEPLOY_MODELS="both")
    assert (status, events[-1][:30]) == (2, "yap-text: TOOL_MODEL is not se")


# What ends a job early


def until_layer(process: subprocess.Popen[str], number: int) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if '"quantize.layer"' in line and json.loads(line)["layer"] >= number:
            return
    raise AssertionError("the job ended before its layers")


@contextmanager
def running(bench: Bench, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with bench.start(*arguments) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def test_a_second_job_is_told_who_runs(bench: Bench) -> None:
    """At once, with the process id; the first goes on."""
    with running(bench, "--force") as first:
        until_layer(first, 1)
        status, events = bench.run("--force")
        assert status == 1
        assert f"another job is at work on {bench.state}/awq: process {first.pid}, since 20" in events[-1]
        first.communicate(timeout=300)
        assert first.returncode == 0
    bench.check_clean(1)


def test_sigterm_leaves_what_was_there(bench: Bench) -> None:
    """143, the old result, and nothing half-made."""
    before = bench.finished().folder
    with running(bench, "--force") as process:
        until_layer(process, 1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode == 143
    assert bench.finished().folder == before
    bench.check_clean(1)


def test_killed_at_any_moment_it_leaves_the_old_or_the_new(bench: Bench) -> None:
    """Ten times SIGKILL, from the start to past the end: a whole result each time, a clean shelf after the next run."""
    chance = random.Random(11)
    for _ in range(10):
        with running(bench, "--force") as process:
            try:
                process.communicate(timeout=chance.uniform(0.5, 11))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        bench.finished()
    assert bench.run("--force")[0] == 0
    bench.check_clean(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs; mounting takes root, which CI has."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=66m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_without_room_is_told_before_the_work(small_disk: Path, model: Path) -> None:
    """What is needed and what is free."""
    bench = Bench(small_disk, model)
    (small_disk / "ballast").write_bytes(bytes(20 * 2**20))
    status, events = bench.run()
    assert status == 1
    assert re.fullmatch(r"yap-text: Tiny-Llama needs \d+ MB in .*, and 4\d MB are free", events[-1])
    bench.check_clean(0)


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half(small_disk: Path, model: Path) -> None:
    """One line; and with room again the next job does it."""
    bench = Bench(small_disk, model)
    ballast = small_disk / "ballast"
    with running(bench) as process:
        until_layer(process, 1)
        with pytest.raises(OSError, match="No space left"), ballast.open("wb") as file:
            while True:
                file.write(bytes(2**16))
        text, _ = process.communicate(timeout=120)
    assert process.returncode == 1, text
    assert text.splitlines()[-1].startswith("yap-text: the disk of ") and "is full; nothing was kept" in text
    bench.check_clean(0)
    ballast.unlink()
    assert bench.run()[0] == 0
    bench.check_clean(1)


def test_a_state_folder_that_cannot_be_written_is_one_line(tmp_path: Path, model: Path) -> None:
    """It names the folder."""
    (tmp_path / "state").write_text("a file")
    status, events = Bench(tmp_path / "state", model).run()
    assert status == 1 and events[-1].startswith(f"yap-text: cannot write to {tmp_path}/state/awq: ")


def test_a_result_that_rounding_beats_is_not_kept(fresh: Bench) -> None:
    """An error; --allow-worse keeps it and the figures tell."""
    driver = (
        "import sys; from yaptext.quantize import verify; from yaptext.cli import run;"
        "verify.Report.worthwhile = False; sys.exit(run(['quantize', *sys.argv[1:]]))"
    )

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", driver, *arguments]
        return subprocess.run(command, env=fresh.environment, capture_output=True, text=True, check=False)

    refused = run()
    assert refused.returncode == 1
    assert "AWQ is no better than plain rounding for Tiny-Llama: KL 0." in refused.stderr.splitlines()[-1]
    fresh.check_clean(0)
    assert run("--allow-worse").returncode == 0
    fresh.check_clean(1)


# Pushing


def test_a_result_goes_to_the_hub_once(bench: Bench) -> None:
    """Checked before the work, pushed after it; the next run pushes nothing; another branch is pushed to."""
    with HubServer() as hub:
        hub.accounts["hf_token"] = Account("someone")
        push = {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_token",
            "HF_AWQ_PUSH": "1",
        }
        status, events = bench.run("--force", **push)
        assert status == 2 and "HF_AWQ_PUSH=1 needs HF_AWQ_CHAT_REPO" in events[-1]
        assert not lines_of(events, "quantize.begun")
        push["HF_AWQ_CHAT_REPO"] = "someone/tiny-awq"
        status, events = bench.run(**push)
        assert status == 0, events
        assert not lines_of(events, "quantize.begun") and len(lines_of(events, "hub.uploaded")) == 1
        status, events = bench.run(**push)
        assert (status, events) == (0, ["quantize.finished_before"])
        status, events = bench.run(**push, HF_AWQ_BRANCH="next")
        assert status == 0 and len(lines_of(events, "hub.uploaded")) == 1
    for receipt in bench.row.glob("pushed-*"):
        receipt.unlink()
