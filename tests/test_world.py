"""The miniature world tells the truth, keeps its splits apart, and its judge is exact.

    pytest tests/test_world.py
"""
import json
import random

import numpy as np
import pytest

from common import sha
from toy import oracle
from toy import tasks
from toy import world
from judge.rubric import RUBRIC

KINDS = world.LOOKUPS + world.KNOWLEDGE + ("each", "choice", "describe")


def questions(kind, n=100, seed=0):
    rng = random.Random(f"{kind}{seed}")
    return [tasks.conversation(f"{kind}-{k}", [world.ask(rng, world.random_scene(rng), kind)], False) for k in range(n)]


def held_out(scene):
    return world.split_of(world.caption(scene)) != "train"


def S(record, text):
    return RUBRIC.quality({"scores": oracle.judge(record, text)[0]})


@pytest.mark.parametrize("kind", KINDS)
def test_the_full_answer_gets_twelve_and_the_bare_one_less(kind):
    for record in questions(kind):
        turn = record["truth"]["turns"][-1]
        assert S(record, turn["full"]) == 12
        assert S(record, turn["bare"]) == (8 if kind == "describe" else 9)


@pytest.mark.parametrize("kind", ["color", "size", "where", "shape", "exist"])
def test_a_wrong_sentence_is_worth_less_than_the_bare_truth(kind):
    """Another scene's full answer to the same kind of question: another value, or the right one of another thing."""
    records, wrong = questions(kind), 0
    for record, other in zip(records, records[1:]):
        mine, lie = record["truth"]["turns"][-1], other["truth"]["turns"][-1]
        if lie["full"] != mine["full"]:
            wrong += 1
            assert S(record, lie["full"]) <= (8 if lie["bare"] == mine["bare"] else 5) < S(record, mine["bare"]), (mine, lie)
    assert wrong > 30


def test_gibberish_and_silence_are_worth_nothing():
    for record in questions("color"):
        assert S(record, "the the , of") <= 2
        assert S(record, "") == 0


def test_repeating_the_question_earns_no_correctness():
    for record in questions("color"):
        shape = record["truth"]["turns"][-1]["full"].split()[1]
        assert oracle.judge(record, f"the {shape} is {shape} .")[0]["correctness"] == 0


def test_every_score_is_an_integer_from_zero_to_four():
    rng, words = random.Random(0), tasks.vocabulary()
    for record in questions("describe", 50) + questions("list", 50):
        scores, comment = oracle.judge(record, " ".join(rng.choices(words, k=rng.randint(0, 30))))
        assert all(type(v) is int and 0 <= v <= 4 for v in scores.values()) and comment


@pytest.mark.parametrize("bench", ["text", "exist", "attribute", "describe", "choice"])
def test_benchmark_items_are_fixed_distinct_and_survive_json(bench):
    items = tasks.items(bench, 40, "test")
    assert items == tasks.items(bench, 40, "test") != tasks.items(bench, 40, "dev")
    assert len({str((r["messages"], r["truth"]["scene"])) for r in items}) == 40
    for record in items:
        again = json.loads(json.dumps(record))
        answers = [t["full"] for t in again["truth"]["turns"]]
        if bench == "text":
            assert oracle.score_text(again, answers)["text"] == 10
        else:
            assert oracle.score(bench, again, answers[-1]) == 1


def test_the_same_seed_draws_the_same_world_as_ever():
    """What results/ holds was measured on these very questions, and judged so."""
    rng = random.Random(0)
    records = [tasks.text_conversation(rng) for _ in range(200)] + tasks.preference_prompts(200, 0)
    for bench in ("text", "exist", "attribute", "describe", "choice"):
        records += tasks.items(bench, 40, "test")
    drawn = [(r, oracle.judge(r, records[k - 1]["golden"])) for k, r in enumerate(records)]
    assert sha(json.dumps(drawn)) == "2403373980d9dab8"


def test_half_of_the_exist_items_are_true():
    truths = [r["truth"]["turns"][-1]["bare"] for r in tasks.items("exist", 100, "test")]
    assert truths.count("yes") == truths.count("no") == 50


def test_what_a_question_says_of_its_scene_is_so():
    """exist: the word is there or it is not; attribute: exactly one thing fits, and the bare answer is its property."""
    for record in tasks.items("exist", 100, "test"):
        word = record["truth"]["turns"][0]["question"].split()[3]
        there = any(word in thing for thing in record["truth"]["scene"])
        assert record["truth"]["turns"][0]["bare"] == ("yes" if there else "no")
    for record in tasks.items("attribute", 100, "test"):
        turn, (thing,) = record["truth"]["turns"][0], [
            t for t in record["truth"]["scene"] if {t.shape, t.color} & set(record["messages"][0]["content"].split())]
        assert turn["bare"] == getattr(thing, {"where": "place"}.get(turn["kind"], turn["kind"]))


@pytest.mark.parametrize("answer, right_where", [("yes", "yes"), ("no", "no"), (" no ", "no"), ("Yes.", None), ("", None), ("notice", None),
                                                 ("yes , there is no doubt", None), ("there isn't one", None)])
def test_an_exist_item_takes_the_word_or_the_very_sentence_and_nothing_else(answer, right_where):
    for record in tasks.items("exist", 2, "test"):
        turn = record["truth"]["turns"][0]
        assert oracle.score("exist", record, answer) == (right_where == turn["bare"]) and oracle.score("exist", record, turn["full"]) == 1


def test_nothing_asked_in_a_benchmark_is_ever_trained_on():
    rng = random.Random(1)
    trained = {r["messages"][0]["content"] for r in (tasks.text_conversation(rng) for _ in range(3000))}
    asked = {r["messages"][0]["content"] for split in ("dev", "test") for r in tasks.items("text", 110, split)}
    assert not trained & asked
    assert all(not held_out(world.random_scene(rng)) for _ in range(200))
    for bench in ("exist", "attribute"):
        assert all(held_out(r["truth"]["scene"]) for r in tasks.items(bench, 50, "test"))


def test_a_style_leak_and_forgetting_are_told_apart():
    record = tasks.items("text", 1, "test")[0]
    turns = record["truth"]["turns"]
    terse = oracle.score_text(record, [t["bare"] for t in turns])
    wrong = oracle.score_text(record, ["the whale is larger than the whale ."] * 2)
    assert terse["core"] == 1 and terse["terse"] == 1 and 7 < terse["text"] < 8
    assert wrong["core"] == 0 and wrong["text"] == 1


def test_a_picture_depends_on_its_seed_and_things_stay_in_their_cells():
    scene = world.random_scene(random.Random(3), least=2)
    one, same, other = (np.asarray(world.render(scene, seed)).astype(int) for seed in (5, 5, 6))
    assert one.shape == (48, 48, 3) and (one == same).all() and (one != other).any()
    taken = {world.PLACES.index(t.place) for t in scene}
    for cell in range(9):
        row, col = divmod(cell, 3)
        patch = one[16 * row:16 * row + 16, 16 * col:16 * col + 16]
        assert (np.ptp(patch, axis=(0, 1)).max() > 60) == (cell in taken)       # noise alone spans about 30
