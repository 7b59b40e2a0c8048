"""What ours stand beside on a CPU and on a GPU, each in the best way in which it is right.

A peer may prepare whatever a server could keep, such as norms or an index. On a CPU it finds the
nearest key of each query, and neither tests radii nor writes values; the keys are exact in float32
and in bfloat16, and it reads what it can. On a GPU it answers a lookup, radii included, from keys
of the type that ours read. None certifies its winner, so each is compared with the right answer
before it is timed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .gate import Answer

SLOW, FAR = 0.25, 10.0
"""Seconds a call, and times the fastest right peer's: what takes longer than both is not asked for
more queries. Far, since faiss goes over to a matrix product from 20 queries on."""
FEW = 8
"""Queries up to which torch.compile takes differences; beyond, it is another program."""


@dataclass(frozen=True)
class Book:
    """Keys `[N, D]` and radii `[N]`, with what may be kept about them between queries.

    `given` are the same keys in float32, where a peer may keep them so beside the narrow ones.
    """

    keys: Tensor
    radii: Tensor
    threads: int = 1
    given: Tensor | None = None

    @functools.cached_property
    def wide(self) -> Tensor:
        """The keys in float32."""
        return self.keys.float() if self.given is None else self.given

    @functools.cached_property
    def norms(self) -> Tensor:
        """Squared norms `[N]` float32, made in slices: a copy in float32 may not fit."""
        keys = self.keys if self.given is None else self.given
        return torch.cat([part.float().square().sum(dim=1) for part in keys.split(1 << 14)])

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
    keys = book.wide if query.dtype == torch.float32 else book.keys
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
        dim = book.keys.shape[1]
        if kind == "flat":
            index = faiss.IndexFlatL2(dim)
        else:
            coded = faiss.ScalarQuantizer.QT_bf16
            index = faiss.IndexScalarQuantizer(dim, coded, faiss.METRIC_L2)
        for part in book.keys.split(1 << 14):
            index.add(part.float().numpy())
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
        keys, rows = (t.view(torch.uint16).numpy() for t in (book.keys, query))

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


ON_CPU = _ways()
COMPILING = ("torch.compile", "PyKeOps argmin")
"""Those that compile for many seconds; a quick run does without."""
COLD = ("torch product", "faiss IndexFlatL2", "usearch exact")
"""Those that are measured with cold caches too."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` with a float32 result: a bf16 one would round distances to 8 bits."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _covered(radii: Tensor, index: Tensor, distance: Tensor) -> tuple[Tensor, Tensor]:
    hit = distance <= radii[index]
    return torch.where(hit, index, -1), torch.where(hit, distance, math.inf)


def _found(keys: Tensor, radii: Tensor, query: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Return the answer, the distance to the nearest key anew, in float64."""
    difference = query.double() - keys[index].double()
    return _covered(radii, index, difference.square().sum(dim=1).float().sqrt())


def _least(
    dots: Tensor, keys: Tensor, radii: Tensor, norms: Tensor, query: Tensor
) -> tuple[Tensor, Tensor]:
    """Answer from products `[B, N]`."""
    return _found(keys, radii, query, (norms - 2 * dots).min(dim=1).indices)


def _difference(keys: Tensor, radii: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """Answer from differences, squared and summed in float32: torch.compile fuses them."""
    difference = query.float()[None, :, :] - keys.float()[:, None, :]
    return _found(keys, radii, query, difference.square().sum(dim=2).min(dim=0).indices)


def _keys_query(book: Book, query: Tensor) -> Callable[[], Answer]:
    keys, radii, norms = book.keys, book.radii, book.norms

    def ask() -> Answer:
        scores = norms[:, None] - 2 * product(keys, query.T)
        return _found(keys, radii, query, scores.min(dim=0).indices)

    return ask


def _query_keys(book: Book, query: Tensor) -> Callable[[], Answer]:
    keys, radii, norms = book.keys, book.radii, book.norms
    return lambda: _least(product(query, keys.T), keys, radii, norms, query)


def _cdist_covered(book: Book, query: Tensor) -> Callable[[], Answer]:
    """The published code's way: all in float32, the codebook anew at every call."""

    def ask() -> Answer:
        found = torch.cdist(book.keys.float(), query.float()).min(dim=0)
        return _covered(book.radii, found.indices, found.values)

    return ask


@functools.cache
def _for_a_gpu(function: Callable[..., Any], compiler: str, *case: Any) -> Callable[..., Any]:
    torch._dynamo.reset()  # what was compiled for another case is not asked again
    return torch.compile(function, dynamic=False, fullgraph=True, backend=compiler)


def _compile_covered(book: Book, query: Tensor) -> Callable[[], Answer]:
    """One fused pass for few queries, else a product first.

    The product stays outside: torch.compile would call the same library, and cannot trace this form
    of it in every version.
    """
    keys, radii = book.keys, book.radii
    case = "inductor" if keys.is_cuda else "eager", *keys.shape, keys.dtype, len(query)
    if len(query) <= FEW:
        direct = _for_a_gpu(_difference, *case)
        return lambda: direct(keys, radii, query)
    after = _for_a_gpu(_least, *case)
    return lambda: after(product(query, keys.T), keys, radii, book.norms, query)


COMPILED = Peer("torch.compile", "", "", _compile_covered)
ON_GPU = (
    Peer("cuBLAS keys @ query", "", "", _keys_query),
    Peer("cuBLAS query @ keys", "", "", _query_keys),
    Peer("cdist", "", "", _cdist_covered),
)
"""Those on a GPU, for keys of any type."""


def limit_threads(threads: int) -> None:
    """Give every library that is loaded the same number of threads."""
    torch.set_num_threads(threads)
    try:
        from threadpoolctl import threadpool_limits
    except ImportError:
        return
    threadpool_limits(threads)
