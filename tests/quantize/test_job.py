"""job.py: what is done and what is not, and what is left whatever ends a job."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from privileged import tmpfs
from quantize.forge import Bench, Forge, only
from quantize.hub_server import TOKEN, HubServer

from yaptext.engine import awq_results, checkpoints
from yaptext.errors import StartError
from yaptext.settings import Settings

pytestmark = [pytest.mark.subprocess, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def made(forge: Forge, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """One finished result, made by the command itself: for reading, `bench` is a copy of it."""
    bench = Bench(forge, tmp_path_factory.mktemp("made"), model)
    done = subprocess.run(
        [sys.executable, "-m", "yaptext", "quantize"],
        env=bench.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    (bench.state / "told").write_text(done.stdout)
    return bench


@pytest.fixture
def bench(made: Bench, tmp_path: Path) -> Bench:
    """A state folder that is a link, as systemd's DynamicUser= has it, with one finished result."""
    shutil.copytree(made.state, tmp_path / "private")
    (tmp_path / "state").symlink_to(tmp_path / "private")
    return Bench(made.forge, tmp_path / "state", made.model)


# What is done, and what is not


def test_a_result_is_whole_and_tells_what_it_is(made: Bench) -> None:
    """Manifest, card with the source's licence, plot; no path of this machine in what may be pushed."""
    made.check_clean()
    found = made.finished()
    source = {"name": "Tiny-Llama", "revision": None, "content": awq_results.content(Path(made.model))}
    assert found.manifest["source"] == source
    figures = found.manifest["verification"]
    assert figures["awq"]["kl"] < figures["rounding"]["kl"] / 5
    card = (found.folder / "README.md").read_text()
    assert card.startswith('---\nlicense: "apache-2.0"\nlanguage: ["en", "pl"]\ntags:')
    assert f"| AWQ | {figures['awq']['kl']:.4f} |" in card and "layer_errors.png" in card
    assert (found.folder / "layer_errors.png").read_bytes().startswith(b"\x89PNG")
    assert (found.folder / "LICENSE").read_text() == "the licence"
    for file in found.folder.iterdir():
        assert file.stat().st_mode & 0o777 == 0o644, file
        if file.suffix in (".md", ".json"):
            assert str(Path(made.model).parent) not in file.read_text()
            assert str(made.state) not in file.read_text()


def test_the_journal_has_our_lines_and_no_others(made: Bench) -> None:
    """No bar, no farewell of a library; a line a layer, and what it took at the end."""
    lines = [json.loads(line) for line in (made.state / "told").read_text().splitlines()]
    assert {line["logger"].split(".")[0] for line in lines} == {"yaptext"}
    told = [line["event"] for line in lines]
    assert told == [f"quantize.{event}" for event in
                    ("begun", "planned", "layer", "layer", "verified", "kept", "done")]  # fmt: skip
    begun, planned, *layers, verified, _, done = lines
    assert begun["reason"] == "no finished result"
    assert (planned["group_size"], planned["samples"], planned["tokens"], planned["layers"]) == (128, 4, 128, 2)
    assert [(layer["layer"], layer["layers"]) for layer in layers] == [(1, 2), (2, 2)]
    assert verified["kl"] < verified["rounding_kl"]
    assert done["peak_memory_mb"] > 100 and done["seconds"] > 0


def test_finished_work_is_not_done_again(made: Bench) -> None:
    """The second run says where the result is, and loads none of what is heavy."""
    driver = (
        "import sys; from yaptext.commands.main import run; status = run(['quantize']);"
        "print(status, *({'torch', 'transformers', 'awq', 'datasets', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", driver], env=made.environment, capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"
    assert '"quantize.finished_before"' in done.stderr and str(made.finished().folder) in done.stderr


def test_the_service_asks_without_costing_a_start(bench: Bench, fresh: Bench) -> None:
    """It is not wanted unless QUANTIZATION=awq; then any finished result will do, whatever it was made with, and an
    upload that failed an earlier day is not tried at a start."""
    assert fresh.run("--when-wanted") == (0, ["quantize.not_wanted QUANTIZATION=auto"])
    assert not fresh.state.exists()
    other = {"AWQ_CALIBRATION_SAMPLES": "7", "AWQ_CALIBRATION": "/gone", "TOOLS_FILE": "/gone", "HF_AWQ_PUSH": "1"}
    status, events = bench.run("--when-wanted", QUANTIZATION="awq", **other)
    assert (status, events) == (0, ["quantize.finished_before"])


