"""Compiled models under `query="text"`: ids are read outside of graphs, edits compile nothing."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from grace_edit import QueryPlan
from text_models import NEIGHBOUR, QUESTION, TARGET, text_editor, tokenizer
from tiny_models import generated
from torch._dynamo.utils import counters

WORDS = tokenizer()
ASKED, NEAR, ANSWER = (WORDS(text).input_ids for text in (QUESTION, NEIGHBOUR, TARGET))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def test_a_compiled_generate_with_a_static_cache_answers_edits_and_compiles_nothing_for_them(
    trained,
):
    editor = text_editor(trained("llama"), "llama", replace="all")
    config = tf.CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True  # otherwise generate compiles on accelerators alone
    how = {"cache_implementation": "static", "compile_config": config}
    plain = generated(editor.model, [ASKED, NEAR], 3, **how)
    assert counters["stats"]["unique_graphs"] == 1
    assert editor.edit(QUESTION, TARGET).success
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert generated(editor.model, [ASKED, NEAR], 3, **how) == [ANSWER, plain[1]]
        editor.undo()
        assert generated(editor.model, [ASKED, NEAR], 3, **how) == plain
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_forward_breaks_where_the_ids_are_read_and_not_with_a_plan(trained):
    editor = text_editor(trained("gpt2"), "gpt2")
    model, ids, near = editor.model, torch.tensor([ASKED]), torch.tensor([NEAR])
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        plain, other = compiled(ids).logits, compiled(near).logits
        assert editor.edit(QUESTION, TARGET).success
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert int(compiled(ids).logits[0, -1].argmax()) == ANSWER[0]
            assert torch.equal(compiled(near).logits, other)
        torch._dynamo.reset()
        whole = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"editor\.answers"):
            whole(ids)
        torch._dynamo.reset()
        row = torch.tensor([len(ASKED) - 1])
        plan = QueryPlan(row, row, row + 1, answers=editor.answers([QUESTION]))
        with editor.plan(plan):
            assert int(whole(ids).logits[0, -1].argmax()) == ANSWER[0]
            answers = editor.answers([NEIGHBOUR])
            plan.answers.index.copy_(answers.index)
            with torch._dynamo.config.patch(error_on_recompile=True):
                assert torch.equal(whole(ids).logits, plain)
