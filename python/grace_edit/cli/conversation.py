"""A conversation with an edited model: turns, answers, corrections. Prints nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from ..codebook.records import EditResult
from ..editing.explanation import Explanation
from ..editor import GraceEditor
from ..keys.prompts import PromptReader

Hear = Callable[[str], None]


@dataclass
class Answer:
    """What the model said to a message, and what the codebook said of it.

    Args:
        text: the answer, without the space round it.
        why: which edit answered, or came nearest.
        stopped: somebody stopped it (Ctrl-C); `text` is what had been said.
        seconds: from the question to the last word.
    """

    text: str
    why: Explanation
    stopped: bool
    seconds: float


class Conversation:
    """Ask an edited model, turn by turn, and correct what it answers.

    Args:
        editor: of a model that generates, with its tokenizer.
        chat: put messages into the tokenizer's chat template, with the turns before them. Otherwise
            each message is a prompt by itself, which the model continues up to the end of a line.
        max_tokens: most tokens of an answer.
    """

    def __init__(self, editor: GraceEditor, *, chat: bool, max_tokens: int) -> None:
        self.editor, self.chat, self.max_tokens = editor, chat, max_tokens
        self.turns: list[dict[str, str]] = []
        self._reader = PromptReader(editor.tokenizer)
        self._saved = self._state()

    @property
    def question(self) -> str | None:
        """The last message, None before the first one."""
        return self.turns[-2]["content"] if self.turns else None

    def ask(self, message: str, hear: Hear) -> Answer:
        """Answer a message; `hear` gets the text piece by piece while it is made.

        Raises:
            ValueError: the message is longer than what the model has positions for.
        """
        turn = {"role": "user", "content": message}
        ids = self._ids([*self.turns, turn])
        while self.turns and len(ids) + self.max_tokens > self.editor.family.longest:
            del self.turns[:2]
            ids = self._ids([*self.turns, turn])
        start = time.perf_counter()
        why = self.editor.explain(ids)
        said, stopped = self._generate(ids, hear)
        answer = Answer(said.strip(), why, stopped, time.perf_counter() - start)
        self.turns += [turn, {"role": "assistant", "content": answer.text}]
        return answer

    def correct(self, right: str) -> EditResult:
        """Make the model answer the last message with `right`, by an edit.

        In a chat the edit is made on the message as the only turn, so that it does not depend on
        what was said before, and on the whole answer: the model stops after it.

        Raises:
            ValueError: no message yet, or `right` is empty.
        """
        question = self.question
        if question is None:
            raise ValueError("there is no answer yet that could be corrected")
        if not right.strip():
            raise ValueError("the right answer must not be empty")
        if self.chat:
            turn = [{"role": "user", "content": question}]
            return self.editor.edit(turn, right)
        joint = "" if question[-1:].isspace() or right[:1].isspace() else " "
        return self.editor.edit(question, joint + right)

    def ask_again(self, hear: Hear) -> Answer:
        """Answer the last message anew, after what stood before it."""
        message = self.turns[-2]["content"]
        del self.turns[-2:]
        return self.ask(message, hear)

    def explain_last(self) -> Explanation:
        """Say which edit answers the last message after what stood before it, by now."""
        return self.editor.explain(self._ids(self.turns[:-1]))

    def read(self, prompt: list[int]) -> str:
        """Return an edit's prompt as a person reads it: of a chat what its user said last."""
        return self._reader.text(prompt)

    @property
    def unsaved(self) -> bool:
        """Whether the edits differ from those that were last saved or loaded."""
        return self._state() != self._saved

    def mark_saved(self) -> None:
        """Remember the edits as they are now as the saved ones."""
        self._saved = self._state()

    def _state(self) -> list[tuple[int, str, Any]]:
        return [(edit.id, edit.state, edit.label) for edit in self.editor.codebook.history]

    def _ids(self, turns: Sequence[dict[str, str]]) -> list[int]:
        if not self.chat:
            return self.editor.family.encode(turns[-1]["content"])
        return self.editor.family.encode(self._tokens(self._rendered(turns, asks=True)))

    def _rendered(self, turns: Sequence[dict[str, str]], *, asks: bool) -> str:
        tokenizer = self.editor.tokenizer
        return str(
            tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=asks)
        )

    def _tokens(self, text: str) -> list[int]:
        return list(self.editor.tokenizer(text, add_special_tokens=False).input_ids)

    @torch.no_grad()
    def _generate(self, ids: list[int], hear: Hear) -> tuple[str, bool]:
        model: Any = self.editor.model
        heard = _Heard(self.editor.tokenizer, hear, one_line=not self.chat)
        room = self.editor.family.longest - len(ids)
        given = torch.tensor([ids], device=next(model.parameters()).device)
        stopped = False
        try:
            with self.editor.family.working():
                model.generate(
                    input_ids=given,
                    attention_mask=torch.ones_like(given),
                    max_new_tokens=max(1, min(self.max_tokens, room)),
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=self.editor.family.pad_id,
                    streamer=heard,
                    stopping_criteria=StoppingCriteriaList([_AtEndOfLine(heard)]),
                )
        except KeyboardInterrupt:
            stopped = True
        return heard.text, stopped


class _Heard(TextStreamer):
    """Hands the text of new tokens on; under `one_line` up to the end of the first line."""

    def __init__(self, tokenizer: Any, hear: Hear, *, one_line: bool) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self.ended = "", False
        self._hear, self._one_line = hear, one_line

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self.ended:
            return
        # An answer begins with its first word: the space before it belongs to the prompt.
        text = text if self.text else text.lstrip()
        if self._one_line and "\n" in text:
            text, self.ended = text.split("\n", 1)[0], True
        if text:
            self.text += text
            self._hear(text)


class _AtEndOfLine(StoppingCriteria):
    def __init__(self, heard: _Heard) -> None:
        self._heard = heard

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = torch.full((input_ids.shape[0],), self._heard.ended, dtype=torch.bool)
        return done.to(input_ids.device)
