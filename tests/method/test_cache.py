from pathlib import Path

import pytest
import torch

from repapq_plugin.method.cache import ActivationCache


def test_what_exceeds_the_budget_goes_to_disk_and_comes_back_equal(tmp_path):
    tensors = [torch.randn(4, 5), torch.randn(3)]
    with ActivationCache(budget=100, folder=str(tmp_path)) as cache:
        for batch in range(3):
            cache.put("unit", batch, [tensor + batch for tensor in tensors])
        assert cache.used <= 100
        assert len(list(tmp_path.rglob("*.safetensors"))) == 2
        for batch in range(3):
            for found, wanted in zip(cache.get("unit", batch), tensors, strict=True):
                assert torch.equal(found, wanted + batch)
    assert not list(tmp_path.iterdir())


def test_files_vanish_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), ActivationCache(budget=0, folder=str(tmp_path)) as cache:
        cache.put("unit", 0, [torch.ones(3)])
        assert any(Path(tmp_path).iterdir())
        raise RuntimeError("stop")
    assert not list(tmp_path.iterdir())


def test_writing_into_what_came_back_does_not_reach_the_cache():
    with ActivationCache(budget=2**20) as cache:
        source = torch.ones(3)
        cache.put("unit", 0, [source])
        source.zero_()
        cache.get("unit", 0)[0].zero_()
        assert torch.equal(cache.get("unit", 0)[0], torch.ones(3))


def test_dropping_frees_the_budget():
    with ActivationCache(budget=2**20) as cache:
        cache.put("unit", 0, [torch.ones(8)])
        cache.put("unit", 0, [torch.ones(4)])
        assert cache.used == 16
        cache.drop_all("unit")
        assert cache.used == 0
        assert ("unit", 0) not in cache
        with pytest.raises(KeyError):
            cache.get("unit", 0)
