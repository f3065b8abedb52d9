"""nix/lock/lock.py: reading and writing locks, what it makes of pip's report, and what `--check` finds."""

import hashlib
import importlib.util
import re
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCKS = sorted((ROOT / "nix" / "lock").glob("*.txt"))
SHA = "0" * 63
HEAD = "# serve: CPython 3.11 on x86_64 Linux."


def load() -> ModuleType:
    """The script as a module: it stands outside the package, since the service has no use for it."""
    spec = importlib.util.spec_from_file_location("lock", ROOT / "nix" / "lock" / "lock.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


lock = load()


def line(name: str, version: str, digit: str = "1") -> str:
    return f"{name}=={version} --hash=sha256:{SHA}{digit}  # {name.replace('-', '_')}-{version}-py3-none-any.whl"


def inputs(*requirements: str, **options: Any) -> Any:
    return lock.Inputs("serve", "3.11", tuple(map(lock.Requirement, requirements)), **options)


def findings(wanted: Any, *lines: str, base: Any = None, like: Any = None) -> list[str]:
    found: list[str] = lock.check(wanted, lock.parse("\n".join((HEAD, *lines))), base, like)
    return found


def entry(name: str, version: str, *requires: str, **archive: Any) -> dict[str, Any]:
    """One package of a pip report, from a made-up registry unless `url` says otherwise."""
    file = f"{name.replace('-', '_')}-{version}-py3-none-any.whl".replace("+", "%2B")
    url = archive.pop("url", f"https://wheels.invalid/{file}")
    return {
        "metadata": {"name": name, "version": version, "requires_dist": list(requires)},
        "download_info": {"url": url, "archive_info": archive or {"hashes": {"sha256": f"{SHA}1"}}},
    }


def report(*entries: dict[str, Any]) -> dict[str, Any]:
    return {"version": "1", "environment": {"python_version": "3.11"}, "install": list(entries)}


# Reading and writing


def test_what_is_rendered_parses_to_the_same_wheels_sorted_by_name() -> None:
    """A lock survives being written and read; its header is skipped."""
    wheels = lock.parse(f"{line('zebra', '1.0')}\n{line('ant-eater', '2.0')}").wheels
    text = lock.render("serve", "3.12", wheels)
    assert text.startswith("# serve: CPython 3.12 on x86_64 Linux. ")
    assert lock.parse(text) == lock.Lock(tuple(sorted(wheels)), python="3.12")


def test_a_line_has_exactly_the_form_that_pip_and_nix_read() -> None:
    """Name, version, one sha256 and, as a comment, the wheel's file."""
    wheel = lock.Wheel("torch", "2.13.0+cpu", SHA + "a", "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl")
    assert str(wheel) == (f"torch==2.13.0+cpu --hash=sha256:{SHA}a  # torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl")


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param("ant", id="not pinned"),
        pytest.param("ant>=1  # ant-1-py3-none-any.whl", id="a range"),
        pytest.param("ant==1  # ant-1-py3-none-any.whl", id="no hash"),
        pytest.param(f"ant==1 --hash=sha256:{SHA}  # ant-1-py3-none-any.whl", id="a short hash"),
        pytest.param(f"ant==1 --hash=sha256:{SHA}g  # ant-1-py3-none-any.whl", id="a hash of no hex"),
        pytest.param(f"ant==1 --hash=md5:{SHA}1  # ant-1-py3-none-any.whl", id="another digest"),
        pytest.param(f"ant==1 --hash=sha256:{SHA}1  # ant-1.zip", id="another archive"),
        pytest.param(f"Ant==1 --hash=sha256:{SHA}1  # ant-1-py3-none-any.whl", id="a name not normalized"),
        pytest.param(f"ant @ https://a.invalid/ant-1.whl --hash=sha256:{SHA}1  # ant-1.whl", id="a URL"),
        pytest.param(f"ant==1 --hash=sha256:{SHA}1  # https://a.invalid/ant-1.whl", id="a URL as comment"),
        pytest.param("--extra-index-url https://a.invalid/simple", id="an option"),
    ],
)
def test_a_line_of_any_other_form_is_reported_with_its_number(bad: str) -> None:
    """Whatever is not a pinned, hashed wheel is named, and does not count as one."""
    parsed = lock.parse(f"# header\n{bad}\n")
    assert parsed.wheels == ()
    assert len(parsed.malformed) == 1
    assert parsed.malformed[0].startswith("line 2 is not ") and parsed.malformed[0].endswith(bad)


