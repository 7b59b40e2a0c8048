"""The edits that an engine serves, brought up to what was saved or published since."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from ...adaptor.text_queries import TextQueries
from ...codebook import files, store
from ...codebook.files import StoreError
from ...codebook.replica import Replica
from ...config import GraceConfig
from ...serving import check_reading, text_of
from .checkpoint import Checkpoint, Unreadable
from .options import NotServed, Options

log = logging.getLogger("grace_edit")


class Described:
    """What a directory of saved edits says of the layer and of how it is asked.

    Args:
        directory: of saved edits, published or not.

    Raises:
        NotServed: the directory holds no edits that can be read, or of a kind that vLLM cannot ask
            for.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        try:
            saved = store.load_saved(directory)
            self.book, self.described, self.beside = saved.codebook, saved.config, saved.beside
            self.book.storage.slots.maintain_sketch()
            self.saved = saved
            self.layer: str = self.described["serving"]["layer"]
            self.query: str = self.described["serving"]["query"]
            self.replace: str = self.described["serving"]["replace"]
            self.model: dict[str, Any] = self.described["model"]
        except (StoreError, KeyError, TypeError) as error:
            raise NotServed(f"grace.codebook: {error}") from error
        if self.query not in ("last", "text"):
            raise NotServed(
                f"{directory}: query must be 'text' or 'last' in vLLM, which computes prompts in "
                f"chunks, got {self.query!r}"
            )
        if self.replace != "last":
            raise NotServed(
                f"{directory}: replace must be 'last' in vLLM, whose cache shares the other rows "
                f"of a prompt, got {self.replace!r}"
            )

    def check_dtype(self, dtype: torch.dtype, width: int) -> None:
        """Refuse a model of another dtype or width than the edits.

        Raises:
            NotServed: with what to do.
        """
        book = self.book
        asked = book.keys.dtype if self.query == "last" else dtype
        if book.values.dtype != dtype or asked != dtype:
            raise NotServed(
                f"{self.directory}: dtype must be that of the edits, got {dtype} for edits made in "
                f"{book.values.dtype}; start with --dtype {str(book.values.dtype)[6:]}"
            )
        key_width = book.keys.shape[1] if self.query == "last" else width
        if book.values.shape[1] != width or key_width != width:
            raise NotServed(
                f"{self.directory}: the layer must take and give {width} numbers a token, the "
                f"model's width, got edits of {key_width} and {book.values.shape[1]}"
            )


class SavedEdits:
    """Saved edits with what asks them, at the state of the last `refresh`.

    The codebook and its tensors stay the same ones, but where it outgrows its capacity.

    Args:
        config: a `VllmConfig`.
        options: the option `grace`.

    Attributes:
        book: the codebook, on the CPU.
        query: `"text"` or `"last"`.
        text: what makes its queries; None under `"last"`.

    Raises:
        NotServed: the edits are another model's, or cannot be read.
    """

    def __init__(self, config: Any, options: Options) -> None:
        self._config, self._options = config, options
        directory = Path(options.codebook)
        self._place = directory / files.CONFIG
        self._seen, self._told = self._look(), ""
        now = Described(options.codebook)
        now.check_dtype(config.model_config.dtype, config.model_config.get_hidden_size())
        self.book, self.query = now.book, now.query
        self._described = now.described
        self._replica = Replica(now.book, directory, now.saved, self._check)
        self._log_bytes = now.saved.end.offset
        try:
            checkpoint = Checkpoint(config)
            self._check_model(checkpoint, now)
        except Unreadable as error:
            self._unchecked(f"the model cannot be compared with that of the edits: {error}")
            checkpoint = None
        self.text = self._text(checkpoint, now)

    @property
    def version(self) -> int:
        """The version of whoever saved or published."""
        return self._replica.version

    def refresh(self) -> None:
        """Take what was saved or published since.

        Where nothing was it costs reading a file of a few kB, and a change that was published costs
        what it changed. What cannot be taken, as edits of another model or layer, or read, as the
        directory is gone, is logged as an error; what was there before is kept.
        """
        try:
            seen, size = self._look(), self._size_of_log()
            if seen == self._seen and size == self._log_bytes:
                self._told = ""
                return
        except NotServed as error:
            self._tell(error)
            return
        try:
            self._replica.poll()
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            self._tell(error)
            if isinstance(error, NotServed):  # until somebody saves again
                self._seen, self._log_bytes = seen, size
            return
        # Only what was read is not looked at again: what failed may go well the next time.
        self._seen, self._log_bytes = seen, self._replica.end.offset
        self._told = ""

    def _tell(self, error: Exception) -> None:
        if str(error) != self._told:
            self._told = str(error)
            log.error("saved edits are not served, those before them are: %s", self._told)

    def take_rows(self) -> set[int]:
        """Return the slots whose key, value or radius was written since the last call."""
        return self._replica.take_rows()

    def _check(self, config: dict[str, Any]) -> None:
        """Refuse what was saved of another model or layer since."""
        for name in ("serving", "model"):
            old, new = self._described[name], config.get(name) or {}
            if {**old, "source": ""} != {**new, "source": ""}:
                raise NotServed(
                    f"{self._options.codebook}: {name} must be as when the engine was started "
                    f"({old}), got {new}; start it again"
                )

    def _size_of_log(self) -> int:
        path = self._replica.log
        try:
            return os.stat(path).st_size
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise NotServed(f"{path}: cannot be read ({error.strerror})") from error

    def _look(self) -> bytes:
        # Not its times: two saves within a tick of the clock may leave them as they were.
        try:
            return self._place.read_bytes()
        except OSError as error:
            raise NotServed(f"{self._place}: cannot be read ({error.strerror})") from error

    def _check_model(self, checkpoint: Checkpoint, now: Described) -> None:
        prints = checkpoint.fingerprint(now.layer)
        wanted = now.model["fingerprint"]
        different = [part for part in ("below", "above") if prints[part] != wanted.get(part)]
        if different:
            raise NotServed(
                f"{now.directory}: edits of another model: the checkpoint differs "
                f"{' and '.join(different)} the layer {now.layer} (saved from "
                f"{now.model['class']}, got {checkpoint.model_class})"
            )

    def _unchecked(self, why: str) -> None:
        if not self._options.unchecked:
            raise NotServed(
                f"{self._options.codebook}: {why}; if it is the same model, say so: "
                '{"grace": {"codebook": ..., "unchecked": true}}'
            )
        log.warning("%s: %s; served unchecked, as asked", self._options.codebook, why)

    def _text(self, checkpoint: Checkpoint | None, now: Described) -> TextQueries | None:
        if now.query != "text":
            return None
        config, options = self._config.model_config, self._options
        asked = GraceConfig(
            **{
                **now.described["config"],
                **({} if options.encoder is None else {"encoder": options.encoder}),
            }
        )
        tokenizer = _tokenizer(config)
        saved = now.described["serving"]["text"]
        try:
            made = text_of(
                _Missing() if checkpoint is None else checkpoint,
                tokenizer,
                asked,
                saved,
                now.beside,
                now.directory,
            )
            check_reading(made, now.book, now.directory)
        except (StoreError, Unreadable, ValueError) as error:
            raise NotServed(str(error)) from error
        return made


class _Missing:
    def get_input_embeddings(self) -> Any:
        raise Unreadable(
            "edits with encoder='tokens' need the embeddings of the checkpoint, which cannot be "
            "read"
        )


def _tokenizer(config: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        config.tokenizer,
        revision=config.tokenizer_revision,
        trust_remote_code=config.trust_remote_code,
    )
