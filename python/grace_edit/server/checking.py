"""The rules of a request's body, which transformers' handlers take for kept."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

from fastapi import HTTPException
from transformers import PreTrainedTokenizerBase

Rule = tuple[Callable[[Any], bool], str]


def _number(low: float, high: float = math.inf, *, above: bool = False) -> Callable[[Any], bool]:
    def fits(given: Any) -> bool:
        if isinstance(given, bool) or not isinstance(given, (int, float)):
            return False
        return (low < given if above else low <= given) and given <= high and math.isfinite(given)

    return fits


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda given: type(given) is int and low <= given <= high


def _texts(given: Any) -> bool:
    several = isinstance(given, list) and given and all(isinstance(x, str) and x for x in given)
    return bool(several) or (isinstance(given, str) and given != "")


def _objects(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(item, dict) for item in given)


# Handed on by name: a template of the client's own would run here, for as long as it likes.
_TAKEN = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)


def _switches(given: Any) -> bool:
    single = (str, bool, int, float, type(None))
    return isinstance(given, dict) and all(
        name not in _TAKEN and isinstance(value, single) for name, value in given.items()
    )


_TOKENS: Rule = (_whole(1, 2**31), "a whole number of at least 1")
_RULES: dict[str, Rule] = {
    "model": (lambda given: isinstance(given, str), "a string"),
    "stream": (lambda given: isinstance(given, bool), "true or false"),
    "max_tokens": _TOKENS,
    "max_completion_tokens": _TOKENS,
    "max_output_tokens": _TOKENS,
    "temperature": (_number(0.0), "a number of at least 0"),
    "top_p": (_number(0.0, 1.0, above=True), "a number above 0, at most 1"),
    # transformers makes a repetition penalty of it, 1 more than it.
    "frequency_penalty": (_number(-1.0, 2.0, above=True), "a number above -1, at most 2"),
    "seed": (_whole(0, 2**63 - 1), "a whole number of at least 0"),
    "stop": (_texts, "a string that is not empty, or a list of such"),
    "suffix": (lambda given: isinstance(given, str), "a string"),
    "n": (lambda given: given == 1 and type(given) is int, "1"),
    "tools": (_objects, "a list of objects"),
    "chat_template_kwargs": (
        _switches,
        "an object of strings, numbers and booleans, without what apply_chat_template itself takes",
    ),
    "generation_config": (lambda given: False, "left out"),
    "logit_bias": (lambda given: False, "left out"),
}


def check_request(kind: str, body: dict[str, Any]) -> None:
    """Check a body.

    Args:
        kind: "chat", "completion" or "response".

    Raises:
        HTTPException: 400, with the rule.
    """
    for name, (fits, rule) in _RULES.items():
        given = body.get(name)
        if given is not None and not fits(given):
            raise broken(name, rule, given)
    if kind == "chat":
        check_messages(body.get("messages"))
    elif kind == "completion":
        prompt = body.get("prompt")
        if not isinstance(prompt, str) or not prompt:
            raise broken("prompt", "a string that is not empty", prompt)
    else:
        given = body.get("input")
        if not isinstance(given, (str, list)) or not given:
            raise broken("input", "a string or a list of messages, not empty", given)
        for number, item in enumerate(given if isinstance(given, list) else []):
            if not isinstance(item, dict) or "role" in item:
                _check_message(f"input[{number}]", item)


def check_messages(messages: Any) -> None:
    """Check the messages of a chat. Raises HTTPException 400 with the rule."""
    if not isinstance(messages, list) or not messages:
        raise broken("messages", "a list of at least one message", messages)
    for number, message in enumerate(messages):
        _check_message(f"messages[{number}]", message)


def _check_message(where: str, message: Any) -> None:
    if not isinstance(message, dict):
        raise broken(where, "an object", message)
    if not isinstance(message.get("role"), str):
        raise broken(f"{where}.role", "a string", message.get("role"))
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    rule = "text, or a list of text parts"
    if not isinstance(content, list):
        raise broken(f"{where}.content", rule, content)
    for part in content:
        # An image that the model cannot see must not be dropped in silence.
        text = isinstance(part, dict) and isinstance(part.get("text"), str)
        if not text or part.get("type") not in ("text", "input_text", "output_text"):
            raise broken(f"{where}.content", rule, part)


def broken(name: str, rule: str, given: Any) -> HTTPException:
    """Return the error that says which rule an argument breaks."""
    shown = repr(given)
    shown = shown if len(shown) <= 100 else f"{shown[:97]}..."
    return HTTPException(400, f"{name} must be {rule}, got {shown}")
