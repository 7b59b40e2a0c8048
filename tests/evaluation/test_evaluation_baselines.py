"""Each baseline on a small trained model: what it is meant to do, what it costs, its state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from counting import record, words
from grace_edit import GraceConfig
from grace_edit.evaluation import AskedModel, EditRecord, Grace, Method
from grace_edit.evaluation.baselines import Defer, Memory, Retrieval
from grace_edit.evaluation.finetuning import ElasticFineTuning, FineTuning, ReplayFineTuning
from tiny_models import LAYERS

Asked = Callable[[str], AskedModel]
LAYER = LAYERS["gpt2"]
STREAM = [record(i) for i in range(3)]

MAKERS: dict[str, Callable[[AskedModel], Method]] = {
    "ft": lambda asked: FineTuning(asked, LAYER),
    "ewc": lambda asked: ElasticFineTuning(asked, LAYER),
    "replay": lambda asked: ReplayFineTuning(asked, LAYER, frequency=2, epochs=1),
    "defer": lambda asked: Defer(asked, LAYER, lr=1e-2),
    "memory": lambda asked: Memory(asked, GraceConfig(layer=LAYER, radius=0.5)),
    "rag": lambda asked: Retrieval(asked, threshold=0.9),
    "paper": lambda asked: Grace(
        asked, GraceConfig(layer=LAYER, policy="paper", radius=0.5), name="paper"
    ),
}


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def told(method: Method, records: list[EditRecord]) -> list[Any]:
    """All that a method says about some records."""
    return [
        found
        for one in records
        for prompt in (one.prompt, *one.paraphrases, *(q.prompt for q in one.neighbours))
        for found in (method.look(prompt), *method.ask(prompt, one.target))
    ]


@pytest.mark.parametrize("name", [name for name in MAKERS if name not in ("rag", "paper")])
def test_a_baseline_takes_an_edit_and_gives_the_model_back(name: str, asked: Asked) -> None:
    model = asked("gpt2")
    before = weights_of(model.model)
    first = STREAM[0]
    own, _ = model.ask(first.prompt, first.target)
    method = MAKERS[name](model)
    made = method.edit(first)
    assert made.accepted
    assert (made.steps > 0) == (name != "memory")
    answer, forced = method.ask(first.prompt, first.target)
    assert answer.text == first.target != own.text
    assert forced is not None
    assert forced.predicted == forced.wanted
    with method.unedited():
        assert method.ask(first.prompt, first.target)[0] == own
    assert method.ask(first.prompt, first.target)[0].text == first.target
    method.close()
    assert model.ask(first.prompt, first.target)[0] == own
    after = weights_of(model.model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert all(p.grad is None for p in model.model.parameters())


@pytest.mark.parametrize("name", list(MAKERS))
def test_a_state_that_is_read_back_goes_on_to_the_bit(
    name: str, asked: Asked, tmp_path: Path
) -> None:
    whole = MAKERS[name](asked("gpt2"))
    assert whole.edit(STREAM[0]).accepted
    whole.save(tmp_path)
    resumed = MAKERS[name](asked("gpt2"))
    resumed.restore(tmp_path)
    assert told(resumed, STREAM[:1]) == told(whole, STREAM[:1])
    assert resumed.edit(STREAM[1]) == whole.edit(STREAM[1])
    assert told(resumed, STREAM[:2]) == told(whole, STREAM[:2])
    assert resumed.keys == whole.keys


def test_fine_tuning_trains_one_layer_until_the_target_leads(asked: Asked) -> None:
    model = asked("gpt2")
    before = weights_of(model.model)
    method = FineTuning(model, LAYER, steps=50)
    made = method.edit(STREAM[0])
    assert 0 < made.steps < 50
    changed = {
        key for key, value in weights_of(model.model).items() if not value.equal(before[key])
    }
    assert changed
    assert all(key.startswith(LAYER) for key in changed)
    assert method.edit(STREAM[0]).steps == 0  # it leads already
    assert method.look(STREAM[0].prompt) is None
    assert method.keys is None


def test_fine_tuning_wants_parameters_and_leaves_frozen_ones_frozen(asked: Asked) -> None:
    model = asked("gpt2")
    model.model.requires_grad_(False)
    method = FineTuning(model, LAYER)
    assert method.edit(STREAM[0]).steps > 0
    method.close()
    assert not any(p.requires_grad for p in model.model.parameters())
    with pytest.raises(ValueError, match=r"layer must have parameters to train, got none"):
        FineTuning(model, "transformer.h.1.mlp.act")


def test_elastic_weights_stay_where_earlier_edits_need_them(asked: Asked) -> None:
    def moved(strength: float) -> float:
        model = asked("gpt2")
        method = ElasticFineTuning(model, LAYER, strength=strength, lr=1e-3)
        method.edit(STREAM[0])
        method.edit(STREAM[1])
        pairs = zip(method.fisher, method.parameters.values(), method.anchor, strict=True)
        with torch.no_grad():
            return float(sum((f * (p - a).square()).sum() for f, p, a in pairs))

    free, bound = moved(0.0), moved(1e6)
    assert free > 0
    assert bound < free / 2


def test_the_fisher_matrix_is_the_mean_squared_gradient_of_the_last_edits(asked: Asked) -> None:
    model = asked("gpt2")
    method = ElasticFineTuning(model, LAYER, memory=2)
    method.past = [(one.prompt, one.target) for one in STREAM]
    method.steps = 0
    method._train((STREAM[0].prompt, STREAM[0].target))
    parameter = model.module(LAYER).c_proj.weight
    squares = []
    for one in STREAM[1:]:
        logits, wanted = model.training_logits(one.prompt, one.target)
        loss = torch.nn.functional.cross_entropy(logits, wanted)
        squares.append(torch.autograd.grad(loss, parameter)[0].square())
    at = list(method.parameters).index("c_proj.weight")
    torch.testing.assert_close(method.fisher[at], (squares[0] + squares[1]) / 2)


def test_replay_trains_the_last_edits_again_now_and_then(asked: Asked) -> None:
    method = ReplayFineTuning(asked("gpt2"), LAYER, frequency=2, memory=2, epochs=3)
    alone, again = method.edit(STREAM[0]), method.edit(STREAM[1])
    assert (alone.reason, again.reason) == ("", "replayed")
    assert again.steps >= 3 * 2
    plain = FineTuning(asked("gpt2"), LAYER)
    for one in STREAM[:2]:
        plain.edit(one)
    losses = [sum(m.ask(STREAM[0].prompt, STREAM[0].target)[1].losses) for m in (method, plain)]  # type: ignore[union-attr, arg-type]
    assert losses[0] < losses[1]


def test_defer_says_whether_its_gate_opens_and_leaves_the_rest_alone(asked: Asked) -> None:
    model = asked("gpt2")
    prompts = [one.prompt for one in STREAM] + [words(s, 5) for s in range(0, 60, 6)]
    own = {prompt: model.ask(prompt, words(0, 2))[0] for prompt in prompts}
    method = Defer(model, LAYER, lr=1e-2)
    assert not any(method.look(prompt).fires for prompt in prompts)  # type: ignore[union-attr]
    method.edit(STREAM[0])
    fires = {prompt: method.look(prompt).fires for prompt in prompts}  # type: ignore[union-attr]
    assert fires[STREAM[0].prompt]
    for prompt in prompts:
        if not fires[prompt]:
            assert method.ask(prompt, words(0, 2))[0] == own[prompt]


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_defer_and_fine_tuning_edit_encoders(name: str, asked: Asked) -> None:
    target = 2 if name == "bert" else words(40, 2)
    one = EditRecord("0", words(3, 5), target)
    for make in (FineTuning, Defer):
        model = asked(name)
        method = make(model, LAYERS[name], lr=1e-2)
        assert method.ask(one.prompt, target)[0].text != model.label(target)
        method.edit(one)
        assert method.ask(one.prompt, target)[0].text == model.label(target)
        method.close()


def test_memory_says_the_nearest_target_within_the_radius(asked: Asked) -> None:
    model = asked("gpt2")
    near = words(1, 5)
    config = GraceConfig(layer=LAYER, radius=0.5)
    method = Memory(model, config)
    for one in STREAM[:2]:
        method.edit(one)
    look = method.look(STREAM[1].prompt)
    assert look is not None
    assert (look.fires, look.label, look.distance) == (True, STREAM[1].target, 0)
    assert method.keys == 2
    far = method.look(near)
    assert far is not None
    assert far.distance is not None
    assert not far.fires
    own = model.ask(near, STREAM[0].target)
    assert method.ask(near, STREAM[0].target) == own
    # The same prompt a little nearer than the radius, which is inclusive.
    method.radius = far.distance
    assert method.look(near).fires  # type: ignore[union-attr]
    assert method.ask(near, None)[0].text == far.label
    # It is wrong about another target by its tokens, and likelihoods it has none.
    _, forced = method.ask(STREAM[1].prompt, STREAM[0].target)
    assert forced is not None
    assert forced.losses is None
    assert forced.predicted == model.wanted_ids(STREAM[1].prompt, STREAM[1].target)


class Reader:
    """A model that says back what it is asked."""

    family = "causal"

    def label(self, target: Any) -> str:
        return str(target).strip()

    def ask(self, prompt: str, target: Any, least: int) -> tuple[str, None]:
        return prompt, None


def test_rag_pastes_the_fact_that_is_most_like_the_last_sentence() -> None:
    method = Retrieval(Reader(), threshold=0.5)  # type: ignore[arg-type]
    for prompt, target in (
        ("The capital of Australia is", "Melbourne"),
        ("The capital of Austria is", "Graz"),
        ("Mice eat", "cats"),
    ):
        method.edit(EditRecord("", prompt, target))
    asked = "It rained. Australia has its capital in"
    assert method.ask(asked, "x")[0] == f"The capital of Australia is Melbourne. {asked}"
    look = method.look(asked)
    assert look is not None
    assert (look.fires, look.label) == (True, "Melbourne")
    # Only the last sentence counts, and what is like no fact goes unchanged.
    for other in ("The capital of Australia is large. Who sang?", "Who sang?"):
        assert method.ask(other, "x")[0] == other
        assert not method.look(other).fires  # type: ignore[union-attr]
    with method.unedited():
        assert method.ask(asked, "x")[0] == asked
    assert method.keys == 3


def test_rag_finds_what_the_memory_finds_where_it_has_one(asked: Asked, tmp_path: Path) -> None:
    model = asked("gpt2")
    config = GraceConfig(layer=LAYER, radius=0.5)
    method = Retrieval(model, memory=Memory(model, config))
    for one in STREAM[:2]:
        method.edit(one)
    look = method.look(STREAM[1].prompt)
    assert look is not None
    assert (look.fires, look.edits, look.label) == (True, (1,), STREAM[1].target)
    # By its words this one is like the second fact.
    near = method.look(STREAM[1].prompt + " w5")
    assert near is not None
    assert not near.fires
    pasted = f"{STREAM[1].prompt} {STREAM[1].target}. {STREAM[1].prompt}"
    assert method.ask(STREAM[1].prompt, "w9") == model.ask(pasted, "w9")
    method.save(tmp_path)
    method.close()
    again = Retrieval(model, memory=Memory(model, config))
    again.restore(tmp_path)
    assert again.look(STREAM[1].prompt) == look
    again.close()


def test_rag_reads_its_fact_and_wants_a_language_model(asked: Asked) -> None:
    model = asked("gpt2")
    method = Retrieval(model, threshold=0.9)
    method.edit(STREAM[0])
    pasted = f"{STREAM[0].prompt} {STREAM[0].target}. {STREAM[0].prompt}"
    assert method.ask(STREAM[0].prompt, "w9") == model.ask(pasted, "w9")
    with pytest.raises(ValueError, match="rag must be run on a language model"):
        Retrieval(asked("bert"))