def test_the_service_may_serve_awq_weights_of_others(fresh: Bench, result: Path) -> None:
    """In CHAT_MODEL, under QUANTIZATION=awq: there is nothing to do then; who asks himself is told so by an error."""
    status, events = fresh.run("--when-wanted", QUANTIZATION="awq", CHAT_MODEL=str(result))
    assert (status, events) == (0, ["quantize.given it has AWQ weights already"])
    status, events = fresh.run(CHAT_MODEL=str(result))
    assert status == 2 and "has awq weights already" in events[-1]


def test_the_server_finds_the_result(bench: Bench, tmp_path: Path) -> None:
    """Under auto and awq, with the reason; `none` serves the float model; without a result awq is refused."""
    given = {"CHAT_MODEL": str(bench.model), "YAP_TEXT_DEVICE": "cpu", "YAP_TEXT_STATE_DIR": bench.state}
    for wanted in ("auto", "awq"):
        chosen = checkpoints.choose(Settings.load(QUANTIZATION=wanted, **given), "chat")
        assert (chosen.source, chosen.kind) == (str(bench.finished().folder), "awq")
        assert "a finished AWQ folder for Tiny-Llama" in chosen.reason
    plain = checkpoints.choose(Settings.load(QUANTIZATION="none", **given), "chat")
    assert (plain.source, plain.kind) == (str(bench.model), "float")
    with pytest.raises(StartError, match=r"no finished AWQ folder lies in .*\. Run `yap-text quantize`"):
        checkpoints.choose(Settings.load(QUANTIZATION="awq", **(given | {"YAP_TEXT_STATE_DIR": tmp_path})), "chat")


def test_another_recipe_or_force_makes_it_anew(bench: Bench) -> None:
    """Why is said; the new result takes the place of the old one."""
    before = bench.finished().folder
    status, events = bench.run("--samples", "5")
    assert (status, only(events, "quantize.begun")) == (0, ["quantize.begun samples was 4, is 5"])
    after = bench.finished().folder
    assert after != before and not before.exists()
    status, events = bench.run("--force", "--samples", "5")
    assert (status, only(events, "quantize.begun")) == (0, ["quantize.begun --force"])
    bench.check_clean()


def test_every_choice_is_part_of_the_recipe(bench: Bench, tmp_path: Path) -> None:
    """Whatever changes what the model is calibrated on; not what is of the other role."""
    (tmp_path / "text.txt").write_text("text")
    (tmp_path / "tools.json").write_text('[{"name": "one"}]')
    forging = "from yaptext.quantize import job; job.make = lambda *_: None"  # what would be done is all that is asked
    for name, value, told in [
        ("AWQ_CALIBRATION_TOKENS", "256", "tokens was 128, is 256"),
        ("AWQ_GROUP_SIZE", "32", "group_size was auto, is 32"),
        ("CHAT_PROMPT_FORMAT", "turns", "prompts was segments, is turns"),
        ("AWQ_CALIBRATION", str(tmp_path / "text.txt"), "text was "),
        ("TOOL_MODEL", str(bench.model), "roles was ['chat'], is ['chat', 'tool'], tools was None, is "),
        ("TOOLS_FILE", str(tmp_path / "tools.json"), None),
    ]:
        changed = {name: value} | ({"DEPLOY_MODELS": "both"} if name == "TOOL_MODEL" else {})
        status, events = bench.run(before=forging, **changed)
        assert status == 0
        begun = only(events, "quantize.begun")
        assert begun[0].startswith(f"quantize.begun {told}") if told else begun == [], (name, events)


def test_what_an_earlier_version_did_not_note_is_no_change(bench: Bench) -> None:
    """An update of the service does not cost an hour."""
    file = bench.finished().folder / awq_results.MANIFEST
    manifest = json.loads(file.read_text())
    del manifest["recipe"]["prompts"]
    file.write_text(json.dumps(manifest))
    assert bench.run() == (0, ["quantize.finished_before"])