# What --check finds


def test_a_lock_that_satisfies_its_inputs_has_no_findings() -> None:
    """Names are compared normalized, versions with the specifier; wheels that nobody asked for are fine."""
    wanted = inputs("Ant_Eater>=2,<3", "zebra[stripes]")
    assert findings(wanted, line("ant-eater", "2.5"), line("bee", "1"), line("zebra", "1.0rc1")) == []


def test_a_missing_package_is_found() -> None:
    """A requirement that no line pins."""
    assert findings(inputs("ant", "zebra>=1"), line("ant", "1")) == ["zebra>=1 is required, but zebra is not pinned"]


def test_an_unsatisfied_specifier_is_found_with_both_versions() -> None:
    """The sentence gives what is asked for and what is pinned."""
    assert findings(inputs("ant>=2"), line("ant", "1.9")) == ["ant>=2 is required, but ant 1.9 is pinned"]


def test_an_excluded_name_is_found() -> None:
    """What pyproject.toml keeps out may not come back by hand."""
    assert findings(inputs(exclude=frozenset({"bee"})), line("bee", "1")) == [
        "bee is excluded in pyproject.toml, but pinned"
    ]


def test_a_duplicate_is_found_once() -> None:
    """Two lines for one name are one finding, with the count."""
    assert findings(inputs(), line("ant", "1"), line("ant", "2")) == ["ant is pinned 2 times"]


def test_lines_out_of_order_are_found() -> None:
    """Sorted locks make readable diffs."""
    assert findings(inputs(), line("bee", "1"), line("ant", "1")) == ["the lines are not sorted by name"]


def test_a_file_of_another_version_is_found() -> None:
    """A version edited by hand no longer agrees with its wheel."""
    edited = line("ant", "1").replace("ant==1", "ant==2")
    assert findings(inputs(), edited) == ["ant==2 names ant-1-py3-none-any.whl, which is not its file"]


def test_a_local_build_is_found_where_only_the_registrys_is_wanted() -> None:
    """2.13.0+cpu satisfies ==2.13.0, and would put CPU torch on a GPU host."""
    wanted = inputs("torch==2.13.0", registry_only=True)
    assert findings(wanted, line("torch", "2.13.0+cpu")) == [
        "torch 2.13.0+cpu is a local build; serve takes registry builds only"
    ]
    assert findings(wanted, line("torch", "2.13.0")) == []


def test_a_source_archive_is_found_unless_it_is_named_as_an_exception() -> None:
    """What is built at the install is chosen in pyproject.toml, never by accident; its file must be its own, too."""
    pinned = line("ant", "1").replace("-py3-none-any.whl", ".tar.gz")
    assert findings(inputs("ant"), pinned) == ["ant is pinned as an sdist; pyproject.toml names no such exception"]
    wanted = inputs("ant", sdist=frozenset({"ant"}))
    assert findings(wanted, pinned) == []
    edited = pinned.replace("ant==1", "ant==2")
    assert findings(wanted, edited) == ["ant==2 names ant-1.tar.gz, which is not its file"]


def test_an_environment_on_top_of_another_counts_what_that_one_pins() -> None:
    """Requirements may be met below; a name pinned in both is found."""
    base = lock.parse(line("attrs", "26.1.0"))
    wanted = inputs("attrs", "pytest", on="below")
    assert findings(wanted, line("pytest", "9"), base=base) == []
    assert findings(wanted, line("attrs", "25"), line("pytest", "9"), base=base) == ["attrs is pinned already by below"]


def test_an_environment_may_have_versions_of_its_own_of_what_it_stands_on() -> None:
    """Those that are named, and no others; and its wheels have to fit every Python if that is said."""
    base = lock.parse(line("attrs", "25.1"))
    wanted = inputs("attrs", on="below", apart=frozenset({"attrs"}), pure=True)
    assert findings(wanted, line("attrs", "26.1"), base=base) == []
    binary = line("attrs", "26.1").replace("py3-none-any", "cp311-cp311-manylinux_2_28_x86_64")
    assert findings(wanted, binary, base=base) == [
        "attrs-26.1-cp311-cp311-manylinux_2_28_x86_64.whl is not for every Python; serve has to be"
    ]


