"""Every scorer against figures worked out by hand, every parser against a table of replies, every prompt against its template.

    python -m pytest tests/test_evaluate_scores.py -q
    REMEDY_BENCHMARKS=DIR python -m pytest ...        also on the official question files, laid out as the README says

The files here are small and made up, in the formats that the benchmarks' own tools write.
"""
import base64
import json
import os
import random
import re
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

from benchmarks import harness
from benchmarks.harness import Item, load, mean, ratios
from common import BadInput
from conftest import picture
from evaluate import BENCHES
from benchmarks.text import AlpacaEval, MTBench, length_controlled
from benchmarks.pictures import POPE, LLaVABench, MMBench, MMVet

OFFICIAL = os.environ.get("REMEDY_BENCHMARKS", "")
official = pytest.mark.skipif(not OFFICIAL, reason="REMEDY_BENCHMARKS names no folder of official question files")


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows) if isinstance(rows, list) else rows if isinstance(rows, str) else json.dumps(rows))
    return path


def told(*texts):
    return [{"text": t, "finish": "stop"} for t in texts]


def close(estimate, value, ci=None):
    assert abs(estimate["mean"] - value) < 1e-9, (estimate, value)
    assert ci is None or abs(estimate["ci"] - ci) < 1e-9, (estimate, ci)


# ---- intervals -------------------------------------------------------------------------------------------------

def test_the_interval_of_a_plain_mean_is_the_textbook_one():
    x = [1.0, 4.0, 2.0, 7.0]
    close(mean(x), 3.5, 1.96 * np.std(x, ddof=1) / 2)
    assert mean([3.0]) == {"mean": 3.0, "ci": None, "n": 1} and mean([])["mean"] is None and ratios([])["mean"] is None


def test_turns_of_one_question_move_together():
    close(mean([1.0, 1.0, 5.0, 5.0], ["a", "a", "b", "b"]), 3.0, 1.96 * np.std([1, 5], ddof=1) / 2 ** 0.5)


def test_the_interval_of_f1_covers_what_it_should():
    """Of 400 small POPEs with questions in groups of six, about 95 % have the large one's F1 in their interval."""
    rng = np.random.default_rng(0)

    def draw(n):
        hard = rng.beta(2, 2, n).repeat(6)                               # pictures differ, so their answers go together
        true = np.tile([1, 0], 3 * n)
        yes = np.where(rng.random(6 * n) < 0.25 + 0.7 * (1 - hard), true, 1 - true)
        return ratios([(2 * true * yes, true + yes, np.arange(n).repeat(6).tolist())])
    truth = draw(20000)["mean"]
    inside = np.mean([abs(e["mean"] - truth) < e["ci"] for e in (draw(60) for _ in range(400))])
    assert 0.93 < inside < 0.965, "independent questions would give .915"


def test_the_mean_of_three_f1s_has_one_interval():
    part = ([2, 0, 2, 2], [2, 1, 2, 3], list("abcd"))
    one, three = ratios([part]), ratios([part] * 3)
    close(three, one["mean"], one["ci"])
    assert three["n"] == 12, "the same pictures thrice are not three times the evidence"


# ---- MT-Bench --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reply, grade, strict", [
    ("Good. Rating: [[7]]", 7, 7), ("[[7.5]] and [[2]]", 7.5, 7.5), ("as [1] says. No grade.", 1, None), ("Rating: [6]", 6, 6),
    ("[[8/10]]", -1, 8), ("[[85]]", 85, None), ("[[0]]", 0, None), ("", -1, None), ("ten", -1, None), ("[[10]]", 10, 10),
    ("see [3]; Rating: [[4]]", 4, 4)])
def test_mt_bench_reads_grades(reply, grade, strict):
    assert MTBench.official(reply) == grade
    if strict is None:
        with pytest.raises(ValueError):
            MTBench.read(reply)
    else:
        assert MTBench.read(reply) == strict


def graded(question, turn, score, judgment=None, model="m"):
    return {"question_id": question, "turn": turn, "score": score, "model": model, "judge": ["gpt-4", "single-v1"],
            "judgment": f"Rating: [[{score}]]" if judgment is None else judgment}


