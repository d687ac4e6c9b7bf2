"""What of the installed packages works together, and what to do about the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from repapq_plugin.cli.installed import OWN_DISTRIBUTION, WITH_OPERATORS, Package, installed_packages, own_requirements

OPENMMLAB = "pip install 'repapq-plugin[openmmlab]'"
EXPORT = "pip install 'repapq-plugin[export]'"
SENSITIVITY = "pip install 'repapq-plugin[sensitivity]'"

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
    "scipy": SENSITIVITY,
    "matplotlib": SENSITIVITY,
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
    "bits by sensitivity": ("torch", "scipy"),
    "plots of sensitivity": ("torch", "matplotlib"),
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
    return diagnose(installed_packages(KNOWN, path), own_requirements())


def diagnose(packages: Mapping[str, Package], own: Sequence[str] = ()) -> Diagnosis:
    """Judge installed packages.

    Args:
        packages: By import name.
        own: What this plugin asks of them, as in `Package.requires`.
    """
    problems: list[Problem] = []
    for package in packages.values():
        problems += _twice_installed(package)
        problems += _unloadable_operators(package, packages)
        problems += _unaccepted(package, packages)
        problems += _unmet(package, package.requires, packages)
    problems += _unmet(None, own, packages)
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


def _twice_installed(package: Package) -> Iterator[Problem]:
    if len(package.distributions) > 1:
        yield Problem(
            package.name,
            f"{' and '.join(package.distributions)} both install {package.name} and overwrite each other's files.",
            f"pip uninstall {' '.join(package.distributions)}, then install one of them again",
        )


def _unloadable_operators(package: Package, packages: Mapping[str, Package]) -> Iterator[Problem]:
    users = [name for name in NEEDS_OPERATORS if name in packages]
    if package.name != WITH_OPERATORS or not package.operators or not users:
        return
    text = f"mmcv {package.version}: {package.operators}. {', '.join(users)} cannot be imported without them."
    remedy = OPERATORS_REMEDY.format(distribution=package.distributions[0])
    if package.distributions[0] == OPERATORLESS:
        remedy = f"pip uninstall {OPERATORLESS}, then install mmcv itself or the tested stack: {OPENMMLAB}"
    for name in (WITH_OPERATORS, *users):
        yield Problem(name, text, remedy)


def _unaccepted(package: Package, packages: Mapping[str, Package]) -> Iterator[Problem]:
    who = f"{package.name} {package.version}"
    for name, (low, high) in package.accepts.items():
        limits = [text for text in (low and f">={low}", high and f"<{high}") if text]
        wanted, other = " and ".join(limits), packages.get(name)
        if other is None:
            yield Problem(package.name, f"{who} needs {name} {wanted}, which is not installed.", KNOWN[name])
        # A toolbox compares releases: to it 2.2.0rc1 is as high as 2.2.0, and 2.0.0 no higher than 2.0.0rc4.
        elif (low and release(other.version) < release(low)) or (high and release(other.version) >= release(high)):
            yield Problem(
                package.name,
                f"{who} refuses {name} {other.version} at import: it takes {wanted}.",
                f"install a {name} that is {wanted}, or the tested stack: {OPENMMLAB}",
            )


def _unmet(package: Package | None, requirements: Sequence[str], packages: Mapping[str, Package]) -> Iterator[Problem]:
    """Compare requirements with what is installed; those of ``None`` are this plugin's own."""
    by_distribution = {canonicalize_name(name): other for other in packages.values() for name in other.distributions}
    who = package.distributions[0] if package else OWN_DISTRIBUTION
    for requirement in filter(None, map(parsed, requirements)):
        other = by_distribution.get(canonicalize_name(requirement.name))
        if other is None or meets(other.version, requirement.specifier):
            continue
        wanted = f"{requirement.name} {requirement.specifier}"
        yield Problem(
            package.name if package else other.name,
            f"{who} needs {wanted}, but {other.version} is installed.",
            f'pip install "{wanted.replace(" ", "")}"' + (f", or another {package.name}" if package else ""),
        )


def parsed(requirement: str) -> Requirement | None:
    """Return ``'torch (>=2.6,<3)'`` as packaging reads it; ``None`` if it cannot be read."""
    try:
        return Requirement(requirement)
    except InvalidRequirement:
        return None


def release(version: str) -> Version:
    """Return a version as its release: ``'2.12.1+cpu'`` and ``'2.12.1rc4'`` are ``2.12.1``."""
    return Version(Version(version).base_version)


def meets(version: str, conditions: str | SpecifierSet) -> bool:
    """Return whether a version or its release satisfies each condition; what cannot be compared is taken as met."""
    try:
        versions = (Version(version), release(version))
        each = SpecifierSet(str(conditions))
    except (InvalidVersion, InvalidSpecifier):
        return True
    return all(any(one in SpecifierSet(str(condition), prereleases=True) for one in versions) for condition in each)