def test_a_lock_of_another_python_is_found() -> None:
    """pyproject.toml says which; the first line of the lock is what set-up and Nix read."""
    wanted = lock.Inputs("serve", "3.12", ())
    assert lock.check(wanted, lock.parse(HEAD)) == ["its first line says Python 3.11; pyproject.toml says 3.12"]
    assert lock.check(wanted, lock.parse("")) == ["its first line says Python None; pyproject.toml says 3.12"]


@pytest.mark.parametrize(
    ("tags", "fits"),
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        ("cp311-cp311-linux_x86_64", True),
        ("cp38-abi3-linux_x86_64", True),
        ("py311-none-any", True),
        ("cp312-cp312-linux_x86_64", False),
        ("cp310-cp310-linux_x86_64", False),
        ("cp312-abi3-linux_x86_64", False),
        ("py312-none-any", False),
        ("py2-none-any", False),
    ],
)
def test_a_wheel_of_another_python_is_found(tags: str, fits: bool) -> None:
    """A line copied from another lock installs nowhere."""
    pinned = line("ant", "1").replace("py3-none-any", tags)
    found = findings(inputs("ant"), pinned)
    tag = tags.partition("-")[0]
    assert found == ([] if fits else [f"ant-1-{tags}.whl is for {tag}; serve is for Python 3.11"])


def test_versions_that_two_environments_should_share_are_compared() -> None:
    """Local builds count as their release; an exception is named, and named no longer than it is one."""
    like = lock.parse("\n".join((line("ant", "1+cpu"), line("bee", "2"))))
    wanted = inputs(like="cpu")
    assert findings(wanted, line("ant", "1"), line("bee", "2"), line("cat", "3"), like=like) == []
    assert findings(wanted, line("bee", "3"), like=like) == ["bee 3 is pinned, but cpu has 2; no `apart` allows that"]
    wanted = inputs(like="cpu", apart=frozenset({"bee"}))
    assert findings(wanted, line("bee", "3"), like=like) == []
    assert findings(wanted, line("bee", "2"), like=like) == ["bee is in `apart`, but cpu has the same version or none"]


# pip's report


def test_a_report_becomes_lines_without_their_address() -> None:
    """Names are normalized, %2B is a plus, and the registry is forgotten."""
    made = lock.wheels_of(report(entry("Jinja2", "3.1.6"), entry("torch", "2.13.0+cpu")), inputs("jinja2", "torch"))
    assert lock.render("serve", "3.11", made).splitlines()[2:] == [
        f"jinja2==3.1.6 --hash=sha256:{SHA}1  # Jinja2-3.1.6-py3-none-any.whl",
        f"torch==2.13.0+cpu --hash=sha256:{SHA}1  # torch-2.13.0+cpu-py3-none-any.whl",
    ]


def test_a_local_file_without_a_hash_is_hashed(tmp_path: Path) -> None:
    """pip knows no hash of a wheel in a plain folder."""
    wheel = tmp_path / "ant-1-py3-none-any.whl"
    wheel.write_bytes(b"not much of a wheel")
    made = lock.wheel_of(entry("ant", "1", url=wheel.as_uri(), hashes={}))
    assert made.sha256 == hashlib.sha256(b"not much of a wheel").hexdigest()


def test_a_remote_file_without_a_hash_is_refused() -> None:
    """Nothing is downloaded to be trusted at first sight."""
    with pytest.raises(lock.LockError, match=re.escape("ant-1-py3-none-any.whl: its index gives no sha256")):
        lock.wheel_of(entry("ant", "1", hashes={}))


def test_a_source_archive_is_refused() -> None:
    """A package without a wheel is an error, never a silent build."""
    with pytest.raises(lock.LockError, match=re.escape("ant 1 has no wheel, only ant-1.tar.gz")):
        lock.wheel_of(entry("ant", "1", url="https://wheels.invalid/ant-1.tar.gz"))


