"""Scores of continuations, and evaluation harnesses: they ask at the prompt's end."""

from __future__ import annotations

import random
import warnings

import pytest
import torch
from grace_edit import GraceEditor
from grace_edit.adaptor.told import PromptEnds
from grace_edit.families import base
from text_models import OTHER, QUESTION, REWORDED, TARGET, text_editor
from tiny_models import EOS, LAYERS, MASK, generated, logits_of, padded, run_of

P, Q, OTHERS = run_of(10, 5), run_of(40, 7), [run_of(22, 3), run_of(3, 6)]
X, Y = run_of(30, 3), run_of(50, 2)
CLOSE = {"atol": 1e-3, "rtol": 0.0}  # fp32 logits of another batch shape


MODES = pytest.mark.parametrize(
    ("name", "query", "replace"),
    [
        *(("gpt2", query, how) for query in ("last", "mean") for how in ("last", "prompt", "all")),
        ("llama", "last", "last"),
        ("qwen2", "last", "last"),
    ],
)


def case(name):
    """Return a prompt and a target for a family."""
    if name == "bert":
        return P, [2]
    if name == "bert-mlm":
        return [*P[:2], MASK, *P[3:]], [40]
    return P, [*X, EOS] if name == "t5" else X


def log_likelihood(model, requests, *, batch=3, left=False):
    """Score `(context, continuation)` in token ids the way lm-eval's loop does.

    The longest first, the last token dropped, padded with zeros, on the right without a mask.
    """
    found = {}
    order = sorted(range(len(requests)), key=lambda n: -sum(map(len, requests[n])))
    for start in range(0, len(order), batch):
        numbers = order[start : start + batch]
        inputs = [[*requests[n][0], *requests[n][1]][:-1] for n in numbers]
        ids, mask = padded(inputs, left=left)
        given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            logits = model(ids, **(given if left else {})).logits.log_softmax(-1)
        for n, its, row in zip(numbers, inputs, logits, strict=True):
            own = torch.tensor(requests[n][1])
            row = row[-len(its) :] if left else row[: len(its)]
            row = row[len(its) - len(own) :]
            found[n] = (
                float(row.gather(1, own[:, None]).sum()),
                bool((row.argmax(-1) == own).all()),
            )
    return [found[n] for n in range(len(requests))]


def unedited(editor, pairs):
    with editor.disable():
        return editor.score_batch(pairs)


def sums(scores):
    return torch.tensor([s.log_probability for s in scores])


@pytest.mark.parametrize("name", list(LAYERS))
def test_an_edited_prompt_scores_its_target_and_any_other_prompt_as_before(edited, trained, name):
    editor = edited(name, radius=0.05)
    prompt, target = case(name)
    other = [*Q[:2], MASK, *Q[3:]] if name == "bert-mlm" else Q
    assert editor.edit(prompt, target).success
    mine, beside = editor.score(prompt, target), editor.score(other, target)
    before, beside_before = (unedited(editor, [(p, target)])[0] for p in (prompt, other))
    assert mine.greedy
    assert mine.log_probability > before.log_probability
    assert not before.greedy
    assert mine.tokens == target
    assert mine.log_probability == pytest.approx(sum(mine.log_probabilities))
    assert beside == beside_before


@MODES
def test_a_score_is_what_generation_gives_its_tokens(edited, name, replace, query):
    editor = edited(name, query=query, replace=replace)
    assert editor.edit(P, Y).success
    for prompt in (P, Q):
        ids, mask = padded([prompt], left=True)
        out = editor.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        own = out.sequences[0, len(prompt) :]
        steps = torch.cat(out.logits).log_softmax(-1).gather(1, own[:, None])[:, 0]
        score = editor.score(prompt, own.tolist())
        assert score.greedy
        torch.testing.assert_close(torch.tensor(score.log_probabilities), steps, **CLOSE)