def test_mt_bench_scores_as_show_result_does():
    """Rows without a grade are dropped, all others averaged as they stand; the repaired figures beside it."""
    rows = [graded(81, 1, 8), graded(81, 2, 6), graded(81, 2, 2), graded(104, 1, 10), graded(104, 2, -1, "no"), graded(82, 1, 1, "see [1]")]
    items = [Item(str(n), ["a", "b"], {"question_id": n, "category": kind}) for n, kind in ((81, "writing"), (82, "writing"), (104, "math"))]
    found = MTBench.score(items, {}, rows)
    close(found["scores"]["score"], (8 + 6 + 2 + 10 + 1) / 5)
    close(found["scores"]["turn 1"], (8 + 10 + 1) / 3)
    close(found["scores"]["turn 2"], (6 + 2) / 2)
    close(found["scores"]["strict"], (8 + 2 + 10) / 3)                   # the later judgment of a turn, no citation
    close(found["scores"]["sound"], (8 + 2) / 2)                         # 104 has a wrong reference
    close(found["categories"]["math"], 10)
    close(found["categories"]["writing"], (8 + 6 + 2 + 1) / 4)
    assert (found["ok"], found["total"]) == (3, 6)
    assert MTBench.score([], {}, rows)["total"] == 5, "without the questions: what the file speaks of"


TEMPLATES = [{"name": f"single-{math}v1{turn}", "system_prompt": f"system {math}{turn} [[rating]]", "prompt_template": text} for math, turn, text in (
    ("", "", "Q {question} A {answer}"), ("math-", "", "Q {question} R {ref_answer_1} A {answer}"),
    ("", "-multi-turn", "{question_1}|{answer_1}|{question_2}|{answer_2}"),
    ("math-", "-multi-turn", "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|{question_2}|{answer_2}"))]


def mt_bench(folder: Path) -> Path:
    write(folder / "mt_bench/question.jsonl", [{"question_id": n, "category": kind, "turns": [f"first {n}?", f"second {{{n}}}?"]}
                                               for n, kind in ((81, "writing"), (111, "math"), (151, "humanities"))])
    write(folder / "mt_bench/judge_prompts.jsonl", TEMPLATES)
    write(folder / "mt_bench/reference_answer/gpt-4.jsonl", [{"question_id": 111, "choices": [{"index": 0, "turns": ["r1", "r2"]}]}])
    return folder


def test_mt_bench_prompts_and_temperatures(tmp_path):
    items = MTBench.items(str(mt_bench(tmp_path)))
    assert [i.temperature for i in items] == [0.7, 0.0, 0.1]
    prompts = {p.id: p for p in MTBench.prompts(str(tmp_path), items, {i.id: told("one", "{two}") for i in items})}
    assert prompts["81-1"].text == "Q first 81? A one" and prompts["81-1"].system == "system  [[rating]]"
    assert prompts["151-2"].text == "first 151?|one|second {151}?|{two}" and prompts["151-2"].system == "system -multi-turn [[rating]]"
    assert prompts["111-1"].text == "Q first 111? R r1 A one"
    assert prompts["111-2"].text == "r1|r2|first 111?|one|second {111}?|{two}" and prompts["111-2"].row["prompt_name"] == "single-math-v1-multi-turn"
    items[0].row["category"] = "reasoning"
    with pytest.raises(KeyError, match="81"):                            # evaluate.from_files says it in words
        MTBench.prompts(str(tmp_path), items, {i.id: told("one", "two") for i in items})


@official
def test_mt_bench_prompts_are_the_official_templates_filled():
    """Byte for byte, for all 80 questions and both turns."""
    items = MTBench.items(OFFICIAL)
    answers = {i.id: told(f"first {{answer}} to {i.id}\n[[5]]", f"second {i.id}") for i in items}
    prompts = {p.id: p for p in MTBench.prompts(OFFICIAL, items, answers)}
    folder = Path(OFFICIAL) / "mt_bench"
    rules = {r["name"]: r for r in load(folder / "judge_prompts.jsonl")}
    truth = {r["question_id"]: r["choices"][0]["turns"] for r in load(folder / "reference_answer" / "gpt-4.jsonl")}
    assert len(prompts) == 160
    for row in load(folder / "question.jsonl"):
        n, (a1, a2) = row["question_id"], [a["text"] for a in answers[str(row["question_id"])]]
        math = n in truth
        assert math == (row["category"] in ("math", "reasoning", "coding"))
        extra = {"ref_answer_1": truth[n][0], "ref_answer_2": truth[n][1]} if math else {}
        one, two = (rules[("single-math-v1" if math else "single-v1") + end] for end in ("", "-multi-turn"))
        assert prompts[f"{n}-1"].text == one["prompt_template"].format(question=row["turns"][0], answer=a1, **extra)
        assert prompts[f"{n}-2"].text == two["prompt_template"].format(question_1=row["turns"][0], question_2=row["turns"][1],
                                                                       answer_1=a1, answer_2=a2, **extra)
        assert (prompts[f"{n}-1"].system, prompts[f"{n}-2"].system) == (one["system_prompt"], two["system_prompt"])


# ---- AlpacaEval ------------------------------------------------------------------------------------------------

