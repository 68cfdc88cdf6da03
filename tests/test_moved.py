"""How far a method went, and whether its text is better or only longer.

    python -m pytest tests/test_moved.py -q
"""
import math

import numpy as np
import pytest
import torch

import checkpoint
from data import Pixels, Tokens, make_tree
from model import token_logps
from toy import items, moved, tasks

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def shipped():
    folder = checkpoint.resolve("toy/llava")
    model = checkpoint.load(folder)
    return model, Tokens(folder, model.config)


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    return checkpoint.mix("toy/llava", "toy/vicuna", 0.5, tmp_path_factory.mktemp("mix") / "half")


def asked(n, folder):
    return tasks.draw(tasks.items("attribute", n, "test"), folder)


def test_the_divergence_is_that_of_one_answer_at_a_time(shipped, half, tmp_path, monkeypatch):
    start, tokens = shipped
    model = checkpoint.load(half)
    records = asked(12, tmp_path)
    said = []
    real = moved.sample_answers
    monkeypatch.setattr(moved, "sample_answers", lambda *args, **how: said.append(real(*args, **how)) or said[0])
    found = moved.divergence(model, tokens, start, tokens, records)

    pixels = Pixels(model.config)
    differences, lengths = [], 0
    for record, answers in zip(records, said[0]):
        for answer in answers:
            pack = pixels.pack([make_tree(tokens, record, [answer["text"]])])
            with torch.no_grad():
                differences.append((token_logps(model, pack) - token_logps(start, pack)).sum().item())
            lengths += len(tokens.encode(answer["text"])) - 1 + 1            # less <s>, and </s>
    assert len(differences) == 48 == found["kl"]["n"]
    assert found["kl"]["mean"] == pytest.approx(sum(differences) / 48, abs=1e-4) and found["kl"]["mean"] > 0
    assert found["kl a token"]["mean"] == pytest.approx(sum(differences) / lengths, abs=1e-4)


def test_who_did_not_move_has_no_divergence_and_cut_answers_do_not_count(shipped, tmp_path, monkeypatch):
    model, tokens = shipped
    records = asked(6, tmp_path)
    assert moved.divergence(model, tokens, model, tokens, records)["kl"] == {"mean": 0, "ci": 0, "n": 24}
    monkeypatch.setattr(items, "MAX_NEW", 1)
    assert moved.divergence(model, tokens, model, tokens, records)["kl"]["n"] == 0


def drawn(theta, phi, n=200_000):
    rng = np.random.default_rng(0)
    longer = rng.normal(2, 3, n)
    p = 1 / (1 + np.exp(-theta - phi * np.tanh(longer / longer.std())))
    return (rng.random(n) < p).astype(float), longer


@pytest.mark.parametrize("theta, phi", [(0.0, 2.0), (0.7, 1.0), (-0.5, 0.0)])
def test_what_length_explains_is_taken_out_of_the_win_rate(theta, phi, monkeypatch):
    monkeypatch.setattr(moved, "RIDGE", 0.0)
    wins, longer = drawn(theta, phi)
    assert moved.win_rate(wins, longer) == pytest.approx(1 / (1 + math.exp(-theta)), abs=0.01)


def test_the_win_rate_of_ties_is_a_half_and_without_lengths_it_is_the_mean():
    assert moved.win_rate(np.full(9, 0.5), np.arange(9.0)) == pytest.approx(0.5)
    wins = np.array([1, 1, 1, 0.5, 0] * 20)
    assert moved.win_rate(wins, np.zeros(100)) == pytest.approx(0.7, abs=1e-3)
    separated = moved.win_rate(np.array([1.0, 0.0] * 20), np.array([5.0, -5.0] * 20))
    assert separated == pytest.approx(0.5), "always longer and always better: length explains it all"


def test_right_answers_win_equal_ones_tie_and_lengths_that_never_meet_say_nothing():
    records = tasks.items("text", 20, "test")
    full = [[turn["full"] for turn in record["truth"]["turns"]] for record in records]
    bare = [[turn["bare"] for turn in record["truth"]["turns"]] for record in records]
    wrong = [["no"] * 2] * 20
    assert moved.controlled(records, full, full) == {"mean": 0.5, "ci": None, "n": 40}
    assert moved.controlled(records, bare, wrong)["mean"] > 0.6 > 0.4 > moved.controlled(records, wrong, bare)["mean"]
    assert moved.controlled(records, full, bare)["mean"] is None, "no answer is as long as the start's: nothing is known"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_sentences_for_words_are_no_gain_at_equal_length(share):
    """The same content in a sentence always wins and is always longer: its length explains all of it."""
    records = tasks.items("text", 165, "test")
    bare = [[turn["bare"] for turn in record["truth"]["turns"]] for record in records]
    mine = [[turn["full"] for turn in record["truth"]["turns"]] if k < share * 165 else words for k, (record, words) in enumerate(zip(records, bare))]
    found = moved.controlled(records, mine, bare)
    assert found["mean"] == pytest.approx(0.5, abs=0.02)


def test_text_questions_to_be_judged_are_training_ones_without_a_picture():
    records = tasks.text_prompts(200, 3)
    assert records == tasks.text_prompts(200, 3) != tasks.text_prompts(200, 4)
    assert not any(record["images"] for record in records) and all(len(record["messages"]) == 1 for record in records)
    held_out = {record["messages"][0]["content"] for split in ("dev", "test") for record in tasks.items("text", 165, split)}
    assert not held_out & {record["messages"][0]["content"] for record in records}
    assert len({record["truth"]["turns"][0]["kind"] for record in records}) > 9
