"""Every scorer against figures worked out by hand, every parser against a table of replies, every prompt against its template.

    python -m pytest tests/test_evaluate_scores.py -q
    REMEDY_BENCHMARKS=DIR python -m pytest ...        also on the official files, laid out as docs/benchmarks.md says

The files here are small and made up, in the formats that the benchmarks' own tools write.
"""
import base64
import json
import os
import random
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

import evaluate
from benchmarks import alpaca_eval, harness, llava_bench, mm_vet, mmbench, mt_bench, pope
from benchmarks.harness import Folder, Item, Prompt, load, mean, ratios, readable
from common import BadInput
from conftest import picture
from evaluate import BENCHES

OFFICIAL = os.environ.get("REMEDY_BENCHMARKS", "")
official = pytest.mark.skipif(not OFFICIAL, reason="REMEDY_BENCHMARKS names no folder of official question files")


def folder(data, bench) -> Folder:
    return Folder(Path(data) / bench.FOLDER, bench.SOURCE, Path(data) / "unpacked")


def items_of(data, bench) -> list[Item]:
    return bench.items(folder(data, bench))


def answered(items: list[Item], texts) -> list[Item]:
    """The items with answers: {id: texts of its turns}, or a function of the item; who has none keeps none."""
    texts = texts if isinstance(texts, dict) else {item.id: texts(item) for item in items}
    return [replace(item, texts=texts[item.id], finishes=["stop"] * len(texts[item.id])) if item.id in texts else item for item in items]


def prompts_of(data, bench, items: list[Item]) -> dict[str, Prompt]:
    return {prompt.id: prompt for prompt in bench.prompts(folder(data, bench), [item for item in items if item.texts], "m")}


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = rows if isinstance(rows, str) else json.dumps(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if isinstance(rows, list) else text)
    return path


def close(figure, value, ci=None):
    assert abs(figure["mean"] - value) < 1e-9, (figure, value)
    assert ci is None or abs(figure["ci"] - ci) < 1e-9, (figure, ci)


def reads(read, replies: dict):
    """What `read` makes of each reply; None where it must refuse."""
    for reply, value in replies.items():
        assert harness.readable(read, reply) == value, reply


# ---- intervals -------------------------------------------------------------------------------------------------

def test_the_interval_of_a_plain_mean_is_the_textbook_one():
    x = [1.0, 4.0, 2.0, 7.0]
    close(mean(x), 3.5, 1.96 * np.std(x, ddof=1) / 2)
    assert mean([3.0]) == {"mean": 3.0, "ci": None, "n": 1} and mean([])["mean"] is None and ratios([])["mean"] is None
    assert harness.shown(mean(x), "5.1f") == "  3.5 ± 2.6" and harness.shown(mean([]), "5.1f") == "-"


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
    inside = np.mean([abs(figure["mean"] - truth) < figure["ci"] for figure in (draw(60) for _ in range(400))])
    assert 0.93 < inside < 0.965, "independent questions would give .915"


def test_the_mean_of_three_f1s_has_one_interval():
    part = ([2, 0, 2, 2], [2, 1, 2, 3], list("abcd"))
    one, three = ratios([part]), ratios([part] * 3)
    close(three, one["mean"], one["ci"])
    assert three["n"] == 12, "the same pictures thrice are not three times the evidence"


# ---- MT-Bench --------------------------------------------------------------------------------------------------

def test_mt_bench_reads_grades():
    reads(mt_bench.official, {"Good. Rating: [[7]]": 7, "[[7.5]] and [[2]]": 7.5, "as [1] says. No grade.": 1, "Rating: [6]": 6, "[[8/10]]": -1,
                              "[[85]]": 85, "[[0]]": 0, "": -1, "ten": -1, "[[10]]": 10, "see [3]; Rating: [[4]]": 4})
    reads(mt_bench.read, {"Good. Rating: [[7]]": 7, "[[7.5]] and [[2]]": 7.5, "as [1] says. No grade.": None, "Rating: [6]": 6, "[[8/10]]": 8,
                          "[[85]]": None, "[[0]]": None, "": None, "ten": None, "[[10]]": 10, "see [3]; Rating: [[4]]": 4})


def graded(question, turn, score, judgment=None, model="m"):
    return {"question_id": question, "turn": turn, "score": score, "model": model, "judge": ["gpt-4", "single-v1"],
            "judgment": f"Rating: [[{score}]]" if judgment is None else judgment}


def test_mt_bench_scores_as_show_result_does():
    """Rows without a grade are dropped, all others averaged as they stand; the repaired figure beside it."""
    rows = [graded(81, 1, 8), graded(81, 2, 6), graded(81, 2, 2), graded(104, 1, 10), graded(104, 2, -1, "no"), graded(82, 1, 1, "see [1]")]
    items = [Item(n, ["a", "b"], {"category": kind}) for n, kind in ((81, "writing"), (82, "writing"), (104, "math"))]
    found = mt_bench.score(items, rows)
    close(found["scores"]["score"], (8 + 6 + 2 + 10 + 1) / 5)
    close(found["scores"]["turn 1"], (8 + 10 + 1) / 3)
    close(found["scores"]["turn 2"], (6 + 2) / 2)
    close(found["scores"]["strict"], (8 + 2 + 10) / 3)                   # the later judgment of a turn, no citation
    assert (found["ok"], found["total"]) == (3, 6)
    assert mt_bench.score([], rows)["total"] == 5, "without the questions: what the file speaks of"


