"""A module with one convolution in place of each of its regions; the rest of its forward stays as it is.

What is made here is compared with the block, which then takes it over (`repapq_plugin.reparam.take_over`).
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx, nn

from repapq_plugin.reparam.by_algebra.forward_graph import ForwardGraph
from repapq_plugin.reparam.by_algebra.regions import Region
from repapq_plugin.reparam.merged import MergedBlock


def rewritten(forward: ForwardGraph, regions: Collection[Region], name: str) -> MergedBlock | fx.GraphModule:
    """Return a module with a convolution in place of each region.

    Args:
        forward: The forward that the regions were found in; used up.
        regions: One or more, none inside another.
        name: Class name of the module.

    Returns:
        A `MergedBlock` where nothing but a chain of modules follows the only region, else the rewritten forward.
    """
    after = _chain_behind(forward, regions)
    if after is not None:
        return MergedBlock(next(iter(regions)).conv, after)
    graph, root = forward.graph, forward.root
    calls: dict[fx.Node, fx.Node] = {}
    for index, region in enumerate(sorted(regions, key=lambda region: forward.live.index(region.node))):
        child = "merged" if index == 0 else f"merged_{index}"
        while hasattr(root, child):
            child += "_"
        root.add_module(child, MergedBlock(region.conv))
        source = calls.get(region.source, region.source)
        with graph.inserting_after(source):
            calls[region.node] = graph.call_module(child, (source,))
        region.node.replace_all_uses_with(calls[region.node])
    merged = {node for region in regions for node in region.inside}
    for node in reversed(list(graph.nodes)):
        if not node.users and (node in merged or not forward.is_live(node)) and node not in calls.values():
            graph.erase_node(node)
    graph.lint()  # type: ignore[no-untyped-call]
    return fx.GraphModule(root, graph, name)


def _chain_behind(forward: ForwardGraph, regions: Collection[Region]) -> list[nn.Module] | None:
    """Modules between the only region and the output, if there is nothing else in the forward."""
    region = next(iter(regions))
    if len(regions) > 1 or region.source is not forward.input:
        return None
    if any(user not in region.inside for user in region.source.users):
        return None
    after, node = [], region.node
    while node is not forward.output:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_module" or users[0].args != (node,) or users[0].kwargs:
            return None
        node = users[0]
        after.append(forward.child(node))
    return after
