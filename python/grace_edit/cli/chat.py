"""`grace chat`: ask an edited model in a terminal and correct what it answers."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..codebook.records import UndoError
from ..editor import GraceEditor
from ..families import target_of
from .chat_view import JsonView, TextView, View
from .conversation import Conversation
from .opening import open_editor
from .output import CONFLICT, FAILED, NOT_FOUND, OK, USAGE, quiet

COMMANDS = {
    "/edit": ("[ANSWER]", "correct the last answer; without ANSWER it is asked for"),
    "/undo": ("", "take the last change of the edits back"),
    "/why": ("", "say which edit answered the last message, or came nearest, and how far it is"),
    "/edits": ("", "list the edits"),
    "/delete": ("N", "take edit N back"),
    "/save": ("[DIR]", "save the edits (DIR: where --codebook says, if left out)"),
    "/new": ("", "begin a new conversation; the edits stay"),
    "/help": ("", "this list"),
    "/quit": ("", "leave (as Ctrl-D does)"),
}


@dataclass
class Options:
    """What `grace chat` was told. In `settings` None is an option that was not given."""

    model: str | None
    codebook: Path | None
    plain: bool
    max_tokens: int
    dtype: str | None
    device: str
    as_json: bool
    settings: dict[str, Any] = field(default_factory=dict)


class Lines:
    """Messages from stdin: asked for in a terminal, else one a line."""

    def __init__(self) -> None:
        self.terminal = sys.stdin.isatty()
        if self.terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (input() edits lines with it)

    def read(self, prompt: str) -> str | None:
        """Return the next line, None at the end (Ctrl-D and Ctrl-C are one, too)."""
        try:
            if self.terminal:
                return input(prompt).strip()
            line = sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            return None
        return line.strip() if line else None


def run(options: Options) -> int:
    """Talk until the end of stdin or `/quit`; returns the exit code."""
    editor = open_editor(
        options.model, options.codebook, options.dtype, options.device, options.settings
    )
    view: View = JsonView() if options.as_json else TextView()
    chat = not options.plain and bool(getattr(editor.tokenizer, "chat_template", None))
    conversation = Conversation(editor, chat=chat, max_tokens=options.max_tokens)
    return Chat(conversation, view, Lines(), options.codebook).run()


class Chat:
    """The loop: one message or command a line.

    Args:
        conversation: with the model.
        view: where answers and events are shown.
        lines: where messages come from.
        place: where `/save` writes if it is told nothing.
    """

    def __init__(
        self, conversation: Conversation, view: View, lines: Lines, place: Path | None
    ) -> None:
        self.conversation, self.view, self.lines, self.place = conversation, view, lines, place
        self.code = OK
        self._instead: str | None = None  # a command, said where an answer was asked for
        self._commands: dict[str, Callable[[str], None]] = {
            "/edit": self._edit,
            "/undo": self._undo,
            "/why": self._why,
            "/edits": self._edits,
            "/delete": self._delete,
            "/save": self._save,
            "/new": self._new,
            "/help": lambda _: self.view.help(COMMANDS),
        }

    @property
    def _editor(self) -> GraceEditor:
        return self.conversation.editor

    def run(self) -> int:
        """Talk until the end; returns 0, or in a script the code of what went wrong first."""
        book, editor = self._editor.codebook, self._editor
        self.view.event(
            "ready",
            model=str(getattr(editor.model, "name_or_path", "")),
            layer=editor.layer,
            query=editor.adaptor.query,
            edits=book.edits,
            chat=self.conversation.chat,
        )
        while (line := self._next()) is not None:
            if not line:
                continue
            if not self.lines.terminal:
                self.view.echo(line)
            if line == "/quit":
                break
            self._take(line)
        self._leave()
        return OK if self.lines.terminal else self.code

    def _next(self) -> str | None:
        line, self._instead = self._instead, None
        return self.lines.read("> ") if line is None else line

    def _take(self, line: str) -> None:
        name, _, rest = line.partition(" ")
        try:
            if not name.startswith("/"):
                self._ask(line)
            elif name in self._commands:
                self._commands[name](rest.strip())
            else:
                self._wrong(f"{name} is no command; /help lists them", USAGE)
        except KeyboardInterrupt:
            self.view.event("stopped")
        except (ValueError, UndoError, OSError, FloatingPointError) as error:
            self._wrong(str(error), FAILED)
        except KeyError as error:
            self._wrong(str(error.args[0] if error.args else error), NOT_FOUND)

    def _wrong(self, message: str, code: int) -> None:
        self.code = self.code or code
        self.view.event("error", message=message)

    def _ask(self, message: str) -> None:
        with quiet():
            answer = self.conversation.ask(message, self.view.hear)
        self._answered(answer)

    def _answered(self, answer: Any) -> None:
        self.view.event(
            "answer",
            question=self.conversation.question,
            text=answer.text,
            stopped=answer.stopped,
            seconds=answer.seconds,
            **self._near(answer.why),
        )

    def _near(self, why: Any) -> dict[str, Any]:
        """Return which edit answers, or is nearest, and how far it is, as an event's fields."""
        near = {"hit": why.hit, "edit": why.edit_id, "distance": None, "radius": None}
        if why.edit_id is None:
            return {**near, "edit_prompt": None, "edit_answer": None}
        return {
            **near,
            "distance": why.distance,
            "radius": why.radius,
            "edit_prompt": self._prompt_of(why.edit_id),
            "edit_answer": why.label.strip(),
        }

    def _prompt_of(self, edit_id: int) -> str:
        ids = self._editor.codebook.edit(edit_id).prompt
        return "" if ids is None else self.conversation.read(list(ids))

    def _edit(self, right: str) -> None:
        if self.conversation.question is None:
            raise ValueError("there is no answer yet that could be corrected")
        if not right:
            asked = self.lines.read("right answer: ")
            if asked and (asked == "/quit" or asked.partition(" ")[0] in self._commands):
                self._instead = asked
                raise ValueError(f"nothing was corrected: got the command {asked} for an answer")
            if not asked:
                raise ValueError("nothing was corrected: there was no right answer")
            right = asked
            if not self.lines.terminal:
                self.view.echo(right)
        start = time.perf_counter()
        with quiet(), self.view.busy("editing"):
            result = self.conversation.correct(right)
        seconds = time.perf_counter() - start
        if not result.success:
            self.code = self.code or CONFLICT
        self.view.event(
            "edit",
            question=self.conversation.question,
            answer=right,
            seconds=seconds,
            **{**result.to_dict(), "edits": self._editor.codebook.edits},
        )
        if result.success:
            with quiet():
                answer = self.conversation.ask_again(self.view.hear)
            self._answered(answer)

    def _undo(self, _: str) -> None:
        before = self._live()
        self._editor.undo()
        after = self._live()
        self.view.event("undo", gone=sorted(before - after), back=sorted(after - before))

    def _live(self) -> set[int]:
        return {edit.id for edit in self._editor.codebook.history if edit.live}

    def _why(self, _: str) -> None:
        if self.conversation.question is None:
            raise ValueError("nothing has been asked yet")
        with quiet():
            why = self.conversation.explain_last()
        near: dict[str, Any] = {
            "question": self.conversation.question,
            **self._near(why),
            "text": None if why.text is None else asdict(why.text),
        }
        if why.runner_up is not None:
            other = why.runner_up
            near["runner_up"] = {
                "edit": other["edit_id"],
                "distance": other["distance"],
                "radius": other["radius"],
                "edit_prompt": self._prompt_of(other["edit_id"]),
                "edit_answer": other["label"].strip(),
            }
        self.view.event("why", **near)

    def _edits(self, _: str) -> None:
        family, book = self._editor.family, self._editor.codebook
        rows = [
            {
                "id": edit.id,
                "prompt": self._prompt_of(edit.id),
                "answer": family.show(target_of(edit.label)).strip(),
                "radius": float(book.radii[edit.slot]),
            }
            for edit in book.history
            if edit.live
        ]
        self.view.event("edits", edits=rows)

    def _delete(self, number: str) -> None:
        try:
            edit_id = int(number)
        except ValueError:
            raise ValueError(f"/delete must get the number of an edit, got {number!r}") from None
        self._editor.delete(edit_id)
        self.view.event("delete", edit=edit_id, edits=self._editor.codebook.edits)

    def _save(self, where: str) -> None:
        place = Path(where).expanduser() if where else self.place
        if place is None:
            raise ValueError("/save must get a directory: --codebook named none")
        if place != self.place and (place / "grace_config.json").exists():
            raise ValueError(f"{place} holds other edits: name a new directory")
        self._editor.save_pretrained(place)
        self.place = place
        self.conversation.mark_saved()
        self.view.event("save", directory=str(place), edits=self._editor.codebook.edits)

    def _new(self, _: str) -> None:
        self.conversation.turns.clear()
        self.view.event("new")

    def _leave(self) -> None:
        """Ask a person about edits that are not saved; tell a script."""
        if not self.conversation.unsaved:
            return
        if not self.lines.terminal:
            self.view.event("unsaved", edits=self._editor.codebook.edits)
            return
        where = f" in {self.place}" if self.place is not None else ""
        answer = (self.lines.read(f"\nsave the edits{where}? [y/N] ") or "").lower()
        if answer not in ("y", "yes"):
            return
        place = "" if self.place is not None else self.lines.read("directory: ")
        if place is None or not (place or self.place):
            self.view.event("unsaved", edits=self._editor.codebook.edits)
            return
        self._take(f"/save {place}")
