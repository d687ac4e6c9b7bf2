"""What is installed beside the plugin, what of it works together, and what to do about the rest.

Nothing is imported for it: distributions say their versions and what they need, and the toolboxes' own source files
say which versions they accept of each other (they assert it as they are imported). Only mmcv's compiled operators are
loaded, because nothing else tells whether they were built beside this very torch.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from repapq_plugin.errors import HostError

OPENMMLAB = "pip install 'repapq-plugin[openmmlab]'"
EXPORT = "pip install 'repapq-plugin[export]'"

KNOWN: Mapping[str, str] = {
    "torch": "pip install torch",
    "torchvision": "pip install torchvision",
    "mmengine": OPENMMLAB,
    "mmcv": OPENMMLAB,
    "mmdet": OPENMMLAB,
    "mmyolo": OPENMMLAB,
    "mmseg": OPENMMLAB,
    "mmpretrain": OPENMMLAB,
    "nncf": "pip install 'repapq-plugin[nncf]'",
    "openvino": EXPORT,
    "onnx": EXPORT,
    "onnxruntime": EXPORT,
    "torchao": "pip install 'repapq-plugin[pt2e]'",
}
"""Packages that matter, by import name, and how to get each."""

FEATURES: Mapping[str, tuple[str, ...]] = {
    "any PyTorch model": ("torch",),
    "MMDetection configs": ("torch", "mmengine", "mmcv", "mmdet"),
    "MMYOLO configs": ("torch", "mmengine", "mmcv", "mmdet", "mmyolo"),
    "MMSegmentation configs": ("torch", "torchvision", "mmengine", "mmcv", "mmseg"),
    "MMPretrain configs": ("torch", "torchvision", "mmengine", "mmcv", "mmpretrain"),
    "export to ONNX": ("torch", "onnx"),
    "scores on onnxruntime": ("torch", "onnx", "onnxruntime"),
    "export to OpenVINO, scores and latency on it": ("torch", "onnx", "openvino"),
    "NNCF's pipeline": ("torch", "nncf", "openvino"),
    "torchao's pt2e": ("torch", "torchao"),
}
"""What a user can do, and which packages it takes."""

NEEDS_OPERATORS = ("mmdet", "mmyolo", "mmseg")
"""Toolboxes that import mmcv's compiled operators."""

OPERATORLESS = "mmcv-lite"
"""The distribution of mmcv that never has compiled operators."""

OPERATORS_REMEDY = (
    "build mmcv beside this torch: pip install --no-cache-dir --no-build-isolation --force-reinstall --no-deps "
    "{distribution} with MMCV_WITH_OPS=1 set"
)


@dataclass(frozen=True)
class Package:
    """One installed package.

    Args:
        name: What is imported: ``'mmdet'``.
        version: Its version, as its distribution says.
        distributions: Names of the distributions that install it; more than one overwrite each other.
        requires: Requirements that hold always (no extras, no markers): ``'torch (==2.12.1)'``.
        accepts: Versions of other packages that its own source accepts, by import name: the lowest, and the first that
            is too high; an empty text where there is no limit.
        operators: For mmcv: empty if its compiled operators can be loaded, else why not.
    """

    name: str
    version: str
    distributions: tuple[str, ...]
    requires: tuple[str, ...] = ()
    accepts: Mapping[str, tuple[str, str]] | None = None
    operators: str = ""


@dataclass(frozen=True)
class Problem:
    """Something installed that does not work, and what to do about it.

    Args:
        package: Import name of the package that does not work.
        text: What is wrong.
        remedy: What to do.
    """

    package: str
    text: str
    remedy: str


@dataclass(frozen=True)
class Diagnosis:
    """What is there, what works, and what to do.

    Args:
        packages: Installed ones out of `KNOWN`, by import name.
        problems: What is installed and does not work.
        works: Features of `FEATURES` that can be used.
        missing: Other features, with the packages each lacks or cannot use.
    """

    packages: Mapping[str, Package]
    problems: tuple[Problem, ...]
    works: tuple[str, ...]
    missing: Mapping[str, tuple[str, ...]]

    @property
    def healthy(self) -> bool:
        """Whether all that is installed works together; what is not installed is no fault."""
        return not self.problems


