"""Two text benchmarks, as their authors run and score them: MT-Bench and AlpacaEval.

Each is a class of plain functions, never an object; evaluate.py looks them up by name:

    items(data)                             the questions, from the official files under --data_dir
    answer_rows / read_answers              the model's answers, in the benchmark's own format, out and in
    prompts(data, items, answers)           what the judge reads: the official templates, filled
    read(text)                              a judge's reply; ValueError where it says nothing that can be used
    judge_rows(...)                         the judgments, in the benchmark's own format
    score(items, answers, rows)             {"scores", "ok", "total", ...} from such rows, ours or anybody's

MT-Bench (arXiv:2306.05685, FastChat's llm_judge): 80 questions of two turns in 8 categories, each turn graded 1 to 10; the mean
over all rows whose grade could be read. The official parser takes the first [[number]] or, failing that, [number], "[1]" of a
citation included, and a row judged twice counts twice; `strict` takes a grade from 1 to 10 and each turn once. 13 of the 30
reference answers that the judge is given are wrong (FastChat pull request 3158); `sound` leaves out those questions.

AlpacaEval 1 (github.com/tatsu-lab/alpaca_eval): 805 instructions; the judge ranks the answer against text-davinci-003's, in an
order drawn per instruction. win = 100 mean(p - 1), p = 2 where the model won. The official parser wants a bare Python list;
`tolerant` also finds it in a code fence or in prose. Judges like length, so `controlled` asks what the win rate were at equal
length, as arXiv:2404.04475 does (less its term for an instruction's difficulty, which takes other models' judgments):

    P(model wins) = sigmoid(t + f tanh((len - len_reference) / sd)),   reported: 100 sigmoid(t)

Other than officially, the judge is asked at temperature 0 where it can be, and its replies may be long.

Previous: toy/items.py.  Next: benchmarks/pictures.py (four with pictures).
"""
import ast
import random
import re

import numpy as np

from benchmarks.harness import UNKNOWN, Item, Prompt, find, load, mean
from common import sha

FASTCHAT = "github.com/lm-sys/FastChat, fastchat/llm_judge/data"
ALPACA = "github.com/tatsu-lab/alpaca_eval"


def complete(items: list[Item], answers: dict) -> list[tuple[Item, list[str]]]:
    """Items with an answer to each turn, and the answers' texts."""
    return [(i, [a["text"] for a in answers[i.id]]) for i in items if len(answers.get(i.id, ())) == len(i.questions)]