TEMPLATES = [{"name": f"single-{math}v1{turn}", "system_prompt": f"system {math}{turn} [[rating]]", "prompt_template": text} for math, turn, text in (
    ("", "", "Q {question} A {answer}"), ("math-", "", "Q {question} R {ref_answer_1} A {answer}"),
    ("", "-multi-turn", "{question_1}|{answer_1}|{question_2}|{answer_2}"),
    ("math-", "-multi-turn", "{ref_answer_1}|{ref_answer_2}|{question_1}|{answer_1}|{question_2}|{answer_2}"))]


def make_mt_bench(data: Path) -> Path:
    write(data / "mt_bench/question.jsonl", [{"question_id": n, "category": kind, "turns": [f"first {n}?", f"second {{{n}}}?"]}
                                             for n, kind in ((81, "writing"), (111, "math"), (151, "humanities"))])
    write(data / "mt_bench/judge_prompts.jsonl", TEMPLATES)
    write(data / "mt_bench/reference_answer/gpt-4.jsonl", [{"question_id": 111, "choices": [{"index": 0, "turns": ["r1", "r2"]}]}])
    return data


def test_mt_bench_prompts_and_temperatures(tmp_path):
    items = answered(items_of(make_mt_bench(tmp_path), mt_bench), lambda item: ["one", "{two}"])
    assert [item.temperature for item in items] == [0.7, 0.0, 0.1]
    prompts = prompts_of(tmp_path, mt_bench, items)
    assert prompts["81-1"].text == "Q first 81? A one" and prompts["81-1"].system == "system  [[rating]]"
    assert prompts["151-2"].text == "first 151?|one|second {151}?|{two}" and prompts["151-2"].system == "system -multi-turn [[rating]]"
    assert prompts["111-1"].text == "Q first 111? R r1 A one"
    assert prompts["111-2"].text == "r1|r2|first 111?|one|second {111}?|{two}"
    row = mt_bench.judge_rows([prompts["111-2"]], {"111-2": "[[3]]"}, "j")[0]
    assert row["judge"] == ["j", "single-math-v1-multi-turn"] and (row["question_id"], row["turn"], row["score"], row["model"]) == (111, 2, 3, "m")
    items[0].row["category"] = "reasoning"
    with pytest.raises(BadInput, match="gpt-4.jsonl: has no 81"):
        prompts_of(tmp_path, mt_bench, items)


@official
def test_mt_bench_prompts_are_the_official_templates_filled():
    """Byte for byte, for all 80 questions and both turns."""
    items = answered(items_of(OFFICIAL, mt_bench), lambda item: [f"first {{answer}} to {item.id}\n[[5]]", f"second {item.id}"])
    prompts = prompts_of(OFFICIAL, mt_bench, items)
    where = Path(OFFICIAL) / "mt_bench"
    rules = {r["name"]: r for r in load(where / "judge_prompts.jsonl")}
    truth = {r["question_id"]: r["choices"][0]["turns"] for r in load(where / "reference_answer" / "gpt-4.jsonl")}
    assert len(prompts) == 160
    for item in items:
        n, (q1, q2), (a1, a2) = item.row["question_id"], item.row["turns"], item.texts
        math = n in truth
        assert math == (item.row["category"] in ("math", "reasoning", "coding"))
        extra = {"ref_answer_1": truth[n][0], "ref_answer_2": truth[n][1]} if math else {}
        one, two = (rules[("single-math-v1" if math else "single-v1") + end] for end in ("", "-multi-turn"))
        assert prompts[f"{n}-1"].text == one["prompt_template"].format(question=q1, answer=a1, **extra)
        assert prompts[f"{n}-2"].text == two["prompt_template"].format(question_1=q1, question_2=q2, answer_1=a1, answer_2=a2, **extra)
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


def make_alpaca(data: Path, n: int = 6) -> Path:
    write(data / "alpaca_eval/alpaca_eval.json", [{"dataset": "d", "instruction": f"do {k}", "output": f"reference {k}", "generator": "davinci"}
                                                  for k in range(n)])
    write(data / "alpaca_eval/alpaca_eval.txt", TEMPLATE)
    return data


def test_alpaca_eval_prompts_and_judgments(tmp_path):
    """The order is drawn per instruction, both orders occur; braces in the texts are left alone, but for a field's own name. The
    swap is undone, and equal answers are a draw that nobody is asked about."""
    items = items_of(make_alpaca(tmp_path, 40), alpaca_eval)
    items[0].row["instruction"] = "write {x} and {output_2}"
    items = answered(items, lambda item: [item.row["output"]] if item.id == items[1].id else ["mine {y}"])
    prompts = prompts_of(tmp_path, alpaca_eval, items)
    orders = {}
    for item in items[2:]:
        text, swapped = prompts[item.id].text, random.Random(f"is_switched_outputs{item.row['instruction']}0").choices([False, True], k=1)[0]
        first, second = ("mine {y}", item.row["output"]) if swapped else (item.row["output"], "mine {y}")
        assert f"model_1: {first}\nmodel_2: {second}\n" in text and f'"""{item.row["instruction"]}"""' in text
        orders[item.row["instruction"]] = swapped
    assert {*orders.values()} == {False, True} and prompts[items[2].id].system == "Rank." and "<|im" not in prompts[items[2].id].text
    assert '"""write {x} and ' in prompts[items[0].id].text and "model_2: {output_2}" in prompts[items[0].id].text   # as the official tool does

    rows = alpaca_eval.judge_rows(list(prompts.values()), {item.id: ranks(1, 2) for item in items}, "j")
    assert prompts[items[1].id].text == "" and rows[1]["preference"] == 1.5
    assert all(row["preference"] == (2 if orders[row["instruction"]] else 1) for row in rows[2:])
    assert {"instruction", "output_1", "output_2", "generator_1", "generator_2", "annotator", "preference"} <= set(rows[0])


