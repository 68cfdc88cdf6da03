"""Did it help, and what did it cost: one harness for six published benchmarks and the miniature's.

    text       mt_bench       80 questions of two turns, graded 1 to 10 by a judge
               alpaca_eval    805 instructions, judged against text-davinci-003's answers
    vision     mm_vet         218 questions graded 0 to 1 by a judge          llava_bench   60, against GPT-4's answers
               pope           8,910 times yes or no, no judge                 mmbench       1,176 times a letter, no judge

A model answers; a judge grades where one is needed; pure functions score. Each stage leaves files, in the benchmark's own format
so that its own tools read them, and each can start from somebody else's:

    python evaluate.py                                                                the miniature, offline, under a minute
    python evaluate.py --ckpt DIR --bench mt_bench,pope --data_dir DATA --judge gemini:MODEL --out runs/evaluate
    python evaluate.py --bench alpaca_eval --judgments annotations.json --json        score a stored file, no model, no judge
    python evaluate.py --bench pope --data_dir DATA --answers answers.jsonl
    python evaluate.py --compare runs/evaluate/llava runs/evaluate/dpo

The rule: a failure is never a score. What could not be answered, or ended as blocked, truncated, unparseable or failed
(judge/client.py), has no grade, the mean is over the rest, the coverage stands next to it, and below --coverage the command exits
with 1. Answers and replies are journalled: kill it, run the same command, and it ends where it would have ended.

Previous: benchmarks/compare.py.  Next: dpo.py (the remedy).
"""
import json
import sys
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import checkpoint
from benchmarks import compare
from judge import client as judge
from toy import items as miniature
from benchmarks.harness import Item, Prompt, answer, dump, literal, load, shown, slug, steer, with_pictures
from common import BadInput, Journal, describe_run, device_and_dtype, main, sha, write_jsonl, write_whole
from benchmarks.compare import judged_by
from data import Pixels, Tokens, target_scores
from benchmarks.text import TEXT
from benchmarks.pictures import VISION, MMBench, MMVet
from judge.wire import Question

BENCHES = TEXT | VISION


@dataclass
class Settings:
    """Score checkpoints, or stored answers and judgments, on benchmarks."""
    ckpt: str = "toy/vicuna,toy/llava"   # checkpoint folders, comma-separated
    bench: str = "miniature"       # mt_bench, alpaca_eval, mm_vet, llava_bench, pope, mmbench, comma-separated; or miniature
    data_dir: str = ""             # official question files, a folder per benchmark (README: The benchmarks)
    out: str = "runs/evaluate"     # answers, judgments and results go here; the same folder again: go on there
    answers: str = ""              # a stored answer file of the one --bench instead of a checkpoint
    judgments: str = ""            # a stored judgment file of the one --bench: nothing is asked
    compare: tuple = ()            # result folders to put side by side
    json: bool = False             # print the results as JSON and nothing else
    device: str = "auto"           # cpu, cuda, ...
    dtype: str = "auto"            # float32, bfloat16; auto: float32 on the CPU
    batch: int = 16                # questions answered at once
    max_new: int = 0               # longest answer in tokens; 0: the benchmark's own
    seed: int = 0                  # of sampling (MT-Bench) and of --picture
    forget: bool = False           # second turns without the model's first answer
    picture: str = ""              # before text questions: a folder to draw pictures from, or the word literal; empty: none
    crop: bool = False             # centre-crop images instead of padding them to a square
    judge: str = ""                # gemini:MODEL or openai:MODEL (any chat-completions server); empty: none
    judge_url: str = ""            # another server, http://host:port
    thinking: str = ""             # how much the judge thinks: low, medium, high; empty: its default
    budget: int = 8192             # longest reply in tokens, thinking included; doubled once where it was too short
    workers: int = 16              # calls at once
    timeout: float = 120.0         # seconds until a call counts as lost
    rpm: int = 0                   # requests per minute that your account allows; 0: no limit on this side
    tpm: int = 0                   # tokens sent per minute; 0: no limit
    rpd: int = 0                   # requests per day; 0: no limit
    retry_failed: bool = False     # ask again for what was blocked, truncated, unparseable or failed
    coverage: float = 0.95         # smallest share that must be scored; below it the exit code is 1
    split: str = "test"            # of the miniature: test, or dev for choosing settings
    target: str = ""               # five scores to ask a SteerLM model for, such as "4 4 4 4 0"; empty: what its folder says