def test_a_named_exception_is_pinned_as_its_source_archive() -> None:
    """And as nothing else: a wheel of it would be another file tomorrow."""
    archive = entry("ant", "1", url="https://wheels.invalid/ant-1.tar.gz")
    assert lock.wheel_of(archive, frozenset({"ant"})).file == "ant-1.tar.gz"
    with pytest.raises(lock.LockError, match="ant 1 has no sdist"):
        lock.wheel_of(entry("ant", "1"), frozenset({"ant"}))


def test_an_excluded_package_goes_with_what_only_it_needs() -> None:
    """`paint` is needed by `bee` alone and goes; `leg` is needed by `ant` too and stays."""
    given = report(
        entry("ant", "1", "bee", "leg"),
        entry("bee", "1", "leg", "paint"),
        entry("leg", "1"),
        entry("paint", "1"),
    )
    made = lock.wheels_of(given, inputs("ant", exclude=frozenset({"bee"})))
    assert [wheel.name for wheel in made] == ["ant", "leg"]


def test_dependencies_follow_markers_and_extras() -> None:
    """A dependency of an extra counts where the extra is asked for, and one of another Python never."""
    given = report(
        entry("ant", "1", 'bee; extra == "wings"', 'leg; python_version < "3"'),
        entry("bee", "1"),
        entry("leg", "1"),
    )
    roots = [lock.Requirement("ant[wings]")]
    assert lock.needed(given, roots, frozenset()) == {"ant", "bee"}
    assert lock.needed(given, [lock.Requirement("ant")], frozenset()) == {"ant"}


def test_a_local_build_is_refused_where_only_the_registrys_is_wanted() -> None:
    """The message names the package, so that the folder it came from can be found."""
    with pytest.raises(lock.LockError, match=re.escape("pip chose torch 2.13.0+cpu")):
        lock.wheels_of(report(entry("torch", "2.13.0+cpu")), inputs("torch", registry_only=True))


def test_packages_without_their_dependencies_are_resolved_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of pip: one with dependencies, one without; what the base pins is left out of the result."""
    runs = []

    def pip_report(requirements: list[str], *options: str, registry_only: bool) -> dict[str, Any]:
        runs.append((requirements, options[0], registry_only))
        return report(*(entry(name, "1", "leg") for name in requirements), entry("leg", "1"))

    monkeypatch.setattr(lock, "pip_report", pip_report)
    made = lock.resolve(inputs("ant", "bee", no_deps=frozenset({"bee"})), {"leg": "1"})
    assert runs == [(["ant"], "-c", False), (["bee"], "--no-deps", False)]
    assert [wheel.name for wheel in made] == ["ant", "bee"]


def test_an_environment_like_another_is_resolved_in_its_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but those apart; of a local build the release."""
    constraints = []

    def pip_report(requirements: list[str], *options: str, registry_only: bool) -> dict[str, Any]:
        constraints.append(Path(options[1]).read_text())
        return report(entry("ant", "1"))

    monkeypatch.setattr(lock, "pip_report", pip_report)
    made = lock.resolve(inputs("ant", apart=frozenset({"bee"})), {}, {"ant": "1+cpu", "bee": "2"})
    assert constraints == ["ant==1\n"] and [wheel.name for wheel in made] == ["ant"]


# The inputs


def test_inputs_are_gathered_from_dependencies_build_extras_and_groups() -> None:
    """`include` names parts of pyproject.toml; markers for other systems drop out."""
    given = {
        "build-system": {"requires": ["backend"]},
        "project": {
            "dependencies": ["ant", 'fly; sys_platform == "win32"'],
            "optional-dependencies": {"gpu": ["bee"]},
        },
        "dependency-groups": {"test": ["cat"]},
        "tool": {
            "yaptext": {
                "lock": {
                    "all": {"python": "3.12", "include": ["dependencies", "build", "gpu", "test"], "requires": ["dog"]}
                }
            }
        },
    }
    assert [str(r) for r in lock.read_inputs(given)["all"].requirements] == ["ant", "backend", "bee", "cat", "dog"]


def test_markers_are_those_of_the_python_that_the_lock_is_for() -> None:
    """Whichever Python reads them."""
    given = {
        "project": {"dependencies": ['ant; python_version >= "3.12"', 'bee; python_full_version < "3.12"']},
        "tool": {"yaptext": {"lock": {"old": {"python": "3.11", "include": ["dependencies"]}}}},
    }
    assert [r.name for r in lock.read_inputs(given)["old"].requirements] == ["bee"]
    given["tool"]["yaptext"]["lock"]["old"]["python"] = "3.12"
    assert [r.name for r in lock.read_inputs(given)["old"].requirements] == ["ant"]


