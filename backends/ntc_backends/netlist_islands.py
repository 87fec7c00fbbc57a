"""How host ops are grouped into islands, and in which order elements can run.

Level of a host op: how many times the signal has left the host on its longest way there. Connected host ops of one level are an island.
No way leads from an island over the chip back into it, so the elements form a directed acyclic graph, although the residual stream
connects all host ops of the network with each other.
"""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
from torch.fx import Node

__all__ = ["in_order", "islands_of"]


def islands_of(nodes: list[Node], host: set[Node]) -> list[list[Node]]:
    """Host nodes by level and connection (see the module's docstring), islands in the order in which they come up."""
    level: dict[Node, int] = {}
    for node in nodes:
        from_inputs = (level[a] + (node in host and a not in host) for a in node.all_input_nodes if a in level)
        level[node] = max(from_inputs, default=0)
    fed: set[Node] = set()  # what depends on the token ids; anything else (a mask, a table of angles) moves to its first user
    for node in nodes:
        if any(a.op == "placeholder" or a in fed for a in node.all_input_nodes):
            fed.add(node)
    for node in reversed(nodes):
        if node not in fed:
            level[node] = min((level[u] for u in node.users if u in level), default=0)
    graph: nx.Graph[Node] = nx.Graph()
    hosts = [n for n in nodes if n in host]
    graph.add_nodes_from(hosts)
    graph.add_edges_from((a, n) for n in hosts for a in n.all_input_nodes if a in host and level[a] == level[n])
    position = {node: i for i, node in enumerate(nodes)}
    islands = [sorted(part, key=position.__getitem__) for part in nx.connected_components(graph)]
    return sorted(islands, key=lambda island: (level[island[0]], position[island[0]]))


def in_order(groups: list[tuple[str, list[Node]]]) -> Iterable[tuple[str, list[Node]]]:
    """Groups in topological order; of those that could run next, the one whose first node comes first in the graph."""
    owner = {node: name for name, members in groups for node in members}
    place = {node: i for i, node in enumerate(next(iter(owner)).graph.nodes)}
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(name for name, _ in groups)
    graph.add_edges_from((owner[a], owner[n]) for n in owner for a in n.all_input_nodes if a in owner and owner[a] != owner[n])
    members = dict(groups)
    for name in nx.lexicographical_topological_sort(graph, key=lambda name: place[members[name][0]]):
        yield name, members[name]