# ---- answers --------------------------------------------------------------------------------------------------

def answers_of(s: Settings, ckpt: str, items: dict[str, list[Item]], out: Path) -> tuple[dict, dict]:
    """({bench: {id: turns}}, {bench: {id: why not}}) of one checkpoint; a benchmark that it has no eyes for is in neither."""
    folder = checkpoint.resolve(ckpt)
    config, _ = checkpoint.read_config(folder)
    device, dtype = device_and_dtype(s.device, s.dtype)
    if s.picture not in ("", "literal") and not config.vision:
        raise BadInput(f"--picture {s.picture}: {ckpt} sees no pictures; leave it out, or take --picture literal")
    seen = [name for name in items if config.vision or not BENCHES[name].vision]
    if len(seen) < len(items):
        left = ", ".join(name for name in items if name not in seen)
        print(f"{ckpt} sees no pictures; left out: {left}", file=sys.stderr)
    tokens = Tokens(folder, config)
    steer(tokens, ckpt, s.target)
    plain = literal(tokens) if s.picture == "literal" else tokens
    model = cache(lambda: checkpoint.load(folder, device, dtype))        # when the first answer is missing
    said, failed = {}, {}
    with closing(Journal(out / "answers-journal.jsonl")) as journal:
        for name, bench in ((name, BENCHES[name]) for name in seen):
            root = Path(items[name][0].root)
            if bench.vision and not root.is_dir():
                raise BadInput(f"{root}: no such folder; the pictures of {name} belong there (README: The benchmarks)")
            reads = tokens if bench.vision else plain
            about = sha(checkpoint.stamp(folder), str(dtype), json.dumps(reads.steer), str(reads.image))
            said[name], failed[name] = answer(items[name], model, reads, Pixels(config, s.crop), batch=s.batch, seed=s.seed,
                                              forget=s.forget, journal=journal, about=about, desc=f"{ckpt}: {name}")
            dump(out / name / bench.files[0].format(model=slug(ckpt)), bench.answer_rows(items[name], said[name], slug(ckpt)))
    return said, failed


def from_files(s: Settings, name: str, read, *args):
    """read(--data_dir, ...), where a KeyError says that official files do not fit each other."""
    if not s.data_dir:
        raise BadInput(f"--bench {name}: say with --data_dir where its question files are; the README says where to get them")
    try:
        return read(s.data_dir, *args)
    except KeyError as missing:
        raise BadInput(f"--data_dir {s.data_dir}: the files of {name} do not belong together, for {missing} is not to be found; "
                       "download them again") from None


def questions_of(s: Settings, name: str, out: Path) -> list[Item]:
    items = from_files(s, name, BENCHES[name].items)
    if name == "mmbench" and not s.answers:
        MMBench.unpack(items, out / name / "images")
    for item in items:
        item.max_new = s.max_new or item.max_new
    if s.picture and not BENCHES[name].vision:
        with_pictures(items, s.picture, s.seed)
    return items


# ---- judgments ------------------------------------------------------------------------------------------------

def ask_judge(s: Settings, name: str, prompts: list[Prompt]) -> tuple[dict[str, str], dict]:
    """Have every prompt judged -> ({prompt id: a usable reply}, what is to be said about all of them)."""
    asked = {p.id: Question(sha(f"{s.judge} {s.thinking}", name, p.id, p.system, p.text), f"{name} {p.id}", p.system, p.text,
                            check=BENCHES[name].read) for p in prompts}
    with closing(judge.Replies(Path(s.out) / "judge-journal.jsonl")) as replies:
        client = judge.Judge(s.judge, replies, s.judge_url, workers=s.workers, timeout=s.timeout, budget=s.budget,
                             thinking=s.thinking, rpm=s.rpm, tpm=s.tpm, rpd=s.rpd)
        client.ask(asked.values(), len(asked), s.retry_failed)
        found = {k: replies.final(question)[0] for k, question in asked.items()}     # read anew, by the parser of today
    good = {k: reply for k, reply in found.items() if reply.state == "ok"}
    about = {"judge": s.judge, "versions": sorted({reply.version for reply in good.values()} - {""}),
             "states": dict(Counter(reply.state for reply in found.values())),
             "trouble": next((reply.reason for reply in found.values() if reply.state != "ok"), ""),
             "prompt": next((p.row["wording"] for p in prompts if "wording" in p.row), "")}
    return {k: reply.text for k, reply in good.items()}, about