TEMPLATE = """<|im_start|>system
Rank. <|im_end|>
<|im_start|>user
{
    "instruction": \"\"\"{instruction}\"\"\",
}
model_1: {output_1}
model_2: {output_2}
Say [{'model': <name>, 'rank': <rank>}]
<|im_end|>
"""


def ranks(one, two):
    return f"[{{'model': 'model_1', 'rank': {one}}}, {{'model': 'model_2', 'rank': {two}}}]"


def alpaca(folder: Path, n: int = 6) -> Path:
    write(folder / "alpaca_eval/alpaca_eval.json", [{"dataset": "d", "instruction": f"do {k}", "output": f"reference {k}", "generator": "davinci"}
                                                    for k in range(n)])
    write(folder / "alpaca_eval/alpaca_eval.txt", TEMPLATE)
    return folder


def test_alpaca_eval_prompts(tmp_path):
    """The order is drawn per instruction, both orders occur; braces in the texts are left alone, but for a field's own name."""
    items = AlpacaEval.items(str(alpaca(tmp_path, 40)))
    items[0].row["instruction"] = "write {x} and {output_2}"
    answers = {i.id: told("mine {y}") for i in items} | {items[1].id: told(items[1].row["output"])}
    prompts = {p.id: p for p in AlpacaEval.prompts(str(tmp_path), items, answers)}
    assert items[1].id not in prompts, "equal answers are a draw, and not asked about"
    orders = set()
    for item in items[2:]:
        text, swapped = prompts[item.id].text, random.Random(f"is_switched_outputs{item.row['instruction']}0").choices([False, True], k=1)[0]
        first, second = ("mine {y}", item.row["output"]) if swapped else (item.row["output"], "mine {y}")
        assert f"model_1: {first}\nmodel_2: {second}\n" in text and f'"""{item.row["instruction"]}"""' in text
        orders.add(swapped)
    assert orders == {False, True} and prompts[items[2].id].system == "Rank." and "<|im" not in prompts[items[2].id].text
    assert '"""write {x} and ' in prompts[items[0].id].text and "model_2: {output_2}" in prompts[items[0].id].text   # as the official tool does


@pytest.mark.parametrize("reply, rank, tolerant", [
    (ranks(1, 2), 1, 1), (ranks(2, 1), 2, 2), (f"```python\n{ranks(2, 1)}\n```", None, 2), (f"Here: {ranks(1, 2)}. I hope it helps", None, 1),
    (ranks(3, 1), None, None), ("[]", None, None), ("model_1", None, None), ("", None, None), ("[{'model': 'model_2', 'rank': 1}]", None, None),
    ("__import__('os')", None, None)])
def test_alpaca_eval_reads_ranks(reply, rank, tolerant):
    for read, value in ((AlpacaEval.official, rank), (AlpacaEval.read, tolerant)):
        if value is None:
            with pytest.raises(ValueError):
                read(reply)
        else:
            assert read(reply) == value


def annotated(k, preference, said=None):
    return {"instruction": f"do {k}", "output_1": "r" * 10, "output_2": "m" * (5 + k), "preference": preference, "raw_completion": said}


def test_alpaca_eval_scores_as_the_leaderboard_does():
    rows = [annotated(k, p) for k, p in enumerate((1, 2, 2, 1.5, 0, None))] + [annotated(9, None, f"```\n{ranks(1, 2)}\n```")]
    found = AlpacaEval.score([], {}, rows)
    values = [0, 1, 1, 0.5, 0.5]
    close(found["scores"]["win rate"], 60, 1.96 * 100 * np.std(values, ddof=1) / 5 ** 0.5)
    last = AlpacaEval.switched("do 9")                                   # then model_1 is the model, and won
    close(found["scores"]["tolerant"], 100 * np.mean(values + [1.0 if last else 0.0]))
    assert (found["ok"], found["total"], found["scores"]["win rate"]["n"]) == (6, 7, 5)
    assert found["length"] == np.mean([5, 6, 7, 8, 9, 10, 14])


def test_judge_rows_undo_the_swap(tmp_path):
    items = AlpacaEval.items(str(alpaca(tmp_path, 30)))
    answers = {i.id: told("mine") for i in items}
    rows = AlpacaEval.judge_rows(items, answers, [], {i.id: ranks(1, 2) for i in items}, "m", "j")
    assert all(r["preference"] == (2 if AlpacaEval.switched(r["instruction"]) else 1) for r in rows)
    assert AlpacaEval.judge_rows(items[:1], {items[0].id: told(items[0].row["output"])}, [], {}, "m", "j")[0]["preference"] == 1.5


