"""Making every edit anew on a model whose dtype or device has changed."""

from __future__ import annotations

import logging

from .codebook.records import EditResult
from .config import GraceConfig
from .editing.asked import wanted_of
from .editing.making import EditMaker
from .families import Family
from .progress import bar

log = logging.getLogger("grace_edit")


def rekey(family: Family, config: GraceConfig, progress: bool) -> list[EditResult]:
    """Do what `GraceEditor.rekey` says: a second codebook is filled, and the first takes it over.

    Until then requests are answered by the first one.
    """
    with family.adaptor.codebook.changing():
        return _rekey(family, config, progress)


def _rekey(family: Family, config: GraceConfig, progress: bool) -> list[EditResult]:
    old = family.adaptor.codebook
    edits = [edit for edit in old.history if edit.live]
    without = [edit.whole for edit in old.live_keys if edit.prompt is None]
    if without:
        raise ValueError(f"cannot rekey: edits {without[:8]} have no stored prompt to run again")
    if old.frozen:
        raise ValueError(
            "cannot rekey a frozen codebook, whose keys captured graphs hold: frozen must be False"
        )
    if old.storage.journal.is_open:
        raise ValueError("cannot rekey inside a transaction: end it first")
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
