"""Count the nodes of a captured graph, by kind.

Through the driver's C interface (libcuda is in every process that uses a GPU; a cudaGraph_t is a
CUgraph), or where that fails from torch's drawing of the graph.
"""

from __future__ import annotations

import ctypes
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

KINDS = {
    0: "kernel",
    1: "memcpy",
    2: "memset",
    3: "host",
    4: "graph",
    5: "empty",
    6: "wait event",
    7: "record event",
    10: "allocation",
    11: "free",
    13: "conditional",
}


def count(graph: Any) -> dict[str, int]:
    """Return how many nodes of each kind a `torch.cuda.CUDAGraph(keep_graph=True)` has."""
    try:
        return _by_driver(int(graph.raw_cuda_graph()))
    except (AttributeError, OSError, RuntimeError) as error:
        found = _by_drawing(graph)
        if not found:
            raise RuntimeError(f"the nodes could not be counted: {error}") from error
        return found


def _by_driver(handle: int) -> dict[str, int]:
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        function = getattr(driver, name)
        function.restype = ctypes.c_int
        status = function(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} returned {status}")

    graph = ctypes.c_void_p(handle)
    number = ctypes.c_size_t(0)
    call("cuGraphGetNodes", graph, None, ctypes.byref(number))
    nodes = (ctypes.c_void_p * max(1, number.value))()
    if number.value:
        call("cuGraphGetNodes", graph, nodes, ctypes.byref(number))
    found: Counter[str] = Counter()
    for node in nodes[: number.value]:
        kind = ctypes.c_int(-1)
        call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        found[KINDS.get(kind.value, f"kind {kind.value}")] += 1
    return dict(found)


def _by_drawing(graph: Any) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.dot"
        graph.debug_dump(str(path))
        return of_drawing(path.read_text(errors="replace")) if path.exists() else {}


def of_drawing(text: str) -> dict[str, int]:
    """Return the nodes by kind of a graph in DOT as the CUDA driver draws it."""
    # A node is a statement of its own, `"graph_0_node_1"[style=... label="..."];`, over several
    # lines; an edge has an arrow.
    found: Counter[str] = Counter()
    for label in re.findall(r'^"graph_\d+_node_\d+"\s*\[(.*?)\];', text, flags=re.M | re.S):
        kind = next((k for k in ("MEMCPY", "MEMSET", "HOST", "EMPTY") if k in label.upper()), None)
        found[kind.lower() if kind else "kernel"] += 1
    return dict(found)