def test_length_control_recovers_what_made_the_judge_decide():
    """4,000 verdicts by sigmoid(0.4 + 1.5 tanh(d / sd)) with long answers: the win rate says 72 %, at equal length it is 60 %."""
    rng = np.random.default_rng(1)
    d = rng.normal(300, 500, 4000)
    won = (rng.random(4000) < 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(d / d.std()))))).astype(float)
    found, truth = length_controlled(list(won), list(d)), 100 / (1 + np.exp(-0.4))
    assert 100 * won.mean() > truth + 8 and abs(found["mean"] - truth) < found["ci"] < 3 and found["n"] == 4000


def test_length_control_at_the_edges():
    even = length_controlled([1, 0, 0.5, 1] * 50, [0] * 200)
    assert abs(even["mean"] - 62.5) < 0.1, "no difference in length: the win rate itself"
    always = length_controlled([1.0] * 50, [1, -1] * 25)
    assert 95 < always["mean"] < 100 and np.isfinite(always["ci"]) and length_controlled([], [])["mean"] is None


# ---- MM-Vet ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reply, grade", [
    ("0.7", 0.7), ("1", 1.0), ("0.5\n", 0.5), ("0.5\nbecause", 0.5), (" 0.3", 0.3), ("**0.4**", 0.4), ("2", None), ("0.9 since", 0.9),
    ("I'd say 0.5", None), ("", None), ("-0.5", None), ("1.0.", 1.0), ("8/10", None), ("1/2", None), ("10", None), ("0.5/1", None), (".5", 0.5), ("v0.5", None)])
def test_mm_vet_reads_grades(reply, grade):
    if grade is None:
        with pytest.raises(ValueError):
            MMVet.read(reply)
    else:
        assert MMVet.read(reply) == grade
        assert MMVet.judge_rows([], {}, [harness.Prompt("v1_0", "")], {"v1_0": reply}, "m", "j")["v1_0"]["score"] == [grade]


def mm_vet(folder: Path) -> Path:
    rows = {f"v1_{k}": {"imagename": f"v1_{k}.png", "question": f"what {k}?", "answer": "a<AND>b<OR>c", "capability": c, "imagesource": "web"}
            for k, c in enumerate((["ocr", "math"], ["math", "ocr"], ["rec"], ["rec"]))}
    write(folder / "mm_vet/mm-vet.json", rows)
    return folder


def test_mm_vet_scores_as_its_evaluator_does(tmp_path):
    items = MMVet.items(str(mm_vet(tmp_path)))
    grade = lambda *pairs: {"model": ["gpt-4"] * len(pairs), "content": [c for c, _ in pairs], "score": [s for _, s in pairs]}
    rows = {"v1_0": grade(("1.0", 1.0), ("0.5", 0.5)), "v1_1": grade(("0.0", 0.0), ("0.1", 0.1)), "v1_2": grade(("0.2", 0.2), ("0.4", 0.4)),
            "v1_3": grade(("well", 0.0), ("0.8", 0.8))}
    found = MMVet.score(items, {}, rows)
    close(found["scores"]["total"], np.mean([(1 + 0 + .2 + 0) / 4, (.5 + .1 + .4 + .8) / 4]) * 100)
    close(found["scores"]["parsed"], np.mean([(1 + 0 + .2) / 3, (.5 + .1 + .4 + .8) / 4]) * 100)     # "well" is no grade
    close(found["categories"]["ocr"], np.mean([.5, .3]) * 100)
    close(found["categories"]["math_ocr"], np.mean([.5, .3]) * 100)
    close(found["categories"]["rec"], np.mean([.1, .6]) * 100)
    assert (found["runs"], found["ok"], found["total"]) == (2, 4, 4) and "rec_rec" not in found["categories"]
    assert MMVet.score(items, {}, {"v1_3": grade(("well", 0.0))})["ok"] == 0
    assert MMVet.score(items, {}, {})["scores"]["total"]["mean"] is None
    with pytest.raises(BadInput, match="no question of mm-vet.json"):
        MMVet.score(items, {}, {"v1_9": grade(("1", 1.0))})


def test_mm_vet_takes_the_users_prompt_and_says_whose_it_is(tmp_path):
    items = MMVet.items(str(mm_vet(tmp_path)))
    ask = lambda: MMVet.prompts(str(tmp_path), items, {"v1_2": told("A, b")})[0]
    assert ask().text == f"{MMVet.OURS}\nwhat 2? | a <AND> b <OR> c | A, b | " and "our own wording" in ask().row["wording"]
    write(tmp_path / "mm_vet/prompt.txt", "OFFICIAL\nQ | G | P | C\n")
    assert ask().text == "OFFICIAL\nQ | G | P | C\nwhat 2? | a <AND> b <OR> c | A, b | " and "official" in ask().row["wording"] and ask().system == ""


