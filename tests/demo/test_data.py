"""The bundled data: three disjoint splits of hand-written sentences, and facts."""

from __future__ import annotations

from collections import Counter

from grace_edit.demo import corrections, facts
from grace_edit.demo.data import TOPICS, load_topics, read_table


def test_the_splits_are_large_enough_and_cover_every_topic() -> None:
    data = load_topics()
    assert len(data.train) >= 300
    assert len(data.test) >= 300
    assert len({request.text for request in data.stream}) >= 600
    assert len(data.held_out) >= 50
    for split in (data.train, data.test):
        assert set(Counter(topic for _, topic in split)) == set(TOPICS)


def test_no_sentence_is_in_two_splits() -> None:
    data = load_topics()
    splits = [
        {text for text, _ in data.train},
        {text for text, _ in data.test},
        {request.text for request in data.stream},
        {request.text for request in data.held_out},
    ]
    for number, split in enumerate(splits):
        for other in splits[number + 1 :]:
            assert not split & other


def test_sentences_are_not_made_from_templates() -> None:
    data = load_topics()
    clusters = {}
    for text, _ in (*data.train, *data.test):
        clusters.setdefault(" ".join(text.lower().split()[:4]), set()).add(text)
    for request in (*data.stream, *data.held_out):
        clusters.setdefault(" ".join(request.text.lower().split()[:4]), set()).add(request.cluster)
    assert max(len(found) for found in clusters.values()) <= 3


def test_every_held_out_paraphrase_has_a_sentence_of_its_cluster_in_the_stream() -> None:
    data = load_topics()
    in_stream = {request.cluster for request in data.stream}
    assert {request.cluster for request in data.held_out} <= in_stream


def test_the_label_shift_comes_in_two_steps() -> None:
    data = load_topics()
    wearables = {
        int(row["cluster"])
        for row in read_table("topics_stream.tsv")
        if row["subject"] == "wearables"
    }
    asked = [r.topic for r in data.stream if r.cluster in wearables]
    assert set(asked) == {"health", "sport"}
    places = {
        topic: [i for i, r in enumerate(data.stream) if r.cluster in wearables and r.topic == topic]
        for topic in ("health", "sport")
    }
    assert max(places["health"]) < min(places["sport"])


def test_the_stream_is_the_same_every_time() -> None:
    assert load_topics() == load_topics()


def test_there_are_at_least_300_facts_and_no_prompt_twice() -> None:
    known = facts.load_facts()
    assert len(known) >= 300
    assert len({fact.prompts[0] for fact in known}) == len(known)


def test_every_error_has_other_wordings_and_prompts_to_leave_alone() -> None:
    asked = corrections.load_corrections()
    assert len({one.text for one in asked}) == len(asked)
    numbers = sorted({one.fact for one in asked})
    assert numbers == list(range(1, 17))
    wanted = {"edit": 1, "cloze": 2, "question": 1, "chat": 1, "neighbour": 2, "same subject": 2}
    for fact in numbers:
        mine = [one for one in asked if one.fact == fact]
        assert Counter(one.role for one in mine) == wanted
        assert len({one.answer for one in mine}) == 1
        assert not any(one.answer in one.text for one in mine if one.role != "same subject")
    assert len(corrections.load_corrections(3)) == 27


def test_an_answer_is_right_if_it_names_what_was_asked_for() -> None:
    assert corrections.is_right("It is Vincent\nvan Gogh, who", "Vincent van Gogh")
    assert not corrections.is_right("Vincent", "Vincent van Gogh")
    assert not corrections.is_right("", "Bern")


def test_answers_survive_the_tokenizer() -> None:
    known = facts.load_facts()
    tokenizer = facts.build_tokenizer(known)
    for fact in known:
        ids = tokenizer(" " + fact.answer).input_ids
        assert tokenizer.decode(ids).strip() == fact.answer
        prompt = tokenizer(fact.prompts[0]).input_ids
        assert tokenizer(f"{fact.prompts[0]} {fact.answer}").input_ids == prompt + ids
