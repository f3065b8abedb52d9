"""Pin every wheel of an environment: one line each, by name, version and sha256, naming no registry.

    python nix/lock/lock.py [ENV ...]            resolve with pip and write nix/lock/ENV.txt
    python nix/lock/lock.py --check [ENV ...]    compare the locks with pyproject.toml, offline

The inputs are `[tool.yaptext.lock.ENV]` in pyproject.toml. pip resolves for the interpreter that runs this
script, so writing needs the Python that the lock is for; with no ENV, this Python's locks are written.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import Requirement
from packaging.utils import (
    InvalidSdistFilename,
    InvalidWheelFilename,
    canonicalize_name,
    parse_sdist_filename,
    parse_wheel_filename,
)
from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[2]
RUNNING_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
HEAD = re.compile(r"# [a-z-]+: CPython (?P<python>\d+\.\d+) on x86_64 Linux\.")
LINE = re.compile(
    r"(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)==(?P<version>[0-9a-z.!+]+)"
    r" --hash=sha256:(?P<sha256>[0-9a-f]{64})  # (?P<file>[^\s/:]+(?:\.whl|\.tar\.gz))"
)


class LockError(Exception):
    """An environment cannot be locked; the message says which package and why."""


@dataclass(frozen=True, order=True)
class Wheel:
    """One line of a lock. For a package that is not published as a wheel `file` is its sdist."""

    name: str
    version: str
    sha256: str
    file: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}  # {self.file}"


@dataclass(frozen=True)
class Inputs:
    """What one environment asks for. `on` is the environment it is installed on top of; `like` one that shares its
    versions of what both hold, except of what is in `apart`. `pure` says that its wheels fit every Python."""

    env: str
    python: str
    requirements: tuple[Requirement, ...]
    exclude: frozenset[str] = frozenset()
    no_deps: frozenset[str] = frozenset()
    sdist: frozenset[str] = frozenset()
    registry_only: bool = False
    on: str | None = None
    like: str | None = None
    apart: frozenset[str] = frozenset()
    pure: bool = False


@dataclass(frozen=True)
class Lock:
    """A lock file as read: its wheels, a sentence for each line that is not one, and the Python that its head names."""

    wheels: tuple[Wheel, ...]
    malformed: tuple[str, ...] = ()
    python: str | None = None

    def versions(self) -> dict[str, str]:
        return {wheel.name: wheel.version for wheel in self.wheels}


# Inputs


def requirements_of(pyproject: Mapping[str, Any], part: str) -> list[str]:
    """The requirement strings of one part of pyproject.toml: dependencies, build, an extra or a group."""
    project = pyproject.get("project", {})
    parts = {
        "dependencies": project.get("dependencies", []),
        "build": pyproject.get("build-system", {}).get("requires", []),
        **project.get("optional-dependencies", {}),
        **pyproject.get("dependency-groups", {}),
    }
    if part not in parts:
        raise LockError(f"pyproject.toml has no part {part!r} to lock; it has {', '.join(sorted(parts))}")
    return list(parts[part])


def read_inputs(pyproject: Mapping[str, Any]) -> dict[str, Inputs]:
    tables = pyproject.get("tool", {}).get("yaptext", {}).get("lock", {})
    return {
        env: Inputs(
            env=env,
            python=table["python"],
            requirements=tuple(
                requirement
                for part in table.get("include", [])
                for requirement in map(Requirement, requirements_of(pyproject, part))
                if requirement.marker is None
                or requirement.marker.evaluate(
                    {"python_version": table["python"], "python_full_version": f"{table['python']}.0"}
                )
            )
            + tuple(map(Requirement, table.get("requires", []))),
            exclude=frozenset(map(canonicalize_name, table.get("exclude", []))),
            no_deps=frozenset(map(canonicalize_name, table.get("no-deps", []))),
            sdist=frozenset(map(canonicalize_name, table.get("sdist", []))),
            registry_only=table.get("registry-only", False),
            on=table.get("on"),
            like=table.get("like"),
            apart=frozenset(map(canonicalize_name, table.get("apart", []))),
            pure=table.get("pure", False),
        )
        for env, table in tables.items()
    }


# Lock files


def parse(text: str) -> Lock:
    wheels, malformed = [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line or line.startswith("#"):
            continue
        if match := LINE.fullmatch(line):
            wheels.append(Wheel(**match.groupdict()))
        else:
            malformed.append(
                f"line {number} is not `name==version --hash=sha256:<64 hex digits>  # file.whl` (or .tar.gz): {line}"
            )
    head = HEAD.match(text)
    return Lock(tuple(wheels), tuple(malformed), head["python"] if head else None)


def render(env: str, python: str, wheels: Iterable[Wheel]) -> str:
    header = (
        f"# {env}: CPython {python} on x86_64 Linux. Written by `make lock`; not to be edited by hand.\n"
        "# Install with pip --require-hashes --no-deps.\n"
    )
    return header + "".join(f"{wheel}\n" for wheel in sorted(wheels))


# pip's report


def needed(report: Mapping[str, Any], roots: Iterable[Requirement], exclude: frozenset[str]) -> set[str]:
    """Names reachable from `roots` without passing through an excluded package."""
    metadata = {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in report["install"]}
    environment = report.get("environment", {})
    seen: set[tuple[str, str]] = set()
    ahead = [(canonicalize_name(root.name), extra) for root in roots for extra in ("", *root.extras)]
    while ahead:
        name, extra = ahead.pop()
        if (name, extra) in seen or name in exclude or name not in metadata:
            continue
        seen.add((name, extra))
        for requirement in map(Requirement, metadata[name].get("requires_dist", [])):
            if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra}):
                dependency = canonicalize_name(requirement.name)
                ahead += [(dependency, wanted) for wanted in ("", *requirement.extras)]
    return {name for name, _ in seen}


def wheel_of(item: Mapping[str, Any], sdist: frozenset[str] = frozenset()) -> Wheel:
    """One entry of pip's report as a wheel, or as an sdist where its name is in `sdist`. A local file whose index gave
    no hash is hashed here."""
    metadata, download = item["metadata"], item["download_info"]
    url = urlsplit(download["url"])
    file = unquote(url.path).rsplit("/", 1)[-1]
    name = canonicalize_name(metadata["name"])
    kind, suffix = ("sdist", ".tar.gz") if name in sdist else ("wheel", ".whl")
    if not file.endswith(suffix):
        raise LockError(f"{metadata['name']} {metadata['version']} has no {kind}, only {file}")
    sha256 = download.get("archive_info", {}).get("hashes", {}).get("sha256")
    if sha256 is None and url.scheme == "file":
        with open(unquote(url.path), "rb") as wheel:
            sha256 = hashlib.file_digest(wheel, "sha256").hexdigest()
    if sha256 is None:
        raise LockError(f"{file}: its index gives no sha256")
    return Wheel(name, metadata["version"], sha256, file)


def wheels_of(report: Mapping[str, Any], inputs: Inputs) -> list[Wheel]:
    """The wheels of a report that the environment needs; a local build is refused where it takes none."""
    keep = needed(report, inputs.requirements, inputs.exclude)
    items = [item for item in report["install"] if canonicalize_name(item["metadata"]["name"]) in keep]
    wheels = [wheel_of(item, inputs.sdist) for item in items]
    if inputs.registry_only and (local := [wheel for wheel in wheels if "+" in wheel.version]):
        raise LockError(
            f"{inputs.env} takes registry builds only, but pip chose "
            + ", ".join(f"{wheel.name} {wheel.version}" for wheel in local)
        )
    return wheels


# Resolving


def pip_report(requirements: Sequence[str], *options: str, registry_only: bool = False) -> Any:
    """What pip would install into an empty environment; pip's own messages go to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        environment = dict(os.environ)
        if registry_only:
            # pip passes over an empty value for its configuration file's; an empty folder replaces both.
            environment["PIP_FIND_LINKS"] = str(Path(folder, "no-wheels"))
            Path(folder, "no-wheels").mkdir()
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "-qq"]
        command += ["--only-binary=:all:", "--report", str(report), *options, *requirements]
        if subprocess.run(command, env=environment, stdout=sys.stderr, check=False).returncode:
            raise LockError("pip found no set of wheels for these requirements (its reason is above)")
        return json.loads(report.read_text())


