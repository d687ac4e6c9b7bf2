"""All that this package uses of mmengine and the toolboxes without their promise to keep it.

Seen on onedl-mmengine 0.10.12 and visaion4mmyolo 0.6.1. Each use has a test of its own, which fails where the thing
is gone.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from mmengine.utils import is_installed

DEPLOY_HOOK = "SwitchToDeployHook"
"""mmyolo's hook, by name: this package imports no toolbox."""


def drop_hooks_on_weights(runner: Runner) -> None:
    """Take the hooks that change the model around an evaluation out of a runner that only evaluates.

    `EMAHook` swaps parameters with its own copy of the model by position, which breaks once modules were replaced. A
    checkpoint's ``state_dict`` holds the averaged weights already. mmyolo's ``SwitchToDeployHook`` would merge the
    branches of the float model in place and drop their norms, so that a saved result no longer fits the config's model.

    Args:
        runner: Its list of hooks is replaced.
    """
    # A new list, because a hook may be calling this from within the runner's loop over the old one.
    runner._hooks = [
        hook for hook in runner.hooks if not isinstance(hook, EMAHook) and type(hook).__name__ != DEPLOY_HOOK
    ]


def remove_hook(runner: Runner, hook: Hook) -> None:
    """Undo ``runner.register_hook(hook)``.

    Args:
        runner: Where the hook was registered.
        hook: The very object.
    """
    runner.hooks.remove(hook)  # the property hands out the list itself


@contextmanager
def unpickling_by(load: Callable[..., object]) -> Iterator[None]:
    """Let ``load`` read every file that mmengine reads as a checkpoint; undone at the end.

    All of mmengine's ways to a checkpoint (a file, an address, a name in a model zoo) end in ``torch.load``, which they
    look up as they call it. mmengine tries to read plain data first, and where that fails it reads the file in the way
    that runs what stands in it. Its list of what is plain holds ``getattr``, too, which reaches everything.

    Args:
        load: Takes what `torch.load` takes.
    """
    before = torch.load
    torch.load = load
    try:
        yield
    finally:
        torch.load = before


def loading_through(runner: Runner, around: Callable[[Callable[[], object], str], object]) -> None:
    """Stand between a runner and the loading of its checkpoint, for as long as it lives.

    Args:
        runner: Has not loaded yet; whatever it loads or resumes from goes through its ``load_checkpoint``.
        around: Is given a function that loads, and the path or address; returns what the function returns.
    """
    load = runner.load_checkpoint

    def load_checkpoint(filename: str, *args: object, **kwargs: object) -> object:
        return around(lambda: load(filename, *args, **kwargs), filename)

    runner.load_checkpoint = load_checkpoint


def name_experiment(cfg: Config) -> None:
    """Give a config an experiment name of its own, in place.

    mmengine keeps loggers and visualizers for the whole process by their names. One of an earlier runner would go on
    writing into that runner's folder.

    Args:
        cfg: A config from which one runner is built.
    """
    cfg.experiment_name = f"repapq_{time.time_ns()}"
    if cfg.get("visualizer"):
        cfg.visualizer.name = cfg.experiment_name


def add_scope(scope: str) -> None:
    """Let ``<scope>::...`` name configs of the package ``scope``; again is harmless.

    mmengine looks a name before ``::`` up in a table of its own. A toolbox that comes under another distribution name
    than this table expects is looked up by its module instead, so that its ``mmseg::...`` names work as well.

    Args:
        scope: Import name of a package with a folder ``.mim/configs``.
    """
    MODULE2PACKAGE.setdefault(scope, scope)
    for module, package in MODULE2PACKAGE.items():
        if module != package and not is_installed(package) and find_spec(module) is not None:
            MODULE2PACKAGE[module] = module


DENSE_HEAD = "BaseDenseHead"
"""mmdet's base class of heads that predict boxes at every place, by name."""


def dense_functions() -> tuple[Callable[..., object], Callable[..., object]]:
    """Return what dense heads call to drop low scores and to suppress boxes: mmdet's and mmcv's functions."""
    from mmcv.ops import batched_nms
    from mmdet.models.utils import filter_scores_and_topk

    return filter_scores_and_topk, batched_nms


@contextmanager
def everywhere(function: Callable[..., object], other: Callable[..., object]) -> Iterator[None]:
    """Let every loaded module that holds a function under its name hold another one; undone at the end.

    The modules of heads import the functions by name, so exchanging them where they are defined changes nothing.
    """
    name = function.__name__
    holders = [module for module in list(sys.modules.values()) if vars(module).get(name) is function]
    for module in holders:
        vars(module)[name] = other
    try:
        yield
    finally:
        for module in holders:
            vars(module)[name] = function


@contextmanager
def outside_of_export() -> Iterator[None]:
    """Let ``torch.onnx.is_in_onnx_export()`` say no; undone at the end.

    Where it says yes, mmdet's box coders import a module that mmdet 3 no longer has.
    """
    before = torch.onnx.is_in_onnx_export
    torch.onnx.is_in_onnx_export = lambda: False
    try:
        yield
    finally:
        torch.onnx.is_in_onnx_export = before
