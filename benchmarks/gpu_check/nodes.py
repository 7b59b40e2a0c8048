"""Count the nodes of a captured graph, by kind.

Through the driver's C interface: libcuda is in every process that uses a GPU, and a cudaGraph_t is
a CUgraph.
"""

from __future__ import annotations

import ctypes
from collections import Counter
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
    handle = int(graph.raw_cuda_graph())
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: Any) -> None:
        function = getattr(driver, name)
        function.restype = ctypes.c_int
        status = function(*arguments)
        if status != 0:
            raise RuntimeError(f"{name} returned {status}")

    whole = ctypes.c_void_p(handle)
    number = ctypes.c_size_t(0)
    call("cuGraphGetNodes", whole, None, ctypes.byref(number))
    nodes = (ctypes.c_void_p * max(1, number.value))()
    if number.value:
        call("cuGraphGetNodes", whole, nodes, ctypes.byref(number))
    found: Counter[str] = Counter()
    for node in nodes[: number.value]:
        kind = ctypes.c_int(-1)
        call("cuGraphNodeGetType", ctypes.c_void_p(node), ctypes.byref(kind))
        found[KINDS.get(kind.value, f"kind {kind.value}")] += 1
    return dict(found)
