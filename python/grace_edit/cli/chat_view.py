"""What `grace chat` shows: text for a person, or one JSON object a line."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

from rich.padding import Padding

from ..terminal import facts, number, plain, progress, screen, table
from .output import print_json
from .show import text_facts


class View(ABC):
    """Shows what happens."""

    @abstractmethod
    def event(self, name: str, **data: Any) -> None:
        """Show an event; an answer's text has been heard already."""

    @abstractmethod
    def hear(self, text: str) -> None:
        """Show a piece of an answer."""

    @abstractmethod
    def echo(self, line: str) -> None:
        """Show a line that was read from a script."""

    @abstractmethod
    def help(self, commands: Mapping[str, tuple[str, str]]) -> None:
        """Show the commands with their arguments and what they do."""

    def busy(self, what: str) -> AbstractContextManager[Any]:
        """Show inside a `with` block that something takes a while."""
        return progress(what)


class JsonView(View):
    """One object a line on stdout, `{"event": name, ...}`; answers come whole."""

    def event(self, name: str, **data: Any) -> None:
        print_json({"event": name, **data})

    def hear(self, text: str) -> None:
        pass

    def echo(self, line: str) -> None:
        pass

    def help(self, commands: Mapping[str, tuple[str, str]]) -> None:
        self.event("help", commands=list(commands))


class TextView(View):
    """Lines of text on stdout; what the codebook says is dim."""

    def __init__(self) -> None:
        self._console = screen()

    def event(self, name: str, **data: Any) -> None:
        getattr(self, f"_{name}")(data)

    def hear(self, text: str) -> None:
        shown = "\n".join(map(plain, text.split("\n")))
        self._console.print(shown, end="", soft_wrap=True)

    def echo(self, line: str) -> None:
        self._console.print(f"> {plain(line)}", soft_wrap=True)

    def help(self, commands: Mapping[str, tuple[str, str]]) -> None:
        for name, (argument, what) in commands.items():
            self._console.print(f"  {f'{name} {argument}':16} {what}")
        self._dim("anything else is a message to the model; Ctrl-C stops an answer")

    def _dim(self, text: str) -> None:
        self._console.print(f"  {plain(text)}", style="dim", soft_wrap=True)

    def _ready(self, data: dict[str, Any]) -> None:
        how = "in its chat template" if data["chat"] else "plain prompts"
        self._dim(
            f"{data['model']}, {data['layer']}, query {data['query']}, {data['edits']} edits, {how}"
        )
        self._dim("/edit corrects the last answer, /help lists the rest")

    def _answer(self, data: dict[str, Any]) -> None:
        self._console.print(" (stopped)" if data["stopped"] else "")
        self._dim(_verdict(data))

    def _stopped(self, data: dict[str, Any]) -> None:
        self._console.print()
        self._dim("stopped; nothing was changed")

    def _error(self, data: dict[str, Any]) -> None:
        self._console.print(f"  {plain(data['message'])}", style="red", soft_wrap=True)

    def _edit(self, data: dict[str, Any]) -> None:
        cost = f"{data['steps']} steps, {data['seconds']:.1f} s"
        if not data["success"]:
            self._error({"message": f"refused: {data['reason']} ({cost})"})
            return
        note = f"; {data['reason']}" if data["reason"] else ""
        self._dim(f"edit {data['id']}: {cost}, {data['case']}; live edits {data['edits']}{note}")

    def _undo(self, data: dict[str, Any]) -> None:
        parts = [f"edit {i} is gone" for i in data["gone"]]
        parts += [f"edit {i} is back" for i in data["back"]]
        self._dim(", ".join(parts) or "undone")

    def _why(self, data: dict[str, Any]) -> None:
        self._dim(_verdict(data))
        if data["text"] is not None:
            self._console.print(
                Padding(facts(text_facts(data["text"])), (0, 0, 0, 2), expand=False)
            )
        if data["edit"] is None:
            return
        rows = [("nearest", data)]
        if "runner_up" in data:
            rows.append(("runner-up", data["runner_up"]))
        columns = ("", "edit", "its prompt", "its answer", "distance", "radius")
        self._console.print(
            table(
                columns,
                (
                    (
                        name,
                        near["edit"],
                        near["edit_prompt"],
                        near["edit_answer"],
                        number(near["distance"]),
                        number(near["radius"]),
                    )
                    for name, near in rows
                ),
            )
        )

    def _edits(self, data: dict[str, Any]) -> None:
        if not data["edits"]:
            self._dim("no edits")
            return
        columns = ("edit", "prompt", "answer", "radius")
        rows = [
            (row["id"], row["prompt"], row["answer"], number(row["radius"]))
            for row in data["edits"]
        ]
        self._console.print(table(columns, rows))

    def _delete(self, data: dict[str, Any]) -> None:
        self._dim(f"edit {data['edit']} is gone; live edits {data['edits']}")

    def _save(self, data: dict[str, Any]) -> None:
        self._dim(f"{data['edits']} edits saved in {data['directory']}")

    def _new(self, data: dict[str, Any]) -> None:
        self._dim("a new conversation")

    def _unsaved(self, data: dict[str, Any]) -> None:
        self._dim("the edits were not saved")


def _verdict(data: dict[str, Any]) -> str:
    if data["edit"] is None:
        return "no edit answers: there is none"
    far = f"distance {number(data['distance'])}, radius {number(data['radius'])}"
    if data["hit"]:
        return f'edit {data["edit"]} answers ("{data["edit_prompt"]}"): {far}'
    return f'no edit answers: the nearest is {data["edit"]} ("{data["edit_prompt"]}"), {far}'