class MTBench:
    vision, judged, form = False, True, "5.2f"
    files = "model_answer/{model}.jsonl", "model_judgment/{judge}_single.jsonl"
    row = "question_id", "turn", "score"                                 # what a stored judgment must have
    TEMPERATURE = {"extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}    # else 0.7
    REFERENCE = ("math", "reasoning", "coding")                          # what the judge is given the right answer to
    WRONG = (104, 105, 109, 111, 113, 114, 120, 122, 124, 125, 126, 128, 130)

    def items(data: str) -> list[Item]:
        return [Item(str(r["question_id"]), r["turns"], r, temperature=MTBench.TEMPERATURE.get(r["category"], 0.7))
                for r in load(find(data, "mt_bench", "question.jsonl", FASTCHAT), "question_id", "category", "turns")]

    def answer_rows(items: list[Item], answers: dict, model: str) -> list[dict]:
        return [{"question_id": i.row["question_id"], "answer_id": sha(model, i.id, *texts), "model_id": model,
                 "choices": [{"index": 0, "turns": texts, "finish": [a["finish"] for a in answers[i.id]]}]}
                for i, texts in complete(items, answers)]

    def read_answers(path) -> dict:
        rows = load(path, "question_id", "choices")
        finish = lambda choice: choice.get("finish") or [None] * len(choice["turns"])
        return {str(r["question_id"]): [{"text": t, "finish": f} for t, f in zip(c["turns"], finish(c))]
                for r in rows for c in r["choices"][:1]}

    def prompts(data: str, items: list[Item], answers: dict) -> list[Prompt]:
        path = find(data, "mt_bench", "judge_prompts.jsonl", FASTCHAT)
        templates = {r["name"]: r for r in load(path, "name", "system_prompt", "prompt_template")}
        references = {r["question_id"]: r["choices"][0]["turns"] for r in
                      load(find(data, "mt_bench", "reference_answer/gpt-4.jsonl", FASTCHAT), "question_id", "choices")}
        out = []
        for item, (one, two) in complete(items, answers):
            number, (first, second) = item.row["question_id"], item.row["turns"]
            fields = {"question": first, "answer": one, "question_1": first, "answer_1": one,      # each template takes its own
                      "question_2": second, "answer_2": two}
            math = "math-" if item.row["category"] in MTBench.REFERENCE else ""
            if math:
                fields["ref_answer_1"], fields["ref_answer_2"] = references[number]
            for turn, name in ((1, f"single-{math}v1"), (2, f"single-{math}v1-multi-turn")):
                text = templates[name]["prompt_template"].format(**fields)
                out.append(Prompt(f"{number}-{turn}", text, templates[name]["system_prompt"],
                                  {"question_id": number, "turn": turn, "prompt_name": name}))
        return out

    def official(text: str) -> float:
        """FastChat's parser; -1 where there is no grade."""
        found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
        return ast.literal_eval(found[1]) if found else -1

    def read(text: str) -> float:
        """The grade, 1 to 10. Raises ValueError."""
        found = re.search(r"\[\[(\d+(?:\.\d+)?)(?:/10)?\]\]", text) or re.search(r"[Rr]ating:?\s*\**\[(\d+(?:\.\d+)?)\]", text)
        if not found or not 1 <= float(found[1]) <= 10:
            raise ValueError("no [[grade]] from 1 to 10")
        return float(found[1])

    def judge_rows(items, answers, prompts: list[Prompt], replies: dict, model: str, judge: str) -> list[dict]:
        """replies: {prompt id: text of a usable reply}. FastChat's way to say "no grade" is -1."""
        said = {p.id: replies.get(p.id, "$ERROR$") for p in prompts}
        return [{"question_id": p.row["question_id"], "model": model, "judge": [judge, p.row["prompt_name"]],
                 "user_prompt": p.text, "judgment": said[p.id], "score": MTBench.official(said[p.id]),
                 "turn": p.row["turn"]} for p in prompts]

    def score(items: list[Item], answers: dict, rows: list[dict]) -> dict:
        good = [r for r in rows if r["score"] != -1]
        said = {(r["question_id"], r["turn"]): r.get("judgment", f"[[{r['score']}]]") for r in rows}     # a turn's last judgment
        strict = {key: grade for key, text in said.items() if (grade := readable(MTBench.read, text)) is not None}
        sound = {key: grade for key, grade in strict.items() if key[0] not in MTBench.WRONG}
        over = lambda rows: mean([r["score"] for r in rows], [r["question_id"] for r in rows])
        once = lambda grades: mean(list(grades.values()), [question for question, _ in grades])
        category = {i.row["question_id"]: i.row["category"] for i in items}
        return {"scores": {"score": over(good), "turn 1": over([r for r in good if r["turn"] == 1]),
                           "turn 2": over([r for r in good if r["turn"] == 2]), "strict": once(strict), "sound": once(sound)},
                "categories": {name: over([r for r in good if category.get(r["question_id"]) == name])
                               for name in dict.fromkeys(category.values())},
                "ok": len(strict), "total": 2 * len(items) or len(said)}


def readable(read, text):
    """read(text), or None where it raises ValueError."""
    try:
        return read(text)
    except ValueError:
        return None


class AlpacaEval:
    vision, judged, form = False, True, "5.1f"
    files = "model_outputs.json", "annotations.json"
    row = "instruction", "output_1", "output_2", "preference"

    def items(data: str) -> list[Item]:
        source = f"huggingface.co/datasets/tatsu-lab/alpaca_eval (alpaca_eval.json) or {ALPACA}"
        rows = load(find(data, "alpaca_eval", "alpaca_eval*.json", source), "instruction", "output")
        return [Item(sha(r["instruction"]), [r["instruction"]], r) for r in rows]

    def answer_rows(items: list[Item], answers: dict, model: str) -> list[dict]:
        return [{"dataset": i.row.get("dataset"), "instruction": i.row["instruction"], "output": text, "generator": model,
                 "finish": answers[i.id][0]["finish"]} for i, (text,) in complete(items, answers)]

    def read_answers(path) -> dict:
        rows = load(path, "instruction", "output")
        return {sha(r["instruction"]): [{"text": r["output"], "finish": r.get("finish")}] for r in rows}

    def switched(instruction: str) -> bool:
        """Is the model's answer shown first? Drawn as the official annotator draws it, seed 0."""
        return random.Random("is_switched_outputs" + instruction + "0").choices([False, True], k=1)[0]

    def prompts(data: str, items: list[Item], answers: dict) -> list[Prompt]:
        """Filled as officially: the first {field} that stands there is replaced, one field after the other, then the ChatML
        markers split it into messages. Equal answers are not asked about."""
        template = find(data, "alpaca_eval", "alpaca_eval.txt", f"{ALPACA}, evaluators_configs").read_text(encoding="utf8")
        out = []
        for item, (text,) in complete(items, answers):
            if text == item.row["output"]:
                continue
            first, second = item.row["output"], text
            if AlpacaEval.switched(item.row["instruction"]):
                first, second = second, first
            filled = template.strip()
            for name, value in (("instruction", item.row["instruction"]), ("output_1", first), ("output_2", second)):
                filled = filled.replace("{" + name + "}", value, 1)
            parts = [part.split("\n", 1) for part in filled.split("<|im_start|>")[1:]]
            said = {role.strip(): body.split("<|im_end|>", 1)[0].strip() for role, body in parts}
            out.append(Prompt(item.id, said["user"], said["system"]))
        return out

    def official(text: str) -> int:
        """The rank of model_1 in a bare Python list. Raises ValueError."""
        try:
            rank = [entry["rank"] for entry in ast.literal_eval(text.strip()) if entry["model"] == "model_1"][0]
        except (ValueError, SyntaxError, TypeError, KeyError, IndexError, MemoryError, RecursionError):
            raise ValueError("no list that ranks model_1") from None
        if rank not in (1, 2):
            raise ValueError(f"rank {rank!r}")
        return rank

    def read(text: str) -> int:
        found = re.search(r"\[\s*{.*?}\s*,?\s*\]", text, re.S)
        return AlpacaEval.official(found[0] if found else text)

    def judge_rows(items, answers, prompts, replies: dict, model: str, judge: str) -> list[dict]:
        rows = []
        for item, (text,) in complete(items, answers):
            reply, same = replies.get(item.id), text == item.row["output"]
            rank = readable(AlpacaEval.official, reply) if reply else None
            rows.append({"instruction": item.row["instruction"], "output_1": item.row["output"], "output_2": text,
                         "generator_1": item.row.get("generator", "reference"), "generator_2": model, "annotator": judge,
                         "dataset": item.row.get("dataset"), "raw_completion": reply,
                         "preference": 1.5 if same else AlpacaEval.unswitched(rank, item.row["instruction"])})
        return rows

    def unswitched(rank: int | None, instruction: str) -> int | None:
        return 3 - rank if rank and AlpacaEval.switched(instruction) else rank

    def score(items: list[Item], answers: dict, rows: list[dict]) -> dict:
        won = lambda p: 0.5 if p in (0, 1.5) else p - 1
        good = [won(r["preference"]) for r in rows if r["preference"] is not None]
        tolerant = {}
        for r in rows:
            p, said = r["preference"], r.get("raw_completion")
            if p is None and isinstance(said, str):
                p = AlpacaEval.unswitched(readable(AlpacaEval.read, said), r["instruction"])
            if p is not None:
                tolerant[r["instruction"]] = (won(p), len(r["output_2"]) - len(r["output_1"]))
        wins = [w for w, _ in tolerant.values()]
        return {"scores": {"win rate": mean([100 * w for w in good]), "tolerant": mean([100 * w for w in wins]),
                           "controlled": length_controlled(wins, [d for _, d in tolerant.values()])},
                "length": float(np.mean([len(r["output_2"]) for r in rows])) if rows else None,
                "ok": len(tolerant), "total": len(items) or len({r["instruction"] for r in rows})}


def length_controlled(wins: list[float], longer: list[float], ridge: float = 0.01) -> dict:
    """The win rate in % at equal length: a logistic regression of wins (0, 0.5 or 1) on tanh of the standardised difference in
    length, by Newton's method. A little ridge on both weights keeps a model that always wins at a finite place."""
    y, d = np.asarray(wins, float), np.asarray(longer, float)
    if not len(y):
        return UNKNOWN
    x = np.stack([np.ones_like(d), np.tanh(d / (d.std() or 1.0))], 1)    # (n, 2)
    w = np.zeros(2)
    for _ in range(50):                                                  # some ten are enough
        p = 1 / (1 + np.exp(-x @ w))
        hessian = (x * (p * (1 - p))[:, None]).T @ x + ridge * np.eye(2)
        w = w + np.linalg.solve(hessian, x.T @ (y - p) - ridge * w)
    at = 1 / (1 + np.exp(-w[0]))
    spread = np.linalg.inv(hessian)[0, 0] ** 0.5                         # of w[0]; by the delta method, of the rate:
    return {"mean": float(100 * at), "ci": float(100 * 1.96 * at * (1 - at) * spread), "n": len(y)}


TEXT = {"mt_bench": MTBench, "alpaca_eval": AlpacaEval}
