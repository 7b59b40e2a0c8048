"""Learning a text map from records of editing data: what `grace tune` does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..keys.augment import Fact
from ..keys.choice import shipped_maps
from ..keys.dense import SentenceEncoder, TokenTable
from ..keys.fit import fit, measure, nearest
from ..keys.learning import Recipe
from ..keys.text_keys import TextKeys
from .loading import load
from .records import EditRecord

_PROPERTIES = {
    "capital": "P36",
    "continent": "P30",
    "country": "P17",
    "country of citizenship": "P27",
    "country of origin": "P495",
    "developer": "P178",
    "employer": "P108",
    "field of work": "P101",
    "genre": "P136",
    "headquarters location": "P159",
    "instrument": "P1303",
    "language of work or name": "P407",
    "languages spoken, written or signed": "P1412",
    "located in the administrative territorial entity": "P131",
    "location": "P276",
    "location of formation": "P740",
    "manufacturer": "P176",
    "member of": "P463",
    "named after": "P138",
    "native language": "P103",
    "occupation": "P106",
    "official language": "P37",
    "original broadcaster": "P449",
    "original language of film or TV show": "P364",
    "owned by": "P127",
    "place of birth": "P19",
    "place of death": "P20",
    "position held": "P39",
    "position played on team / speciality": "P413",
    "record label": "P264",
    "religion": "P140",
    "religion or worldview": "P140",
    "sport": "P641",
    "twinned administrative body": "P190",
    "work location": "P937",
}
"""CounterFact names the relation of an edit by Wikidata's number, that of another question by
Wikidata's name for the same."""


def facts_of(records: Iterable[EditRecord]) -> list[Fact]:
    """Return what a map is learned from. Records that do not name their subject are left out."""
    facts = []
    for record in records:
        if record.subject and record.subject in record.prompt:
            names = [question.group for question in record.same_subject]
            numbered = record.relation[:1] == "P" and record.relation[1:].isdigit()
            facts.append(
                Fact(
                    prompt=record.prompt,
                    subject=record.subject,
                    rewordings=record.paraphrases,
                    neighbours=tuple(question.prompt for question in record.neighbours),
                    others=tuple(question.prompt for question in record.same_subject),
                    relation=record.relation,
                    other_relations=tuple(
                        _PROPERTIES.get(name, name) if numbered else "" for name in names
                    ),
                )
            )
    return facts


def tune(
    sources: Sequence[str | Path],
    out: str | Path,
    dense: TokenTable | SentenceEncoder,
    *,
    name: str = "",
    check: Sequence[str | Path] = (),
    recipe: Recipe | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Learn a text map from data sets and save it.

    Args:
        sources: files or names as `load` takes them, CounterFact's and KnowEdit's by choice.
        out: directory of the map.
        dense: `token_table(model, tokenizer)`, `load_encoder(path or id)` or a `SentenceEncoder`.
        name: of the dense part, for people.
        check: data sets that are measured with the map and never learned from.
        recipe: None: the defaults.
        progress: called with the steps done and the steps in all.

    Returns:
        What was learned from and measured: `"facts"`, `"sources"`, `"held out"` (shares within the
        radius by kind, on facts whose subjects the map that is measured never saw), `"check"` (the
        same per data set, of the map that is saved, and `"unrelated"`, the share of unrelated
        prompts that fire) and `"seconds"`.

    Raises:
        DataError: a data set cannot be read.
        ValueError: the data hold no rewordings or no negatives of named subjects.
    """
    started = time.perf_counter()
    loaded = [load(source) for source in sources]
    facts = [fact for one in loaded for fact in facts_of(one.records)]
    common = shipped_maps()[0].common
    made = fit(facts, dense, common, name=name, recipe=recipe, progress=progress)
    sources_said = {Path(one.source).name: one.sha256 for one in loaded}
    made = replace(made, trained={**made.trained, "sources": sources_said})
    made.save(out)
    keys = TextKeys(made, dense)
    return {
        **made.trained,
        "check": {Path(str(source)).name: measured_on(source, keys) for source in check},
        "seconds": round(time.perf_counter() - started, 1),
    }


def measured_on(source: str | Path, keys: TextKeys) -> dict[str, float]:
    """Return the shares within the radius by kind, of a data set as one codebook of edits.

    The first record of each subject is an edit.
    """
    records = {record.subject.casefold(): record for record in reversed(load(source).records)}
    facts = facts_of(reversed(records.values()))
    shares = measure(keys, facts).shares(keys.radius)
    unrelated = [q.prompt for record in records.values() for q in record.unrelated]
    if unrelated:
        book = torch.stack([keys.keys(fact.prompt)[0] for fact in facts])
        distances = nearest(keys, unrelated, book)[0]
        shares["unrelated"] = sum(d <= keys.radius for d in distances) / len(unrelated)
    return {kind: round(share, 4) for kind, share in shares.items()}