def judge_in(rows) -> str:
    """Who judged, as far as a stored file says."""
    first = next(iter(rows.values() if isinstance(rows, dict) else rows), {})
    found = first.get("judge") or first.get("annotator") or (first["model"] if isinstance(first.get("model"), list) else "")
    return str(found[0] if isinstance(found, list) and found else found or "unknown")


# ---- results --------------------------------------------------------------------------------------------------

def summary(name: str, items: list[Item], answers: dict, rows, **more) -> dict:
    """What is known about one model on one benchmark. Without judgments, only how much was answered."""
    turns = [a for said in answers.values() for a in said]
    known = [a["finish"] for a in turns if a["finish"]]
    if BENCHES[name].judged and rows is None:
        found = {"scores": {}, "ok": sum(i.id in answers for i in items), "total": len(items)}
    else:
        found = BENCHES[name].score(items, answers, rows)
    length = sum(len(a["text"]) for a in turns) / len(turns) if turns else None
    return {"bench": name, "length": length, "cut": known.count("length") if known else None, **more, **found,
            "coverage": found["ok"] / found["total"] if found["total"] else 0.0}


def table(results: list[dict]) -> str:
    """One line per figure; coverage, length and the rest once per benchmark."""
    lines = [f"{'benchmark':12} {'figure':12} {'':15} {'n':>6}  coverage  characters  cut off   judge"]
    for r in results:
        about = (f"{r['coverage']:8.1%}  {'-' if r['length'] is None else format(r['length'], '.0f'):>10}  "
                 f"{'-' if r['cut'] is None else r['cut']:>7}   {judged_by(r)}")
        for k, (figure, e) in enumerate(r["scores"].items() or [("not judged", {"mean": None, "n": r["ok"]})]):
            line = f"{'' if k else r['bench']:12} {figure:12} {shown(e, BENCHES[r['bench']].form):>15} {e['n']:>6}  "
            lines.append((line + about * (not k)).rstrip())
    for r in results:
        notes = [", ".join(f"{n} {state}" for state, n in r["states"].items() if state != "ok")] if r.get("trouble") else []
        notes += [f"the first of them: {r['trouble'][:150]}"] if notes else []
        notes += [f"{len(r['unanswered'])} not answered ({next(iter(r['unanswered'].values()))})"] if r.get("unanswered") else []
        notes += [f"{r['unknown']} answers fit no option"] if r.get("unknown") else []
        notes += [f"judge's prompt: {r['prompt']}"] if r.get("prompt") else []
        lines += [f"{r['bench']}: {'; '.join(notes)}"] if notes else []
    return "\n".join(lines)


def evaluate(s: Settings, names: list[str], label: str, ckpt: str, out: Path) -> list[dict]:
    """One model, or stored answers of one, on some benchmarks; files and results.json in `out`."""
    items = {name: questions_of(s, name, out) for name in names}
    if ckpt:
        answers, failed = answers_of(s, ckpt, items, out)
    else:
        (name,) = names
        said = BENCHES[name].read_answers(Path(s.answers))
        answers, failed = {name: {i.id: said[i.id] for i in items[name] if i.id in said}}, {name: {}}
        if not answers[name]:
            raise BadInput(f"--answers {s.answers}: answers none of the questions of {name}")
    results = []
    for name, said in answers.items():
        bench, rows, about = BENCHES[name], None, {"unanswered": failed[name]}
        if bench.judged and s.judge:
            prompts = from_files(s, name, bench.prompts, items[name], said)
            replies, judged = ask_judge(s, name, prompts)
            rows = bench.judge_rows(items[name], said, prompts, replies, label, s.judge)
            dump(out / name / bench.files[1].format(model=label, judge=slug(s.judge)), rows)
            about |= judged
        results.append(summary(name, items[name], said, rows, **about))
    write_whole(out / "results.json", json.dumps(describe_run(s, model=label, results=results), indent=1) + "\n")
    return results