def examine(path: Sequence[str] | None = None) -> Diagnosis:
    """Look at what is installed and judge it.

    Args:
        path: Folders with installed distributions; ``None`` takes ``sys.path``.
    """
    packages = installed_packages(path)
    own = own_requirements()
    return diagnose(packages, own)


def diagnose(packages: Mapping[str, Package], own: Sequence[str] = ()) -> Diagnosis:
    """Judge installed packages.

    Args:
        packages: By import name.
        own: What this plugin asks of them, as in `Package.requires`.
    """
    problems: list[Problem] = []
    by_distribution: dict[str, Package] = {
        canonicalize_name(distribution): package
        for package in packages.values()
        for distribution in package.distributions
    }
    for package in packages.values():
        problems += _twice_installed(package)
        problems += _unloadable_operators(package, packages)
        problems += _unaccepted(package, packages)
        problems += _unmet(package.distributions[0], package, package.requires, by_distribution)
    problems += _unmet("repapq-plugin", None, own, by_distribution)
    broken = {problem.package for problem in problems}
    lacking = {
        feature: tuple(name for name in needed if name not in packages or name in broken)
        for feature, needed in FEATURES.items()
    }
    return Diagnosis(
        packages,
        tuple(problems),
        tuple(feature for feature, names in lacking.items() if not names),
        {feature: names for feature, names in lacking.items() if names},
    )


def _twice_installed(package: Package) -> list[Problem]:
    if len(package.distributions) == 1:
        return []
    names = " and ".join(package.distributions)
    return [
        Problem(
            package.name,
            f"{names} both install {package.name} and overwrite each other's files.",
            f"pip uninstall {' '.join(package.distributions)}, then install one of them again",
        )
    ]


def _unloadable_operators(package: Package, packages: Mapping[str, Package]) -> list[Problem]:
    users = [name for name in NEEDS_OPERATORS if name in packages]
    if package.name != "mmcv" or not package.operators or not users:
        return []
    text = f"mmcv {package.version}: {package.operators}. {', '.join(users)} cannot be imported without them."
    remedy = OPERATORS_REMEDY.format(distribution=package.distributions[0])
    if package.distributions[0] == OPERATORLESS:
        remedy = f"pip uninstall {OPERATORLESS}, then install mmcv itself or the tested stack: {OPENMMLAB}"
    return [Problem(name, text, remedy) for name in ["mmcv", *users]]


def _unaccepted(package: Package, packages: Mapping[str, Package]) -> list[Problem]:
    problems = []
    for name, (low, high) in (package.accepts or {}).items():
        other = packages.get(name)
        wanted = " and ".join(text for text in (low and f">={low}", high and f"<{high}") if text)
        if other is None:
            text, remedy = (
                f"{package.name} {package.version} needs {name} {wanted}, which is not installed.",
                KNOWN[name],
            )
        elif (low and release(other.version) < release(low)) or (high and release(other.version) >= release(high)):
            text = f"{package.name} {package.version} refuses {name} {other.version} at import: it takes {wanted}."
            remedy = f"install a {name} that is {wanted}, or the tested stack: {OPENMMLAB}"
        else:
            continue
        problems.append(Problem(package.name, text, remedy))
    return problems


def _unmet(
    who: str, package: Package | None, requirements: Sequence[str], by_distribution: Mapping[str, Package]
) -> list[Problem]:
    problems = []
    for requirement in requirements:
        distribution, conditions = split_requirement(requirement)
        other = by_distribution.get(canonicalize_name(distribution))
        if other is None or all(meets(other.version, *condition) for condition in conditions):
            continue
        wanted = ",".join(operator + version for operator, version in conditions)
        problems.append(
            Problem(
                package.name if package else other.name,
                f"{who} needs {distribution} {wanted}, but {other.version} is installed.",
                f'pip install "{distribution}{wanted}"' + (f", or another {package.name}" if package else ""),
            )
        )
    return problems


def release(version: str) -> Version:
    """Return a version as its release: ``'2.12.1+cpu'`` and ``'2.12.1rc4'`` are ``2.12.1``."""
    return Version(Version(version).base_version)


def meets(version: str, operator: str, wanted: str) -> bool:
    """Return whether a version or its release satisfies a condition; what cannot be compared is taken as met."""
    try:
        condition = SpecifierSet(operator + wanted)
        return any(condition.contains(one, prereleases=True) for one in (Version(version), release(version)))
    except (InvalidVersion, InvalidSpecifier):
        return True


