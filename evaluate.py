"""Did it help, and what did it cost: published benchmarks and the miniature's.

    text       mt_bench       80 questions of two turns, graded 1 to 10 by a judge
               alpaca_eval    805 instructions, judged against text-davinci-003's answers
               ifeval         541 prompts with instructions that a program checks, no judge
               likelihood     log-probs of given answers, no judge
    vision     mm_vet         218 questions graded 0 to 1 by a judge
               llava_bench    60, against GPT-4's answers
               pope           8,910 times yes or no, no judge
               mmbench        1,176 times a letter, no judge

A model answers; a judge grades where one is needed; pure functions score (benchmarks/). Each stage
leaves files in the benchmark's own format, so that its own tools read them, and can start from
somebody else's:

    python evaluate.py                                     the miniature, offline, under a minute
    python evaluate.py --ckpt DIR --bench mt_bench,pope --data_dir DATA --judge gemini:MODEL
    python evaluate.py --bench alpaca_eval --judgments annotations.json --json     nobody is asked
    python evaluate.py --bench pope --data_dir DATA --answers answers.jsonl
    python evaluate.py --compare runs/evaluate/llava runs/evaluate/dpo

The rule: a failure is never a score. What could not be answered, or ended as blocked, truncated,
unparseable or failed (judge/client.py), has no grade. The mean is over the rest, the coverage
stands next to it, and below --coverage the command exits with 1. Answers and replies are
journalled: kill it, run the same command, and it ends where it would have ended.
"""
import json
import sys
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import checkpoint
from benchmarks import (
    alpaca_eval, compare, ifeval, likelihood, llava_bench, mm_vet, mmbench, mt_bench, pope,
)
from benchmarks.harness import (
    Folder, answer, answer_from_server, dump, mean, shown, slug, stored,
)
from benchmarks.style import style
from common import (
    BadInput, describe_run, device_and_dtype, lock, main, sha, write_json, write_jsonl,
)
from data import Pixels, Tokens, target_scores
from journal import Journal
from judge.client import Judge, JudgeSettings, Replies, door
from judge.wire import Question
from toy import items as miniature

BENCHES = {
    "mm_vet": mm_vet,
    "llava_bench": llava_bench,
    "pope": pope,
    "mmbench": mmbench,
    "mt_bench": mt_bench,
    "alpaca_eval": alpaca_eval,
    "ifeval": ifeval,
    "likelihood": likelihood,
}
MINIATURE = ("miniature", "english")


@dataclass
class Settings(JudgeSettings):
    """Score checkpoints, or stored answers and judgments, on benchmarks."""
    ckpt: str = "toy/vicuna,toy/llava"   # checkpoint folders, comma-separated; or openai:MODEL@URL
    bench: str = "miniature"       # benchmarks, comma-separated; or the miniature's, or its english
    data_dir: str = ""             # official files, a folder per benchmark (docs/benchmarks.md)
    out: str = "runs/evaluate"     # a folder of results per checkpoint; the same again: go on there
    answers: str = ""              # a stored answer file of the one --bench instead of a checkpoint
    judgments: str = ""            # a stored judgment file of the one --bench: nothing is asked
    model: str = ""                # of a judgment file of many models: this one alone
    compare: tuple = ()            # result folders to put side by side
    json: bool = False             # print the results as JSON and nothing else
    device: str = "auto"           # cpu, cuda, ...
    dtype: str = "auto"            # float32, bfloat16; auto: float32 on the CPU
    template: str = ""             # how prompts are spelled (data.TEMPLATES); empty: its own
    batch: int = 16                # questions answered at once
    max_new: int = 0               # longest answer in tokens; 0: the benchmark's own
    seed: int = 0                  # of sampling (MT-Bench)
    coverage: float = 0.95         # smallest share to be scored; below it the exit code is 1
    split: str = "test"            # of the miniature: test, or dev for choosing settings
    target: str = ""               # scores to ask a SteerLM model for, "4 4 4 4 0"; empty: its own


# ---- questions and answers ----------------------------------------------------------------------

