"""The demo's bundled data: sentences of eight topics, and facts."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from importlib import resources

TOPICS = ("arts", "finance", "food", "health", "science", "sport", "technology", "travel")


def read_table(name: str) -> list[dict[str, str]]:
    """Return the rows of a bundled tab-separated file."""
    text = (resources.files(__package__) / "data" / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))


@dataclass(frozen=True)
class Request:
    """One item of the stream: a sentence, the topic it is to be filed under, its cluster."""

    text: str
    topic: str
    cluster: int


@dataclass(frozen=True)
class Topics:
    """Three disjoint splits, and the held-out paraphrases of stream sentences."""

    train: list[tuple[str, str]]
    test: list[tuple[str, str]]
    stream: list[Request]
    held_out: list[Request]


def load_topics(seed: int = 0) -> Topics:
    """Read the splits and lay the stream out.

    The stream has a label shift in two steps, stated here and in the demo's output: sentences about
    wearables (fitness trackers, smart watches; upstream label "technology") are filed under
    "health" from the middle of the stream on, and all of them are filed again, under "sport", in
    its last part.
    """
    rows = read_table("topics_stream.tsv")
    order = random.Random(seed)

    def requests(kind: str, *, roles: tuple[str, ...], topic: str = "") -> list[Request]:
        found = [
            Request(row["text"], topic or row["topic"], int(row["cluster"]))
            for row in rows
            if row["subject"] == kind and row["role"] in roles
        ]
        order.shuffle(found)
        return found

    plain = requests("-", roles=("base", "paraphrase"))
    first = requests("wearables", roles=("base", "paraphrase"), topic="health")
    # One sentence of each cluster first comes in with the second step of the shift.
    late = {request.cluster: request for request in first}
    first = [request for request in first if late[request.cluster] is not request]
    again = requests("wearables", roles=("base", "paraphrase"), topic="sport")
    third = len(plain) // 3
    middle, end = plain[third : 2 * third] + first, plain[2 * third :] + again
    order.shuffle(middle)
    order.shuffle(end)
    held_out = requests("-", roles=("held_out",))
    held_out += requests("wearables", roles=("held_out",), topic="sport")
    return Topics(
        train=[(row["text"], row["topic"]) for row in read_table("topics_train.tsv")],
        test=[(row["text"], row["topic"]) for row in read_table("topics_test.tsv")],
        stream=plain[:third] + middle + end,
        held_out=held_out,
    )