def split_requirement(requirement: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the distribution's name and the conditions of ``'torch (>=2.6,<3)'``; none if it cannot be read."""
    try:
        parsed = Requirement(requirement)
    except InvalidRequirement:
        return requirement, []
    return parsed.name, [(condition.operator, condition.version) for condition in parsed.specifier]


def own_requirements() -> tuple[str, ...]:
    """Return what this plugin needs of other packages, its extras too, exact pins left out.

    An extra's exact pins describe a stack that was tested, not a need.
    """
    try:
        requirements = metadata.requires("repapq-plugin") or []
    except metadata.PackageNotFoundError:  # runs from a checkout that is not installed
        return ()
    plain = (requirement.partition(";")[0].strip() for requirement in requirements)
    return tuple(requirement for requirement in plain if "==" not in requirement)


def installed_packages(path: Sequence[str] | None = None) -> dict[str, Package]:
    """Return the packages of `KNOWN` that are installed, by import name.

    Args:
        path: Folders with installed distributions; ``None`` takes ``sys.path``.
    """
    distributions: dict[str, dict[str, metadata.Distribution]] = {name: {} for name in KNOWN}
    found = metadata.distributions() if path is None else metadata.distributions(path=list(path))
    for distribution in found:
        for name in _modules(distribution) & KNOWN.keys():
            # The first of a name is the one that is imported.
            distributions[name].setdefault(canonicalize_name(distribution.metadata["Name"]), distribution)
    return {name: _package(name, list(those.values())) for name, those in distributions.items() if those}


def _modules(distribution: metadata.Distribution) -> set[str]:
    listed = (distribution.read_text("top_level.txt") or "").split()
    # Not every build tool writes that list.
    return set(listed) or {file.parts[0] for file in distribution.files or () if len(file.parts) > 1}


def _package(name: str, distributions: Sequence[metadata.Distribution]) -> Package:
    first = distributions[0]
    folder = _folder(name, first)
    requires = tuple(requirement for requirement in first.requires or () if ";" not in requirement)
    return Package(
        name,
        first.version,
        tuple(canonicalize_name(distribution.metadata["Name"]) for distribution in distributions),
        requires,
        accepted_versions(folder / "__init__.py") if folder else {},
        _operators(folder) if name == "mmcv" and folder else "",
    )


def _folder(name: str, distribution: metadata.Distribution) -> Path | None:
    folder = Path(str(distribution.locate_file(name)))
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(name)  # an editable install lies elsewhere
    return Path(spec.origin).parent if spec is not None and spec.origin else None


LIMIT = re.compile(r"^(\w+?)_(minimum_version|maximum_version|min|max) = ['\"]([^'\"]+)['\"]", re.M | re.I)


def accepted_versions(source: Path) -> dict[str, tuple[str, str]]:
    """Read from a toolbox's ``__init__.py`` which versions of its neighbours it accepts.

    Returns:
        As `Package.accepts`.
    """
    limits: dict[str, tuple[str, str]] = {}
    text = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else ""
    for name, kind, version in LIMIT.findall(text):
        low, high = limits.get(name.lower(), ("", ""))
        limits[name.lower()] = (version, high) if kind.lower().startswith("min") else (low, version)
    return {name: limit for name, limit in limits.items() if name in KNOWN}


def _operators(folder: Path) -> str:
    """Return why mmcv's compiled operators cannot be loaded, or an empty text."""
    libraries = sorted(folder.glob("_ext*.so")) + sorted(folder.glob("_ext*.pyd"))
    if not libraries:
        return "it was installed without its compiled operators"
    try:
        load_operators(libraries[0])
    except (ImportError, OSError) as error:
        return f"its compiled operators cannot be loaded ({str(error).splitlines()[0]})"
    return ""


def load_operators(library: Path) -> None:
    """Load a compiled extension by itself, without the package that it is part of.

    Raises:
        ImportError: It does not fit this Python or this torch.
        HostError: It is no extension at all.
    """
    import torch  # noqa: F401  - brings the libraries that the extension links to

    spec = importlib.util.spec_from_file_location("_ext", library)
    if spec is None or spec.loader is None:
        raise HostError(f"{library} is not a compiled extension.")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