def resolve(inputs: Inputs, base: Mapping[str, str], like: Mapping[str, str] | None = None) -> list[Wheel]:
    """The wheels of an environment, less those that `base` (name to version) already holds; in the versions of `like`
    where that has them. What is `apart` has versions of its own."""
    base = {name: version for name, version in base.items() if name not in inputs.apart}
    alone = [str(r) for r in inputs.requirements if canonicalize_name(r.name) in inputs.no_deps]
    together = [str(r) for r in inputs.requirements if canonicalize_name(r.name) not in inputs.no_deps]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        given = {name: public(version) for name, version in (like or {}).items() if name not in inputs.apart}
        given |= base
        constraints.writelines(f"{name}=={version}\n" for name, version in given.items())
        constraints.flush()
        options = ["-c", constraints.name] if given else []
        report = pip_report(together, *options, registry_only=inputs.registry_only)
    wheels = wheels_of(report, inputs)
    if alone:
        sdists = [option for name in sorted(inputs.sdist) for option in ("--no-binary", name)]
        options = ["--no-deps", *sdists, "--no-build-isolation"]
        wheels += wheels_of(pip_report(alone, *options, registry_only=inputs.registry_only), inputs)
    return [wheel for wheel in wheels if wheel.name not in base]


# Checking


def check(inputs: Inputs, lock: Lock, base: Lock | None = None, like: Lock | None = None) -> list[str]:
    """What is wrong with a lock, a sentence each; empty when it satisfies its inputs."""
    findings = list(lock.malformed)
    if lock.python != inputs.python:
        findings.append(f"its first line says Python {lock.python}; pyproject.toml says {inputs.python}")
    names = [wheel.name for wheel in lock.wheels]
    findings += [f"{name} is pinned {names.count(name)} times" for name in sorted(set(names)) if names.count(name) > 1]
    if names != sorted(names):
        findings.append("the lines are not sorted by name")
    below = base.versions() if base else {}
    for wheel in lock.wheels:
        if wheel.name in inputs.exclude:
            findings.append(f"{wheel.name} is excluded in pyproject.toml, but pinned")
        if inputs.pure and not wheel.file.endswith("-py3-none-any.whl"):
            findings.append(f"{wheel.file} is not for every Python; {inputs.env} has to be")
        if wheel.name in below and wheel.name not in inputs.apart:
            findings.append(f"{wheel.name} is pinned already by {inputs.on}")
        if inputs.registry_only and "+" in wheel.version:
            findings.append(f"{wheel.name} {wheel.version} is a local build; {inputs.env} takes registry builds only")
        if wheel.file.endswith(".tar.gz") and wheel.name not in inputs.sdist:
            findings.append(f"{wheel.name} is pinned as an sdist; pyproject.toml names no such exception")
        findings += disagreements(wheel)
        if (other := foreign(wheel, inputs.python)) is not None:
            findings.append(f"{wheel.file} is for {other}; {inputs.env} is for Python {inputs.python}")
    if inputs.apart or like:
        findings += differences(inputs, lock, like or base or Lock(()))
    versions = below | lock.versions()
    for requirement in inputs.requirements:
        name = canonicalize_name(requirement.name)
        if name not in versions:
            findings.append(f"{requirement} is required, but {name} is not pinned")
        elif not satisfies(versions[name], requirement):
            findings.append(f"{requirement} is required, but {name} {versions[name]} is pinned")
    return findings


