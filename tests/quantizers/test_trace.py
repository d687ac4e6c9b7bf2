import torch
from torch import nn

from repapq_plugin.core.tensors import floating_tensors
from repapq_plugin.job import merge_for_inference
from repapq_plugin.quantizers.trace import trace_network
from tests.support.networks import Chain, Pyramid, settle


def merged(model: nn.Module) -> nn.Module:
    x = torch.randn(2, 3, 16, 16)
    return merge_for_inference(settle(model), lambda m: m(x))[0]


def test_first_and_last_layers_of_a_chain():
    model = merged(Chain())
    trace = trace_network(model, lambda: model(torch.randn(2, 3, 16, 16)))
    assert [name for name, seen in trace.layers.items() if seen.first] == ["stem.conv"]
    assert [name for name, seen in trace.layers.items() if seen.last] == ["fc"]


def test_a_pyramid_has_several_last_layers_and_shared_ones_are_called_twice():
    model = merged(Pyramid())
    trace = trace_network(model, lambda: model(torch.randn(2, 3, 16, 16)))
    assert {name for name, seen in trace.layers.items() if seen.last} == {"classes", "boxes"}
    assert trace.layers["tower.0"].calls == 2
    assert trace.layers["classes"].input_key == trace.layers["boxes"].input_key
    assert trace.layers["up"].input_key != trace.layers["lateral.0"].input_key


def test_tracing_leaves_gradients_hooks_and_outputs_alone():
    model = merged(Pyramid())
    model.up.weight.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    x = torch.randn(2, 3, 16, 16)
    wanted = floating_tensors(model(x))
    trace_network(model, lambda: model(x))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(floating_tensors(model(x)), wanted, strict=True))


def test_without_gradients_the_last_layer_called_is_taken():
    class Cut(Chain):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    model = merged(Cut())
    trace = trace_network(model, lambda: model(torch.randn(2, 3, 16, 16)))
    assert [name for name, seen in trace.layers.items() if seen.last] == ["fc"]