def test_alpaca_eval_reads_ranks():
    bare = {ranks(1, 2): 1, ranks(2, 1): 2, ranks(3, 1): None, "[]": None, "model_1": None, "": None, "[{'model': 'model_2', 'rank': 1}]": None,
            "__import__('os')": None, "{'model': 1}": None, "[{'model': 'model_1', 'rank': [1]}]": None}
    fenced, prose = f"```python\n{ranks(2, 1)}\n```", f"Here: {ranks(1, 2)}. I hope it helps"
    reads(alpaca_eval.official, bare | {fenced: None, prose: None})
    reads(alpaca_eval.read, bare | {fenced: 2, prose: 1})


def test_alpaca_eval_scores_as_the_leaderboard_does():
    """The win rate counts official verdicts only; one in a code fence counts where length is controlled for (here it is equal)."""
    rows = [{"instruction": f"do {k}", "output_1": "r" * (5 + k), "output_2": "m" * (5 + k), "preference": p, "raw_completion": said}
            for k, (p, said) in enumerate([(1, ""), (2, ""), (2, ""), (1.5, None), (0, ""), (None, None), (None, f"```\n{ranks(1, 2)}\n```")])]
    found = alpaca_eval.score([], rows)
    values = [0, 1, 1, 0.5, 0.5]
    close(found["scores"]["win rate"], 60, 1.96 * 100 * np.std(values, ddof=1) / 5 ** 0.5)
    last = 1.0 if alpaca_eval.switched("do 6") else 0.0                  # then model_1 is the model, and won
    controlled = found["scores"]["controlled"]
    assert abs(controlled["mean"] - 100 * np.mean([*values, last])) < 0.2 and controlled["n"] == 6
    assert (found["ok"], found["total"], found["scores"]["win rate"]["n"], found["length"]) == (6, 7, 5, 8)


def test_length_control_recovers_what_made_the_judge_decide():
    """4,000 verdicts by sigmoid(0.4 + 1.5 tanh(d / sd)) with long answers: the win rate says 72 %, at equal length it is 60 %."""
    rng = np.random.default_rng(1)
    d = rng.normal(300, 500, 4000)
    won = (rng.random(4000) < 1 / (1 + np.exp(-(0.4 + 1.5 * np.tanh(d / d.std()))))).astype(float)
    found, truth = alpaca_eval.at_equal_length(list(won), list(d)), 100 / (1 + np.exp(-0.4))
    assert 100 * won.mean() > truth + 8 and abs(found["mean"] - truth) < found["ci"] < 3 and found["n"] == 4000
    even = alpaca_eval.at_equal_length([1, 0, 0.5, 1] * 50, [0] * 200)
    assert abs(even["mean"] - 62.5) < 0.1, "no difference in length: the win rate itself"
    always = alpaca_eval.at_equal_length([1.0] * 50, [1, -1] * 25)
    assert 95 < always["mean"] < 100 and np.isfinite(always["ci"]) and alpaca_eval.at_equal_length([], [])["mean"] is None


# ---- MM-Vet ----------------------------------------------------------------------------------------------------

def test_mm_vet_reads_grades():
    reads(mm_vet.read, {"0.7": 0.7, "1": 1.0, "0.5\n": 0.5, "0.5\nbecause": 0.5, " 0.3": 0.3, "**0.4**": 0.4, "2": None, "0.9 since": 0.9,
                        "I'd say 0.5": None, "": None, "-0.5": None, "1.0.": 1.0, "8/10": None, "1/2": None, "10": None, "0.5/1": None, ".5": 0.5,
                        "v0.5": None})
    assert mm_vet.judge_rows([Prompt("v1_0", ""), Prompt("v1_1", "")], {"v1_0": "0.7 or so"}, "j") == {
        "v1_0": {"model": ["j"], "content": ["0.7 or so"], "score": [0.7]}}


def make_mm_vet(data: Path) -> Path:
    rows = {f"v1_{k}": {"imagename": f"v1_{k}.png", "question": f"what {k}?", "answer": "a<AND>b<OR>c", "capability": c, "imagesource": "web"}
            for k, c in enumerate((["ocr", "math"], ["math", "ocr"], ["rec"], ["rec"]))}
    write(data / "mm_vet/mm-vet.json", rows)
    return data