def differences(inputs: Inputs, lock: Lock, like: Lock) -> list[str]:
    """Packages of both locks whose versions differ without being named in `apart`, and names in there that do not."""
    other = inputs.like or inputs.on
    findings = []
    theirs = like.versions()
    for name, version in lock.versions().items():
        same = public(version) == public(theirs.get(name, version))
        if not same and name not in inputs.apart:
            findings.append(f"{name} {version} is pinned, but {other} has {theirs[name]}; no `apart` allows that")
        elif same and name in inputs.apart:
            findings.append(f"{name} is in `apart`, but {other} has the same version or none")
    return findings


def public(version: str) -> str:
    """2.13.0 of 2.13.0+cpu."""
    return version.partition("+")[0]


def foreign(wheel: Wheel, python: str) -> str | None:
    """The Python that a wheel is for if that is another one. Stable ABIs fit every later one."""
    try:
        tags = parse_wheel_filename(wheel.file)[3]
    except InvalidWheelFilename:
        return None  # an sdist, or a line that is found otherwise
    minor = int(python.partition(".")[2])
    interpreters = set()
    for tag in tags:
        interpreters.add(tag.interpreter)
        match = re.fullmatch(r"(?:cp|py)3(\d*)", tag.interpreter)
        if match is None:
            continue
        theirs = int(match[1] or 0)
        if theirs == minor or (theirs < minor and tag.abi in {"abi3", "none"}):
            return None
    return "/".join(sorted(interpreters))


