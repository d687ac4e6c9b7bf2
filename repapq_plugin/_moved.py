"""Modules that have moved: their old paths still import, as the very module of the new path, with a warning.

What was pickled, saved in a host's config or written in a user's program names modules by their paths. Importing this
module teaches Python the old ones. Nothing of the new ones is loaded before somebody imports an old one.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "repapq_plugin.fake_quantize": "repapq_plugin.quantizers.fake_quantize",
    "repapq_plugin.layers": "repapq_plugin.quantizers.layers",
    "repapq_plugin.doctor": "repapq_plugin.cli.doctor",
    "repapq_plugin.calibration.across_block": "repapq_plugin.method.across_block",
    "repapq_plugin.calibration.cache": "repapq_plugin.method.cache",
    "repapq_plugin.calibration.calibrate": "repapq_plugin.method.across_block",
    "repapq_plugin.calibration.channels": "repapq_plugin.conditioning.channels",
    "repapq_plugin.calibration.constant_channels": "repapq_plugin.conditioning.constant_channels",
    "repapq_plugin.calibration.equalize": "repapq_plugin.conditioning.equalize",
    "repapq_plugin.calibration.learners": "repapq_plugin.method.learners",
    "repapq_plugin.calibration.partition": "repapq_plugin.method.partition",
    "repapq_plugin.calibration.prepare": "repapq_plugin.quantizers.plan",
    "repapq_plugin.calibration.quantize": "repapq_plugin.job",
    "repapq_plugin.calibration.ranges": "repapq_plugin.method.starting_ranges",
    "repapq_plugin.calibration.reconstruction": "repapq_plugin.method.optimise",
    "repapq_plugin.calibration.replay": "repapq_plugin.method.replay",
    "repapq_plugin.calibration.result": "repapq_plugin.result",
    "repapq_plugin.calibration.subjects": "repapq_plugin.method.schedules",
    "repapq_plugin.calibration.trace": "repapq_plugin.quantizers.trace",
    "repapq_plugin.export.files": "repapq_plugin.core.files",
    "repapq_plugin.export.hosted": "repapq_plugin.hosts.hosted",
    "repapq_plugin.reparam.algebra": "repapq_plugin.reparam.by_algebra.merge",
    "repapq_plugin.reparam.forward_graph": "repapq_plugin.reparam.by_algebra.forward_graph",
    "repapq_plugin.reparam.fuse": "repapq_plugin.reparam.merge",
    "repapq_plugin.reparam.impulse": "repapq_plugin.reparam.by_algebra.impulse",
    "repapq_plugin.reparam.linear_forward": "repapq_plugin.reparam.by_algebra.regions",
    "repapq_plugin.reparam.qpr": "repapq_plugin.method.qpr",
    "repapq_plugin.reparam.unknown": "repapq_plugin.reparam.by_algebra.unknown",
    "repapq_plugin.hosts.nncf_torch": "repapq_plugin.hosts.nncf",
    "repapq_plugin.hosts.nncf_torch.calibrate": "repapq_plugin.hosts.nncf.backend",
    "repapq_plugin.hosts.nncf_torch.engine": "repapq_plugin.hosts.nncf.hosted",
    "repapq_plugin.hosts.nncf_torch.ranges": "repapq_plugin.method.starting_ranges",
    "repapq_plugin.hosts.openmmlab.engines": "repapq_plugin.hosts.openmmlab.other_hosts",
    "repapq_plugin.hosts.openmmlab.pipeline": "repapq_plugin.hosts.openmmlab.workbench",
    "repapq_plugin.hosts.torch_ao.engine": "repapq_plugin.hosts.torch_ao.backend",
    "repapq_plugin.hosts.torchao_pt2e": "repapq_plugin.hosts.pt2e",
    "repapq_plugin.hosts.torchao_pt2e.engine": "repapq_plugin.hosts.pt2e.backend",
}
"""Old path of a module -> its new path. A module of a moved package that is not listed kept its name there."""

DISSOLVED = {"repapq_plugin.calibration": "repapq_plugin.method, .quantizers, .conditioning, .job and .result"}
"""Packages that held nothing but modules, and where these went.

Such a package is not an alias of one of its heirs: importing ``calibration.across_block`` would then overwrite
``method.across_block``, which is another module.
"""


def new_path(old: str) -> str | None:
    """Return where a module is now.

    Args:
        old: Dotted path of a module.

    Returns:
        The path that `MOVED` gives for it or for the nearest package around it; ``None`` if neither has moved.
    """
    package, rest = old, ""
    while package:
        if package in MOVED:
            return MOVED[package] + rest
        package, _, last = package.rpartition(".")
        rest = f".{last}{rest}"
    return None


def _warn(old: str, new: str) -> None:
    # Frames of the import system do not count: behind this function and the loader's stands who imported the old path.
    warnings.warn(f"{old} has moved and this path will go; import {new} instead.", DeprecationWarning, stacklevel=3)


class _Alias(importlib.abc.Loader):
    """Loads a module by the path it has now, and leaves that module as it is.

    Args:
        path: The path it has now.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.own_spec: ModuleSpec | None = None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module of the new path; warns of the old one, ``spec.name``."""
        module = importlib.import_module(self.path)
        _warn(spec.name, self.path)
        self.own_spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing: the module has run. Python has just given it the spec of the old path; take that back."""
        module.__spec__ = self.own_spec


class _Empty(importlib.abc.Loader):
    """Makes a package without anything in it, for the paths below it."""

    def exec_module(self, module: ModuleType) -> None:
        """Warn of the old path; there is nothing to run."""
        _warn(module.__name__, DISSOLVED[module.__name__])


class MovedFinder(importlib.abc.MetaPathFinder):
    """Finds modules by the paths they had before they moved."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how an old path is loaded; ``None`` for a path that never changed or that does not exist."""
        if fullname in DISSOLVED:
            return ModuleSpec(fullname, _Empty(), is_package=True)
        new = new_path(fullname)
        if new is None or importlib.util.find_spec(new) is None:
            return None
        return ModuleSpec(fullname, _Alias(new))


def install() -> None:
    """Let Python import old paths. A second call changes nothing."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        # First, because a package's own folder would answer for its modules with a second copy of them.
        sys.meta_path.insert(0, MovedFinder())


install()