def test_mm_vet_scores_as_its_evaluator_does(tmp_path):
    items = items_of(make_mm_vet(tmp_path), mm_vet)
    grade = lambda *pairs: {"model": ["gpt-4"] * len(pairs), "content": [c for c, _ in pairs], "score": [s for _, s in pairs]}
    rows = {"v1_0": grade(("1.0", 1.0), ("0.5", 0.5)), "v1_1": grade(("0.0", 0.0), ("0.1", 0.1)), "v1_2": grade(("0.2", 0.2), ("0.4", 0.4)),
            "v1_3": grade(("well", 0.0), ("0.8", 0.8))}
    found = mm_vet.score(items, rows)
    close(found["scores"]["total"], np.mean([(1 + 0 + .2 + 0) / 4, (.5 + .1 + .4 + .8) / 4]) * 100)
    close(found["scores"]["parsed"], (1 + 0 + .2 + .5 + .1 + .4 + .8) / 7 * 100)     # "well" is no grade
    close(found["categories"]["ocr"], np.mean([.5, .3]) * 100)
    close(found["categories"]["rec"], np.mean([.1, .6]) * 100)
    sums = [1.5, 0.1, 0.6, 0.8]                                          # of both runs: a question's move together
    close(found["scores"]["total"], 50 * np.mean(sums), 1.96 * 50 * np.std(sums, ddof=1) / 2)
    assert (found["ok"], found["total"]) == (4, 4) and [*found["categories"]] == ["math", "ocr", "rec"]
    assert mm_vet.score(items, {"v1_3": grade(("well", 0.0))})["ok"] == 0
    assert mm_vet.score(items, {})["scores"]["total"]["mean"] is None
    with pytest.raises(BadInput, match="no question of mm-vet.json"):
        mm_vet.score(items, {"v1_9": grade(("1", 1.0))})


def test_mm_vet_takes_the_users_prompt_and_says_whose_it_is(tmp_path):
    items = answered(items_of(make_mm_vet(tmp_path), mm_vet), {"v1_2": ["A, b"]})
    ask = lambda: prompts_of(tmp_path, mm_vet, items)["v1_2"]
    assert ask().text == f"{mm_vet.OURS}\nwhat 2? | a <AND> b <OR> c | A, b | " and "our own wording" in ask().wording
    write(tmp_path / "mm_vet/prompt.txt", "OFFICIAL\nQ | G | P | C\n")
    assert ask().text == "OFFICIAL\nQ | G | P | C\nwhat 2? | a <AND> b <OR> c | A, b | " and "official" in ask().wording and ask().system == ""


# ---- LLaVA-Bench -----------------------------------------------------------------------------------------------

def test_llava_bench_reads_pairs():
    no = [-1, -1]
    reads(llava_bench.official, {"8 7\nBoth": [8, 7], "8,7": [8, 7], "8, 9\nwell": no, "8.5 9": [8.5, 9], "8 7 ": no, "eight 9": no, "": no, "8": no,
                                 "1 2 3": no, "80 90": [80, 90], "0 5": [0, 5]})
    reads(llava_bench.read, {"8 7\nBoth": [8, 7], "8,7": [8, 7], "8, 9\nwell": [8, 9], "8.5 9": [8.5, 9], "8 7 ": [8, 7], "eight 9": None, "": None,
                             "8": None, "1 2 3": None, "80 90": None, "0 5": None, "nan 5": None, "8 7 and": None})


def reviewed(n, kind, reply):
    return {"id": n + 1, "question_id": n, "category": f"llava_bench_{kind}", "content": reply, "tuple": llava_bench.official(reply)}


def test_llava_bench_scores_as_summarize_gpt_review_does():
    rows = [reviewed(0, "conv", "8 6"), reviewed(1, "detail", "9 7"), reviewed(2, "detail", "8, 8"), reviewed(3, "complex", "10 4")]
    found = llava_bench.score([], rows)
    m1, m2 = round((8 + 9 - 1 + 10) / 4, 3), round((6 + 7 - 1 + 4) / 4, 3)
    close(found["scores"]["relative"], round(m2 / m1 * 100, 1))                              # -1 averaged in
    close(found["scores"]["parsed"], 100 * (6 + 7 + 8 + 4) / (8 + 9 + 8 + 10))
    close(found["categories"]["detail"], round(3.0 / 4.0 * 100, 1))
    close(found["scores"]["own grade"], 10 * m2)
    close(found["scores"]["reference"], 10 * m1)
    assert (found["ok"], found["total"]) == (4, 4)
    thirds = [{"question_id": k, "category": "llava_bench_conv", "content": "", "tuple": t} for k, t in enumerate(([1, 1], [1, 2], [2, 2]))]
    close(llava_bench.score([], thirds)["scores"]["relative"], 125.1)    # 1.667 / 1.333 as officially rounded; it is 125
    silent = llava_bench.score([], [reviewed(k, "conv", "sorry") for k in range(3)])
    assert silent["scores"]["relative"]["mean"] == 100.0, "as published tables have it"
    assert silent["scores"]["parsed"]["mean"] is None and silent["ok"] == 0