# ---- LLaVA-Bench -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("reply, pair, parsed", [
    ("8 7\nBoth", [8, 7], [8, 7]), ("8,7", [8, 7], [8, 7]), ("8, 9\nwell", [-1, -1], [8, 9]), ("8.5 9", [8.5, 9], [8.5, 9]), ("8 7 ", [-1, -1], [8, 7]),
    ("eight 9", [-1, -1], None), ("", [-1, -1], None), ("8", [-1, -1], None), ("1 2 3", [-1, -1], None), ("80 90", [80, 90], None), ("0 5", [0, 5], None),
    ("nan 5", None, None)])
def test_llava_bench_reads_pairs(reply, pair, parsed):
    assert pair is None or LLaVABench.official(reply) == pair
    if parsed is None:
        with pytest.raises(ValueError):
            LLaVABench.read(reply)
    else:
        assert LLaVABench.read(reply) == parsed


def reviewed(n, kind, reply):
    return {"id": n + 1, "question_id": n, "category": f"llava_bench_{kind}", "content": reply, "tuple": LLaVABench.official(reply)}


def test_llava_bench_scores_as_summarize_gpt_review_does():
    rows = [reviewed(0, "conv", "8 6"), reviewed(1, "detail", "9 7"), reviewed(2, "detail", "8, 8"), reviewed(3, "complex", "10 4")]
    found = LLaVABench.score([], {}, rows)
    m1, m2 = round((8 + 9 - 1 + 10) / 4, 3), round((6 + 7 - 1 + 4) / 4, 3)
    close(found["scores"]["relative"], round(m2 / m1 * 100, 1))                              # -1 averaged in
    close(found["scores"]["parsed"], 100 * (6 + 7 + 8 + 4) / (8 + 9 + 8 + 10))
    close(found["categories"]["detail"], round(3.0 / 4.0 * 100, 1))
    close(found["scores"]["own grade"], 10 * m2)
    close(found["scores"]["reference"], 10 * m1)
    assert (found["ok"], found["total"]) == (4, 4)
    thirds = [{"question_id": k, "category": "llava_bench_conv", "tuple": t} for k, t in enumerate(([1, 1], [1, 2], [2, 2]))]
    close(LLaVABench.score([], {}, thirds)["scores"]["relative"], 125.1)    # 1.667 / 1.333 as officially rounded; it is 125


def test_llava_bench_when_nothing_could_be_read():
    found = LLaVABench.score([], {}, [reviewed(k, "conv", "sorry") for k in range(3)])
    assert found["scores"]["relative"]["mean"] == 100.0, "as published tables have it"
    assert found["scores"]["parsed"]["mean"] is None and found["ok"] == 0


def llava_bench(folder: Path) -> Path:
    where = folder / "llava_bench_wild"
    write(where / "questions.jsonl", [{"question_id": k, "image": f"00{k // 2 + 1}.jpg", "category": kind, "text": f"what {k}?"}
                                      for k, kind in enumerate(("conv", "detail", "complex"))])
    write(where / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": ["a", "b"]}, {"id": "002", "image": "002.jpg", "caption": "c"}])
    write(where / "answers_gpt4.jsonl", [{"question_id": k, "text": f"gpt {k}", "answer_id": f"g{k}"} for k in range(3)])
    write(where / "rule.json", {f"llava_bench_{kind}": {"role": "Assistant", "prompt": f"rule {kind}"} for kind in ("conv", "detail", "complex")})
    return folder


def test_llava_bench_prompts(tmp_path):
    items = LLaVABench.items(str(llava_bench(tmp_path)))
    assert items[2].questions == ["<image>\nwhat 2?"] and items[2].root.endswith("llava_bench_wild/images")
    p = LLaVABench.prompts(str(tmp_path), items, {"1": told("mine")})[0]
    assert p.text == ("[Context]\na\nb\n\n[Question]\nwhat 1?\n\n[Assistant 1]\ngpt 1\n\n[End of Assistant 1]\n\n"
                      "[Assistant 2]\nmine\n\n[End of Assistant 2]\n\n[System]\nrule detail\n\n")
    assert p.system == LLaVABench.OURS and "our own" in p.row["wording"]
    write(tmp_path / "llava_bench_wild/system.txt", "be exact\n")
    assert LLaVABench.prompts(str(tmp_path), items, {"1": told("mine")})[0].system == "be exact"


# ---- POPE ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("answer, official, words", [
    ("Yes", "yes", "yes"), ("No", "no", "no"), ("no", "no", "no"), ("", "yes", "unknown"), ("Yes.", "yes", "yes"), ("NO", "yes", "no"), ("No\n", "yes", "no"),
    ("There isn't a dog", "yes", "no"), ("Yes, there is no doubt", "no", "yes"), ("I cannot tell", "yes", "unknown"), ("No, there is none.", "no", "no"),
    ("I'm not sure.", "no", "unknown"), ("There is a dog", "yes", "yes"), ("nope", "yes", "no"), ("A dog is not there", "no", "no"),
    ("Yes. No dog", "yes", "yes"), ("a notice", "yes", "unknown"), ("t", "yes", "unknown")])
