"""A CycloneDX bill of materials of what an image for CUDA has: `make sbom`, dist/sbom.cdx.json.

Packages with their licences, their needs and the hashes of all files that may be installed; what is vendored; and
the bundled checkpoint. What is written has been validated against CycloneDX's schema.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys

from cyclonedx.factory.license import LicenseFactory
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from tools.licences import licence_of, metadata_of
from tools.locked import ROOT, Locked
from tools.metadata import Metadata, shipped

FILE = ROOT / "dist/sbom.cdx.json"
OURS = "Apache-2.0"


def bill(packages: list[Locked], metadata: dict[str, Metadata]) -> Bom:
    """Of this version of Tympan."""
    version = re.findall(r'VERSION.* = "(.*)"', (ROOT / "server/version.py").read_text())[0]
    purl = PackageURL("pypi", None, "tympan", version)
    root = _component("tympan", version, OURS, purl, kind=ComponentType.APPLICATION)
    parts = {one.name: _package(one, metadata.get(one.name)) for one in packages}
    weights = ROOT / "checkpoints/tympan-tiny/model.safetensors"
    others = [_vendored(entry) for entry in json.loads((ROOT / "server/static/vendor/vendored.json").read_text())]
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    kind = ComponentType.MACHINE_LEARNING_MODEL
    others.append(_component("tympan-tiny", digest[:12], OURS, hashes=(digest,), kind=kind))
    bom = Bom(components=[*parts.values(), *others])
    bom.metadata.component = root
    bom.register_dependency(root, [*parts.values(), *others])
    for name, part in parts.items():
        needs = metadata[name].requires if name in metadata else frozenset()
        bom.register_dependency(part, [parts[need] for need in needs if need in parts])
    return bom


def _package(package: Locked, metadata: Metadata | None) -> Component:
    hashes = tuple(hash.removeprefix("sha256:") for hash in package.hashes)
    purl = PackageURL("pypi", None, package.name, package.version)
    return _component(package.name, package.version, licence_of(package.name, metadata), purl, hashes)


def _vendored(entry: dict[str, str]) -> Component:
    purl = PackageURL("npm", None, entry["package"], entry["version"])
    return _component(entry["package"], entry["version"], entry["license"], purl, (entry["sha256"],))


def _component(
    name: str,
    version: str,
    licence: str,
    purl: PackageURL | None = None,
    hashes: tuple[str, ...] = (),
    kind: ComponentType = ComponentType.LIBRARY,
) -> Component:
    return Component(
        name=name,
        version=version,
        type=kind,
        purl=purl,
        bom_ref=str(purl or name),
        licenses=[LicenseFactory().make_from_string(licence)],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=hash) for hash in hashes],
    )


def main() -> int:
    """-> exit status."""
    packages = shipped()
    text = JsonV1Dot6(bill(packages, metadata_of(packages))).output_as_string(indent=2)
    problem = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if problem is not None:
        print(f"not what CycloneDX's schema wants: {problem}", file=sys.stderr)
        return 1
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text)
    print(f"{FILE.relative_to(ROOT)}: {len(packages)} packages")
    return 0


if __name__ == "__main__":
    sys.exit(main())