def folder_of(s, name):
    bench = BENCHES[name]
    return Folder(Path(s.data_dir) / bench.FOLDER, bench.SOURCE, Path(s.out) / name / "images")


def questions(s, name):
    """The items of a benchmark, with the answers of --answers where that is given."""
    bench = BENCHES[name]
    items = bench.items(folder_of(s, name))
    if s.max_new:
        items = [replace(item, max_new=s.max_new) for item in items]
    if s.answers:
        answers = bench.read_answers(s.answers, items)
        items = [replace(item, texts=answers.get(item.id, [])) for item in items]
        if not any(item.texts for item in items):
            raise BadInput(f"--answers {s.answers}: answers none of the questions of {name}")
    return items


def tokens_of(s, ckpt, config):
    """A checkpoint's tokens; a SteerLM model is asked for the scores of --target, or its own."""
    tokens = Tokens(checkpoint.resolve(ckpt), config, s.template)
    if tokens.steer and s.target:
        tokens = tokens.asking(target_scores(s.target))
    return tokens


def answer_all(s, ckpt, items, out):
    """{bench: its items with answers}, less the benchmarks that this checkpoint has no eyes for."""
    if ckpt.startswith("openai:"):
        return answers_of_server(s, ckpt, items, out)
    folder = checkpoint.resolve(ckpt)
    config, _ = checkpoint.read_config(folder)
    device, dtype = device_and_dtype(s.device, s.dtype)
    tokens = tokens_of(s, ckpt, config)
    model = cache(lambda: checkpoint.load(folder, device, dtype))    # when an answer is missing
    about = sha(checkpoint.stamp(folder), str(dtype))
    answered = {}
    with closing(Journal(out / "answers-journal.jsonl", answer="an object")) as journal:
        for name, asked in items.items():
            if not config.vision and any(item.images for item in asked):
                print(f"{ckpt} sees no pictures; left out: {name}", file=sys.stderr)
                continue
            if BENCHES[name] is likelihood:
                answered[name] = likelihood.measure(model(), tokens, Pixels(config), asked)
            else:
                answered[name] = answer(
                    asked, model, tokens, Pixels(config), batch=s.batch, seed=s.seed,
                    journal=journal, about=about, desc=f"{ckpt}: {name}")
    return answered


def server_of(s, ckpt):
    """--ckpt openai:MODEL@URL -> the settings of a client that asks it."""
    model, _, url = ckpt.partition("@")
    return replace(s, judge=model, judge_url=url, thinking="", flex=False)


def answers_of_server(s, ckpt, items, out):
    """The same from a server that has the model; it spells the prompts."""
    with closing(Replies(out / "answers-server.jsonl")) as replies:
        client = Judge(server_of(s, ckpt), replies)
        return {name: answer_from_server(asked, client) for name, asked in items.items()}


# ---- judgments ----------------------------------------------------------------------------------

def ask_judge(s, name, items, model):
    """Every answer judged -> (rows in the benchmark's own format, what is to be said of them)."""
    bench = BENCHES[name]
    prompts = bench.prompts(folder_of(s, name), [item for item in items if item.texts], model)
    asked = {}
    for prompt in prompts:
        if prompt.text:
            key = sha(f"{s.judge} {s.thinking}", name, str(prompt.id), prompt.system, prompt.text)
            asked[prompt.id] = Question(key, f"{name} {prompt.id}", prompt.system, prompt.text,
                                        check=bench.read)
    with closing(Replies(Path(s.out) / "judge-journal.jsonl")) as journal:
        Judge(s, journal).ask(asked.values())
        replies = {number: journal.final(question)[0] for number, question in asked.items()}

    good = {number: reply.text for number, reply in replies.items() if reply.state == "ok"}
    trouble = [reply.reason for reply in replies.values() if reply.state != "ok"]
    about = {
        "judge": s.judge,
        "versions": sorted({reply.version for reply in replies.values()} - {""}),
        "states": dict(Counter(reply.state for reply in replies.values())),
        "trouble": trouble[0] if trouble else "",
        "prompt": prompts[0].wording if prompts else "",
    }
    return bench.judge_rows(prompts, good, s.judge), about