def test_an_unknown_part_is_an_error_that_lists_the_known_ones() -> None:
    """A mistyped extra does not lock an empty environment."""
    with pytest.raises(lock.LockError, match="no part 'gpus' to lock; it has build, dependencies"):
        lock.requirements_of({}, "gpus")


# The command, on the locks of this repository


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's inputs and locks, to spoil."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "nix" / "lock", tmp_path / "nix" / "lock")
    return tmp_path


def test_the_committed_locks_satisfy_pyproject(capsys: pytest.CaptureFixture[str]) -> None:
    """Dependencies and locks change in one commit."""
    assert lock.main(["--check"]) == 0
    assert capsys.readouterr().err == ""


def test_every_environment_has_a_lock_and_every_lock_an_environment() -> None:
    """No lock outlives its inputs."""
    every = lock.read_inputs(tomllib.loads((ROOT / "pyproject.toml").read_text()))
    assert {path.stem for path in LOCKS} == set(every)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_no_committed_lock_names_a_host(path: Path) -> None:
    """Where wheels come from is pip's configuration, on each machine its own."""
    assert not re.search(r"://|www\.|index-url|find-links|\.(org|com|io|net)\b|(^|\s)/", path.read_text())


def test_the_cuda_lock_holds_no_local_build() -> None:
    """No +cpu wheel slipped in from a configured folder."""
    assert "+cpu" not in (ROOT / "nix" / "lock" / "serve-cuda.txt").read_text()


def test_check_fails_with_a_line_that_names_the_lock(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, and a sentence on stderr."""
    path = copy / "nix" / "lock" / "serve-cpu.txt"
    path.write_text(re.sub(r"(?m)^starlette==.*\n", "", path.read_text()))
    assert lock.main(["--check"], root=copy) == 1
    assert capsys.readouterr().err == ("serve-cpu.txt: starlette<2,>=1 is required, but starlette is not pinned\n")


def test_check_fails_on_a_lock_that_is_not_there(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And says what writes it."""
    (copy / "nix" / "lock" / "serve-cuda.txt").unlink()
    assert lock.main(["--check", "serve-cuda"], root=copy) == 1
    assert capsys.readouterr().err == "serve-cuda.txt: missing; `make lock` writes it\n"


def test_an_unknown_environment_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """No traceback for a typing slip."""
    assert lock.main(["--check", "serve-tpu"]) == 1
    assert capsys.readouterr().err.startswith("lock: no environment serve-tpu; there are serve-cpu")


def test_writing_under_another_python_is_refused(
    monkeypatch: pytest.MonkeyPatch, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip resolves for the Python it runs on, which has to be the lock's."""
    monkeypatch.setattr(lock, "RUNNING_PYTHON", "3.11")
    copied = sorted((copy / "nix" / "lock").glob("*.txt"))
    assert lock.main(["serve-cuda"], root=copy) == 1
    assert capsys.readouterr().err == "lock: serve-cuda is for Python 3.12; this is 3.11\n"
    assert [path.read_text() for path in copied] == [path.read_text() for path in LOCKS]


@pytest.mark.parametrize(
    ("python", "written"),
    [
        ("3.11", ["serve-cpu", "audit", "clients", "load", "uv", "test", "llmcompressor", "browser"]),
        ("3.12", ["serve-cuda"]),
    ],
)
def test_each_python_writes_the_locks_that_are_for_it(
    monkeypatch: pytest.MonkeyPatch, copy: Path, python: str, written: list[str]
) -> None:
    """What stands on another comes after it."""
    resolved: list[str] = []
    monkeypatch.setattr(lock, "RUNNING_PYTHON", python)
    monkeypatch.setattr(lock, "resolve", lambda inputs, base, like: resolved.append(inputs.env) or [])
    lock.main([], root=copy)
    assert resolved == written
    for env in written:
        assert (copy / "nix" / "lock" / f"{env}.txt").read_text().startswith(f"# {env}: CPython {python} ")
