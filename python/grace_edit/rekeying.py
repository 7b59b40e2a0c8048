"""Making every edit anew on a model whose dtype or device has changed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from contextlib import ExitStack

from .codebook.codebook import Codebook
from .codebook.records import EditResult
from .config import GraceConfig
from .editing.asked import wanted_of
from .editing.making import EditMaker
from .editing.verification import find_unproven
from .families import Family
from .progress import bar

log = logging.getLogger("grace_edit")


def rekey(layers: Sequence[tuple[Family, GraceConfig]], progress: bool) -> list[list[EditResult]]:
    """Do what `GraceEditor.rekey` says: a second codebook is filled, and the first takes it over.

    Until then requests are answered by the first one.

    Args:
        layers: those of a model that are edited, the lower ones first. Each is made anew with those
            below it in place, and at last all are proven together.
        progress: show a progress bar.

    Returns:
        The results for each layer.

    Raises:
        ValueError, RuntimeError: as `GraceEditor.rekey`; the codebooks are then as they were.
    """
    books = [family.adaptor.codebook for family, _ in layers]
    with books[0].changing():
        for book in books:  # before the first is taken over
            _check(book)
        before, results = [copy.copy(book) for book in books], []
        try:
            for number, (family, config) in enumerate(layers, 1):
                with ExitStack() as stack:
                    for above, _ in layers[number:]:
                        stack.enter_context(above.adaptor.using(absent=True))
                    results.append(_rekey(family, config, progress))
            for family, _ in layers if len(layers) > 1 else ():
                with family.working(), family.adaptor.as_served():
                    lost = find_unproven(family, family.adaptor.codebook.live_keys, progress)
                if lost:
                    raise RuntimeError(
                        f"edits {lost[:8]} of layer {family.layer} cannot be made anew: they do "
                        "not hold where those of other layers answer too"
                    )
        except BaseException:
            for book, old in list(zip(books, before, strict=True))[: len(results)]:
                book.take_over(old, "a rekeying that failed")
            raise
        return results


def _check(old: Codebook) -> None:
    """Raise where a codebook cannot be made anew."""
    without = [edit.whole for edit in old.live_keys if edit.prompt is None]
    if without:
        raise ValueError(f"cannot rekey: edits {without[:8]} have no stored prompt to run again")
    if old.frozen:
        raise ValueError(
            "cannot rekey a frozen codebook, whose keys captured graphs hold: frozen must be False"
        )
    if old.storage.journal.is_open:
        raise ValueError("cannot rekey inside a transaction: end it first")


def _rekey(family: Family, config: GraceConfig, progress: bool) -> list[EditResult]:
    old = family.adaptor.codebook
    edits = [edit for edit in old.history if edit.live]
    results = []
    with family.working():
        new = EditMaker(family, config).new_codebook(old.capacity)
        maker = EditMaker(family, config, new)
        for edit in bar(edits, "rekeying", progress):
            new.number_from(edit.id)  # ids stay
            value = old.values[edit.slot].to(new.values)
            result = maker.make(wanted_of(old, edit), value)
            if not result.success:
                raise RuntimeError(f"edit {edit.id} cannot be made anew: {result.reason}")
            results.append(result)
    lost = sorted({edit.id for edit in edits} - set(new.ids))
    if lost:
        raise RuntimeError(f"edits {lost[:8]} have the queries of others on the model as it is now")
    old.take_over(new, "the editor was rekeyed")
    log.info("rekey of %d edits", len(results))
    return results