def make_llava_bench(data: Path) -> Path:
    where = data / "llava_bench_wild"
    write(where / "questions.jsonl", [{"question_id": k, "image": f"00{k // 2 + 1}.jpg", "category": kind, "text": f"what {k}?"}
                                      for k, kind in enumerate(("conv", "detail", "complex"))])
    write(where / "context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "a\nb"}, {"id": "002", "image": "002.jpg", "caption": "c"}])
    write(where / "answers_gpt4.jsonl", [{"question_id": k, "text": f"gpt {k} {{role}}", "answer_id": f"g{k}"} for k in range(3)])
    write(where / "rule.json", {f"llava_bench_{kind}": {"role": "Assistant", "prompt": f"rule {kind}"} for kind in ("conv", "detail", "complex")})
    return data


def test_llava_bench_prompts(tmp_path):
    items = answered(items_of(make_llava_bench(tmp_path), llava_bench), {1: ["mine"]})
    assert items[2].questions == ["<image>\nwhat 2?"] and items[2].root.endswith("llava_bench_wild/images")
    prompt = prompts_of(tmp_path, llava_bench, items)[1]
    assert prompt.text == ("[Context]\na\nb\n\n[Question]\nwhat 1?\n\n[Assistant 1]\ngpt 1 {role}\n\n[End of Assistant 1]\n\n"
                           "[Assistant 2]\nmine\n\n[End of Assistant 2]\n\n[System]\nrule detail\n\n")
    assert prompt.system == llava_bench.OURS and "our own" in prompt.wording
    assert llava_bench.judge_rows([prompt], {1: "7 9\nwell"}, "j") == [
        {"id": 1, "question_id": 1, "answer1_id": "g1", "answer2_id": items[1].answer_id("m"), "category": "llava_bench_detail", "content": "7 9\nwell",
         "tuple": [7, 9]}]
    write(tmp_path / "llava_bench_wild/system.txt", "be exact\n")
    assert prompts_of(tmp_path, llava_bench, items)[1].system == "be exact"


# ---- POPE ------------------------------------------------------------------------------------------------------

def test_pope_reads_answers():
    for answer, officially, words in (
            ("Yes", "yes", "yes"), ("No", "no", "no"), ("no", "no", "no"), ("", "yes", "unknown"), ("Yes.", "yes", "yes"), ("NO", "yes", "no"),
            ("No\n", "yes", "no"), ("There isn't a dog", "yes", "no"), ("There isn’t a dog", "yes", "no"), ("Yes, there is no doubt", "no", "yes"),
            ("I cannot tell", "yes", "unknown"), ("No, there is none.", "no", "no"), ("I'm not sure.", "no", "unknown"), ("There is a dog", "yes", "yes"),
            ("nope", "yes", "no"), ("A dog is not there", "no", "no"), ("Yes. No dog", "yes", "yes"), ("a notice", "yes", "unknown"),
            ("t", "yes", "unknown"), ("**Yes**", "yes", "yes")):
        assert (pope.official(answer), pope.words(answer)) == (officially, words), answer


SPLITS = ("adversarial", "popular", "random")


def make_pope(data: Path, images: int = 2, typo: bool = False, question_file: bool = True) -> Path:
    """Three splits of `images` pictures with four questions each, half of them yes; LLaVA's file in its own order."""
    rows = {split: [{"question_id": 4 * i + k + 1, "image": f"COCO_{i}.jpg", "text": f"Is there {thing} in the {'imange' if typo else 'image'}?",
                     "label": "yes" if k % 2 == 0 else "no"} for i in range(images) for k, thing in enumerate(("a dog", "an owl", "a car", f"a {split}"))]
            for split in SPLITS}
    for split, listed in rows.items():
        write(data / f"pope/coco/coco_pope_{split}.json", listed)        # JSON lines in spite of the name
    if question_file:
        flat = [{"image": r["image"], "text": r["text"].replace("imange", "image") + pope.SUFFIX, "category": split} for split in SPLITS
                for r in reversed(rows[split])]
        write(data / "pope/llava_pope_test.jsonl", [{"question_id": k, **r} for k, r in enumerate(flat)])
    return data


def test_pope_scores_by_hand(tmp_path):
    items = items_of(make_pope(tmp_path, images=2, typo=True), pope)
    assert len(items) == 24 and items[0].questions[0] == f"<image>\nIs there a adversarial in the image?{pope.SUFFIX}"
    labels = {(i.row["category"], i.row["image"], i.row["text"].split(" in ")[0]): i.row["label"] for i in items}
    assert labels["random", "COCO_1.jpg", "Is there a dog"] == "yes" and labels["random", "COCO_1.jpg", "Is there an owl"] == "no"
    items = answered(items, lambda i: [{"adversarial": "Yes", "popular": "No" if "COCO_0" in i.images[0] else i.row["label"],
                                        "random": "NO"}[i.row["category"]]])
    found = pope.score(items)
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
    fewer = pope.score([replace(item, texts=item.texts if item.id % 2 else []) for item in items])
    assert fewer["ok"] == 12 and fewer["total"] == 24
    silent = pope.score(answered(items, lambda item: ["No"]))
    assert silent["categories"]["random precision"]["mean"] is None and silent["scores"]["F1"]["mean"] == 0


def test_pope_from_its_own_files_alone(tmp_path):
    items = items_of(make_pope(tmp_path, question_file=False), pope)
    assert len({i.id for i in items}) == 24 and items[0].row["text"].endswith(pope.SUFFIX) and items[0].max_new == 128


@official
def test_pope_labels_fit_whichever_version_is_there():
    items = items_of(OFFICIAL, pope)
    counts = {split: [i.row["label"] for i in items if i.row["category"] == split] for split in SPLITS}
    assert {k: len(v) for k, v in counts.items()} == {"adversarial": 3000, "popular": 3000, "random": 2910}
    assert counts["random"].count("yes") == 1500
    perfect = pope.score(answered(items, lambda item: [item.row["label"].capitalize()]))
    assert perfect["scores"]["F1"]["mean"] == perfect["scores"]["words"]["mean"] == 1


# ---- MMBench ---------------------------------------------------------------------------------------------------

def make_mmbench(data: Path) -> Path:
    """Two questions: 7 with three rotations, 9 with two; pictures of row 7 as base64, the others refer to it."""
    buffer = BytesIO()
    picture(30, 20).save(buffer, "JPEG")
    cell = base64.b64encode(buffer.getvalue()).decode()
    rows = [(1000007, "which?", "a hint", "owl", "cat", "dog", "", "C", "7"), (7, "which?", "a hint\nof two lines", "cat", "dog", "owl", "", "B", cell),
            (2000007, "which?", "nan", "dog", "owl", "cat", "", "A", "7"), (9, "what\\nnow?", "", "None of it", "none", "z", "", "A", "7"),
            (1000009, "what\\nnow?", "", "y", "None of it", "", "", "B", "7")]
    lines = ["\t".join(("index", "question", "hint", "A", "B", "C", "D", "answer", "image"))]
    lines += ["\t".join(f'"{c}"' if "\n" in str(c) else str(c) for c in row) for row in rows]
    write(data / "mmbench/dev.tsv", "\n".join(lines) + "\n")
    return data


def test_mmbench_prompts_options_and_pictures(tmp_path):
    items = items_of(make_mmbench(tmp_path), mmbench)
    assert items[1].questions == [f"<image>\na hint\nof two lines\nwhich?\nA. cat\nB. dog\nC. owl\n{mmbench.SUFFIX}"]
    assert items[2].questions == [f"<image>\nwhich?\nA. dog\nB. owl\nC. cat\n{mmbench.SUFFIX}"], "nan is no hint"
    assert items[3].row["options"] == {"A": "None of it"}, "options end at the first that is none"
    assert {(i.root, *i.images) for i in items} == {(str(tmp_path / "unpacked"), "7.jpg"), (str(tmp_path / "unpacked"), "9.jpg")}
    assert (tmp_path / "unpacked" / "9.jpg").read_bytes() == (tmp_path / "unpacked" / "7.jpg").read_bytes() != b""
    row = mmbench.answer_rows(answered(items, {7: ["B"]})[1:2], "m")[0]
    assert (row["question_id"], row["option_char"], row["options"], row["text"]) == (7, ["A", "B", "C"], ["cat", "dog", "owl"], "B")
    assert "<image>" not in row["prompt"] and row["prompt"].endswith(mmbench.SUFFIX) and row["round_id"] == 0


def test_a_picture_of_mmbench_is_unpacked_whole_or_not_at_all(tmp_path, monkeypatch):
    cell, path = base64.b64encode(b"a whole picture").decode(), tmp_path / "1.jpg"

    def killed(self, data):
        with open(self, "wb") as file:
            file.write(data[:7])
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(Path, "write_bytes", killed)
        mmbench.unpack(cell, path)
    assert not path.exists()
    mmbench.unpack(cell, path)
    assert path.read_bytes() == b"a whole picture"


def test_mmbench_finds_letters():
    for answer, letter in (
            ("B", "B"), ("B.", "B"), ("(C)", "C"), ("The answer is B", "B"), ("A or B", None), ("dog", "B"), ("It is the owl.", "C"), ("cat and dog", None),
            ("", None), ("A cat sits on a very long wall", None), ("the correct answer is **C** and that is it, as one can see from all of this", "C"),
            ("D", None), ("dog" + " and so on" * 20, None)):
        assert mmbench.letter(answer, {"A": "cat", "B": "dog", "C": "owl"}) == letter, answer


def test_mmbench_counts_a_question_only_if_every_rotation_is_right(tmp_path):
    items = items_of(make_mmbench(tmp_path), mmbench)
    answers = {7: ["B"], 1000007: ["C"], 2000007: ["A"], 9: ["A"], 1000009: ["A"]}
    found = mmbench.score(answered(items, answers))
    close(found["scores"]["circular"], 0.5)
    close(found["scores"]["vanilla"], 1.0)
    assert found["scores"]["circular"]["n"] == 2 and found["unknown"] == 0
    fewer = mmbench.score(answered(items, {k: v for k, v in answers.items() if k != 1000009}))
    close(fewer["scores"]["circular"], 1.0)                              # 9 is not whole: it does not count, and coverage says so
    assert (fewer["ok"], fewer["total"]) == (4, 5)
    turned = mmbench.score(answered(items, answers | {1000007: ["A"]}))
    assert (turned["scores"]["circular"]["mean"], turned["scores"]["vanilla"]["mean"]) == (0, 1), "vanilla counts what is not turned"


@official
def test_mmbench_groups_of_the_official_table():
    items = items_of(OFFICIAL, mmbench)
    found = mmbench.score(answered(items, lambda item: [item.row["answer"]]))
    assert len(items) == 4377 and found["scores"]["circular"]["n"] == 1176 and found["scores"]["circular"]["mean"] == 1


# ---- files -----------------------------------------------------------------------------------------------------

MAKERS = {"mt_bench": make_mt_bench, "alpaca_eval": make_alpaca, "mm_vet": make_mm_vet, "llava_bench": make_llava_bench, "pope": make_pope,
          "mmbench": make_mmbench}
SHAPES = {"mt_bench": {"question_id", "answer_id", "model_id", "choices"}, "alpaca_eval": {"dataset", "instruction", "output", "generator"},
          "llava_bench": {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"},
          "pope": {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"},
          "mmbench": {"question_id", "round_id", "prompt", "text", "options", "option_char", "answer_id", "model_id", "metadata"}}


@pytest.mark.parametrize("name", MAKERS)
def test_answers_come_back_from_the_benchmarks_own_format(tmp_path, name):
    bench = BENCHES[name]
    items = items_of(MAKERS[name](tmp_path), bench)
    items = answered(items, lambda item: [f"answer {k} to {item.id}" for k in range(len(item.questions))])
    rows = bench.answer_rows(items, "m")
    assert len(rows) == len(items) and (name == "mm_vet" or all(SHAPES[name] <= set(row) for row in rows))
    path = tmp_path / ("answers" + Path(bench.ANSWERS).suffix)
    harness.dump(path, rows)
    assert bench.read_answers(str(path), items) == {item.id: item.texts for item in items}


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(BadInput, match="mt_bench/ holds no question.jsonl; it comes from github.com/lm-sys"):
        items_of(tmp_path, mt_bench)
    write(tmp_path / "mt_bench/question.jsonl", "{")
    with pytest.raises(BadInput, match="cannot be read as JSON or as lines of it"):
        items_of(tmp_path, mt_bench)
    make_mmbench(tmp_path)
    write(tmp_path / "mmbench/other.tsv", "index\n1\n")
    with pytest.raises(BadInput, match="pope/ holds no coco_pope_adversarial.json; it comes from github.com/RUCAIBox"):
        items_of(tmp_path, pope)
    with pytest.raises(BadInput, match=r"holds 2 \*.tsv; keep one"):
        items_of(tmp_path, mmbench)


def test_nothing_is_random_without_a_seed():
    where = Path(harness.__file__).parent
    for path in (*where.glob("*.py"), where.parent / "evaluate.py"):
        assert not re.findall(r"\brandom\.(?!Random\b)\w+|torch\.(?:rand|multinomial)", path.read_text()), path.name


@official
def test_no_official_text_was_copied_into_this_repository():
    """No run of eight words of a question, a judge's prompt or a rule stands in our files."""
    where = Path(OFFICIAL)
    texts = [r[key] for r in load(where / "mt_bench/judge_prompts.jsonl") for key in ("system_prompt", "prompt_template")]
    texts += [t for r in load(where / "mt_bench/question.jsonl") for t in r["turns"]]
    texts += [r["prompt"] for r in load(next(where.rglob("rule.json"))).values()] + [next(where.rglob("alpaca_eval.txt")).read_text()]
    texts += [r["instruction"] for r in load(next(where.rglob("alpaca_eval*.json")))] + [r["question"] for r in load(where / "mm_vet/mm-vet.json").values()]
    words = lambda text: re.findall(r"[a-z]+", text.lower())
    runs = lambda text: {tuple(w[k:k + 8]) for w in [words(text)] for k in range(len(w) - 7)}
    theirs = set().union(*map(runs, texts))
    for path in (*Path(harness.__file__).parent.glob("*.py"), *Path(__file__).parent.glob("*.py")):
        shared = runs(path.read_text()) & theirs
        assert not shared, f"{path.name}: {' '.join(next(iter(shared)))}"


# ---- stored files that are not what they should be ---------------------------------------------------------------

STORED = {                                                               # bench: (a good judgment, its fields of one kind)
    "mt_bench": {"question_id": 81, "model": "m", "judgment": "[[8]]", "score": 8, "turn": 1},
    "alpaca_eval": {"instruction": "i", "output_1": "a", "output_2": "b", "generator_2": "m", "preference": 2, "raw_completion": None},
    "llava_bench": {"question_id": 1, "category": "llava_bench_conv", "content": "9 8", "tuple": [9, 8]},
}
OTHER = [float("nan"), [], {}, [None], "x" * 900, True, 1e400, -(10 ** 400)]


@pytest.mark.parametrize("name", STORED)
def test_a_judgment_of_other_types_is_named_or_scored_and_no_figure_is_nan(tmp_path, name, capsys):
    """Every field of a row, replaced by whatever JSON can hold."""
    good, ended = STORED[name], set()
    for field in good:
        for value in [*OTHER, None]:
            path = tmp_path / "x.json"
            path.write_text(json.dumps([good, good | {field: value}]))
            try:
                figures = evaluate.stored_judgments(evaluate.Settings(bench=name, judgments=str(path)), name)
                assert "NaN" not in json.dumps(figures), (field, value)
                ended.add("scored")
            except BadInput as problem:
                assert re.match(rf"{path}: row 2: {field} is .* but must be ", str(problem)) and len(str(problem)) < 300
                ended.add("named")
    assert ended == {"scored", "named"}


def test_of_many_models_one_can_be_named(tmp_path):
    rows = [STORED["mt_bench"] | {"model": model} for model in "abc"]
    s = evaluate.Settings(bench="mt_bench", judgments=str(write(tmp_path / "x.jsonl", rows)), model="b")
    assert list(evaluate.stored_judgments(s, "mt_bench")) == ["b"]
    with pytest.raises(BadInput, match="--model d: .* has a, b, c"):
        evaluate.stored_judgments(replace(s, model="d"), "mt_bench")


def test_mt_bench_error_is_no_answer_and_odd_grades_are_read(tmp_path):
    rows = [{"question_id": 1, "choices": [{"turns": ["a", "$ERROR$"]}]}, {"question_id": 2, "choices": [{"turns": ["a", "b"]}]}]
    assert mt_bench.read_answers(write(tmp_path / "a.jsonl", rows), []) == {2: ["a", "b"]}
    for rows, why in (([{"question_id": 1, "choices": []}], "turns is missing"), ([{"question_id": 1, "choices": [{"turns": ["a"]}]}], "each of its two turns")):
        with pytest.raises(BadInput, match=f"question 1.*{why}"):
            mt_bench.read_answers(write(tmp_path / "a.jsonl", rows), [])
    make_mt_bench(tmp_path)
    write(tmp_path / "mt_bench/question.jsonl", [{"question_id": 5, "category": "generic", "turns": ["How?"]}])
    with pytest.raises(BadInput, match="question 5 has not two turns"):
        items_of(tmp_path, mt_bench)
    assert mt_bench.official("Rating: [[07]]") == 7 and mt_bench.official("[[" + "9" * 400 + "]]") == -1
    assert mt_bench.read(" [4]\n") == 4 and readable(mt_bench.read, "as in [4] it says") is None


def test_pope_answers_are_paired_with_their_own_questions(tmp_path):
    make_pope(tmp_path)
    items = items_of(tmp_path, pope)
    rows = [{"question_id": item.id, "prompt": item.row["text"], "text": "Yes"} for item in items]
    whole = {item.id: ["Yes"] for item in items}
    assert pope.read_answers(str(write(tmp_path / "a.jsonl", rows)), items) == whole
    rows[0], rows[1] = rows[0] | {"prompt": rows[1]["prompt"]}, rows[1] | {"prompt": rows[0]["prompt"]}
    with pytest.raises(BadInput, match="a.jsonl: row 1 answers 'Is there .*, but question .* is 'Is there"):
        pope.read_answers(str(write(tmp_path / "a.jsonl", rows)), items)

    # a file for each split, LLaVA's and POPE's own
    ids, own = [], []
    for split in pope.SPLITS:
        mine = sorted((item for item in items if item.row["category"] == split), key=lambda item: item.row["place"])
        ids.append(write(tmp_path / f"m_{split}.jsonl", [{"question_id": item.row["place"], "text": "Yes"} for item in mine]))
        own.append(write(tmp_path / f"coco_pope_{split}.jsonl",
                         [{"question": item.row["text"].split("\n")[0], "answer": "Yes"} for item in mine]))
    assert pope.read_answers(",".join(map(str, ids)), items) == pope.read_answers(",".join(map(str, own)), items) == whole
    with pytest.raises(BadInput, match="need its name, one of adversarial, popular, random"):
        pope.read_answers(str(write(tmp_path / "own.json", [{"question": "Is it?", "answer": "Yes"}])), items)


def test_pope_labels_are_yes_or_no_in_any_case(tmp_path):
    make_pope(tmp_path)
    path = next(tmp_path.rglob("coco_pope_random.json"))
    rows = load(path)
    write(path, [row | {"label": row["label"].title()} for row in rows])
    assert {item.row["label"] for item in items_of(tmp_path, pope)} == {"yes", "no"}
    write(path, [row | {"label": "maybe"} for row in rows])
    with pytest.raises(BadInput, match="coco_pope_random.json: row 1: label maybe is neither yes nor no"):
        items_of(tmp_path, pope)


def test_mmbench_without_labels_or_as_a_workbook_is_named(tmp_path):
    make_mmbench(tmp_path)
    path = next(tmp_path.rglob("*.tsv"))
    path.rename(path.with_suffix(".xlsx"))
    with pytest.raises(BadInput, match="holds an .xlsx, and its pictures and rotations stand in the .tsv only"):
        items_of(tmp_path, mmbench)
    lines = path.with_suffix(".xlsx").read_text().split("\n")
    path.write_text(lines[0].replace("answer", "unlabelled") + "\n" + "\n".join(lines[1:]))
    with pytest.raises(BadInput, match="has no answer among its options; the test split has none"):
        items_of(tmp_path, mmbench)


def test_mm_vet_answers_and_grades_that_are_none(tmp_path):
    for found, why in (({"v1_0": None}, "v1_0 is (missing|null), but must be a text"), ([{"v1_0": "a"}], "must be one object")):
        with pytest.raises(BadInput, match=why):
            mm_vet.read_answers(write(tmp_path / "a.json", json.dumps(found)), [])
    for row in (0.5, {"content": [None], "score": [None]}, {"content": ["1"], "score": ["1"]}):
        with pytest.raises(BadInput, match="row v1_0: (content|score) is "):
            harness.stored(write(tmp_path / "g.json", {"v1_0": row}), **mm_vet.JUDGED)