def stored_judgments(s, name):
    """Score a stored judgment file -> {model: [result]}; FastChat keeps many models in one file."""
    if not BENCHES[name].JUDGMENTS:
        raise BadInput(f"--judgments: {name} needs no judge; give --ckpt or --answers")
    items = []
    if s.data_dir or s.answers or name == "mm_vet":
        items = questions(s, name)
    path = Path(s.judgments)
    rows = stored(path, **BENCHES[name].JUDGED)
    if isinstance(rows, dict) != (name == "mm_vet"):
        raise BadInput(f"--judgments {path}: is no judgment file of {name}")
    models = defaultdict(list)
    if isinstance(rows, dict):                         # MM-Vet's, of one model
        models[path.stem] = rows
    else:
        for row in rows:                               # FastChat says model, AlpacaEval generator_2
            model = row.get("model") or row.get("generator_2") or path.stem
            models[str(model)].append(row)
    if s.model:
        if s.model not in models:
            raise BadInput(f"--model {s.model}: {path} has {', '.join(models)}")
        models = {s.model: models[s.model]}
    return {model: [summary(name, items, mine, judge=path.name)] for model, mine in models.items()}


# ---- results ------------------------------------------------------------------------------------

def summary(name, items, rows, **about):
    """What is known about one model on one benchmark; without judgments, how much was answered."""
    texts = [text for item in items for text in item.texts]
    finishes = [finish for item in items for finish in item.finishes]
    scored = {"scores": {}, "ok": sum(bool(item.texts) for item in items), "total": len(items)}
    if rows is not None or not BENCHES[name].JUDGMENTS:
        scored = BENCHES[name].score(items, rows)
    spoken = texts and BENCHES[name] is not likelihood and not any(item.images for item in items)
    return {
        "bench": name,
        "style": style(items) if spoken else None,
        "length": mean([len(text) for text in texts])["mean"],
        "cut": finishes.count("length") if finishes else None,
        "unanswered": {item.id: item.failed for item in items if item.failed},
        **about,
        **scored,
        "coverage": scored["ok"] / scored["total"] if scored["total"] else 0.0,
    }


def evaluate(s, names, model, out):
    """A checkpoint, or stored answers, on some benchmarks; files and results.json in `out`."""
    items = {name: questions(s, name) for name in names}
    lock(out)
    if not s.answers:
        items = answer_all(s, model, items, out)
    model = slug(model)
    results = []
    for name, answered in items.items():
        bench = BENCHES[name]
        if not s.answers:
            rows = bench.answer_rows([item for item in answered if item.texts], model)
            dump(out / name / bench.ANSWERS.format(model=model), rows)
        rows, about = None, {}
        if bench.JUDGMENTS and s.judge:
            rows, about = ask_judge(s, name, answered, model)
            dump(out / name / bench.JUDGMENTS.format(model=model, judge=slug(s.judge)), rows)
        results.append(summary(name, answered, rows, **about))
    run = describe_run(s, model=model, results=results)
    write_json(out / "results.json", run)
    return results


def table(results):
    """One line per figure; coverage, length and the rest once per benchmark."""
    lines = [f"{'benchmark':12} {'figure':12} {'':15} {'n':>6}  coverage  characters  cut off   "
             "judge"]
    notes = []
    for r in results:
        name = r["bench"]
        length = "-" if r["length"] is None else f"{r['length']:.0f}"
        cut = "-" if r["cut"] is None else r["cut"]
        about = f"{r['coverage']:8.1%}  {length:>10}  {cut:>7}   {compare.judged_by(r)}"
        for figure, e in (r["scores"] or {"not judged": {"mean": None, "n": r["ok"]}}).items():
            value = shown(e, BENCHES[r["bench"]].FORM, BENCHES[r["bench"]].SCALE)
            lines.append(f"{name:12} {figure:12} {value:>15} {e['n']:>6}  {about}".rstrip())
            name = about = ""                          # they are said once
        said = remarks(r)
        if said:
            notes.append(f"{r['bench']}: {'; '.join(said)}")
    return "\n".join(lines + notes)