def test_other_weights_in_the_same_folder_are_another_model(bench: Bench, tmp_path: Path) -> None:
    """Trained on and put where the old ones were: neither the server nor the job takes the old result for theirs."""
    bench.model = Path(shutil.copytree(bench.model, tmp_path / "own"))
    bench.environment["CHAT_MODEL"] = str(bench.model)
    assert bench.run()[0] == 0
    file = bench.model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4000] + bytes(byte ^ 1 for byte in file.read_bytes()[-4000:]))
    assert awq_results.finished(bench.state, str(bench.model)) is None
    status, events = bench.run("--when-wanted", QUANTIZATION="awq")
    assert (status, only(events, "quantize.begun")) == (0, ["quantize.begun no finished result"])
    bench.check_clean()


def test_a_damaged_result_counts_as_none(bench: Bench) -> None:
    """A file that lost its end is not served; the next run makes it anew."""
    weights_file = bench.finished().folder / "model.safetensors"
    weights_file.write_bytes(weights_file.read_bytes()[:-1])
    assert awq_results.finished(bench.state, str(bench.model)) is None
    status, events = bench.run()
    assert (status, only(events, "quantize.begun")) == (0, ["quantize.begun no finished result"])
    bench.check_clean()


def test_one_model_for_both_roles_is_quantized_once(fresh: Bench) -> None:
    """On talk and decisions alike, also where its folder is written in two ways."""
    both = {"DEPLOY_MODELS": "both", "TOOL_MODEL": f"{fresh.model}/../{Path(fresh.model).name}/"}
    status, events = fresh.run(**both)
    assert status == 0 and len(only(events, "quantize.kept")) == 1
    manifest = fresh.finished().manifest
    assert manifest["recipe"]["roles"] == ["chat", "tool"]
    assert set(manifest["calibration"]["made_of"]) == {"conversation", "decision"}
    assert fresh.run(**both) == (0, ["quantize.finished_before"])


def test_a_role_with_awq_weights_of_its_own_is_left_out(fresh: Bench) -> None:
    """Nothing is to do then."""
    status, events = fresh.run(AWQ_CHAT_MODEL="some/awq-model")
    assert (status, events) == (0, ["quantize.given AWQ_CHAT_MODEL"])


def test_a_state_folder_may_be_a_relative_path(forge: Forge, tmp_path: Path, model: Path) -> None:
    """The demo model has the same row before it is converted and after."""
    there = f"import os; os.chdir({str(tmp_path)!r})"
    small = (
        "import shutil; from pathlib import Path; from yaptext.engine import demo;"
        f"demo.folder = lambda state: Path(shutil.copytree({str(model)!r}, demo.place(state), dirs_exist_ok=True));"
    )
    bench = Bench(forge, Path("state"), model, CHAT_MODEL="")
    status, events = bench.run(before=small + there)
    assert (status, len(only(events, "quantize.kept"))) == (0, 1), events
    assert bench.run(before=small + there) == (0, ["quantize.finished_before"])
    assert len([row for row in (tmp_path / "state" / "awq").iterdir() if row.is_dir()]) == 1


