"""Old import paths give the modules of the new ones, say so once, and load nothing before they are asked for."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import repapq_plugin
from repapq_plugin import LearnableFakeQuantize, MinMaxObserver, _moved
from repapq_plugin._moved import DISSOLVED, MOVED, new_path

PACKAGE = Path(repapq_plugin.__file__).parent
NEEDS_A_TOOLBOX = tuple(f"repapq_plugin.hosts.{name}" for name in ("nncf", "torchao_pt2e", "openmmlab"))
"""These load in `integration/test_moved_hosts.py`."""

LOADABLE = [old for old in MOVED if not old.startswith(NEEDS_A_TOOLBOX)]


@pytest.fixture(autouse=True)
def _as_if_never_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    for old in [*MOVED, *DISSOLVED]:
        monkeypatch.delitem(sys.modules, old, raising=False)


def warnings_of(old: str) -> tuple[ModuleType, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = importlib.import_module(old)
    texts = [str(one.message) for one in caught if issubclass(one.category, DeprecationWarning)]
    return module, [text for text in texts if text.startswith(f"{old} has moved")]


OF_MOVED_PACKAGES = [
    *(f"repapq_plugin.hosts.nncf_torch.{name}" for name in ("affine", "algorithm", "data", "learners", "running")),
    *(
        f"repapq_plugin.hosts.nncf_torch.{name}"
        for name in ("placement", "quantization", "quantizers", "range_estimator")
    ),
    *(f"repapq_plugin.hosts.torchao_pt2e.{name}" for name in ("fake_quantize", "graph", "grid", "learned")),
    *(f"repapq_plugin.hosts.torchao_pt2e.{name}" for name in ("observers", "quantizer", "simulated")),
]
"""Modules that kept their name when their package got another one."""


@pytest.mark.parametrize(("old", "new"), [*MOVED.items(), *((old, new_path(old)) for old in OF_MOVED_PACKAGES)])
def test_every_new_path_is_a_module_and_no_old_one_is(old: str, new: str) -> None:
    def files(dotted: str) -> list[Path]:
        stem = PACKAGE.joinpath(*dotted.split(".")[1:])
        return [path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.exists()]

    assert files(new), f"{new} has moved on: say in MOVED where to"
    assert not files(old)


@pytest.mark.parametrize("old", LOADABLE)
def test_an_old_path_is_the_very_module_and_warns_once(old: str) -> None:
    module, texts = warnings_of(old)
    assert module is importlib.import_module(MOVED[old])
    assert texts == [f"{old} has moved and this path will go; import {MOVED[old]} instead."]
    again, texts = warnings_of(old)
    assert again is module
    assert texts == []


@pytest.mark.parametrize("old", LOADABLE)
def test_the_module_stays_as_it_is(old: str) -> None:
    new = importlib.import_module(MOVED[old])
    before = (new.__name__, new.__package__, new.__spec__, new.__loader__, new.__file__)
    warnings_of(old)
    assert (new.__name__, new.__package__, new.__spec__, new.__loader__, new.__file__) == before
    assert new.__spec__ is not None
    assert new.__spec__.name == new.__name__ == MOVED[old]


def test_no_old_path_takes_the_place_of_a_new_one() -> None:
    for old in LOADABLE:
        warnings_of(old)
    for new in map(MOVED.__getitem__, LOADABLE):
        parent, _, name = new.rpartition(".")
        assert getattr(importlib.import_module(parent), name) is sys.modules[new]


def test_the_dissolved_package_imports_and_says_where_its_modules_went() -> None:
    module, texts = warnings_of("repapq_plugin.calibration")
    assert module.__name__ == "repapq_plugin.calibration"
    assert texts == [
        "repapq_plugin.calibration has moved and this path will go; import repapq_plugin.method, .quantizers, "
        ".conditioning, .job and .result instead."
    ]


@pytest.mark.parametrize("name", ["repapq_plugin.calibration.nothing", "repapq_plugin.nothing"])
def test_what_never_was_is_not_found(name: str) -> None:
    with pytest.raises(ModuleNotFoundError, match=name), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(name)


def test_names_of_a_module_come_from_the_old_path() -> None:
    with pytest.warns(DeprecationWarning, match=r"repapq_plugin\.layers has moved"):
        from repapq_plugin.layers import QuantizedLayer as Old  # type: ignore[import-not-found]
    from repapq_plugin.quantizers.layers import QuantizedLayer

    assert Old is QuantizedLayer


@pytest.mark.slow
def test_the_warning_points_at_who_imports(tmp_path: Path) -> None:
    script = tmp_path / "old_program.py"
    script.write_text("import repapq_plugin._moved\n\nimport repapq_plugin.fake_quantize\n")
    done = subprocess.run([sys.executable, "-W", "always", str(script)], capture_output=True, text=True, check=True)
    assert f"{script}:3: DeprecationWarning: repapq_plugin.fake_quantize has moved" in done.stderr


def test_a_pickle_that_names_an_old_path_loads() -> None:
    # Protocol 0 spells the module out, one name a line.
    fake_quantize = LearnableFakeQuantize(MinMaxObserver)
    now, old = b"repapq_plugin.quantizers.fake_quantize", b"repapq_plugin.fake_quantize"
    written = pickle.dumps(fake_quantize, protocol=0)
    assert now in written
    with pytest.warns(DeprecationWarning, match=r"repapq_plugin\.fake_quantize has moved"):
        loaded = pickle.loads(written.replace(now, old))
    assert type(loaded) is LearnableFakeQuantize
    assert isinstance(loaded.activation_post_process, MinMaxObserver)


@pytest.mark.slow
def test_asking_where_a_module_is_neither_warns_nor_loads_it() -> None:
    code = (
        "import importlib.util, sys, warnings; warnings.simplefilter('error')\n"
        "import repapq_plugin._moved\n"
        "assert importlib.util.find_spec('repapq_plugin.hosts.nncf_torch')\n"
        "print(*sorted({name.partition('.')[0] for name in sys.modules} & {'nncf', 'mmengine', 'torchao', 'openvino'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_modules_of_a_moved_package_follow_it() -> None:
    assert new_path("repapq_plugin.hosts.nncf_torch.quantizers") == "repapq_plugin.hosts.nncf.quantizers"
    assert new_path("repapq_plugin.hosts.torchao_pt2e.engine") == MOVED["repapq_plugin.hosts.torchao_pt2e.engine"]
    assert new_path("repapq_plugin.hosts.nncf_torchlike") is None
    assert new_path("repapq_plugin.config") is None


def test_one_finder_however_often_it_is_installed() -> None:
    _moved.install()
    assert sum(isinstance(finder, _moved.MovedFinder) for finder in sys.meta_path) == 1
