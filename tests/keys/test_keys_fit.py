"""What a map learns from facts, and what is made of the facts to learn from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from grace_edit.keys.augment import (
    Amounts,
    Fact,
    Wordings,
    augmented,
    is_question,
    probes,
)
from grace_edit.keys.fit import fit, measure, split
from grace_edit.keys.learning import Recipe, foreign_neighbours
from grace_edit.keys.practice import practice_facts, relations
from grace_edit.keys.text_keys import TextKeys
from grace_edit.keys.text_map import TextMap
from keys_lab import COMMON, made_map, small_world, table

RECIPE = Recipe(meaning_width=16, lexical_width=64, steps=80, lr=2e-2, role_steps=100, practice=0)


@pytest.fixture(scope="module")
def learned() -> TextMap:
    """Learned from two thirds of the small world's subjects."""
    return fit(_of(small_world(), learn=True), table(), COMMON, name="small world", recipe=RECIPE)


def _of(facts: list[Fact], *, learn: bool) -> list[Fact]:
    subjects = sorted({fact.subject for fact in facts})
    held = set(subjects[::4])
    return [fact for fact in facts if (fact.subject not in held) is learn]


def _shares(text_map: TextMap, radius: float = 1.0) -> dict[str, float]:
    world = small_world()
    keys = TextKeys(text_map, table())
    return measure(keys, _of(world, learn=False), None, Wordings(world)).shares(radius)


def test_a_learned_map_tells_apart_what_a_random_one_does_not(learned: TextMap) -> None:
    shares = _shares(learned)
    assert shares["rewordings"] > 0.8
    assert shares["questions"] > 0.7
    assert shares["others"] < 0.2
    assert shares["sentences of others"] < 0.2
    assert shares["neighbours"] < 0.1
    # The untrained map fires on as many others at the radius that reaches as many rewordings.
    random = made_map()
    world = _of(small_world(), learn=False)
    near = sorted(measure(TextKeys(random, table()), world).positives["rewordings"])
    reach = near[math.ceil(shares["rewordings"] * len(near)) - 1]
    assert _shares(random, reach)["others"] > 0.5


def test_a_map_says_what_it_learned_from_and_what_was_held_out(learned: TextMap) -> None:
    assert learned.radius == 1.0
    assert learned.dense.name == "small world"
    assert learned.trained["facts"] == len(_of(small_world(), learn=True))
    held_out = learned.trained["held out"]
    assert held_out["neighbours"] <= 0.01
    assert held_out["others"] <= 0.05
    assert set(held_out) == {
        *("rewordings", "questions", "lower case"),
        *("neighbours", "others", "sentences of others", "questions of others"),
    }


def test_the_same_facts_and_seed_give_the_same_map() -> None:
    facts = small_world(4)
    recipe = replace(RECIPE, steps=3)
    one, two = (fit(facts, table(), COMMON, recipe=recipe) for _ in range(2))
    assert one.fingerprint() == two.fingerprint()
    other = fit(facts, table(), COMMON, recipe=replace(recipe, seed=1))
    assert other.fingerprint() != one.fingerprint()


def test_few_facts_without_relations_teach_too() -> None:
    facts = [replace(fact, relation="", other_relations=()) for fact in small_world(3)]
    calls: list[tuple[int, int]] = []
    made = fit(
        facts,
        table(),
        COMMON,
        recipe=replace(RECIPE, steps=5),
        progress=lambda done, total: calls.append((done, total)),
    )
    assert made.width == 80
    assert calls[-1] == (15, 15)


def test_facts_that_teach_nothing_are_refused() -> None:
    bare = Fact("The capital of Norway is", "Norway")
    with pytest.raises(ValueError, match="facts must hold rewordings"):
        fit([bare], table(), COMMON)
    with pytest.raises(ValueError, match="facts must hold neighbours or others"):
        fit([replace(bare, rewordings=["Norway's capital is"])], table(), COMMON)
    lost = replace(bare, subject="Peru", rewordings=["x"], others=["y"])
    with pytest.raises(ValueError, match="facts must name subjects"):
        fit([lost, replace(lost, subject="Chad")], table(), COMMON)


