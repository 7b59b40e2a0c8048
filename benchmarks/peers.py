"""Peers of the lookups on a CPU, each in the best way in which its answers are right.

A peer finds the nearest key of each query; none tests radii or writes values. It may prepare
whatever a server could keep, such as norms or an index, and gets keys in float32, or in bfloat16
where it can read them. The data are exact in both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Answer = tuple[Tensor, Tensor | None]
"""Index and distance of the nearest key of each query; None from a peer that gives no distance."""

SLOW, FAR = 0.25, 10.0
"""Seconds a call, and times the fastest right peer's: what takes longer than both is not asked for
more queries. Far, since faiss goes over to a matrix product from 20 queries on."""
FEW = 8
"""Queries up to which torch.compile takes differences; beyond, it is another program."""


@dataclass(frozen=True)
class Book:
    """Keys `[N, D]` in both types, with what may be kept about them between queries."""

    wide: Tensor
    narrow: Tensor
    threads: int

    @functools.cached_property
    def norms(self) -> Tensor:
        """Squared norms `[N]` float32."""
        return torch.cat([part.square().sum(dim=1) for part in self.wide.split(1 << 14)])

    @functools.cached_property
    def indexes(self) -> dict[str, Any]:
        """Indexes that were built once."""
        return {}


@dataclass(frozen=True)
class Peer:
    """A peer: its name, the type of the keys it reads, what package it needs, and how to ask it.

    `asks(book, query)` gets queries `[B, D]` of that type and returns what is timed, a function of
    nothing. Several ways to ask one peer share its name; the fastest counts. One that `changes`
    computes otherwise beyond `FEW` queries, so that its time up to there says nothing about more.
    """

    name: str
    dtype: str
    package: str
    asks: Callable[[Book, Tensor], Callable[[], Answer]]
    way: str = ""
    changes: bool = False


def _product(
    book: Book, query: Tensor, score: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> Callable[[], Answer]:
    """Norms and a matrix product, then what lies within its error of the minimum again."""
    # float32 alone: a CPU's product of bfloat16 is rounded to it, torch.mm's out_dtype is CUDA's
    keys, norms = book.wide, book.norms

    def ask() -> Answer:
        scores = score(norms, keys, query)
        least, index = scores.min(dim=0)
        # c.f. gamma_D: the error of the product and of the norms, generously
        slack = 4e-7 * math.sqrt(keys.shape[1]) * (least.abs() + 3 * query.square().sum(1))
        slot, column = (scores <= least + slack).nonzero(as_tuple=True)
        exact = (keys[slot].double() - query[column].double()).square().sum(dim=1)
        if len(slot) == len(index):
            return slot[column.argsort()], exact[column.argsort()].float().sqrt()
        distance = torch.empty_like(least)
        for b in range(len(query)):
            here = (column == b).nonzero()[:, 0]
            best = here[exact[here].argmin()]
            index[b], distance[b] = slot[best], exact[best].float().sqrt()
        return index, distance

    return ask


def _cdist(book: Book, query: Tensor) -> Callable[[], Answer]:
    """The published code's way."""

    def ask() -> Answer:
        found = torch.cdist(book.wide, query).min(dim=0)
        return found.indices, found.values

    return ask


