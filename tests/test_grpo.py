"""Policy gradient: the advantages, the gradient, who judges, and a run that was stopped.

    python -m pytest tests/test_grpo.py -q
"""
import copy
import json
import math

import pytest
import torch

import annotate
import checkpoint
import formats
import grpo
import train as training
from common import BadInput
from conftest import rows_of
from data import Pixels, Tokens, make_tree
from model import token_logps
from toy.tasks import write_prompts

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prompts(8, 3, tmp_path_factory.mktemp("prompts"))


def settings(prompts, out, **changes):
    given = {"ckpt": "toy/llava", "data": str(prompts), "out": str(out), "judge": "oracle", "device": "cpu", "steps": 4, "batch": 4, "n": 3,
             "max_new": 12, "lr": 1e-4, "save_every": 1}
    return grpo.Settings(**given | changes)


def test_an_advantage_is_what_a_score_is_above_its_siblings_mean():
    nan = math.nan
    scores = torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0], [4.0, nan, 8.0], [nan, nan, nan]])
    expected = [[-2, -1, 3], [0, 0, 0], [-2, 0, 2], [0, 0, 0]]
    assert grpo.advantages(scores).tolist() == expected
    spread = grpo.advantages(scores, spread=True)
    assert torch.allclose(spread[0], torch.tensor([-2.0, -1.0, 3.0]) / math.sqrt(14 / 3), atol=1e-3)
    assert spread[2].tolist() == pytest.approx([-1, 0, 1], abs=1e-3) and spread[1].tolist() == spread[3].tolist() == [0, 0, 0]


def step_of(prompts, out, monkeypatch, score, steps=1):
    """One step with these scores -> (the gradients before they are clipped, answered records, scores, the model)."""
    seen = {}

    def judged(s, records):
        seen["records"] = copy.deepcopy(records)
        seen["scores"] = torch.tensor([[score(k, place) for place in range(s.n)] for k in range(len(records))])
        return seen["scores"]

    def update(run, **amounts):
        seen["grads"] = {name: p.grad.clone() for name, p in run.trained.items()}
        return real(run, **amounts)

    real = training.Run.update
    monkeypatch.setattr(grpo, "judged", judged)
    monkeypatch.setattr(training.Run, "update", update)
    grpo.run(settings(prompts, out, steps=steps, temperature=2.5))
    return seen


def test_the_gradient_is_that_of_one_answer_at_a_time(prompts, tmp_path, monkeypatch):
    seen = step_of(prompts, tmp_path / "out", monkeypatch, lambda k, place: float((k + 2 * place) % 5))
    model = checkpoint.load("toy/llava")
    folder = checkpoint.resolve("toy/llava")
    tokens, pixels = Tokens(folder, model.config), Pixels(model.config)
    total = 0.0
    for record, scores in zip(seen["records"], seen["scores"]):
        for answer, score in zip(record["answers"], scores):
            tree = make_tree(tokens, record, [answer["text"]])
            total = total - (score - scores.mean()) * token_logps(model, pixels.pack([tree])).sum() / seen["scores"].numel()
    total.backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(seen["grads"][name], p.grad, atol=2e-5, rtol=2e-3, msg=name)
    assert any(grad.abs().max() > 1e-3 for grad in seen["grads"].values())


def test_identical_scores_change_nothing(prompts, tmp_path, monkeypatch):
    step_of(prompts, tmp_path / "out", monkeypatch, lambda k, place: 7.0, steps=2)
    assert checkpoint.digest(checkpoint.load(tmp_path / "out/model")) == checkpoint.digest(checkpoint.load("toy/llava"))


def test_cut_off_and_unscored_answers_have_no_score(prompts, tmp_path, monkeypatch):
    records, _ = formats.read(prompts)
    answers = [{"text": "red", "finish": "stop"}, {"text": "red", "finish": "length"}, {"text": "the", "finish": "stop"}]
    records = [record | {"answers": copy.deepcopy(answers)} for record in records[:2]]
    s = settings(prompts, tmp_path)
    scores = grpo.judged(s, records)
    assert scores.shape == (2, 3) and scores.isnan().tolist() == [[False, True, False]] * 2
    monkeypatch.setattr(annotate, "scored", lambda s, records, out: records)
    with pytest.raises(BadInput, match="scored none of 2 questions"):
        grpo.judged(s, records)