def stored(s: Settings, name: str) -> dict[str, list[dict]]:
    """Score a stored judgment file -> {model: [result]}; FastChat keeps many models in one file."""
    bench, stem = BENCHES[name], Path(s.judgments).stem
    if not bench.judged:
        raise BadInput(f"--judgments: {name} needs no judge; give --answers")
    if bench is MMVet and not s.data_dir:
        raise BadInput(f"--bench {name}: its grades say nothing about abilities; give --data_dir with its question file, too")
    items, models = from_files(s, name, bench.items) if s.data_dir else [], defaultdict(list)
    rows = load(Path(s.judgments), *bench.row)
    if isinstance(rows, dict):                                           # MM-Vet's, of one model
        models[stem] = rows
    else:
        for r in rows:
            models[str(r.get("model") or r.get("generator_2") or stem)].append(r)
    answers = bench.read_answers(Path(s.answers)) if s.answers else {}
    return {model: [summary(name, items, answers, mine, judge=judge_in(mine), versions=[])]
            for model, mine in models.items()}


# ---- the script -----------------------------------------------------------------------------------------------

def run_miniature(s: Settings) -> None:
    out, rows = Path(s.out), {}
    device, dtype = device_and_dtype(s.device, s.dtype)
    folders = {ckpt: checkpoint.resolve(ckpt) for ckpt in s.ckpt.split(",")}     # all, before the first takes its time
    for ckpt, folder in folders.items():
        rows[ckpt], answers = miniature.score_checkpoint(folder, ckpt, out, device, dtype, s.split, s.target)
        write_jsonl(out / f"answers-{slug(ckpt)}.jsonl", answers)
    write_whole(out / "scores.json", json.dumps(describe_run(s, scores=rows), indent=1) + "\n")
    print(json.dumps(rows) if s.json else f"{miniature.table(rows)}\nanswers and scores: {out}")


def run(s: Settings) -> None:
    names, ckpts = s.bench.split(","), s.ckpt.split(",")
    if s.split not in ("dev", "test") or min(s.batch, s.workers) < 1 or s.max_new < 0 or not 0 <= s.coverage <= 1:
        raise BadInput("--split is dev or test, --batch at least 1, --max_new not negative, --coverage from 0 to 1")
    if s.target:
        target_scores(s.target)                                          # at the door, not after the first checkpoint
    if s.compare:
        return compare.run(s.compare, Path(s.out))
    if s.bench == "miniature":
        return run_miniature(s)
    unknown = [name for name in names if name not in BENCHES]
    if unknown or (s.answers or s.judgments) and len(names) > 1:
        raise BadInput(f"--bench {s.bench}: choose among {', '.join(BENCHES)}; with --answers or --judgments, one")
    if s.judge:
        judge.door(s.judge, s.judge_url, s.workers, s.timeout, s.budget, s.rpm, s.tpm, s.rpd)
    if s.judgments:
        models = stored(s, names[0])
    elif s.answers:
        label = slug(Path(s.answers).stem)
        models = {label: evaluate(s, names, label, "", Path(s.out))}
    else:
        for ckpt in ckpts:
            checkpoint.resolve(ckpt)                                     # all of them, before the first takes its hours
        where = lambda ckpt: Path(s.out) / slug(ckpt) if len(ckpts) > 1 else Path(s.out)
        models = {ckpt: evaluate(s, names, slug(ckpt), ckpt, where(ckpt)) for ckpt in ckpts}
    if s.json:
        print(json.dumps(models))
    else:
        print("\n\n".join(f"{model}\n{table(results)}" for model, results in models.items()))
        if not s.judgments:
            print(f"answers, judgments and results: {s.out}")
        if len(models) > 1 and not s.judgments:
            print(f"next: python evaluate.py --compare {' '.join(str(where(ckpt)) for ckpt in ckpts)}")
    low = [f"{model} {r['bench']} {r['coverage']:.1%}" for model, results in models.items() for r in results
           if r["coverage"] < s.coverage]
    if low:
        raise BadInput(f"less than --coverage {s.coverage:.0%} was scored: {'; '.join(low)}; the means above are over the rest; "
                       "--retry_failed 1 asks a judge again")


if __name__ == "__main__":
    main(Settings, run)
