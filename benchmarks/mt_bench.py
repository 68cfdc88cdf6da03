"""MT-Bench (arXiv:2306.05685, FastChat's llm_judge): 80 questions of two turns in 8 categories,
each turn graded from 1 to 10 by a judge.

Officially, `score` is the mean over all rows in which FastChat's parser finds a grade: the first
[[number]] or, failing that, the first [number], "[1]" of a citation included. A row that was judged
twice counts twice. `strict` takes only a grade from 1 to 10, and the last judgment of each turn.

Other than officially, the judge is asked at temperature 0 where it can be, and its replies may be
long. For mathematics, reasoning and coding it is given GPT-4's answers as a reference; 13 of these
30 are wrong (FastChat pull request 3158).
"""
import math
import re

from benchmarks.harness import Item, Prompt, mean, readable, stored
from common import BadInput, field, shown

FORM = "5.2f"
SCALE = 1
FOLDER = "mt_bench"
SOURCE = "github.com/lm-sys/FastChat, fastchat/llm_judge/data"
ANSWERS = "model_answer/{model}.jsonl"
JUDGMENTS = "model_judgment/{judge}_single.jsonl"
JUDGED = {
    "question_id": "a name or number",
    "turn": "a whole number",
    "judgment": "a text",
    "score": "a number",
}
ERROR = "$ERROR$"                          # what FastChat writes where a call failed

WITH_REFERENCE = ("math", "reasoning", "coding")
TEMPERATURE = {"math": 0.0, "reasoning": 0.0, "coding": 0.0, "extraction": 0.0, "stem": 0.1,
               "humanities": 0.1}                                    # of the others: 0.7


def items(folder):
    found = []
    rows = stored(folder.find("question.jsonl"), question_id="a name or number", category="a text",
                  turns="a list of texts")
    for row in rows:
        if len(row["turns"]) != 2:
            raise BadInput(f"{row.file}: question {shown(str(row['question_id']))} has not two "
                           "turns, as MT-Bench's have")
        temperature = TEMPERATURE.get(row["category"], 0.7)
        found.append(Item(row["question_id"], row["turns"], row, temperature=temperature))
    return found


def answer_rows(items, model):
    rows = []
    for item in items:
        choice = {"index": 0, "turns": item.texts, "finish": item.finishes}
        rows.append({
            "question_id": item.id,
            "answer_id": item.answer_id(model),
            "model_id": model,
            "choices": [choice],
        })
    return rows


def read_answers(path, items):
    found = {}
    for row in stored(path, question_id="a name or number", choices="a list"):
        where = f"{path}: question {shown(str(row['question_id']))}"
        first = row["choices"][0] if row["choices"] else {}
        turns = field(first, "turns", "a list of texts", where)
        if len(turns) != 2:
            raise BadInput(f"{where} has not an answer to each of its two turns")
        if ERROR not in turns:
            found[row["question_id"]] = turns
    return found


def prompts(folder, items, model):
    templates = folder.by("name", "judge_prompts.jsonl")
    references = folder.by("question_id", "reference_answer/gpt-4.jsonl")
    found = []
    for item in items:
        (q1, q2), (a1, a2) = item.row["turns"], item.texts
        fields = {
            "question": q1,
            "answer": a1,
            "question_1": q1,
            "answer_1": a1,
            "question_2": q2,
            "answer_2": a2,
        }
        kind = "single"
        if item.row["category"] in WITH_REFERENCE:
            reference = references[item.id]["choices"][0]["turns"]
            fields["ref_answer_1"], fields["ref_answer_2"] = reference
            kind = "single-math"
        for turn, name in ((1, f"{kind}-v1"), (2, f"{kind}-v1-multi-turn")):
            text = templates[name]["prompt_template"].format(**fields)
            system = templates[name]["system_prompt"]
            row = {
                "question_id": item.id,
                "model": model,
                "judge": name,
                "user_prompt": text,
                "turn": turn,
            }
            found.append(Prompt(f"{item.id}-{turn}", text, system, row))
    return found


def official(text):
    """FastChat's parser; -1 where there is no grade."""
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    grade = float(found[1]) if found else -1
    if not math.isfinite(grade):
        return -1
    return int(grade) if grade == int(grade) else grade


def read(text):
    """The grade, 1 to 10."""
    found = (re.search(r"\[\[(\d+(?:\.\d+)?)(?:/10)?\]\]", text)
             or re.search(r"[Rr]ating:?\s*\**\[(\d+(?:\.\d+)?)\]", text)
             or re.fullmatch(r"\s*\[(\d+(?:\.\d+)?)\]\s*", text))
    if not found or not 1 <= float(found[1]) <= 10:
        raise ValueError("no [[grade]] from 1 to 10")
    return float(found[1])


def judge_rows(prompts, replies, judge):
    rows = []
    for prompt in prompts:
        text = replies.get(prompt.id, ERROR)                         # which has no grade: -1
        rows.append(prompt.row | {
            "judge": [judge, prompt.row["judge"]],
            "judgment": text,
            "score": official(text),
        })
    return rows


def score(items, rows):
    last = {}                              # (question, turn) -> what the last judgment of it says
    for row in rows:
        last[row["question_id"], row["turn"]] = row["judgment"]
    grades, questions = [], []
    for (question, _), text in last.items():
        grade = readable(read, text)
        if grade is not None:
            grades.append(grade)
            questions.append(question)

    graded = [row for row in rows if row["score"] != -1]
    scores = {
        "score": average(graded),
        "turn 1": average([row for row in graded if row["turn"] == 1]),
        "turn 2": average([row for row in graded if row["turn"] == 2]),
        "strict": mean(grades, questions),
    }
    return {"scores": scores, "ok": len(grades), "total": 2 * len(items) or len(last)}


def average(rows):
    """The mean score; both turns of a question move together."""
    return mean([row["score"] for row in rows], [row["question_id"] for row in rows])