def remarks(r):
    """What stands below the table."""
    said = []
    if r.get("trouble"):
        said = [f"{n} {state}" for state, n in r["states"].items() if state != "ok"]
        said.append(f"the first of them: {r['trouble'][:150]}")
    if r["unanswered"]:
        reason, *others = r["unanswered"].values()
        said.append(f"{1 + len(others)} not answered ({reason})")
    if r.get("style"):
        words, looping, scene = (r["style"][name]["mean"]
                                 for name in ("words", "looping", "scene talk"))
        said.append(f"{words:.0f} words an answer, {looping:.1%} loop, "
                    f"{scene:.1%} speak of a scene")
    if r.get("unknown"):
        said.append(f"{r['unknown']} answers fit no option")
    if r.get("prompt"):
        said.append(f"judge's prompt: {r['prompt']}")
    return said


# ---- the script ---------------------------------------------------------------------------------

def run_miniature(s):
    """Its own benchmarks; or in English, for a model that somebody else trained (smol.py)."""
    out, rows = Path(s.out), {}
    device, dtype = device_and_dtype(s.device, s.dtype)
    for ckpt in s.ckpt.split(","):
        folder = out / slug(ckpt)
        lock(folder)
        model = checkpoint.load(checkpoint.resolve(ckpt), device, dtype)
        tokens = tokens_of(s, ckpt, model.config)
        english = s.bench == "english"
        rows[ckpt], answers = miniature.measure(model, tokens, out, ckpt, s.split, english)
        write_jsonl(folder / "answers.jsonl", answers)
        run = describe_run(s, scores={ckpt: rows[ckpt]})
        write_json(folder / "scores.json", run)
    said = f"{miniature.table(rows)}\nanswers and scores: {out}, a folder for each checkpoint"
    print(json.dumps(rows) if s.json else said)


def check(s, names, ckpts):
    """What can be said at the door. Raises BadInput."""
    if s.split not in ("dev", "test") or s.batch < 1:
        raise BadInput("--split is dev or test, --batch at least 1")
    if s.judge:
        door(s)
    alone = s.answers or s.judgments or set(names) & set(MINIATURE)
    if not set(names) <= {*BENCHES, *MINIATURE} or alone and len(names) > 1:
        raise BadInput(f"--bench {s.bench}: choose among {', '.join(BENCHES)}; with --answers or "
                       f"--judgments, one; or {' or '.join(MINIATURE)}")
    for ckpt in ckpts:
        if ckpt.startswith("openai:") and s.bench not in MINIATURE:
            door(server_of(s, ckpt))
            if "likelihood" in names:
                raise BadInput(f"--ckpt {ckpt}: likelihood needs the model itself, not a server")
        else:
            checkpoint.resolve(ckpt)


def run(s):
    out = Path(s.out)
    if s.compare:
        return compare.run(BENCHES, s.compare, out)
    names = s.bench.split(",")
    ckpts = [] if s.answers or s.judgments else s.ckpt.split(",")
    check(s, names, ckpts)
    if s.bench in MINIATURE:
        return run_miniature(s)

    models = {}
    if s.judgments:
        models = stored_judgments(s, names[0])
    else:
        for model in ckpts or [Path(s.answers).stem]:
            models[model] = evaluate(s, names, model, out / slug(model))

    if s.json:
        print(json.dumps(models))
    else:
        print("\n\n".join(f"{model}\n{table(results)}" for model, results in models.items()))
        if not s.judgments:
            print(f"answers, judgments and results: {out}, a folder for each checkpoint")
    low = [f"{model} {r['bench']} {r['coverage']:.1%}" for model, results in models.items()
           for r in results if r["coverage"] < s.coverage]
    if low:
        again = "; --retry_failed 1 asks the judge again" if s.judge else ""
        raise BadInput(f"less than --coverage {s.coverage:.0%} was scored: {'; '.join(low)}; the "
                       f"means above are over the rest{again}")


if __name__ == "__main__":
    main(Settings, run)