# What is refused


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_what_is_quantized_already_is_refused(forge: Forge, tmp_path: Path, method: str) -> None:
    """In one line, before any weight is read."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": method}}))
    status, events = Bench(forge, tmp_path / "state", folder).run()
    kind = "quantized" if method == "bitsandbytes" else method
    assert status == 2
    assert events[-1].startswith(f"quantize.failed {folder} has {kind} weights already: AWQ is made of float weights")


def test_a_deployed_role_needs_a_model(fresh: Bench) -> None:
    """Wrong settings end with 2."""
    status, events = fresh.run(DEPLOY_MODELS="both")
    assert (status, events[-1][:33]) == (2, "quantize.failed TOOL_MODEL is not")


@pytest.mark.parametrize(
    ("given", "status", "line"),
    [
        ({"CHAT_MODEL": "/no/such/model"}, 2, "/no/such/model is neither a folder nor the name of a model on the hub"),
        ({"CHAT_MODEL": "/" + "x" * 5000}, 2, "x is neither a folder nor the name of a model on the hub"),
        ({"CHAT_MODEL": "some/model"}, 2, "some/model is not on the hub"),
        ({"CHAT_MODEL": "a b/c?d"}, 2, "a b/c?d is neither a folder nor the name of a model on the hub"),
        ({"TOOLS_FILE": "/no/such/tools.json"}, 2, "TOOLS_FILE='/no/such/tools.json' is not a list of tools"),
        ({"AWQ_CALIBRATION": "/no/such/text"}, 2, "AWQ_CALIBRATION=/no/such/text is neither a file, a folder"),
        ({"AWQ_GROUP_SIZE": "96"}, 2, "AWQ_GROUP_SIZE='96' is not allowed"),
    ],
    ids=["no folder", "no name", "not there", "odd name", "no tools", "no text", "group size"],
)
def test_a_wrong_choice_is_one_line(fresh: Bench, given: dict[str, str], status: int, line: str) -> None:
    """Before a weight is loaded; nothing lies on the shelf then."""
    ended, events = fresh.run(**given)
    assert ended == status and line in events[-1] and events[-1].startswith("quantize.failed "), events
    assert not only(events, "quantize.planned") and not only(events, "Traceback")
    assert not list((fresh.state / "awq").glob("*/*"))


def test_too_little_text_is_one_line(fresh: Bench, tmp_path: Path) -> None:
    """Before a weight is loaded."""
    (tmp_path / "text.txt").write_text("The tide came in over the flats.")
    status, events = fresh.run(AWQ_CALIBRATION=str(tmp_path / "text.txt"))
    assert (status, events[0], len(events)) == (2, "quantize.begun no finished result", 2)
    assert events[1].startswith("quantize.failed the calibration text is 32 tokens in 1 documents; about ")
    fresh.check_clean(0)


def test_a_folder_without_weights_is_one_line(forge: Forge, tmp_path: Path, model: Path) -> None:
    """As of a copy that was broken off; an architecture is refused before that."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    status, events = Bench(forge, tmp_path / "state", folder).run()
    assert (status, events[-1]) == (
        2, f"quantize.failed {folder} has no model.safetensors, whole or in shards: name a model that has"
    )  # fmt: skip
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    status, events = Bench(forge, tmp_path / "state", folder).run()
    assert status == 2 and "cannot quantize the architecture 'gpt2'" in events[-1]


