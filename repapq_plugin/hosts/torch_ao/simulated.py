"""From a prepared graph back to quantized layers, the form that `export_onnx` and `export_openvino` take."""

from __future__ import annotations

import copy
from typing import cast

from torch import nn
from torch.fx import GraphModule

from repapq_plugin.errors import HostError
from repapq_plugin.hosts.torch_ao._compat import RECTIFIED, layer_of, plain_layer
from repapq_plugin.hosts.torch_ao.grid import absorb_norms, quantizer_at, resting, weight_quantizer_of
from repapq_plugin.quantizers.fake_quantize import LearnableFakeQuantize
from repapq_plugin.quantizers.layers import QUANTIZABLE, quantize_layer


def quantized_network(prepared: GraphModule) -> GraphModule:
    """Return the network of a prepared and calibrated graph with `QuantizedLayer` in place of its layers.

    Layers keep the quantizers of their input and weight. Grids that torch.ao's integer layers need for
    other outputs are left out: runtimes of ONNX files do without.

    Args:
        prepared: From `prepare_learned`, or from ``prepare_fx`` with our observers or fake quantizers,
            after calibration; not changed.

    Raises:
        HostError: No layer of the graph has quantizers of ours.
    """
    network = copy.deepcopy(prepared)
    absorb_norms(network)
    inputs: dict[str, LearnableFakeQuantize] = {}
    found = 0
    for node in list(network.graph.nodes):
        if node.op != "call_module" or not node.args:
            continue
        module = network.get_submodule(str(node.target))
        layer, source = layer_of(module), quantizer_at(network, node.args[0])
        weight = weight_quantizer_of(module)
        if source is None or weight is None or not isinstance(layer, QUANTIZABLE):
            continue
        key = str(node.args[0].target)
        if key not in inputs:
            inputs[key] = cast(LearnableFakeQuantize, resting(cast(nn.Module, source)))
        quantized: nn.Module = quantize_layer(plain_layer(layer), weight, inputs[key])
        rectified = isinstance(module, RECTIFIED)
        network.set_submodule(str(node.target), nn.Sequential(quantized, nn.ReLU()) if rectified else quantized)
        found += 1
    if not found:
        raise HostError("No layer of the graph has quantizers of ours; prepare it with repapq_qconfig_mapping.")
    for node in list(network.graph.nodes):
        if quantizer_at(network, node) is not None:
            node.replace_all_uses_with(node.args[0])
            network.graph.erase_node(node)
    network.delete_all_unused_submodules()
    network.recompile()
    return network.eval()