def test_pope_reads_answers(answer, official, words):
    assert (POPE.official(answer), POPE.words(answer)) == (official, words)


def pope(folder: Path, images: int = 2, typo: bool = False, question_file: bool = True) -> Path:
    """Three splits of `images` pictures with four questions each, half of them yes; LLaVA's file in its own order."""
    rows = {split: [{"question_id": 4 * i + k + 1, "image": f"COCO_{i}.jpg", "text": f"Is there {thing} in the {'imange' if typo else 'image'}?",
                     "label": "yes" if k % 2 == 0 else "no"} for i in range(images) for k, thing in enumerate(("a dog", "an owl", "a car", f"a {split}"))]
            for split in POPE.SPLITS}
    for split, listed in rows.items():
        write(folder / f"pope/coco/coco_pope_{split}.json", listed)      # JSON lines in spite of the name
    if question_file:
        flat = [{"image": r["image"], "text": r["text"].replace("imange", "image") + POPE.SUFFIX, "category": split} for split in POPE.SPLITS
                for r in reversed(rows[split])]
        write(folder / "pope/llava_pope_test.jsonl", [{"question_id": k, **r} for k, r in enumerate(flat)])
    return folder


def test_pope_scores_by_hand(tmp_path):
    items = POPE.items(str(pope(tmp_path, images=2, typo=True)))
    assert len(items) == 24 and items[0].questions[0] == f"<image>\nIs there a adversarial in the image?{POPE.SUFFIX}"
    labels = {(i.row["category"], i.row["image"], i.row["text"].split(" in ")[0]): i.row["label"] for i in items}
    assert labels["random", "COCO_1.jpg", "Is there a dog"] == "yes" and labels["random", "COCO_1.jpg", "Is there an owl"] == "no"
    answers = {i.id: told({"adversarial": "Yes", "popular": "No" if "COCO_0" in i.images[0] else i.row["label"], "random": "NO"}[i.row["category"]])
               for i in items}
    found = POPE.score(items, answers)
    close(found["categories"]["adversarial F1"], 2 * 4 / (2 * 4 + 4))
    close(found["categories"]["adversarial accuracy"], 0.5)
    close(found["categories"]["adversarial yes"], 1.0)
    close(found["categories"]["popular precision"], 1.0)
    close(found["categories"]["popular recall"], 0.5)
    close(found["categories"]["popular accuracy"], 0.75)
    close(found["categories"]["random yes"], 1.0)                        # "NO" is yes to the official parser
    close(found["scores"]["F1"], (2 / 3 + 2 * 2 / (2 * 2 + 2) + 2 / 3) / 3)
    close(found["scores"]["words"], (2 / 3 + 2 / 3 + 0) / 3)
    assert (found["ok"], found["total"], found["unknown"]) == (24, 24, 0)
    fewer = POPE.score(items, {k: v for k, v in answers.items() if int(k) % 2})
    assert fewer["ok"] == 12 and fewer["total"] == 24
    silent = POPE.score(items, {i.id: told("No") for i in items})
    assert silent["categories"]["random precision"]["mean"] is None and silent["scores"]["F1"]["mean"] == 0


def test_pope_from_its_own_files_alone(tmp_path):
    items = POPE.items(str(pope(tmp_path, question_file=False)))
    assert len({i.id for i in items}) == 24 and items[0].row["text"].endswith(POPE.SUFFIX) and items[0].max_new == 128
    write(tmp_path / "pope/other/coco_pope_random.json", [{"image": "COCO_0.jpg", "text": "Is there a dog in the image?", "label": "no"}])
    with pytest.raises(BadInput, match="labelled otherwise"):
        POPE.items(str(tmp_path))


@official
def test_pope_labels_fit_whichever_version_is_there():
    items = POPE.items(OFFICIAL)
    counts = {split: [i.row["label"] for i in items if i.row["category"] == split] for split in POPE.SPLITS}
    assert {k: len(v) for k, v in counts.items()} == {"adversarial": 3000, "popular": 3000, "random": 2910}
    assert counts["random"].count("yes") == 1500
    perfect = POPE.score(items, {i.id: told(i.row["label"].capitalize()) for i in items})
    assert perfect["scores"]["F1"]["mean"] == perfect["scores"]["words"]["mean"] == 1


