"""A bill of materials of one environment, as CycloneDX JSON: what its lock pins, and the licences of what is installed.

    python nix/lock/sbom.py ENV [--installed FOLDER] > FILE

The same lock gives the same bytes: the bill has no time of its own, and its serial number is made of the lock. FOLDER
is the site-packages of the environment (default: that of .venv/ENV).
"""

import argparse
import json
import tomllib
import uuid
from importlib.metadata import Distribution, distributions
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.model.license import License
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from lock import ROOT, Wheel, parse
from packageurl import PackageURL
from packaging.utils import canonicalize_name

SCHEMA = SchemaVersion.V1_6


def licences(installed: Distribution) -> list[License]:
    """What its metadata says: an SPDX expression, else the old field where it is a name, else its classifiers."""
    told = installed.metadata
    for name in (*told.get_all("License-Expression", []), *told.get_all("License", [])):
        if len(name) < 80 and "\n" not in name:  # else it is the whole text
            return [LicenseFactory().make_from_string(name)]
    classifiers = [each for each in told.get_all("Classifier", []) if each.startswith("License :: ")]
    return [LicenseFactory().make_with_name(each.rpartition(" :: ")[2]) for each in classifiers]


def component(wheel: Wheel, installed: Distribution) -> Component:
    url = PackageURL("pypi", name=wheel.name, version=wheel.version, qualifiers={"file_name": wheel.file})
    return Component(
        type=ComponentType.LIBRARY,
        name=wheel.name,
        version=wheel.version,
        bom_ref=wheel.name,
        purl=url,
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=wheel.sha256)],
        licenses=licences(installed),
    )


def bill(env: str, folder: Path | None = None) -> str:
    """Raises `SystemExit` with a sentence where the environment is not what its lock says."""
    text = (ROOT / "nix" / "lock" / f"{env}.txt").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = parse(text)
    folder = folder or ROOT / ".venv" / env / "lib" / f"python{lock.python}" / "site-packages"
    found = distributions(path=[str(folder)])
    installed: dict[str, Distribution] = {canonicalize_name(each.metadata["Name"]): each for each in found}
    wheels = lock.wheels
    if absent := [w for w in wheels if w.name not in installed or installed[w.name].version != w.version]:
        raise SystemExit(f"sbom: {folder} does not hold {absent[0].name} {absent[0].version}; `make venv` installs it")
    whole = Component(
        type=ComponentType.APPLICATION,
        name=project["name"],
        version=project["version"],
        bom_ref=project["name"],
        licenses=[LicenseFactory().make_from_string(project["license"])],
    )
    bom = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_OID, text + project["version"]),
        components=[component(wheel, installed[wheel.name]) for wheel in wheels],
        metadata=BomMetaData(component=whole),
    )
    bom.register_dependency(whole, bom.components)
    content = json.loads(make_outputter(bom, OutputFormat.JSON, SCHEMA).output_as_string())
    del content["metadata"]["timestamp"]
    written = json.dumps(content, indent=2, sort_keys=True)
    if error := JsonStrictValidator(SCHEMA).validate_str(written):
        raise SystemExit(f"sbom: not a valid bill: {error}")
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("env")
    parser.add_argument("--installed", type=Path)
    given = parser.parse_args()
    print(bill(given.env, given.installed))


if __name__ == "__main__":
    main()