@pytest.fixture(scope="module")
def whole(prompts, tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("grpo") / "whole"
    grpo.run(settings(prompts, out))
    return out


PLACES = [(training.Run, "keep"), (training.Run, "update"), (training.Run, "backward"), (grpo, "sample_answers"), (grpo, "judged")]


@pytest.mark.parametrize("room, name", PLACES, ids=lambda value: value if isinstance(value, str) else "")
def test_killed_anywhere_and_resumed_it_ends_with_the_same_bits(prompts, tmp_path, monkeypatch, whole, room, name):
    """Dies behind the third time that something is done; what happened since the last state happens again."""
    real, times = getattr(room, name), []

    def last_words(*args, **how):
        result = real(*args, **how)
        times.append(1)
        if len(times) == 3:
            raise KeyboardInterrupt
        return result

    out = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr(room, name, last_words)
        with pytest.raises(KeyboardInterrupt):
            grpo.run(settings(prompts, out))
    assert not (out / "model").exists()
    grpo.run(settings(prompts, out, resume=True))
    one, other = ((folder / "model/model.safetensors").read_bytes() for folder in (whole, out))
    assert one == other
    rows = [[{k: v for k, v in row.items() if not k.endswith("_per_s")} for row in rows_of(folder / "metrics.jsonl")] for folder in (whole, out)]
    assert rows[0] == rows[1] and len(rows[0]) == 4


def test_a_judge_over_http_is_asked_through_annotate_with_these_settings(prompts, tmp_path, monkeypatch, capsys):
    asked = []

    def scored(asks, records, out):
        asked.append((asks, len(records), out))
        grade = dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 3)
        return [record | {"answers": [answer | {"scores": grade} for answer in record["answers"]]} for record in records]

    monkeypatch.setenv("OPENAI_API_KEY", "k" * 20)
    monkeypatch.setattr(annotate, "scored", scored)
    monkeypatch.setattr(training.Run, "update", lambda run, **amounts: {"step": 1, "score": 9, "logp": 0, "grad_norm": 0})
    monkeypatch.setattr(grpo.training, "finish", lambda *args: "")
    grpo.run(settings(prompts, tmp_path, judge="openai:m", judge_url="http://127.0.0.1:9/v1", workers=3, steps=1))
    [(asks, count, out)] = asked
    assert (asks.judge, asks.judge_url, asks.workers, asks.golden, count, out) == ("openai:m", "http://127.0.0.1:9/v1", 3, False, 4, tmp_path)
    assert "judge: openai:m, 4 calls, 3 answers in each" in capsys.readouterr().out


def test_a_question_that_leaves_no_room_for_an_answer_is_a_reject(prompts, tmp_path):
    records = rows_of(prompts)
    words = records[0]["messages"][0]["content"]
    records[0]["messages"][0]["content"] = words + " what color is the star ?" * 20
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(BadInput, match="no usable record"):
        grpo.run(settings(rows, tmp_path / "none", image_root=str(prompts.parent), max_length=20))
    grpo.run(settings(rows, tmp_path / "out", image_root=str(prompts.parent), max_length=120, steps=1))
    [reject] = rows_of(tmp_path / "out" / "rejects.jsonl")
    assert reject["id"] == records[0]["id"] and "more than the model was built for (120)" in reject["reason"]


@pytest.mark.parametrize("wrong, why", [({"judge": ""}, "--judge says who"), ({"n": 1}, "at least 2"), ({"judge": "nobody:x"}, "--judge nobody:x: say gemini")])
def test_what_cannot_work_is_refused(prompts, tmp_path, wrong, why):
    with pytest.raises(BadInput, match=why):
        grpo.run(settings(prompts, tmp_path, **wrong))
