import copy

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from repapq_plugin.reparam.parametrized import bake_parametrizations


def test_what_was_computed_becomes_plain_weights_of_the_same_values():
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    baked, x = copy.deepcopy(model), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        wanted = model(x)
        assert bake_parametrizations(baked) == ["0.weight"]
        assert type(baked[0]) is nn.Conv2d
        assert isinstance(baked[0]._parameters["weight"], nn.Parameter)
        assert torch.equal(baked(x), wanted)
        assert bake_parametrizations(baked) == []
        # What it was copied from goes on as it was.
        assert parametrize.is_parametrized(model[0], "weight")
        assert torch.equal(model(x), wanted)
