import pytest
import torch
from torch import nn

from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.method.replay import answering, inputs_of, outputs_of, recording
from tests.support.networks import Pyramid, settle


@pytest.fixture
def model() -> Pyramid:
    return settle(Pyramid())


def test_a_network_whose_modules_answer_from_the_cache_gives_the_same_outputs(model):
    x = torch.randn(2, 3, 16, 16)
    names = ["down1", "down2", "up", "tower"]
    modules = dict(model.named_modules())
    with torch.no_grad():
        with recording(modules, names) as outputs:
            wanted = floating_tensors(model(x))
        stored = {name: [tensor.clone() for tensor in tensors] for name, tensors in outputs.items()}
        assert len(stored["tower"]) == 2
        with answering(modules, stored):
            replayed = floating_tensors(model(torch.zeros_like(x)))
        assert all(torch.equal(a, b) for a, b in zip(replayed, wanted, strict=True))
        again = floating_tensors(model(x))
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))


def test_modules_run_again_after_an_error(model):
    modules = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="stop"), answering(modules, {"up": [torch.zeros(1)]}):
        raise RuntimeError("stop")
    assert "forward" not in vars(model.up)


def test_a_forward_of_the_module_s_own_comes_back(model):
    own = model.up.forward
    model.up.forward = own
    with answering(dict(model.named_modules()), {"up": [torch.zeros(1)]}):
        pass
    assert vars(model.up)["forward"] is own


def test_inputs_and_outputs_of_a_shared_module_are_all_found_and_nothing_behind_it_runs(model):
    ran = []
    model.classes.register_forward_hook(lambda *_: ran.append(1))
    x = torch.randn(2, 3, 16, 16)
    inputs = inputs_of(model.tower, 2, lambda: model(x))
    outputs = outputs_of(model.tower, 2, lambda: model(x))
    assert [tuple(t.shape[-2:]) for t in inputs] == [(8, 8), (4, 4)]
    assert not ran
    for given, got in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(model.tower(given), got)


def test_inputs_given_by_keyword_are_found_and_a_call_without_a_tensor_is_named():
    layer, x = nn.ConvTranspose2d(3, 3, 2, 2), torch.randn(1, 3, 4, 4)
    [given] = inputs_of(layer, 1, lambda: layer(output_size=[8, 8], input=x))
    assert torch.equal(given, x) and given is not x
    nothing = nn.Identity()
    with pytest.raises(TypeError, match="Identity is called without a tensor"):
        inputs_of(nothing, 1, lambda: nothing([x]))
    assert not layer._forward_pre_hooks and not nothing._forward_pre_hooks


class ChangesInPlace(nn.Module):
    """What follows its layers works on their outputs in place; one layer is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.twice = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.silu(self.one(x), inplace=True)
        y = self.twice(y).mul_(0.5)
        return self.twice(y).neg_()


def test_what_is_recorded_is_what_was_returned_whatever_happens_to_it_later():
    model, x = ChangesInPlace(), torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        one = model.one(x)
        first = model.twice(nn.functional.silu(one))
        second = model.twice(0.5 * first)
    with recording(dict(model.named_modules()), ["one", "twice"]) as outputs:
        model(x)
    assert all(map(torch.equal, outputs["one"], [one])) and len(outputs["one"]) == 1
    for found in (outputs["twice"], outputs_of(model.twice, 2, lambda: model(x))):
        assert all(map(torch.equal, found, [first, second])) and len(found) == 2
    (outputs["one"][0].sum() + outputs["twice"][1].sum()).backward()
    assert all(bool(parameter.grad.any()) for parameter in model.parameters())
