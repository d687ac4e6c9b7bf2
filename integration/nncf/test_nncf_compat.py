"""A canary for everything that the host takes from NNCF's inside; all were seen on nncf 3.4.0."""

from __future__ import annotations

import copy

import nncf
import pytest
import torch
from torch import nn

from integration.nncf.conftest import Case
from repapq_plugin.hosts.nncf import _compat


def test_every_name_is_still_there() -> None:
    assert all(hasattr(_compat, name) for name in _compat.__all__)
    assert nncf.__version__.split(".")[0] == "3", (
        "look at each test of this file before another major version is allowed"
    )


def test_hooks_of_an_operation_are_found_by_a_key_of_name_and_port(eight: Case) -> None:
    storage = _compat.get_hook_storage(eight.result.model)
    names = [name for name, _ in storage.named_hooks()]
    kind, operation, port = _compat.decode_hook_name(names[0])
    hooks, key = _compat.hooks_of(eight.result.model, kind, operation, port)
    assert key in hooks and isinstance(hooks[key], nn.ModuleDict)


def test_a_hook_is_replaced_under_its_name(eight: Case) -> None:
    model = copy.deepcopy(eight.result.model)
    name, _ = next(iter(_compat.get_hook_storage(model).named_hooks()))
    other = nn.Identity()
    _compat.replace_hook(model, name, other)
    assert dict(_compat.get_hook_storage(model).named_hooks())[name] is other


def test_lengths_are_stored_in_one_parameter_as_numbers_or_logarithms(eight: Case) -> None:
    model = copy.deepcopy(eight.result.model)
    quantizers = [hook for _, hook in _compat.get_hook_storage(model).named_hooks()]
    symmetric = next(hook for hook in quantizers if isinstance(hook, _compat.SymmetricQuantizer))
    before = symmetric.scale.detach().clone()
    assert torch.equal(_compat.length_of(symmetric), before)
    with torch.no_grad():
        _compat.length_of(symmetric).log_()
    _compat.store_as_logarithm(symmetric, True)
    torch.testing.assert_close(symmetric.scale.detach(), before)


def test_the_running_mode_knows_its_model_its_stack_and_its_counters(eight: Case) -> None:
    model, seen = copy.deepcopy(eight.result.model), []

    def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        mode = _compat.current_mode(model)
        assert mode is not None and mode.model is model
        assert mode.module_call_stack[-1] is module
        seen.append(dict(mode.op_calls))

    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    handle = layer.register_forward_pre_hook(look)
    with torch.no_grad():
        model(eight.unseen)
    handle.remove()
    assert seen and seen[0] and _compat.current_mode(model) is None


def test_counters_are_a_dictionary_that_can_be_set(eight: Case) -> None:
    model = eight.result.model
    with _compat.FunctionHookMode(model=model, hook_storage=_compat.get_hook_storage(model)) as mode:
        _compat.set_counters(mode, {"a": 3})
        assert dict(mode.op_calls) == {"a": 3}


def test_the_graph_names_quantizers_and_weights(eight: Case) -> None:
    graph = _compat.build_nncf_graph(eight.result.model, eight.unseen)
    assert {node.node_type for node in graph.get_all_nodes()} & set(_compat.QUANTIZE_NODES)
    assert any(node.node_name.endswith(".weight") for node in graph.get_all_nodes())
    inputs = [node for node in graph.get_all_nodes() if node.node_type == _compat.INPUT_NODE]
    assert len(inputs) == 1 and isinstance(inputs[0], _compat.NNCFNode)


def test_statistics_are_looked_up_in_plain_dictionaries() -> None:
    assert isinstance(_compat.collectors.REDUCERS_MAP, dict) and isinstance(_compat.collectors.AGGREGATORS_MAP, dict)


def test_an_algorithm_gets_a_wrapper_that_holds_the_model(chain: nn.Module) -> None:
    wrapper = _compat.GraphModelWrapper(_compat.wrap_model(copy.deepcopy(chain)), torch.zeros(1, 3, 16, 16))
    assert _compat.is_wrapped(wrapper.model) and callable(wrapper.reset_graph)
    assert any(name.startswith(_compat.ATR_HOOK_STORAGE) for name, _ in wrapper.model.named_modules())


@pytest.mark.parametrize("name", ["get_config", "from_config"])
def test_modules_with_a_state_of_their_own_say_how_they_are_rebuilt(name: str) -> None:
    assert name in vars(_compat.StatefulModuleInterface)