def _direct(keys: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    difference = keys.float()[:, None, :] - query.float()[None, :, :]
    return difference.square().sum(dim=2).min(dim=0)


def _scored(keys: Tensor, query: Tensor, norms: Tensor) -> Tensor:
    dots = query.float() @ keys.float().T  # a bfloat16 product would round to 8 bits
    return (norms - 2 * dots).min(dim=1).indices


@functools.cache
def _compiled(function: Callable[..., Any], *case: Any) -> Callable[..., Any]:
    """Compile for any sizes; a case (one query, a type) has a compiled function of its own."""
    torch._dynamo.config.recompile_limit = 64  # counted for all of them together
    return torch.compile(function, dynamic=True, fullgraph=True)


def _compile(book: Book, query: Tensor) -> Callable[[], Answer]:
    """torch.compile of the plain formula: differences for few queries, a product for many."""
    keys = book.wide if query.dtype == torch.float32 else book.narrow
    if len(query) > FEW:
        call = _compiled(_scored, query.dtype)

        def ask() -> Answer:
            index = call(keys, query, book.norms)
            return index, (keys[index].double() - query.double()).square().sum(1).float().sqrt()

        return ask
    direct = _compiled(_direct, query.dtype, len(query) == 1)

    def ask_directly() -> Answer:
        values, index = direct(keys, query)
        return index, values.sqrt()

    return ask_directly


def _faiss(book: Book, query: Tensor, kind: str) -> Callable[[], Answer]:
    import faiss

    faiss.omp_set_num_threads(book.threads)
    if kind not in book.indexes:
        dim = book.wide.shape[1]
        if kind == "flat":
            index = faiss.IndexFlatL2(dim)
        else:
            coded = faiss.ScalarQuantizer.QT_bf16
            index = faiss.IndexScalarQuantizer(dim, coded, faiss.METRIC_L2)
        for part in book.wide.split(1 << 14):
            index.add(part.numpy())
        book.indexes[kind] = index
    index, rows = book.indexes[kind], query.float().numpy()

    def ask() -> Answer:
        distance, found = index.search(rows, 1)
        return torch.from_numpy(found[:, 0]), torch.from_numpy(distance[:, 0]).sqrt()

    return ask


def _usearch(book: Book, query: Tensor) -> Callable[[], Answer]:
    from usearch.index import MetricKind, search

    if query.dtype == torch.float32:
        options, keys, rows = {}, book.wide.numpy(), query.numpy()
    else:
        options = {"dtype": "bf16"}
        keys, rows = (t.view(torch.uint16).numpy() for t in (book.narrow, query))

    def ask() -> Answer:
        found = search(keys, rows, 1, MetricKind.L2sq, exact=True, threads=book.threads, **options)
        index = torch.from_numpy(found.keys.reshape(-1).astype("int64"))
        return index, torch.from_numpy(found.distances.reshape(-1)).sqrt()

    return ask


def _scikit(book: Book, query: Tensor) -> Callable[[], Answer]:
    from sklearn import config_context
    from sklearn.metrics import pairwise_distances_argmin
    from threadpoolctl import threadpool_limits

    keys, rows = book.wide.numpy(), query.numpy()
    kept = {"Y_norm_squared": book.norms.double().numpy()}

    def ask() -> Answer:
        with config_context(assume_finite=True):
            found = pairwise_distances_argmin(rows, keys, metric_kwargs=kept)
        return torch.from_numpy(found.astype("int64")), None

    threadpool_limits(book.threads)
    return ask


def _keops(book: Book, query: Tensor) -> Callable[[], Answer]:
    import pykeops
    from pykeops.torch import LazyTensor

    pykeops.set_verbose(False)
    rows, keys = LazyTensor(query[:, None, :]), LazyTensor(book.wide[None, :, :])
    distances = rows.sqdist(keys)

    def ask() -> Answer:
        return distances.argmin(dim=1).view(-1), None

    return ask


def _ways() -> tuple[Peer, ...]:
    products: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "keys @ queries": lambda n, k, q: n[:, None] - 2 * (k @ q.T),
        "queries @ keys": lambda n, k, q: (n - 2 * (q @ k.T)).T,
        "keys @ one query": lambda n, k, q: torch.stack([n - 2 * (k @ one) for one in q], dim=1),
        "addmm, keys @ queries": lambda n, k, q: torch.addmm(n[:, None], k, q.T, alpha=-2),
        "addmm, queries @ keys": lambda n, k, q: torch.addmm(n, q, k.T, alpha=-2).T,
    }
    return (
        *(
            Peer("torch product", "fp32", "", functools.partial(_product, score=score), way)
            for way, score in products.items()
        ),
        Peer("torch.compile", "fp32", "", _compile, changes=True),
        Peer("torch.compile", "bf16", "", _compile, changes=True),
        Peer("torch.cdist", "fp32", "", _cdist),
        Peer("faiss IndexFlatL2", "fp32", "faiss-cpu", functools.partial(_faiss, kind="flat")),
        Peer("faiss bf16 codes", "bf16", "faiss-cpu", functools.partial(_faiss, kind="bf16")),
        Peer("usearch exact", "fp32", "usearch", _usearch),
        Peer("usearch exact", "bf16", "usearch", _usearch),
        Peer("scikit-learn argmin", "fp32", "scikit-learn", _scikit),
        Peer("PyKeOps argmin", "fp32", "pykeops", _keops),
    )


PEERS = _ways()
COMPILING = ("torch.compile", "PyKeOps argmin")
"""Those that compile for many seconds; a quick run does without."""
COLD = ("torch product", "faiss IndexFlatL2", "usearch exact")
"""Those that are measured with cold caches too."""


def limit_threads(threads: int) -> None:
    """Give every library that is loaded the same number of threads."""
    torch.set_num_threads(threads)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    threadpool_limits(threads)