def test_facts_are_split_by_subject_or_by_relation() -> None:
    facts = small_world(4)
    for by, of in (("subject", lambda f: f.subject), ("relation", lambda f: f.relation)):
        parts = split(facts, replace(RECIPE, by=by))
        assert sorted(n for part in parts for n in part) == list(range(len(facts)))
        names = [{of(facts[n]) for n in part} for part in parts]
        assert not names[0] & names[1]


def test_neighbours_that_name_an_edited_subject_are_no_negatives() -> None:
    facts = [
        Fact(
            "The capital of Norway is", "Norway", neighbours=("The capital of Peru is", "Chad is")
        ),
        Fact("The capital of Peru is", "Peru"),
    ]
    assert foreign_neighbours(facts) == ["Chad is"]


def test_only_the_own_key_counts_as_a_hit() -> None:
    keys = TextKeys(made_map(), table())
    facts = [
        Fact("The capital of Norway is", "Norway", ("The capital of Norway is",)),
        Fact(
            "The capital of Peru is", "Peru", ("The capital of Norway is",), others=("Who wrote",)
        ),
    ]
    found = measure(keys, facts)
    assert found.positives["rewordings"] == [0.0, math.inf]
    assert found.keys == 2
    assert found.shares(0.0) == {"rewordings": 0.5, "others": 0.0}
    both = found.joined(found)
    assert both.positives["rewordings"] == [0.0, math.inf] * 2


# What is made of the facts


def test_wordings_are_cut_where_the_subject_stands() -> None:
    facts = [
        Fact("The capital of Norway is", "Norway", ("It rained. Norway's capital is",),
             others=("Who rules Norway?",), relation="P36", other_relations=("P6",)),
        Fact("The capital of Peru is", "Peru"),
        Fact("Peru borders", "Peru", relation="P47"),
    ]  # fmt: skip
    wordings = Wordings(facts)
    assert wordings.relation(facts[1]) == "P36"
    assert "{}'s capital is" in wordings.sentences["P36"]
    assert wordings.questions["P6"] == ["Who rules {}?"]
    assert wordings.others("P36") == ["P6"]
    assert wordings.others("P47") == []


def test_relations_that_share_a_wording_are_never_told_apart() -> None:
    facts = [
        Fact("Oslo is located in", "Oslo", others=("Which continent is Oslo on?",
             "Who rules Oslo?"), relation="country", other_relations=("continent", "ruler")),
        Fact("Lima is located in", "Lima", relation="continent"),
    ]  # fmt: skip
    wordings = Wordings(facts)
    assert wordings.others("country") == ["ruler"]
    made = augmented(facts, Amounts(0, 2, 2, 0.0), 0, wordings)
    assert made[0].others[2:] == ["Who rules Oslo?"]


def test_what_another_fact_answers_is_no_other_question() -> None:
    norway = Fact(
        "The capital of Norway is", "Norway", ("Norway's capital is",),
        others=("Who rules Norway?", "Who sings in Norway?"),
        relation="capital", other_relations=("ruler", "singer"),
    )  # fmt: skip
    ruler = Fact("The ruler of Norway is", "Norway", relation="ruler")
    made = augmented([norway, ruler], Amounts(0, 0, 0, 0.0), 0)
    assert made[0].others == ["Who sings in Norway?"]
    found = measure(TextKeys(made_map(), table()), [norway, ruler], None, Wordings([norway, ruler]))
    assert len(found.negatives["others"]) == 1


def test_each_form_is_made_on_either_side() -> None:
    facts = small_world(6)
    wordings = Wordings(facts)
    made = augmented(facts, Amounts(questions=2), 0)
    fact = made[0]
    assert fact.prompt == facts[0].prompt
    assert any(is_question(text) for text in fact.rewordings)
    assert set(facts[0].rewordings) <= set(fact.rewordings)
    assert any(not is_question(text) for text in fact.others)
    for text in (*fact.rewordings, *fact.others):
        assert fact.subject.casefold() in text.casefold()
    assert augmented(facts, Amounts(questions=2), 0, wordings) == made
    assert augmented(facts, Amounts(questions=2), 1) != made
    # A subject's fact that is given twice is taken once.
    assert augmented([*facts, facts[0]], Amounts(questions=2), 0, wordings) == made