# ---- MMBench ---------------------------------------------------------------------------------------------------

def mmbench(folder: Path) -> Path:
    """Two questions: 7 with three rotations, 9 with two; pictures of row 7 as base64, the others refer to it."""
    data = BytesIO()
    picture(30, 20).save(data, "JPEG")
    cell = base64.b64encode(data.getvalue()).decode()
    rows = [(7, "which?", "a hint\nof two lines", "cat", "dog", "owl", "", "B", cell), (1000007, "which?", "a hint", "owl", "cat", "dog", "", "C", "7"),
            (2000007, "which?", "nan", "dog", "owl", "cat", "", "A", "7"), (9, "what\\nnow?", "", "None of it", "none", "z", "", "A", "7"),
            (1000009, "what\\nnow?", "", "y", "None of it", "", "", "B", "7")]
    lines = ["\t".join(("index", "question", "hint", "A", "B", "C", "D", "answer", "image"))]
    lines += ["\t".join(f'"{c}"' if "\n" in str(c) else str(c) for c in row) for row in rows]
    write(folder / "mmbench/dev.tsv", "\n".join(lines) + "\n")
    return folder


def test_mmbench_prompts_options_and_pictures(tmp_path):
    items = MMBench.items(str(mmbench(tmp_path)))
    assert items[0].questions == [f"<image>\na hint\nof two lines\nwhich?\nA. cat\nB. dog\nC. owl\n{MMBench.SUFFIX}"]
    assert items[2].questions == [f"<image>\nwhich?\nA. dog\nB. owl\nC. cat\n{MMBench.SUFFIX}"], "nan is no hint"
    assert items[3].row["options"] == {"A": "None of it"}, "options end at the first that is none"
    MMBench.unpack(items, tmp_path / "pictures")
    assert {(i.root, *i.images) for i in items} == {(str(tmp_path / "pictures"), "7.jpg"), (str(tmp_path / "pictures"), "9.jpg")}
    assert (tmp_path / "pictures" / "9.jpg").read_bytes() == (tmp_path / "pictures" / "7.jpg").read_bytes() != b""
    row = MMBench.answer_rows(items, {"7": told("B")}, "m")[0]
    assert (row["question_id"], row["option_char"], row["options"], row["text"]) == (7, ["A", "B", "C"], ["cat", "dog", "owl"], "B")
    assert "<image>" not in row["prompt"] and row["prompt"].endswith(MMBench.SUFFIX) and row["round_id"] == 0


@pytest.mark.parametrize("answer, letter", [
    ("B", "B"), ("B.", "B"), ("(C)", "C"), ("The answer is B", "B"), ("A or B", None), ("dog", "B"), ("It is the owl.", "C"), ("cat and dog", None), ("", None),
    ("A cat sits on a very long wall", None), ("the correct answer is **C** and that is it, as one can see from all of this", "C"), ("D", None),
    ("dog" + " and so on" * 20, None)])
def test_mmbench_finds_letters(answer, letter):
    assert MMBench.letter(answer, {"A": "cat", "B": "dog", "C": "owl"}) == letter


def test_mmbench_counts_a_question_only_if_every_rotation_is_right(tmp_path):
    items = MMBench.items(str(mmbench(tmp_path)))
    answers = {"7": told("B"), "1000007": told("C"), "2000007": told("A"), "9": told("A"), "1000009": told("A")}
    found = MMBench.score(items, answers)
    close(found["scores"]["circular"], 0.5)
    close(found["scores"]["vanilla"], 1.0)
    assert found["scores"]["circular"]["n"] == 2 and found["unknown"] == 0
    fewer = MMBench.score(items, {k: v for k, v in answers.items() if k != "1000009"})
    close(fewer["scores"]["circular"], 1.0)                              # 9 is not whole: it does not count, and coverage says so
    assert (fewer["ok"], fewer["total"]) == (4, 5)


def test_guessing_four_letters_gets_nearly_nothing():
    rng = random.Random(0)
    items = [Item(str(k + r * MMBench.MILLION), [""], {"question_id": k + r * MMBench.MILLION, "options": dict.fromkeys("ABCD", "x"), "answer": "ABCD"[r]})
             for k in range(3000) for r in range(4)]
    found = MMBench.score(items, {i.id: told(rng.choice("ABCD")) for i in items})["scores"]
    assert 0.001 < found["circular"]["mean"] < 0.008 and abs(found["vanilla"]["mean"] - 0.25) < 0.03


@official
def test_mmbench_groups_of_the_official_table():
    items = MMBench.items(OFFICIAL)
    found = MMBench.score(items, {i.id: told(i.row["answer"]) for i in items})
    assert len(items) == 4377 and found["scores"]["circular"]["n"] == 1176 and found["scores"]["circular"]["mean"] == 1


