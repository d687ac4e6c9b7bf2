"""What is installed out of the packages that matter, read without importing any of them.

Distributions say their versions and what they need. The toolboxes' own source files say which versions they accept of
each other: they assert it as they are imported. Only mmcv's compiled operators are loaded, because nothing else tells
whether they were built beside this very torch.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

from repapq_plugin.errors import HostError

OWN_DISTRIBUTION = "repapq-plugin"

WITH_OPERATORS = "mmcv"
"""The package that has compiled operators."""


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
    accepts: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    operators: str = ""


def installed_packages(known: Collection[str], path: Sequence[str] | None = None) -> dict[str, Package]:
    """Return which of some packages are installed, by import name.

    Args:
        known: Import names to look for.
        path: Folders with installed distributions; ``None`` takes ``sys.path``.
    """
    distributions: dict[str, dict[str, metadata.Distribution]] = {name: {} for name in known}
    found = metadata.distributions() if path is None else metadata.distributions(path=list(path))
    for distribution in found:
        for name in _modules(distribution) & distributions.keys():
            # The first of a name is the one that is imported.
            distributions[name].setdefault(canonicalize_name(distribution.metadata["Name"]), distribution)
    return {name: _package(name, those, known) for name, those in distributions.items() if those}


def own_requirements() -> tuple[str, ...]:
    """Return what this plugin needs of other packages, its extras too, exact pins left out.

    An extra's exact pins describe a stack that was tested, not a need.
    """
    try:
        requirements = metadata.requires(OWN_DISTRIBUTION) or []
    except metadata.PackageNotFoundError:  # runs from a checkout that is not installed
        return ()
    plain = (requirement.partition(";")[0].strip() for requirement in requirements)
    return tuple(requirement for requirement in plain if "==" not in requirement)


def _modules(distribution: metadata.Distribution) -> set[str]:
    listed = (distribution.read_text("top_level.txt") or "").split()
    # Not every build tool writes that list.
    return set(listed) or {file.parts[0] for file in distribution.files or () if len(file.parts) > 1}


def _package(name: str, distributions: Mapping[str, metadata.Distribution], known: Collection[str]) -> Package:
    first = next(iter(distributions.values()))
    folder = _folder(name, first)
    return Package(
        name,
        first.version,
        tuple(distributions),
        tuple(requirement for requirement in first.requires or () if ";" not in requirement),
        accepted_versions(folder / "__init__.py", known) if folder else {},
        _operators(folder) if name == WITH_OPERATORS and folder else "",
    )


def _folder(name: str, distribution: metadata.Distribution) -> Path | None:
    folder = Path(str(distribution.locate_file(name)))
    if folder.is_dir():
        return folder
    spec = importlib.util.find_spec(name)  # an editable install lies elsewhere
    return Path(spec.origin).parent if spec is not None and spec.origin else None


LIMIT = re.compile(r"^(\w+?)_(minimum_version|maximum_version|min|max) = ['\"]([^'\"]+)['\"]", re.M | re.I)


def accepted_versions(source: Path, known: Collection[str]) -> dict[str, tuple[str, str]]:
    """Read from a toolbox's ``__init__.py`` which versions of its neighbours it accepts.

    Args:
        source: The file; one that does not exist accepts anything.
        known: Import names of neighbours that matter.

    Returns:
        As `Package.accepts`.
    """
    limits: dict[str, tuple[str, str]] = {}
    text = source.read_text(encoding="utf-8", errors="replace") if source.is_file() else ""
    for name, kind, version in LIMIT.findall(text):
        low, high = limits.get(name.lower(), ("", ""))
        limits[name.lower()] = (version, high) if kind.lower().startswith("min") else (low, version)
    return {name: limit for name, limit in limits.items() if name in known}


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