def test_a_model_that_cannot_be_read_is_one_line(forge: Forge, tmp_path: Path, model: Path) -> None:
    """The first line of what the library says that is not empty, of what checkpoint.py does not know."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "tokenizer.json").write_bytes(b"no tokenizer")
    bench = Bench(forge, tmp_path / "state", folder)
    status, events = bench.run()
    assert status == 2 and re.fullmatch(r"quantize.failed model could not be quantized: \S.*", events[-1])
    bench.check_clean(0)


@pytest.mark.parametrize("lying", [".", "awq", "awq/lock/x", "row"])
def test_a_state_folder_that_cannot_be_written_is_one_line(fresh: Bench, lying: str) -> None:
    """Something else lies where it, the shelf, the lock or the row should."""
    place = fresh.row if lying == "row" else fresh.state / lying
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("a file")
    status, events = fresh.run()
    assert status == 2 and events[-1].startswith("quantize.failed "), events
    assert str(fresh.state) in events[-1] or "File exists" in events[-1]


def test_a_result_that_rounding_beats_is_not_kept(fresh: Bench) -> None:
    """An error; --allow-worse keeps it and the figures tell."""
    worse = "from yaptext.quantize import verify; verify.Report.worthwhile = False"
    status, events = fresh.run(before=worse)
    assert status == 2
    assert "AWQ is no better than plain rounding for Tiny-Llama: KL 0." in events[-1]
    fresh.check_clean(0)
    assert fresh.run("--allow-worse", before=worse)[0] == 0
    fresh.check_clean()


def test_what_is_calibrated_with_is_what_is_noted(fresh: Bench, tmp_path: Path) -> None:
    """Not what lies there hours later, if anything does."""
    text = tmp_path / "text.txt"
    text.write_text("The tide came in over the flats, and the birds went up.\n\n" * 200)
    gone = (
        "from pathlib import Path; from yaptext.quantize import plan; before = plan.plan\n"
        f"def after(*given): Path({str(text)!r}).unlink(); return before(*given)\n"
        "plan.plan = after"
    )
    status, events = fresh.run(before=gone, AWQ_CALIBRATION=str(text))
    assert status == 0, events
    manifest = fresh.finished().manifest
    assert manifest["calibration"]["text"] == "own" and len(manifest["recipe"]["text"]) == 16


# What ends a job early


def test_a_second_job_is_told_who_runs(bench: Bench) -> None:
    """At once, with the process id; the first goes on. Who has nothing to do is not held up."""
    first = bench.start("--force")
    first.until("quantize.layer", layer=1)
    status, events = bench.run("--force")
    assert status == 75
    assert f"another job is using {bench.state}/awq: process {first.pid}, since 20" in events[-1]
    assert bench.run() == (0, ["quantize.finished_before"])
    assert first.end() == 0
    bench.check_clean()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_what_was_there(bench: Bench, number: int, status: int) -> None:
    """The old result, and nothing half-made."""
    before = bench.finished().folder
    job = bench.start("--force")
    job.until("quantize.layer", layer=1)
    assert job.end(number) == status
    assert not only(job.events, "Traceback")
    assert bench.finished().folder == before
    bench.check_clean()


def test_a_signal_that_is_swallowed_ends_the_job_at_the_next_layer(bench: Bench) -> None:
    """As in a destructor, where Python prints an exception and goes on."""
    swallowing = (
        "import os, signal; from yaptext.quantize import verify; init = verify.Reference.__init__\n"
        "def first(*given, **named):\n"
        "    init(*given, **named)\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    except BaseException: pass\n"
        "verify.Reference.__init__ = first"
    )
    job = bench.start("--force", before=swallowing)
    assert job.end() == 143
    assert not only(job.events, "quantize.layer")
    bench.check_clean()


def test_a_signal_ends_a_download(forge: Forge, tmp_path: Path, hub: HubServer) -> None:
    """Not after the file that is on its way, which may take an hour."""
    hub.add("maker/model", {"config.json": b'{"model_type": "llama"}', "model.safetensors": bytes(50_000_000)})
    bench = Bench(forge, tmp_path / "state", "maker/model", HF_HOME=str(tmp_path / "hf"))
    ending = (
        "import os, signal, threading; from yaptext.engine import underway\n"
        "came, install = threading.Event(), signal.signal\n"
        "def hearing(number, handler):\n"
        "    def heard(*given):\n"
        "        try: handler(*given)\n"
        "        finally: came.set()\n"
        "    return install(number, heard if callable(handler) else handler)\n"
        "signal.signal = hearing\n"
        "def first(self, size):\n"
        "    if threading.current_thread() is threading.main_thread() or came.is_set(): return\n"
        "    os.kill(os.getpid(), signal.SIGTERM); came.wait(30)\n"
        "underway.Teller.came = first"
    )
    job = bench.start(before=ending)
    assert job.end() == 143, job.events
    assert [size for file in (tmp_path / "hf").rglob("*") if (size := file.stat().st_size) >= 50_000_000] == []
    bench.check_clean(0)


def test_killed_at_any_moment_it_leaves_the_old_or_the_new(bench: Bench) -> None:
    """Ten times SIGKILL, from the start to past the end: a whole result each time, a clean shelf after the next run."""
    begun = time.monotonic()
    assert bench.run("--force")[0] == 0
    whole_s = time.monotonic() - begun
    chance = random.Random(11)
    for _ in range(10):
        job = bench.start("--force")
        time.sleep(chance.uniform(0, 1.1 * whole_s))  # the moment of the kill; nothing is waited for
        job.end(signal.SIGKILL)
        bench.finished()
    assert bench.run("--force")[0] == 0
    bench.check_clean()


KILLED = """
import os, shutil, signal
from pathlib import Path
from yaptext.quantize import job, kept, model_card, plan, verify
def dying(place, name, late=False):
    do = getattr(place, name)
    def end(*given, **named):
        late and do(*given, **named)
        os.kill(os.getpid(), signal.SIGKILL)
    setattr(place, name, end)
