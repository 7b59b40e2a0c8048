"""Making every edit anew on a model whose dtype or device has changed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .codebook.records import EditResult
from .editing.verification import target_of
from .progress import bar

if TYPE_CHECKING:
    from .editor import GraceEditor

log = logging.getLogger("grace_edit")


def rekey(editor: GraceEditor, progress: bool) -> list[EditResult]:
    """Do what `GraceEditor.rekey` says: a second codebook is filled and takes the first's place."""
    old = editor.codebook
    edits = editor._live()
    without = [edit.id for edit in edits if edit.prompt is None]
    if without:
        raise ValueError(f"edits must have a stored prompt, got none for {without[:8]}")
    if old.frozen:
        raise ValueError(
            "frozen must be False when an editor is rekeyed, got True: captured graphs hold the "
            "old keys"
        )
    results = []
    with editor._working():
        new = editor._new_codebook(old.capacity)
        with editor.adaptor.using(codebook=new):
            for edit in bar(edits, "rekeying", progress):
                new.number_from(edit.id)  # ids stay
                value = old.values[edit.slot].to(new.values)
                result = editor._edit(list(edit.prompt or ()), target_of(edit), value)
                if not result.success:
                    raise RuntimeError(f"edit {edit.id} cannot be made anew: {result.reason}")
                results.append(result)
    lost = sorted({edit.id for edit in edits} - set(new.ids))
    if lost:
        raise RuntimeError(f"edits {lost[:8]} have the queries of others on the model as it is now")
    new.succeed(old, "the editor was rekeyed")
    editor.adaptor.codebook = new
    log.info("rekey of %d edits", len(results))
    return results
