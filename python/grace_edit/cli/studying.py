"""A study of a directory of records, by one process or by two side by side."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from ..evaluation import EvaluationError, Options
from .models import load_model
from .output import quiet

_SHARES = (("edits", "scope", "baselines"), ("paper", "hallucination"))
"""Parts that two processes can do at once, of about the same cost: scope asks what edits found."""


@dataclass(frozen=True)
class Work:
    """What `grace eval` was asked to study.

    Args:
        folder: of the records.
        options: of the runs, `model` among them.
        beside: encoders whose scope is measured too.
        dtype, device: of the model.
    """

    folder: Path
    options: Options
    beside: tuple[str, ...]
    dtype: str | None
    device: str

    def load(self) -> tuple[Any, Any]:
        """Return the model and its tokenizer."""
        assert self.options.model is not None
        loaded = load_model(self.options.model, task="auto", dtype=self.dtype, device=self.device)
        return loaded.model, loaded.tokenizer

    def do(self, parts: Sequence[str], loaded: tuple[Any, Any]) -> dict[str, Any]:
        """Do some parts; returns all results that there are then."""
        from ..evaluation.study import Sizes, study

        options = self.options
        sizes = Sizes() if options.edits is None else Sizes(edits=options.edits)
        return study(
            self.folder,
            options.out,
            loaded,
            replace(options, edits=None),
            parts=parts,
            encoders=self.beside,
            sizes=sizes,
        )


def study_folder(work: Work, parts: str, jobs: int) -> dict[str, Any]:
    """Do the parts of a study, those of another process meanwhile where there are two.

    A causal model that says one token after the other keeps one core busy, not two.

    Args:
        parts: separated by commas; empty: all.
        jobs: 1 or 2 processes; two have half of the threads each, and a model each.

    Raises:
        EvaluationError: another number of processes.
        Exception: as `evaluation.study.study`. What the other process has finished is kept.
    """
    from ..evaluation.study import PARTS

    if jobs not in (1, 2):
        raise EvaluationError(f"jobs must be 1 or 2, got {jobs}")
    chosen = tuple(name.strip() for name in parts.split(",") if name.strip()) or PARTS
    others = tuple(part for part in chosen if part in _SHARES[1])
    own = tuple(part for part in chosen if part not in others)
    if jobs == 1 or not own or not others:
        return work.do(chosen, work.load())
    threads = torch.get_num_threads()
    mine, theirs = multiprocessing.Pipe(duplex=False)
    arguments = (work, others, max(1, threads // 2), theirs)
    other = multiprocessing.get_context("spawn").Process(target=_share, args=arguments, daemon=True)
    os.environ["TQDM_POSITION"] = "1"  # its progress bars stand below those of this process
    try:
        other.start()
    finally:
        del os.environ["TQDM_POSITION"]
    theirs.close()
    torch.set_num_threads(max(1, threads // 2))
    try:
        loaded = work.load()
        waiting = True  # for the other one
        for part in own:
            work.do((part,), loaded)
            if waiting and mine.poll():
                _outcome(mine, others)
                waiting = False
        if waiting:
            _outcome(mine, others)
        other.join()
    finally:
        other.kill()
        torch.set_num_threads(threads)
    return work.do((), loaded)


def _outcome(done: Connection, parts: tuple[str, ...]) -> None:
    """Wait until the other process has finished, and raise what it failed by."""
    try:
        failed = done.recv()
    except EOFError:
        failed = EvaluationError(f"the process that did {', '.join(parts)} was killed")
    if failed is not None:
        raise failed


def _share(work: Work, parts: tuple[str, ...], threads: int, done: Connection) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        with quiet():
            work.do(parts, work.load())
    except KeyboardInterrupt:  # of both processes; the other one says so
        pass
    except Exception as error:
        done.send(error)
    else:
        done.send(None)


def _end_with_parent() -> None:
    """End this process when the other one is gone, however it ended: nobody waits for it."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
