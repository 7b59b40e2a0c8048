"""Where the prompts of plain forwards end, as whoever scores a continuation behind them says."""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Sequence

import torch
from torch import Tensor

from .positions import last_column
from .torch_private import outside_graphs


class PromptEnds:
    """Say how many tokens of each row of a forward are its prompt.

    Args:
        lengths: `[B]`, the tokens of each row that are prompt, padding not counted; 0: none, so
            that the row goes unedited.
        prompts: in place of lengths, token ids of prompts: what each row begins with, the longest
            that there is. A row that begins with none of them goes unedited, with a warning.
    """

    def __init__(
        self,
        lengths: Sequence[int] | None = None,
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.lengths = lengths
        self._prompts = sorted({tuple(ids) for ids in prompts or ()})

    @outside_graphs(reason="inside editor.prompts(...) the host says where prompts end")
    def columns(self, mask: Tensor, ids: Tensor | None) -> Tensor:
        """Return `[B]` int64, the columns of `mask [B, L]` up to the ends of the prompts.

        Args:
            mask: bool, True at tokens.
            ids: `[B, L]`; needed where prompts were given.

        Raises:
            ValueError: no number for each row, one larger than the row, or no ids.
        """
        if self.lengths is None:
            lengths = self._found(mask, ids)
        else:
            lengths = [int(n) for n in self.lengths]
            if len(lengths) != len(mask):
                raise ValueError(
                    f"lengths must have one number per row ({len(mask)} here), got {len(lengths)}"
                )
            if lengths and not 0 <= min(lengths) <= max(lengths) <= mask.shape[1]:
                raise ValueError(f"lengths must be 0 to {mask.shape[1]} here, got {lengths}")
        wanted = torch.tensor(lengths, dtype=torch.int64, device=mask.device)
        return last_column(mask & (mask.cumsum(1) <= wanted[:, None])) + 1

    def _found(self, mask: Tensor, ids: Tensor | None) -> list[int]:
        if ids is None or ids.shape != mask.shape:
            raise ValueError("input_ids must be given inside editor.prompts(prompts), got none")
        rows = [
            tuple(row[there].tolist()) for row, there in zip(ids.cpu(), mask.cpu(), strict=True)
        ]
        lengths = [self._longest(row) for row in rows]
        missed = lengths.count(0)
        if missed:
            warnings.warn(
                f"{missed} of {len(rows)} rows begin with none of the prompts of "
                "editor.prompts(...) and go unedited",
                stacklevel=2,
            )
        return lengths

    def _longest(self, row: tuple[int, ...]) -> int:
        """Return the length of the longest prompt that `row` begins with, 0: there is none."""
        while row:
            # What row begins with stands before it, the longest last, but for prompts that part
            # from it later: their common beginning has the same answer.
            place = bisect_right(self._prompts, row)
            if place == 0:
                return 0
            last = self._prompts[place - 1]
            common = next(
                (n for n, (a, b) in enumerate(zip(last, row, strict=False)) if a != b),
                min(len(last), len(row)),
            )
            if common == len(last):
                return common
            row = row[:common]
        return 0