"""


@pytest.mark.parametrize(
    "moment",
    [
        "dying(plan, 'plan')",
        "dying(kept.shutil, 'copyfile', late=True)",
        "dying(model_card, 'plot', late=True)",
        "dying(job, 'sync')",
        "dying(Path, 'rename')",
        "dying(Path, 'rename', late=True)",
        "job.shutil.rmtree = lambda folder, **_: folder.exists() and"
        " (dying(os, 'unlink', late=True), [os.unlink(file) for file in folder.iterdir()])",
    ],
)
def test_killed_at_a_bad_moment_it_leaves_the_old_or_the_new(bench: Bench, moment: str) -> None:
    """Between two steps, and in the middle of deleting what was replaced; a run that has nothing to do clears it away,
    too."""
    assert bench.start("--force", before=KILLED + moment).end() == -signal.SIGKILL
    bench.finished()
    assert bench.run() == (0, ["quantize.finished_before"])
    bench.check_clean()


def test_what_a_killed_job_left_of_another_model_goes(bench: Bench) -> None:
    """Who names another model then does not keep gigabytes of the first."""
    left = bench.state / "awq" / "other-12345678" / ".partial-20260101T000000Z"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert bench.run() == (0, ["quantize.finished_before"])
    assert not left.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """One of 72 MiB, on which nothing is left open."""
    with tmpfs(tmp_path / "small", "size=72m", lazily=False) as folder:
        yield folder


def fill_up(folder: Path) -> Path:
    """Writes a file until there is no room for a byte."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(2**16))
        with pytest.raises(OSError, match="No space left"):
            while True:
                file.write(b"x")
    return folder / "ballast"


def test_a_disk_without_room_is_told_before_the_work(forge: Forge, small_disk: Path, model: Path) -> None:
    """What is needed and what is free; without any, even who runs cannot be noted."""
    bench = Bench(forge, small_disk, model)
    (small_disk / "ballast").write_bytes(bytes(20 * 2**20))
    status, events = bench.run()
    assert status == 75
    assert re.fullmatch(r"quantize.failed Tiny-Llama needs \d+ MB in .*, and 5\d MB are free", events[-1])
    bench.check_clean(0)
    fill_up(small_disk)
    status, events = Bench(forge, small_disk / "x", model).run()
    assert (status, events) == (
        75,
        [f"quantize.failed cannot write to {small_disk}/x/awq: [Errno 28] No space left on device"],
    )


def test_a_disk_that_fills_up_meanwhile_leaves_what_was_there(made: Bench, small_disk: Path) -> None:
    """One line; and with room again the next job does it."""
    shutil.copytree(made.state / "awq", small_disk / "awq")
    bench = Bench(made.forge, small_disk, made.model)
    before = bench.finished().folder
    job = bench.start("--force")
    job.until("quantize.layer", layer=1)
    ballast = fill_up(small_disk)
    assert job.end() == 75
    assert job.events[-1].startswith("quantize.failed the disk of ") and "is full; nothing was kept" in job.events[-1]
    assert bench.finished().folder == before
    bench.check_clean()
    ballast.unlink()
    assert bench.run("--force")[0] == 0
    assert bench.finished().folder != before
    bench.check_clean()


# The hub


def pushing(hub: HubServer, **more: str) -> dict[str, str]:
    return {"HF_TOKEN": TOKEN, "HF_AWQ_PUSH": "1", "HF_AWQ_CHAT_REPO": "someone/tiny-awq", **more}


def test_a_result_goes_to_the_hub_once(bench: Bench, hub: HubServer) -> None:
    """Checked before the work, pushed after it; the next run pushes nothing; another branch is pushed to."""
    status, events = bench.run("--force", HF_TOKEN=TOKEN, HF_AWQ_PUSH="1")
    assert status == 2 and "HF_AWQ_PUSH=1 needs HF_AWQ_CHAT_REPO" in events[-1]
    assert not only(events, "quantize.begun")
    push = pushing(hub)
    status, events = bench.run(**push)
    assert status == 0, events
    assert not only(events, "quantize.begun") and len(only(events, "hub.uploaded")) == 1
    there = hub.repos["someone/tiny-awq"].at("main")
    assert there is not None
    found = bench.finished().folder
    assert {name: stored.data for name, stored in there.files.items() if name != ".gitattributes"} == {
        file.name: file.read_bytes() for file in found.iterdir()
    }
    hub.requests.clear()
    assert bench.run(**push) == (0, ["quantize.finished_before"])
    assert hub.requests == []
    status, events = bench.run(**push, HF_AWQ_BRANCH="next")
    assert status == 0 and len(only(events, "hub.uploaded")) == 1
    status, events = bench.run("--force", **push)
    assert status == 0 and len(only(events, "hub.uploaded")) == 1, "a new result is another"