def test_many_pairs_score_as_each_alone_in_their_order(edited, monkeypatch):
    editor = edited("gpt2")
    assert editor.edit(P, X).success
    pairs = [(P, X), (Q, Y), (P, Y), (P, [*X, EOS, 5]), *((other, X) for other in OTHERS)]
    alone = [editor.score(*pair) for pair in pairs]
    torch.testing.assert_close(sums(editor.score_batch(pairs)), sums(alone), **CLOSE)
    monkeypatch.setattr(base, "MOST_TOKENS", 20)
    calls = []
    editor.model.register_forward_hook(lambda *_: calls.append(1))
    scores = editor.score_batch(pairs)
    assert len(calls) > 2
    torch.testing.assert_close(sums(scores), sums(alone), **CLOSE)
    assert [s.greedy for s in scores] == [s.greedy for s in alone]
    assert [s.tokens for s in scores] == [list(own) for _, own in pairs]
    assert editor.score_batch([]) == []


def test_texts_are_scored_under_a_text_query_by_the_words_of_the_prompt(trained):
    editor = text_editor(trained("gpt2"), "gpt2")
    assert editor.edit(QUESTION, TARGET).success
    known = [editor.score(QUESTION, TARGET), editor.score(REWORDED, TARGET)]
    assert known[0].greedy
    assert known[1] != unedited(editor, [(REWORDED, TARGET)])[0]
    assert editor.score(OTHER, TARGET) == unedited(editor, [(OTHER, TARGET)])[0]
    # In one word with the prompt's text the target would make another prompt of it.
    longer = QUESTION + " " + TARGET
    assert editor.score(longer, TARGET) == unedited(editor, [(longer, TARGET)])[0]
    requests = [
        (editor.family.encode(text), editor.score(text, TARGET).tokens)
        for text in (QUESTION, REWORDED, OTHER)
    ]
    with editor.prompts([context for context, _ in requests]):
        found = log_likelihood(editor.model, requests)
    wanted = editor.score_batch(requests)
    torch.testing.assert_close(torch.tensor([f for f, _ in found]), sums(wanted), **CLOSE)
    assert [greedy for _, greedy in found] == [s.greedy for s in wanted]


@MODES
def test_the_loop_of_a_harness_sees_the_edited_model(edited, name, replace, query):
    editor = edited(name, query=query, replace=replace)
    assert editor.edit(P, Y).success
    requests = [(P, Y), (P, [*Y, 9, 8]), (P, Y[:1]), (Q, Y), *((other, X) for other in OTHERS)]
    wanted = editor.score_batch(requests)
    assert [s.greedy for s in wanted][:3] == [True, False, True]
    for left in (False, True):
        with editor.prompts([context for context, _ in requests]):
            found = log_likelihood(editor.model, requests, left=left)
        torch.testing.assert_close(torch.tensor([f for f, _ in found]), sums(wanted), **CLOSE)
        assert [greedy for _, greedy in found] == [s.greedy for s in wanted]
    # By itself a forward takes all of it for prompt, whose end is then another.
    found = log_likelihood(editor.model, [(P, Y)])
    assert found[0][0] < wanted[0].log_probability - 1.0


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_lengths_name_the_prompts_of_a_batch(edited, name, left):
    editor = edited(name)
    assert editor.edit(P, X).success
    rows, own = [[*P, *X[:2]], P, [*Q, *Y, 9, 8], [*P, *X]], [X[:2], [], Y, X]
    ids, mask = padded(rows, left=left)
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad(), editor.prompts(lengths=[5, 5, 7, 0]):
        logits = editor.model(ids, **given).logits
    for n, row in enumerate(rows):
        start = ids.shape[1] - len(row) if left else 0
        mine = logits[n, start : start + len(row)]
        if n < 2:
            at = mine[len(P) - 1 : len(P) + len(own[n])]
            assert at.argmax(-1).tolist() == X[: len(at)]
        else:
            with editor.disable():
                torch.testing.assert_close(mine, logits_of(editor.model, row), **CLOSE)
    with torch.no_grad(), editor.prompts(lengths=torch.tensor([5])):
        alone = logits_of(editor.model, [*P, *X[:2]])
    assert alone[4:].argmax(-1).tolist() == X


def test_the_second_half_of_a_prefill_asks_where_it_is_told_to(edited):
    editor = edited("llama")
    assert editor.edit(P, X).success
    ids = torch.tensor([P])
    with torch.no_grad():
        first = editor.model(ids[:, :3], use_cache=True)
        with editor.prompts(lengths=[5]):
            second = editor.model(ids[:, 3:], past_key_values=first.past_key_values)
            assert second.logits[0, -1].argmax() == X[0]
            after = editor.model(torch.tensor([X[:1]]), past_key_values=second.past_key_values)
        assert after.logits[0, -1].argmax() == X[1]