def test_what_is_made_asks_of_the_right_relation() -> None:
    facts = small_world(6)
    wordings = Wordings(facts)
    of = {wording: name for forms in (wordings.sentences, wordings.questions)
          for name, found in forms.items() for wording in found}  # fmt: skip

    def relation(text: str, subject: str) -> str:
        return of[text.replace(subject, "{}")]

    for fact in augmented(facts, Amounts(lower=0.0), 0):
        assert {relation(text, fact.subject) for text in fact.rewordings} == {fact.relation}
        assert fact.relation not in {relation(text, fact.subject) for text in fact.others}
    for kind, asked in probes(facts, wordings, 0).items():
        for fact in asked if kind != "lower case" else ():
            own = kind == "questions"
            for text in fact.rewordings if own else fact.others:
                assert (relation(text, fact.subject) == fact.relation) is own


def test_no_draw_depends_on_torch_s_own_generator() -> None:
    recipe = replace(RECIPE, steps=2)
    torch.manual_seed(1)
    one = fit(small_world(3), table(), COMMON, recipe=recipe).fingerprint()
    torch.manual_seed(2)
    assert fit(small_world(3), table(), COMMON, recipe=recipe).fingerprint() == one


# Facts to practise on


def test_wordings_for_practice_name_their_subject_once_and_no_relation_twice() -> None:
    found = relations()
    assert len(found) > 150
    for name, wordings in found.items():
        assert len(set(wordings)) == len(wordings) >= 3, name
        assert all(wording.count("{}") == 1 for wording in wordings), name


def test_facts_for_practice_keep_to_one_form_and_ask_another_relation_beside() -> None:
    facts = practice_facts(["Norway", "Marta Holm"], 2, 0)
    of: dict[str, set[str]] = {}
    for name, wordings in relations().items():
        for wording in wordings:
            of.setdefault(wording, set()).add(name)
    assert len(facts) == 2 * len(relations())
    for fact in facts:
        name = fact.relation.removeprefix("practice: ")
        same = [prompt.replace(fact.subject, "{}") for prompt in (fact.prompt, *fact.rewordings)]
        assert len(same) > 1
        assert len({is_question(prompt) for prompt in same}) == 1
        assert all(name in of[prompt] for prompt in same)
        assert all(name not in of[other.replace(fact.subject, "{}")] for other in fact.others)
    assert facts == practice_facts(["Norway", "Marta Holm"], 2, 0)
    assert facts != practice_facts(["Norway", "Marta Holm"], 2, 1)
    assert practice_facts([], 2, 0) == practice_facts(["Norway"], 0, 0) == []


def test_roles_and_map_learn_from_practice_too() -> None:
    facts, less = small_world(4), replace(RECIPE, steps=3, role_steps=10)
    more = replace(less, practice=1)
    roles = [fit(facts, table(), COMMON, recipe=recipe).roles for recipe in (less, more)]
    assert (roles[0].hidden != roles[1].hidden).any()
    made = [fit(facts, table(), COMMON, roles=roles[0], recipe=recipe) for recipe in (less, more)]
    assert (made[0].matrix != made[1].matrix).any()
    assert made[0].trained["facts"] == made[1].trained["facts"] == len(facts)


def test_the_radius_is_a_little_less_than_the_bounds_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    facts, recipe = small_world(4), replace(RECIPE, steps=3, role_steps=10)
    made = fit(facts, table(), COMMON, recipe=recipe)
    monkeypatch.setattr("grace_edit.keys.fit.MARGIN", 1.0)
    widest = fit(facts, table(), COMMON, recipe=recipe)
    assert made.meaning_length * 0.97 == pytest.approx(widest.meaning_length)
    assert made.lexical_length * 0.97 == pytest.approx(widest.lexical_length)
