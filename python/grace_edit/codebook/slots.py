"""What lookups read: keys, values and radii, a slot per entry, in memory allocated ahead."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grace_kernels import Sketch, lookup, nearest

from .journal import Journal
from .records import CapacityError, TieError
from .sketch_upkeep import SketchUpkeep
from .tensors import resized, same_bits

_KEY_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_VECTORS = ("keys", "values")
_SAMPLE = 2048  # keys from which to guess how far the nearest is
_FILLS = {"keys": 0, "values": 0, "radii": -math.inf, "label_ids": -1}


class Slots:
    """C slots, of which `0..in_use-1` are in use; a free one among these is dead.

    Whatever is written goes through methods that note it in the journal first, and tell the sketch.
    Within the capacity the tensors stay where they are.

    Attributes:
        keys, values, radii: `[C, D]`, `[C, V]`, `[C]` float32, on one device. A slot that is free
            or not in use has radius -inf and, at the end of a change, holds zeros.
        label_ids: `[C]` int64, the number of each entry's label; -1: there is no entry.
        count: `in_use` as an int64 scalar on that device.
        frozen: growing raises CapacityError, and undoing keeps the capacity.
        untied: `nearest` raises TieError where the lowest slot would decide.
        sketch_upkeep: the sketch of the keys and what it has to be told.
    """

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        capacity: int,
        dtype: torch.dtype,
        value_dtype: torch.dtype,
        device: torch.device | str,
        journal: Journal,
    ) -> None:
        sizes = {"key_dim": key_dim, "value_dim": value_dim, "capacity": capacity}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if dtype not in _KEY_DTYPES:
            raise ValueError(f"dtype must be float32, float16 or bfloat16, got {dtype}")
        if not value_dtype.is_floating_point:
            raise ValueError(f"value_dtype must be a floating point type, got {value_dtype}")
        self.keys = torch.zeros(capacity, key_dim, dtype=dtype, device=device)
        self.values = torch.zeros(capacity, value_dim, dtype=value_dtype, device=device)
        self.radii = torch.full((capacity,), -math.inf, device=device)
        self.label_ids = torch.full((capacity,), -1, dtype=torch.int64, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.in_use = 0
        self.frozen = self.untied = False
        self.sketch_upkeep = SketchUpkeep.beside(self.keys)
        self._free: set[int] = set()
        self._journal = journal

    @property
    def capacity(self) -> int:
        """Number of slots allocated, C."""
        return len(self.radii)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.radii.device

    @property
    def sketch(self) -> Sketch | None:
        """What lookups take as `sketch`."""
        return self.sketch_upkeep.sketch

    @property
    def free(self) -> frozenset[int]:
        """The dead slots among those in use."""
        return frozenset(self._free)

    @property
    def live(self) -> int:
        """Number of slots that hold an entry."""
        return self.in_use - len(self._free)

    def key(self, slot: int) -> Tensor:
        """Return the key `[D]` of a slot."""
        return self.keys[slot]

    def radius(self, slot: int) -> float:
        """Return the radius of a slot; -inf: it is dead."""
        return self.radii[slot].item()

    def held(self, table: str, key: Any) -> Any:
        """Return what a place holds; see `journal.Part`."""
        if table in _VECTORS:
            vector = getattr(self, table)[key]
            return vector.clone() if vector.view(torch.uint8).any() else None  # None: zeros
        if table in _FILLS:
            return getattr(self, table)[key].item()
        if table == "free":
            return key in self._free
        return self.in_use if table == "in_use" else self.capacity

    def put_back(self, table: str, key: Any, old: Any) -> None:
        """Let a place hold what it held; see `journal.Part`."""
        if table in _FILLS:
            self._set(table, key, 0 if old is None else old)
        elif table == "free":
            (self._free.add if old else self._free.discard)(key)
        elif table == "in_use":
            self._set_in_use(old)
        elif not self.frozen:  # captured graphs must keep their memory
            self._resize(old)

    def write_key(self, slot: int, key: Tensor) -> None:
        """Write a key `[D]`, of any device."""
        self._write_vector("keys", slot, key)

    def write_value(self, slot: int, value: Tensor) -> None:
        """Write a value `[V]`, of any device."""
        self._write_vector("values", slot, value)

    def write_radius(self, slot: int, radius: float) -> None:
        """Write a radius; any but -inf makes the slot live for lookups."""
        self._journal.note(self, "radii", slot)
        self._set("radii", slot, radius)

    def write_label(self, slot: int, number: int) -> None:
        """Write the number of an entry's label."""
        self._journal.note(self, "label_ids", slot)
        self._set("label_ids", slot, number)

    def _write_vector(self, table: str, slot: int, vector: Tensor) -> None:
        vector = vector.to(self.device)
        if not same_bits(getattr(self, table)[slot], vector):
            self._journal.note(self, table, slot)
            self._set(table, slot, vector)

    def _set(self, table: str, slot: int, data: Tensor | float) -> None:
        # The one place where a slot of a codebook that may be in use is written.
        self.sketch_upkeep.touch(table, slot)
        getattr(self, table)[slot] = data

    def _set_in_use(self, number: int) -> None:
        self.in_use = number
        self.count.fill_(number)

    def take(self, slot: int | None = None) -> int:
        """Take a free slot for an entry: this one, else the lowest, else a new one.

        Raises:
            CapacityError: a new one is needed and the codebook is frozen and full.
        """
        if slot is None and self._free:
            slot = min(self._free)
        if slot is not None:
            self._journal.note(self, "free", slot)
            self._free.discard(slot)
            return slot
        slot = self.in_use
        if slot == self.capacity:
            if self.frozen:
                raise CapacityError(
                    f"cannot add an entry: the codebook is frozen and all its {slot} slots are in "
                    "use; thaw it, or attach with a larger capacity"
                )
            self.warn_of_new_memory(2 * slot)
            self._journal.note(self, "capacity")
            self._resize(2 * slot)
        self._journal.note(self, "in_use")
        self._set_in_use(slot + 1)
        return slot

    def release(self, slot: int) -> None:
        """Make a slot dead and free. Its key and value stay until they are overwritten."""
        self.write_radius(slot, -math.inf)
        self.write_label(slot, -1)
        self._journal.note(self, "free", slot)
        self._free.add(slot)

    def extend(self, in_use: int) -> None:
        """Let at least so many slots, of those allocated, be in use; added ones are free."""
        for slot in range(self.in_use, in_use):
            self._journal.note(self, "free", slot)
            self._free.add(slot)
        if in_use > self.in_use:
            self._journal.note(self, "in_use")
            self._set_in_use(in_use)

    def trim(self) -> None:
        """Let the slots in use end with a live one."""
        while self.in_use - 1 in self._free:
            self._journal.note(self, "free", self.in_use - 1)
            self._free.discard(self.in_use - 1)
            self._journal.note(self, "in_use")
            self._set_in_use(self.in_use - 1)

    def clear_free(self) -> None:
        """Write zeros over the keys and values of free slots."""
        for slot in self._free:
            self.clear(slot)

    def clear(self, slot: int) -> None:
        """Write zeros over the key and the value of a free slot."""
        self.write_key(slot, torch.zeros_like(self.keys[slot]))
        self.write_value(slot, torch.zeros_like(self.values[slot]))

    def warn_of_new_memory(self, capacity: int) -> None:
        """Warn, on CUDA, that another capacity means other memory."""
        if self.device.type == "cuda":
            warnings.warn(
                f"the codebook moves from {self.capacity} slots into new memory for {capacity}: "
                "CUDA graphs captured before must be captured again",
                stacklevel=4,
            )

    def _resize(self, capacity: int) -> None:
        grown = {name: resized(getattr(self, name), capacity, _FILLS[name]) for name in _FILLS}
        upkeep = self.sketch_upkeep.resized(grown["keys"])
        # All made before the first is replaced.
        vars(self).update(grown, sketch_upkeep=upkeep)

    def fill(self, keys: Tensor, values: Tensor, radii: Tensor) -> None:
        """Let the first slots of an empty codebook hold these, without a note in the journal."""
        count = len(radii)
        self.keys[:count], self.values[:count], self.radii[:count] = keys, values, radii
        self._set_in_use(count)

    def adopt(self, keys: Tensor, values: Tensor, radii: Tensor) -> None:
        """Let `keys` and `values` be the memory of an empty codebook, all of it, without a copy."""
        with torch.inference_mode(False):
            labels = torch.full((len(keys),), -1, dtype=torch.int64, device=keys.device)
            own = {"keys": keys.contiguous(), "values": values.contiguous(), "label_ids": labels}
            upkeep = SketchUpkeep.beside(own["keys"])
            vars(self).update(own, radii=radii.clone(), sketch_upkeep=upkeep)
        self._set_in_use(len(keys))

    @property
    def fills(self) -> dict[str, float]:
        """What free slots hold, by the name of each tensor with a row per slot."""
        return dict(_FILLS)

    def keep(self, rows: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return what puts back all that `overwrite` or `take_memory` will have replaced.

        Args:
            rows: by name of a tensor, the slots `[n]` that will be overwritten.
        """
        own = dict(vars(self))
        # On the host: a device may have no room for rows of three states.
        kept = {name: (at, getattr(self, name)[at].cpu()) for name, at in rows.items()}

        def put_back() -> None:
            vars(self).update(own)
            for name, (at, old) in kept.items():
                self.sketch_upkeep.touch_all(name, at.tolist())
                getattr(self, name)[at] = old.to(at.device)
            self._set_in_use(own["in_use"])
            self.tell_sketch()

        return put_back

    def overwrite(self, rows: dict[str, tuple[Tensor, Tensor]], other: Slots) -> None:
        """Hold what `other` does, in the tensors that are here, without a note in the journal.

        Args:
            rows: by name of a tensor, the slots `[n]` that differ and their rows, on the device.
            other: up to date with its sketch.
        """
        for name in _FILLS:
            at, new = rows[name]
            self.sketch_upkeep.touch_all(name, at.tolist())
            getattr(self, name)[at] = new
        self._free = set(other.free)
        self._set_in_use(other.in_use)
        self.sketch_upkeep.take(other.sketch_upkeep)

    def take_memory(self, other: Slots) -> None:
        """Hold what `other` does, not to be used any more, in its tensors, on the same device."""
        own = ("sketch_upkeep", "_free")
        vars(self).update({name: vars(other)[name] for name in (*_FILLS, *own)})
        self._set_in_use(other.in_use)

    def fill_labels(self, numbers: Sequence[int]) -> None:
        """Number the labels of all slots that were filled; -1: the slot is free."""
        if numbers:
            self.label_ids[: self.in_use] = torch.tensor(numbers, device=self.device)
        self._free = {slot for slot, number in enumerate(numbers) if number < 0}

    def nearest(self, query: Tensor, radii: Tensor | None = None) -> tuple[int, float]:
        """Return slot and distance of the entry nearest to `[D]`; -1 and +inf if there is none.

        Args:
            query: of any device.
            radii: `[in_use]`, to be read instead of the codebook's; -inf leaves an entry out.
        """
        count = self.in_use
        radii = self.radii[:count] if radii is None else radii
        asked = query.to(self.device)[None]
        slot, distance = self._nearest_by_sketch(asked, radii) or nearest(
            asked, self.keys[:count], radii
        )
        found = int(slot), distance.item()
        if self.untied and found[0] >= 0:
            others = radii.clone()
            others[found[0]] = -math.inf
            again = nearest(asked, self.keys[:count], others)
            if again[1].item() == found[1]:
                raise TieError
        return found

    def _nearest_by_sketch(self, query: Tensor, radii: Tensor) -> tuple[Tensor, Tensor] | None:
        """Find the same, where the sketch spares reading most keys: on a CPU; None elsewhere.

        The nearest of a few keys tells how far the nearest of all is at most. Were that the radius
        of all, the nearest would always answer.
        """
        sketch, count = self.sketch, len(radii)
        if sketch is None or not sketch.active or self.device.type != "cpu" or count < _SAMPLE:
            return None
        step = count // _SAMPLE
        reach = nearest(query, self.keys[:count:step], radii[::step])[1].item()
        if not math.isfinite(reach):
            return None
        reaches = torch.where(radii == -math.inf, -math.inf, reach)
        return lookup(query, self.keys[:count], reaches, sketch=sketch.within(reach))

    def nearest_two(self, query: Tensor) -> list[tuple[int, float]]:
        """Return slots and distances of the two entries nearest to `[D]`, of fewer if need be."""
        found: list[tuple[int, float]] = []
        radii = self.radii[: self.in_use].clone()
        for _ in range(2):
            slot, distance = self.nearest(query, radii)
            if slot >= 0:
                found.append((slot, distance))
                radii[slot] = -math.inf
        return found

    def nearest_of_other_label(
        self, query: Tensor, number: int, radii: Tensor | None = None
    ) -> float:
        """Return the distance of the nearest entry whose label has another number; else +inf."""
        radii = self.radii[: self.in_use] if radii is None else radii
        same = self.label_ids[: self.in_use] == number
        return self.nearest(query, radii.masked_fill(same, -math.inf))[1]

    def lookup(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Find the entries that answer `[B, D]`; see `grace_kernels.lookup`."""
        return lookup(query, self.keys, self.radii, self.in_use, sketch=self.sketch)

    def tell_sketch(self) -> None:
        """Let the sketch catch up with what was written, and be used again."""
        self.sketch_upkeep.tell(self.keys, self.radii, self.in_use)

    def maintain_sketch(self) -> None:
        """Let the sketch catch up at the end of a change, and fit it anew where that pays."""
        self.sketch_upkeep.maintain(self.keys, self.radii, self.in_use)

    def move_to(self, device: torch.device | str) -> None:
        """Move the tensors and the sketch."""
        with torch.inference_mode(False):
            moved = {name: getattr(self, name).to(device) for name in (*_FILLS, "count")}
            vars(self).update(moved, sketch_upkeep=self.sketch_upkeep.to(device))