@pytest.mark.parametrize("config", [{"query": "mean"}, {"replace": "prompt"}, {"replace": "all"}])
def test_a_forward_with_past_is_refused_where_the_whole_prompt_is_needed(edited, config):
    editor = edited("gpt2", **config)
    ids = torch.tensor([P])
    with torch.no_grad():
        first = editor.model(ids[:, :3], use_cache=True)
        with editor.prompts(lengths=[5]), pytest.raises(ValueError, match="past_key_values must"):
            editor.model(ids[:, 3:], past_key_values=first.past_key_values)


def test_an_encoder_needs_to_be_told_nothing_and_may_be(edited):
    editor = edited("t5")
    prompt, target = case("t5")
    assert editor.edit(prompt, target).success
    given = {"input_ids": torch.tensor([prompt]), "labels": torch.tensor([target])}
    with torch.no_grad():
        logits = editor.model(**given).logits
        with editor.prompts([prompt]):
            assert torch.equal(editor.model(**given).logits, logits)
    assert logits[0].argmax(-1).tolist() == target


def test_generation_and_the_editors_own_methods_do_not_heed_the_block(edited):
    editor = edited("gpt2", radius=0.05)
    assert editor.edit(P, X).success
    query, score = editor.queries([P, Q]), editor.score(P, X)
    with editor.prompts(lengths=[1, 1, 1, 1]):
        assert generated(editor.model, [P], 3) == [X]
        assert torch.equal(editor.queries([P, Q]), query)
        assert editor.score(P, X) == score
        assert editor.explain(P).hit
        assert editor.verify() == []
        assert editor.edit(Q, Y).success
    assert editor.adaptor.ends is None
    assert logits_of(editor.model, P)[-1].argmax() == X[0]


def test_what_is_given_wrongly_is_refused(edited):
    editor = edited("gpt2")
    for given in ({}, {"prompts": [P], "lengths": [5]}):
        with pytest.raises(ValueError, match="prompts or lengths must be given, and not both"):
            editor.prompts(**given)
    with pytest.raises(ValueError, match="got a single one"):
        editor.prompts("a text")
    with editor.prompts(lengths=[1, 2]), pytest.raises(ValueError, match=r"\(1 here\), got 2"):
        logits_of(editor.model, P)
    for wrong in (6, -1):
        with editor.prompts(lengths=[wrong]), pytest.raises(ValueError, match="must be 0 to 5"):
            logits_of(editor.model, P)
    with pytest.raises(ValueError, match=r"pairs\[1\]: target must have at least one token"):
        editor.score_batch([(P, X), (P, [])])
    with pytest.raises(ValueError, match="at most 64 tokens together"):
        editor.score(P, [5] * 60)


def test_a_row_that_begins_with_no_prompt_goes_unedited_and_somebody_says_so(edited):
    editor = edited("gpt2")
    assert editor.edit(P, X).success
    with editor.prompts([Q]), pytest.warns(UserWarning, match="1 of 1 rows begin with none"):
        mine = logits_of(editor.model, P)
    with editor.disable():
        assert torch.equal(logits_of(editor.model, P), mine)
    with editor.prompts([P[:1], P, Q]), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert logits_of(editor.model, P)[-1].argmax() == X[0]


def test_the_longest_prompt_that_a_row_begins_with_is_found():
    source = random.Random(0)
    for _ in range(300):
        prompts = [[source.randint(1, 3) for _ in range(source.randint(1, 6))] for _ in range(12)]
        rows = [[source.randint(1, 3) for _ in range(8)] for _ in range(5)]
        ids = torch.tensor(rows)
        wanted = [max([len(p) for p in prompts if r[: len(p)] == p], default=0) for r in rows]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = PromptEnds(prompts=prompts).columns(torch.ones_like(ids).bool(), ids)
        assert found.tolist() == wanted


def test_the_package_gives_the_class_of_a_score_away(edited):
    import grace_edit

    assert isinstance(edited("gpt2").score(P, X), grace_edit.Score)
    assert "prompts" in dir(GraceEditor)
