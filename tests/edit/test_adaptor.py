"""Plain forwards of an attached model: who asks, what is replaced, gradients, dtypes, plans."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from grace_edit import Codebook, GraceEditor, QueryPlan
from grace_edit.adaptor import forwards
from grace_edit.adaptor.adaptor import GraceAdaptor
from grace_edit.adaptor.positions import LatchedPlan, plan_queries
from grace_edit.adaptor.state import Generation, Latched
from tiny_models import CAUSAL, MASK, CountGrace, generated, logits_of, padded, run_of

PROMPT, TARGET = run_of(10, 4), run_of(30, 3)
OTHERS = [run_of(40, 6), run_of(3, 2), run_of(22, 9)]


def edit(editor: GraceEditor) -> GraceEditor:
    assert editor.edit(PROMPT, TARGET).success
    return editor


@torch.no_grad()
def run(model, rows, *, left, **kwargs):
    ids, mask = padded(rows, left=left)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return model(input_ids=ids, attention_mask=mask, position_ids=positions, **kwargs)


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
def test_in_a_padded_batch_the_edited_prompt_answers_and_the_others_keep_their_bits(
    edited, trained, name, left
):
    editor, plain = edit(edited(name)), trained(name)
    rows = [OTHERS[0], PROMPT, *OTHERS[1:]]
    got, base = run(editor.model, rows, left=left).logits, run(plain, rows, left=left).logits
    last = -1 if left else len(PROMPT) - 1
    assert got[1, last].argmax() == TARGET[0]
    assert base[1, last].argmax() == run_of(14, 1)[0]
    for b in (0, 2, 3):
        assert torch.equal(got[b], base[b])
    # Only the query's row is replaced: what comes before it is as it was.
    start = 0 if not left else got.shape[1] - len(PROMPT)
    assert torch.equal(got[1, start : start + 3], base[1, start : start + 3])


@pytest.mark.parametrize("name", CAUSAL)
def test_every_prompt_that_misses_gives_the_unedited_models_logits_bitwise(edited, trained, name):
    editor, plain = edit(edited(name)), trained(name)
    for start in range(0, 60, 5):
        row = run_of(start, 5)
        assert torch.equal(logits_of(editor.model, row), logits_of(plain, row))
    assert not torch.equal(logits_of(editor.model, PROMPT), logits_of(plain, PROMPT))


def test_the_rows_that_are_replaced_hold_the_value_and_no_others_do(edited):
    for replace, rows in (("last", [3]), ("prompt", range(4)), ("all", range(4))):
        editor = edit(edited("gpt2", replace=replace))
        layer = editor.model.get_submodule(editor.layer)
        seen = []
        handle = layer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        logits_of(editor.model, PROMPT)
        handle.remove()
        equal = [bool(torch.equal(row, editor.codebook.values[0])) for row in seen[0][0]]
        assert equal == [i in rows for i in range(4)], replace


def test_left_padding_without_positions_warns_once_per_adaptor_and_only_then(edited):
    editor = edit(edited("gpt2"))
    ids, mask = padded([OTHERS[0], PROMPT], left=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(editor.model, [OTHERS[0], PROMPT], left=True)
        editor.model(*padded([OTHERS[0], PROMPT], left=False)[:1])
    with pytest.warns(UserWarning, match="left padding without position_ids"):
        editor.model(input_ids=ids, attention_mask=mask)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editor.model(input_ids=ids, attention_mask=mask)
    with pytest.warns(UserWarning, match="left padding without position_ids"):
        edit(edited("gpt2")).model(input_ids=ids, attention_mask=mask)


def test_generate_of_a_left_padded_batch_does_not_warn(edited):
    editor = edit(edited("gpt2"))
    ids, mask = padded([OTHERS[0], PROMPT], left=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        editor.model.generate(ids, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert editor.adaptor.warned == set()


def test_a_forward_with_past_asks_nobody_but_inside_a_plan_it_does(edited):
    editor = edit(edited("llama"))
    model = editor.model
    whole = torch.tensor([PROMPT])
    with torch.no_grad():
        direct = model(whole).logits[0, -1]
        past = model(whole[:, :3], use_cache=True).past_key_values
        with CountGrace() as count:
            after = model(whole[:, 3:], past_key_values=past).logits[0, -1]
    assert count.calls.total() == 0
    assert after.argmax() == run_of(14, 1)[0]
    with torch.no_grad():
        past = model(whole[:, :3], use_cache=True).past_key_values
        plan = plan_queries(torch.ones(1, 4).bool(), replace="last", computed=3)
        with editor.plan(plan):
            planned = model(whole[:, 3:], past_key_values=past).logits[0, -1]
    assert direct.argmax() == planned.argmax() == TARGET[0]
    assert editor.adaptor.plan is None


def test_a_packed_batch_is_answered_at_the_rows_that_a_plan_names(edited, trained):
    editor = edit(edited("llama"))
    packed = [*OTHERS[1], *PROMPT, *OTHERS[0]]
    ids = torch.tensor([packed])
    positions = torch.tensor([[*range(2), *range(4), *range(6)]])
    ends = torch.tensor([1, 5, 11])
    plan = QueryPlan(ends, ends, ends + 1)
    # Without a mask and with positions that start anew, transformers keeps the pieces apart.
    with torch.no_grad(), editor.plan(plan):
        got = editor.model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    with torch.no_grad():
        base = trained("llama")(input_ids=ids, position_ids=positions, use_cache=False)
        base = base.logits[0]
    assert [int(got[i].argmax()) for i in ends] == [run_of(5, 1)[0], TARGET[0], run_of(46, 1)[0]]
    others = [i for i in range(12) if i != 5]
    assert torch.equal(got[others], base[others])


def test_a_mask_of_four_dimensions_is_refused_with_the_way_out(edited):
    editor = edit(edited("llama"))
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\].*editor.plan"):
        editor.model(input_ids=torch.tensor([PROMPT]), attention_mask=torch.zeros(1, 1, 4, 4))


def test_a_packed_batch_without_a_plan_is_refused_with_the_way_out(edited):
    editor = edit(edited("llama"))
    with pytest.raises(ValueError, match=r"cu_seq_lens_q must be None.*editor.plan"):
        editor.model(input_ids=torch.tensor([PROMPT]), cu_seq_lens_q=torch.tensor([0, 4]))


def test_a_packed_batch_told_by_its_positions_alone_is_refused_with_the_way_out(edited):
    editor = edit(edited("llama"))
    ids = torch.tensor([[*OTHERS[1], *PROMPT]])
    restarts = torch.tensor([[0, 1, 0, 1, 2, 3]])
    with pytest.raises(ValueError, match=r"position_ids without a mask must ascend.*editor.plan"):
        editor.model(input_ids=ids, position_ids=restarts, use_cache=False)
    # With a mask they are a padded row's, and ascending ones are a single sequence's.
    rising = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        editor.model(input_ids=ids, position_ids=restarts, attention_mask=torch.ones_like(ids))
        logits = editor.model(input_ids=torch.tensor([PROMPT]), position_ids=rising - 3).logits
    assert logits[0, -1].argmax() == TARGET[0]


def test_where_the_host_does_not_look_nobody_asks_in_a_packed_row(edited, trained, monkeypatch):
    editor, plain = edit(edited("llama")), trained("llama")
    monkeypatch.setattr(forwards, "_may_look", lambda *given: False)  # as later on a GPU
    ids = torch.tensor([[*OTHERS[1], *PROMPT], [*PROMPT[:2], *PROMPT]])
    ascending = torch.arange(6)[None]
    restarts = torch.tensor([[0, 1, 0, 1, 2, 3]])
    with torch.no_grad():
        for given in (restarts, restarts.expand(2, 6)):
            got = editor.model(input_ids=ids, position_ids=given, use_cache=False).logits
            base = plain(input_ids=ids, position_ids=given, use_cache=False).logits
            assert base[0, -1].argmax() == run_of(14, 1)[0]  # the edit's own prompt
            assert torch.equal(got, base)
        mixed = torch.tensor([[0, 1, 2, 3], [0, 1, 0, 1]])
        ids = torch.tensor([PROMPT, PROMPT])
        got = editor.model(input_ids=ids, position_ids=mixed, use_cache=False).logits
        assert got[0, -1].argmax() == TARGET[0]
        base = plain(input_ids=ids, position_ids=mixed, use_cache=False).logits
        assert torch.equal(got[1], base[1])
        got = editor.model(input_ids=ids, position_ids=ascending[:, :4], use_cache=False).logits
        assert got[:, -1].argmax(dim=-1).tolist() == [TARGET[0]] * 2


def test_latched_answers_are_written_in_the_layers_dtype():
    adaptor = GraceAdaptor(Codebook(2, 3), query="last", replace="all")
    latched = Latched(torch.tensor([0, -1]), torch.full((2, 3), 1.5))
    state = Generation(prompt_len=4, latched=latched, answered=True)
    hidden = torch.zeros(2, 1, 3, dtype=torch.bfloat16)
    with adaptor.using(generation=state, plan=LatchedPlan(2)):
        got = adaptor(torch.zeros(2, 1, 2, dtype=torch.bfloat16), hidden)
    assert got.dtype == torch.bfloat16
    assert got[:, 0].tolist() == [[1.5] * 3, [0.0] * 3]


def test_disable_covers_every_thread_until_the_last_of_overlapping_blocks_ends(edited):
    editor = edit(edited("gpt2"))
    first_in, second_in, first_out, looked = (threading.Event() for _ in range(4))
    seen = {}

    def look(name):
        seen[name] = (
            int(logits_of(editor.model, PROMPT)[-1].argmax()),
            generated(editor.model, [PROMPT], 3)[0][0],
        )

    def first():
        with editor.disable():
            first_in.set()
            second_in.wait(300)
            look("first")
        first_out.set()

    def second():
        first_in.wait(300)
        with editor.disable(), editor.disable():
            second_in.set()
            first_out.wait(300)
            look("second")
            looked.wait(300)

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    first_out.wait(300)
    look("outside")
    looked.set()
    for thread in threads:
        thread.join()
    plain = run_of(14, 1)[0]
    assert seen == dict.fromkeys(("first", "second", "outside"), (plain, plain))
    look("after")
    assert seen["after"] == (TARGET[0], TARGET[0])


def test_disable_covers_a_generation_that_a_streamer_starts_in_a_thread(edited):
    editor = edit(edited("llama"))
    plain, ended = run_of(14, 3), []

    def stream():
        ended.append(generated(editor.model, [PROMPT], 3))

    with editor.disable():
        thread = threading.Thread(target=stream)
        thread.start()
        thread.join()
    stream()
    assert ended == [[plain], [TARGET]]


def test_disable_of_one_thread_leaves_the_others_as_they_are(edited):
    editor = edit(edited("gpt2"))
    answers = {}

    def look(name):
        answers[name] = int(logits_of(editor.model, PROMPT)[-1].argmax())

    with editor.disable(thread_only=True):
        look("here")
        other = threading.Thread(target=look, args=["there"])
        other.start()
        other.join()
    look("after")
    assert answers == {"here": run_of(14, 1)[0], "there": TARGET[0], "after": TARGET[0]}


@pytest.mark.parametrize("replace", ["last", "all"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_generation_that_has_begun_ends_as_it_began_when_the_edits_are_disabled(
    edited, replace, use_cache
):
    editor = edit(edited("llama", replace=replace))
    begun, go, got = threading.Event(), threading.Event(), []

    def stop(module, args, kwargs):
        if threading.current_thread() is thread and not begun.is_set():
            begun.set()
            go.wait(300)

    def work():
        got.extend(generated(editor.model, [PROMPT], 3, use_cache=use_cache))

    expected = generated(editor.model, [PROMPT], 3, use_cache=use_cache)
    thread = threading.Thread(target=work)
    handle = editor.model.register_forward_pre_hook(stop, with_kwargs=True)
    thread.start()
    begun.wait(300)
    with editor.disable():
        go.set()
        thread.join()
        assert generated(editor.model, [PROMPT], 3, use_cache=use_cache) == [run_of(14, 3)]
    handle.remove()
    assert got == expected == [TARGET]


def test_a_copy_of_a_model_whose_edits_are_disabled_has_them(edited):
    editor = edit(edited("gpt2"))
    with editor.disable():
        twin = copy.deepcopy(editor.model)
    assert logits_of(twin, PROMPT)[-1].argmax() == TARGET[0]


def test_an_edit_is_made_and_proven_while_edits_are_disabled(edited):
    editor = edited("gpt2")
    with editor.disable():
        assert editor.edit(PROMPT, TARGET).success
        assert editor.verify() == []
        assert generated(editor.model, [PROMPT], 3) == [run_of(14, 3)]
    assert generated(editor.model, [PROMPT], 3) == [TARGET]


def test_a_thread_that_serves_while_the_codebook_grows_never_sees_a_half_made_entry():
    book = Codebook(8, 8, capacity=1, radius=0.25)
    adaptor = GraceAdaptor(book, query="last", replace="last")
    keys = torch.arange(64.0)[:, None].expand(-1, 8).contiguous()
    values = -1.0 - keys
    rows = torch.arange(64)
    plan = QueryPlan(rows, rows, rows + 1)
    wrong, done = [], threading.Event()

    def serve():
        try:
            with adaptor.using(plan=plan), torch.no_grad():
                while not done.is_set():
                    out = adaptor(keys, torch.full((64, 8), 7.0))
                    good = (out == 7.0).all(1) | (out == values).all(1)
                    wrong.extend(out[~good].tolist())
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        for i in range(64):
            book.insert(keys[i], [i], values[i])
        for _ in range(64):
            book.undo()
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    for i in range(64):
        book.insert(keys[i], [i], values[i])
    with adaptor.using(plan=plan):
        assert torch.equal(adaptor(keys, torch.zeros(64, 8)), values)
    assert book.capacity == 64


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_growth_past_the_capacity_warns_where_graphs_could_have_been_captured(device):
    book = Codebook(2, 2, capacity=2, device=device)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for i in range(4):
            book.insert(torch.full((2,), 9.0 * i), [i], torch.zeros(2))
    told = [w for w in warned if "must be captured again" in str(w.message)]
    assert len(told) == (device == "cuda")
    assert book.capacity == 4


def test_threads_serve_at_the_same_time_and_while_another_one_edits(edited):
    editor = edit(edited("llama"))
    torch._dynamo.reset()
    compiled = torch.compile(editor.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        compiled(input_ids=torch.tensor([PROMPT]), use_cache=False)
    wrong = []

    def serve(row, expected):
        for _ in range(8):
            if generated(editor.model, [row], 3) != [expected]:
                wrong.append((row, "generate"))
            with torch.no_grad():
                logits = compiled(input_ids=torch.tensor([row]), use_cache=False).logits
            if int(logits[0, -1].argmax()) != expected[0]:
                wrong.append((row, "compiled"))

    def guarded(row, expected):
        try:
            serve(row, expected)
        except Exception as error:
            wrong.append((row, repr(error)))

    work = [(PROMPT, TARGET), (OTHERS[0], run_of(46, 3)), (OTHERS[2], run_of(31, 3))]
    threads = [threading.Thread(target=guarded, args=args) for args in work]
    for thread in threads:
        thread.start()
    for start in (3, 15, 50):
        assert editor.edit(run_of(start, 7), TARGET).success
    for thread in threads:
        thread.join()
    assert wrong == []
    torch._dynamo.reset()


def test_labels_and_hidden_states_and_tuples_come_as_from_the_unedited_model(edited, trained):
    editor, plain = edit(edited("gpt2")), trained("gpt2")
    ids = torch.tensor([OTHERS[0]])
    with torch.no_grad():
        got = editor.model(input_ids=ids, labels=ids, output_hidden_states=True)
        base = plain(input_ids=ids, labels=ids, output_hidden_states=True)
        assert torch.equal(got.loss, base.loss)
        assert all(map(torch.equal, got.hidden_states, base.hidden_states))
        asked = torch.tensor([PROMPT])
        loss = editor.model(input_ids=asked, labels=asked).loss
        pair = editor.model(asked, return_dict=False)
    assert torch.isfinite(loss)
    assert isinstance(pair, tuple)
    assert pair[0][0, -1].argmax() == TARGET[0]


def test_inference_mode_and_embeddings_and_positional_ids_are_answered(edited):
    editor = edit(edited("llama"))
    ids = torch.tensor([PROMPT])
    embeds = editor.model.get_input_embeddings()(ids).detach()
    with torch.inference_mode():
        assert editor.model(ids).logits[0, -1].argmax() == TARGET[0]
        assert editor.model(inputs_embeds=embeds).logits[0, -1].argmax() == TARGET[0]
        assert editor.model(ids, torch.ones_like(ids)).logits[0, -1].argmax() == TARGET[0]


def gradients(model, rows, **kwargs):
    ids, mask = padded(rows, left=False)
    model.zero_grad(set_to_none=True)
    model(input_ids=ids, attention_mask=mask, labels=ids, **kwargs).loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def test_training_an_attached_model_gives_the_plain_models_gradients_where_nothing_is_edited(
    edited, trained
):
    editor, plain = edit(edited("gpt2")), trained("gpt2")
    editor.model.train()
    plain.train()
    for module in [*editor.model.modules(), *plain.modules()]:
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    got, base = gradients(editor.model, OTHERS), gradients(plain, OTHERS)
    assert got.keys() == base.keys()
    assert all(torch.equal(got[n], base[n]) for n in base)


def test_the_gradient_stops_at_a_replaced_row_and_flows_round_it(edited):
    editor = edit(edited("gpt2"))
    model = editor.model.train()
    layer = model.get_submodule(editor.layer)
    outputs = []

    def keep(module, args, out):
        out.retain_grad()
        outputs.append(out)

    handle = layer.c_proj.register_forward_hook(keep)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.tensor([PROMPT])
    loss = model(ids).logits[0, -1].square().sum()
    loss.backward()
    handle.remove()
    grad = outputs[0].grad[0]
    assert grad[3].abs().max() == 0
    assert grad[:3].abs().max() > 0
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_activation_checkpointing_gives_the_same_gradients(edited, name, reentrant):
    editor = edit(edited(name))
    model = editor.model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    rows = [PROMPT, OTHERS[0]]
    expected = gradients(model, rows, use_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    runs = []
    handle = model.get_submodule(editor.layer).register_forward_pre_hook(lambda *_: runs.append(1))
    got = gradients(model, rows, use_cache=False)
    handle.remove()
    assert len(runs) == 2
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def checkpointed(model, reentrant):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})


def joint_gradients(editor):
    """Return the gradients of four forwards at once: edited, disabled, planned and with a mask."""
    model = editor.model
    model.zero_grad(set_to_none=True)
    ids, mask = padded([PROMPT, OTHERS[0]], left=False)
    last = torch.tensor([3])
    loss = model(input_ids=ids, attention_mask=mask, labels=ids, use_cache=False).loss
    with editor.disable():
        same = torch.tensor([PROMPT])
        loss = loss + 2 * model(input_ids=same, labels=same, use_cache=False).loss
    loss = loss + 3 * model(input_ids=same, labels=same, use_cache=False).loss
    with editor.plan(QueryPlan(last, last - 2, last + 1)):
        loss = loss + 4 * model(input_ids=same, labels=same, use_cache=False).loss
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_runs_each_of_several_forwards_again_as_it_ran_before_one_backward(
    edited, reentrant
):
    editor = edit(edited("llama"))
    without_dropout(editor.model.train())
    expected = joint_gradients(editor)
    checkpointed(editor.model, reentrant)
    got = joint_gradients(editor)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_refuses_a_forward_made_before_an_edit_or_no_longer_known(edited, reentrant):
    editor = edit(edited("gpt2"))
    model = without_dropout(editor.model.train())
    checkpointed(model, reentrant)
    ids = torch.tensor([PROMPT])
    loss = model(ids, labels=ids, use_cache=False).loss
    assert editor.edit(OTHERS[0], TARGET).success
    with pytest.raises(RuntimeError, match=r"edits of its forward \(version 1.*got version 2"):
        loss.backward()
    loss = model(ids, labels=ids, use_cache=False).loss
    for _ in range(64):
        model(ids[:, :1], use_cache=False)
    with pytest.raises(RuntimeError, match="one of the last 64"):
        loss.backward()


@pytest.mark.parametrize("name", ["bert", "bert-mlm", "t5"])
def test_the_other_families_keep_the_bits_of_prompts_that_miss(edited, trained, name):
    editor, plain = edited(name, radius=0.01), trained(name)
    prompt = [*PROMPT[:2], MASK, PROMPT[3]] if name == "bert-mlm" else PROMPT
    target = {"bert": 2, "bert-mlm": [40], "t5": [*TARGET, 2]}[name]
    assert editor.edit(prompt, target).success
    rows = [OTHERS[2], OTHERS[0], prompt]
    ids, mask = padded(rows, left=False)
    extra = {"decoder_input_ids": torch.zeros(3, 1).long()} if name == "t5" else {}
    with torch.no_grad():
        got = editor.model(input_ids=ids, attention_mask=mask, **extra).logits
        base = plain(input_ids=ids, attention_mask=mask, **extra).logits
    assert torch.equal(got[:2], base[:2])
    assert not torch.equal(got[2], base[2])
    row = {"bert": got[2], "t5": got[2, 0]}.get(name)
    row = got[2, 2] if row is None else row
    assert int(row.argmax()) == {"bert": 2, "t5": TARGET[0], "bert-mlm": 40}[name]


def test_a_layer_in_another_dtype_than_its_codebook_is_refused_with_the_remedy(edited):
    editor = edit(edited("gpt2"))
    keys = editor.codebook.keys.clone()
    editor.model.to(torch.bfloat16)
    assert editor.codebook.keys.dtype == torch.float32
    assert torch.equal(editor.codebook.keys, keys)
    for ask in (
        lambda: logits_of(editor.model, PROMPT),
        lambda: editor.edit(OTHERS[0], TARGET),
        lambda: editor.explain(PROMPT),
        lambda: editor.verify(),
    ):
        with pytest.raises(ValueError, match=r"got torch.bfloat16 in.*editor.rekey\(\)"):
            ask()
    editor.model.to(torch.float32)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_compiled_model_answers_and_an_edit_within_the_capacity_compiles_nothing_anew(
    edited, trained, name
):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    editor, plain = edit(edited(name)), trained(name)
    compiled = torch.compile(editor.model, backend=count, fullgraph=True)
    unedited = torch.compile(plain, backend="eager", fullgraph=True)
    ids, mask = padded([OTHERS[0], PROMPT, run_of(50, 6)], left=False)
    with torch.no_grad():

        def ask():
            return compiled(input_ids=ids, attention_mask=mask, use_cache=False).logits

        first = ask()
        assert first[1, 3].argmax() == TARGET[0]
        base = unedited(input_ids=ids, attention_mask=mask, use_cache=False).logits
        assert torch.equal(first[0], base[0])
        before = len(graphs)
        assert editor.edit(run_of(50, 6), TARGET).success
        second = ask()
        assert second[2, -1].argmax() == TARGET[0]
        assert second[1, 3].argmax() == TARGET[0]
        editor.undo()
        assert torch.equal(ask(), first)
    assert before == len(graphs) == 1
    torch._dynamo.reset()
