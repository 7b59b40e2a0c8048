"""What the kernels stand beside: the same answer by way of cdist, a cuBLAS product, torch.compile.

A peer answers a lookup: index and distance of the nearest key where its radius covers the query,
-1 and +inf elsewhere. None of them is exact in general, since none certifies its winner; each is
compared with the right answer before it is timed, and shown as wrong where it differs. They are
given what a server could keep: the squared norms of the keys (+inf for a dead entry, of which cdist
is not told). A count on the device they do without.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .place import Tensors


@dataclass(frozen=True)
class Shelf:
    """A codebook, what a peer may precompute about it, and queries.

    `keys [N, D]`, `radii [N]`, `norms [N]` float32, `query [B, D]`, `values [N, V]`.
    """

    keys: Tensor
    radii: Tensor
    norms: Tensor
    query: Tensor
    values: Tensor

    @property
    def searched(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keys, radii, norms and query."""
        return self.keys, self.radii, self.norms, self.query

    @functools.cached_property
    def wide(self) -> Tensor:
        """The keys in float32, for peers that keep them so."""
        return self.keys.float()

    @staticmethod
    def of(keys: Tensor, radii: Tensor, query: Tensor, values: Tensor) -> Shelf:
        """Return a codebook with its norms, made in slices: a copy in float32 may not fit."""
        parts = [part.float().square().sum(dim=1) for part in keys.split(1 << 17)]
        norms = torch.cat(parts) if parts else radii.clone()
        return Shelf(keys, radii, norms.masked_fill(radii == -math.inf, math.inf), query, values)


Peer = Callable[[Shelf], Tensors]


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b` with a float32 result: a bf16 one would round distances to 8 bits."""
    if a.dtype == torch.float32:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _covered(radii: Tensor, index: Tensor, distance: Tensor) -> Tensors:
    hit = distance <= radii[index]
    return torch.where(hit, index, -1), torch.where(hit, distance, math.inf)


def _again(keys: Tensor, query: Tensor, index: Tensor) -> Tensor:
    """Return the distance to the winner, scored again in float64."""
    difference = query.double() - keys[index].double()
    return difference.square().sum(dim=1).float().sqrt()


def _after_keys_query(
    dots: Tensor, keys: Tensor, radii: Tensor, norms: Tensor, query: Tensor
) -> Tensors:
    index = (norms[:, None] - 2 * dots).min(dim=0).indices
    return _covered(radii, index, _again(keys, query, index))


def _after_query_keys(
    dots: Tensor, keys: Tensor, radii: Tensor, norms: Tensor, query: Tensor
) -> Tensors:
    index = (norms - 2 * dots).min(dim=1).indices
    return _covered(radii, index, _again(keys, query, index))


def _direct(keys: Tensor, radii: Tensor, norms: Tensor, query: Tensor) -> Tensors:
    """Differences, squared and summed in float32: for torch.compile, which fuses them."""
    difference = query.float()[None, :, :] - keys.float()[:, None, :]
    dead = torch.where(norms == math.inf, math.inf, 0.0)
    index = (difference.square().sum(dim=2) + dead[:, None]).min(dim=0).indices
    return _covered(radii, index, _again(keys, query, index))


def keys_query(shelf: Shelf) -> Tensors:
    """cuBLAS keys @ query with a float32 result, min, score again, gather."""
    return _after_keys_query(product(shelf.keys, shelf.query.T), *shelf.searched)


def query_keys(shelf: Shelf) -> Tensors:
    """The same product the other way round."""
    return _after_query_keys(product(shelf.query, shelf.keys.T), *shelf.searched)


def cdist(shelf: Shelf) -> Tensors:
    """The published code's way: torch.cdist(keys, query).min(0), all in float32."""
    found = torch.cdist(shelf.keys.float(), shelf.query.float()).min(dim=0)
    return _covered(shelf.radii, found.indices, found.values)


PEERS: dict[str, Peer] = {
    "cuBLAS keys @ query": keys_query,
    "cuBLAS query @ keys": query_keys,
    "cdist": cdist,
}


def _flash_kmeans(shelf: Shelf) -> Tensors:
    """flash-kmeans: the assignment step of its Euclidean k-means."""
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    x = shelf.query[None]
    found = euclid_assign_triton(
        x, shelf.keys[None], x.float().square().sum(dim=-1), c_sq=shelf.norms[None]
    )
    return _found(shelf, found[0])


def _fastkmeans(shelf: Shelf) -> Tensors:
    """fastkmeans: the assignment of one chunk."""
    from fastkmeans.triton_kernels import chunked_kmeans_kernel

    index = torch.empty(len(shelf.query), dtype=torch.int32, device=shelf.query.device)
    norms = shelf.query.float().square().sum(dim=1)
    chunked_kmeans_kernel(shelf.query, norms, shelf.keys, shelf.norms, index)
    return _found(shelf, index)


def _vector_quantize(shelf: Shelf) -> Tensors:
    """vector-quantize-pytorch: the distances of its Euclidean codebook, kept in float32."""
    from vector_quantize_pytorch.vector_quantize_pytorch import cdist as distances

    found = distances(shelf.query.float()[None], shelf.wide[None])[0]
    return _found(shelf, found.argmin(dim=1))


def _found(shelf: Shelf, index: Tensor) -> Tensors:
    """Return the answer of a peer that only names the nearest key."""
    index = index.long()
    return _covered(shelf.radii, index, _again(shelf.keys, shelf.query, index))


PACKAGES: dict[str, tuple[str, Peer]] = {
    "flash-kmeans": ("flash_kmeans", _flash_kmeans),
    "fastkmeans": ("fastkmeans", _fastkmeans),
    "vector-quantize-pytorch": ("vector_quantize_pytorch", _vector_quantize),
}
"""Peers that are packages of their own, with the module that says whether one is installed."""


def installed() -> dict[str, Peer]:
    """Return the packages that are here."""
    return {
        name: peer
        for name, (module, peer) in PACKAGES.items()
        if importlib.util.find_spec(module) is not None
    }


def compiled(batch: int, compiler: str) -> Peer:
    """Return the compiled peer for a batch: one fused pass for few queries, else a product first.

    The product stays outside: torch.compile would call the same library, and cannot trace this form
    of it in every version.
    """
    torch._dynamo.reset()
    options: dict[str, Any] = {"dynamic": False, "fullgraph": True, "backend": compiler}
    if batch <= 8:
        direct = torch.compile(_direct, **options)
        return lambda shelf: direct(*shelf.searched)
    after = torch.compile(_after_query_keys, **options)
    return lambda shelf: after(product(shelf.query, shelf.keys.T), *shelf.searched)


def writing(peer: Peer, hidden: Tensor, rows: Tensor) -> Peer:
    """Return a peer that also does what `adapt_` does: the value into a row of `hidden` each."""

    def written(shelf: Shelf) -> Tensors:
        index, distance = peer(shelf)
        value = shelf.values[index.clamp(min=0)]
        hidden[rows] = torch.where((index >= 0)[:, None], value, hidden[rows])
        return index, distance

    return written