# ---- files -----------------------------------------------------------------------------------------------------

MAKERS = {"mt_bench": mt_bench, "alpaca_eval": alpaca, "mm_vet": mm_vet, "llava_bench": llava_bench, "pope": pope, "mmbench": mmbench}


@pytest.mark.parametrize("name", MAKERS)
def test_answers_come_back_from_the_benchmarks_own_format(tmp_path, name):
    kind, items = BENCHES[name], BENCHES[name].items(str(MAKERS[name](tmp_path)))
    answers = {i.id: told(*(f"answer {k} to {i.id}" for k in range(len(i.questions)))) for i in items}
    path = tmp_path / ("answers" + Path(kind.files[0]).suffix)
    harness.dump(path, kind.answer_rows(items, answers, "m"))
    back = kind.read_answers(path)
    assert {k: [a["text"] for a in v] for k, v in back.items()} == {k: [a["text"] for a in v] for k, v in answers.items()}
    some = dict(list(answers.items())[1:])
    harness.dump(path, kind.answer_rows(items, some, "m"))
    assert list(kind.read_answers(path)) == list(some), "what was not answered has no row"


SHAPES = {"mt_bench": {"question_id", "answer_id", "model_id", "choices"}, "alpaca_eval": {"dataset", "instruction", "output", "generator"},
          "llava_bench": {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"},
          "pope": {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"},
          "mmbench": {"question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id", "model_id", "metadata"}}


@pytest.mark.parametrize("name", SHAPES)
def test_answer_files_have_the_fields_that_official_tools_read(tmp_path, name):
    items = BENCHES[name].items(str(MAKERS[name](tmp_path)))
    rows = BENCHES[name].answer_rows(items, {i.id: told(*["x"] * len(i.questions)) for i in items}, "m")
    assert len(rows) == len(items) and all(SHAPES[name] <= set(r) for r in rows)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(BadInput, match="mt_bench/ must hold one question.jsonl, not 0; get it from github.com/lm-sys"):
        MTBench.items(str(tmp_path))
    write(tmp_path / "mt_bench/question.jsonl", [{"question_id": 1}])
    with pytest.raises(BadInput, match="row 1 has no category, turns"):
        MTBench.items(str(tmp_path))
    write(tmp_path / "mt_bench/question.jsonl", "{")
    with pytest.raises(BadInput, match="neither JSON nor JSON lines"):
        MTBench.items(str(tmp_path))
    mmbench(tmp_path)
    write(tmp_path / "mmbench/other.tsv", "index\n1\n")
    with pytest.raises(BadInput, match=r"must hold one \*.tsv, not 2 \(mmbench/dev.tsv, mmbench/other.tsv\)"):
        MMBench.items(str(tmp_path))
    os.remove(tmp_path / "mmbench/dev.tsv")
    with pytest.raises(BadInput, match="not a table of MMBench"):
        MMBench.items(str(tmp_path))


def test_nothing_is_random_without_a_seed():
    for name in ("harness", "miniature", "text_benchmarks", "vision_benchmarks", "compare", "evaluate"):
        source = Path(harness.__file__).with_name(f"{name}.py").read_text()
        assert not re.findall(r"\brandom\.(?!Random\b)\w+|torch\.(?:rand|multinomial)", source), name


@official
def test_no_official_text_was_copied_into_this_repository():
    """No run of eight words of a question, a judge's prompt or a rule stands in our files."""
    folder = Path(OFFICIAL)
    texts = [r[key] for r in load(folder / "mt_bench/judge_prompts.jsonl") for key in ("system_prompt", "prompt_template")]
    texts += [t for r in load(folder / "mt_bench/question.jsonl") for t in r["turns"]]
    texts += [r["prompt"] for r in load(next(folder.rglob("rule.json"))).values()] + [next(folder.rglob("alpaca_eval.txt")).read_text()]
    texts += [r["instruction"] for r in load(next(folder.rglob("alpaca_eval*.json")))] + [r["question"] for r in load(folder / "mm_vet/mm-vet.json").values()]
    words = lambda text: re.findall(r"[a-z]+", text.lower())
    runs = lambda text: {tuple(w[k:k + 8]) for w in [words(text)] for k in range(len(w) - 7)}
    theirs = set().union(*map(runs, texts))
    for path in (*(p for p in harness.Path(harness.__file__).parent.glob("*.py")), *Path(__file__).parent.glob("*.py")):
        shared = runs(path.read_text()) & theirs
        assert not shared, f"{path.name}: {' '.join(next(iter(shared)))}"