def test_a_push_that_cannot_be_is_told_before_the_work(bench: Bench, hub: HubServer) -> None:
    """The token of who may not write there."""
    hub.add("other/tiny-awq", {})
    status, events = bench.run("--force", **pushing(hub, HF_AWQ_CHAT_REPO="other/tiny-awq"))
    assert status == 2 and "may not write to other/tiny-awq" in events[-1]
    assert not only(events, "quantize.begun")


def test_a_push_that_failed_is_made_good_by_the_next_run(bench: Bench, hub: HubServer) -> None:
    """The result is kept, and not made again; a receipt that was cut counts as none."""
    failing = "from yaptext.quantize import hub; from yaptext.errors import QuantizeDelayed\n"
    failing += "def upload(*_): raise QuantizeDelayed('the hub is gone')\nhub.upload = upload"
    status, events = bench.run("--force", before=failing, **pushing(hub))
    assert (status, events[-1]) == (75, "quantize.failed the hub is gone")
    bench.check_clean()
    for receipt in (None, "", "{", "{}", "[]", '{"result": 5, "to": {}}', '{"to": {}}'):
        if receipt is not None:
            (bench.row / "pushed-chat.json").write_text(receipt)
        status, events = bench.run(**pushing(hub))
        assert status == 0 and not only(events, "quantize.begun"), events
        assert len(only(events, "hub.uploaded")) == 1


def test_one_result_for_both_roles_goes_to_two_repositories(bench: Bench, hub: HubServer) -> None:
    """Each role has its own."""
    both = {"DEPLOY_MODELS": "both", "TOOL_MODEL": str(bench.model), "HF_AWQ_TOOL_REPO": "someone/tool-awq"}
    status, events = bench.run(**both, **pushing(hub))
    assert status == 0 and len(only(events, "hub.uploaded")) == 2, events
    assert {"someone/tiny-awq", "someone/tool-awq"} <= set(hub.repos)
    assert bench.run(**both, **pushing(hub)) == (0, ["quantize.finished_before"])


def test_a_model_comes_from_the_hub_and_is_made_anew_with_it(
    forge: Forge, tmp_path: Path, model: Path, hub: HubServer
) -> None:
    """Fetched, quantized, told by its revision; a newer revision that was seen is a reason to do it again."""
    files = {file.name: file.read_bytes() for file in model.iterdir()}
    first = hub.add("maker/Tiny-Llama", files).branches["main"][-1].sha
    bench = Bench(forge, tmp_path / "state", "maker/Tiny-Llama", HF_HOME=str(tmp_path / "hf"))
    status, events = bench.run()
    assert status == 0, events
    found = bench.finished()
    assert found.manifest["source"] == {"name": "maker/Tiny-Llama", "revision": first, "content": None}
    card = (found.folder / "README.md").read_text()
    assert "base_model: maker/Tiny-Llama\n" in card and f"`maker/Tiny-Llama` at revision `{first}`" in card
    with hub.down():
        assert bench.run() == (0, ["quantize.finished_before"])
    (tmp_path / "hf" / "hub" / "models--maker--Tiny-Llama" / "snapshots" / "c0ffee").mkdir()
    (tmp_path / "hf" / "hub" / "models--maker--Tiny-Llama" / "refs" / "main").write_text("c0ffee")
    status, events = bench.run(before="from yaptext.quantize import job; job.make = lambda *_: None")
    assert only(events, "quantize.begun") == [f"quantize.begun made of revision {first}, the newest seen is c0ffee"]


def test_the_architecture_is_refused_before_the_download(forge: Forge, tmp_path: Path, hub: HubServer) -> None:
    """One small file is fetched."""
    hub.add("maker/moe", {"config.json": b'{"model_type": "a-new-one"}', "model.safetensors": bytes(1000)})
    bench = Bench(forge, tmp_path / "state", "maker/moe", HF_HOME=str(tmp_path / "hf"))
    status, events = bench.run()
    assert status == 2 and "cannot quantize the architecture 'a-new-one'" in events[-1]
    assert not hub.asked("GET .*safetensors")