def satisfies(version: str, requirement: Requirement) -> bool:
    try:
        return requirement.specifier.contains(version, prereleases=True)
    except InvalidVersion:
        return False


def disagreements(wheel: Wheel) -> list[str]:
    """A line whose file is of another package or version than it pins."""
    try:
        parse = parse_wheel_filename if wheel.file.endswith(".whl") else parse_sdist_filename
        name, version, *_ = parse(wheel.file)
        if (name, version) == (wheel.name, Version(wheel.version)):
            return []
    except (InvalidWheelFilename, InvalidSdistFilename, InvalidVersion):
        pass
    return [f"{wheel.name}=={wheel.version} names {wheel.file}, which is not its file"]


# Command


def write(environments: Sequence[str], every: Mapping[str, Inputs], folder: Path) -> None:
    for env in environments:
        inputs = every[env]
        if inputs.python != RUNNING_PYTHON:
            raise LockError(f"{env} is for Python {inputs.python}; this is {RUNNING_PYTHON}")
    for env in environments:
        inputs = every[env]
        base, like = (
            parse((folder / f"{other}.txt").read_text()).versions() if other else {}
            for other in (inputs.on, inputs.like)
        )
        print(f"{env}: resolving", file=sys.stderr, flush=True)
        wheels = resolve(inputs, base, like)
        (folder / f"{env}.txt").write_text(render(env, inputs.python, wheels))
        print(f"{env}: {len(wheels)} wheels pinned", file=sys.stderr, flush=True)


def verify(environments: Sequence[str], every: Mapping[str, Inputs], folder: Path) -> list[str]:
    locks = {path.stem: parse(path.read_text()) for path in folder.glob("*.txt")}
    findings = []
    for env in environments:
        if env not in locks:
            findings.append(f"{env}.txt: missing; `make lock` writes it")
            continue
        inputs = every[env]
        base, like = (locks.get(other or "") for other in (inputs.on, inputs.like))
        findings += [f"{env}.txt: {finding}" for finding in check(inputs, locks[env], base, like)]
    return findings


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("environment", nargs="*", help="default: all that are for this Python; with --check, all")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a lock does not fit")
    options = parser.parse_args(arguments)
    folder = root / "nix" / "lock"
    try:
        every = read_inputs(tomllib.loads((root / "pyproject.toml").read_text()))
        # One that stands on another, or is like it, is resolved after it.
        ordered = sorted(every, key=lambda env: bool(every[env].on or every[env].like))
        ours = [env for env in ordered if options.check or every[env].python == RUNNING_PYTHON]
        chosen = options.environment or ours
        if unknown := [env for env in chosen if env not in every]:
            raise LockError(f"no environment {', '.join(unknown)}; there are {', '.join(every)}")
        if not options.check:
            write(chosen, every, folder)
        findings = verify(chosen, every, folder)
    except LockError as error:
        print(f"lock: {error}", file=sys.stderr)
        return 1
    for finding in findings:
        print(finding, file=sys.stderr)
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
