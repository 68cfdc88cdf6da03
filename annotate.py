"""Where preferences come from: sample n answers to each question, have a judge score them, keep everything.

The recipe (arXiv:2402.10884). The model answers each image question n = 4 times at temperature > 0. A judge that sees image,
conversation and all n answers gives each five integers from 0 to 4, and where they differ enough there is a pair. The model
is thus taught by its own answers: nothing that it could not already say is asked of it.

This file puts it together: sampling stands here, the judge's prompt in judge/rubric.py, the calls in judge/client.py, pairs in judge/report.py.

Nothing is computed or paid for twice. Answers go to answers-RANK.jsonl and replies to journal.jsonl as they come; each line is
named by a hash of everything it depends on, so the same command goes on where it was stopped, and a changed prompt,
picture, model or setting is asked anew. records.jsonl appears when all is done: every record as it came, in its order, with
answers and scores, and the pictures beside it (hard links where possible), so that the folder stands alone.

    python annotate.py                                                                        the whole of it on the miniature
    python annotate.py --ckpt llava-1.5-7b-hf --data prompts.jsonl --out runs/annotate        sample
    python annotate.py --data prompts.jsonl --judge gemini:MODEL --dry_run                     what would judging cost?
    torchrun --nproc_per_node 8 -- annotate.py --ckpt DIR --data FILE --judge gemini:MODEL     sample on 8 GPUs, then judge

Previous: judge/report.py.  Next: rejection.py (the first rival).
"""
import filecmp
import json
import math
import os
import shutil
import sys
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import common  # first: it tells OpenMP how to wait
from tqdm import tqdm

import checkpoint
from judge import client as judge
from judge import report as pairs
import parallel
import formats as records
from toy import tasks
from common import BadInput, Journal, describe_run, device_and_dtype, journal_rows, main, sha, write_jsonl, write_whole
from data import Pixels, Tokens, make_tree
from generate import answer_seed, check_room, sample_answers
from model import Llava
from judge.rubric import RUBRIC, conversation, letter, shown_order
from judge.wire import IMAGE_TOKENS, Question, Reply


@dataclass
class Settings:
    """Sample answers to image questions, have them judged on five attributes, look at the pairs."""
    data: str = ""               # records, questions or preference files (see formats.py); empty: the miniature
    ckpt: str = ""               # who answers; needed for records that have no answers yet
    image_root: str = ""         # folder the image names start from; empty: the data file's own
    out: str = "runs/annotate"   # journals, records.jsonl and pictures; the same folder again: go on there
    seed: int = 0                # of sampling, of the order in which answers are shown, of the rejected one
    device: str = "auto"         # cpu, cuda, ...
    dtype: str = "auto"          # float32, bfloat16; auto: float32 on the CPU
    n: int = 4                   # answers per question (the paper's 4)
    temperature: float = 1.2     # of the sampling (the authors' script; reviews of the paper say 0.7)
    top_p: float = 1.0           # of the sampling; 1: everything
    max_new: int = 1024          # longest answer in tokens (the authors' script)
    batch: int = 16              # questions answered at once
    crop: bool = False           # centre-crop images instead of padding them to a square
    judge: str = ""              # gemini:MODEL, openai:MODEL (any chat-completions server), oracle (the miniature); empty: none
    judge_url: str = ""          # another server, http://host:port
    golden: bool = False         # ask the judge for an answer of its own, too
    thinking: str = ""           # how much the judge thinks: low, medium, high; empty: its default
    budget: int = 8192           # longest reply in tokens, thinking included; doubled once where it was too short
    workers: int = 16            # calls at once
    timeout: float = 120.0       # seconds until a call counts as lost
    rpm: int = 0                 # requests per minute that your account allows; 0: no limit on this side
    tpm: int = 0                 # tokens sent per minute; 0: no limit
    rpd: int = 0                 # requests per day; 0: no limit
    retry_failed: bool = False   # ask again for what was blocked, truncated, unparseable or failed
    dry_run: bool = False        # say what judging would take, and show the first call; nothing is sent
    gap: int = pairs.GAP         # smallest difference in S of a pair (the paper's 2)
    pairs: bool = False          # print yield, scores, correlations, lengths and the judge's position bias
    board: str = ""              # write a page of records and pairs to this file
    export: str = ""             # trl: also write the pairs in TRL's format, to trl.jsonl


@dataclass
class Story(Settings):
    """The miniature: 1000 questions, sampled and judged exactly. With --data FILE it is your own data that is annotated, and
    other defaults hold: python annotate.py --data FILE -h"""
    ckpt: str = "toy/llava"            # who answers
    temperature: float = 1.0     # of the sampling
    max_new: int = 48            # longest answer in tokens
    batch: int = 64              # questions answered at once
    judge: str = "oracle"        # the miniature knows the truth
    pairs: bool = True           # print yield, scores, correlations, lengths and the judge's position bias
    prompts: int = 1000          # how many questions


# ---- sampling -------------------------------------------------------------------------------------------------

def answer_seed(seed: int, record_id: str, k: int) -> int:
    """The k-th answer's own seed: the same whatever stands before or beside it in the file."""
    return int(sha(str(seed), record_id, str(k))[:15], 16)


def sample_batch(model: Llava, tokens: Tokens, pixels: Pixels, items: list[dict], *, n: int = 4, temperature: float = 1.0,
                 top_p: float = 1.0, max_new: int = 1024, seed: int = 0) -> list[list[dict]]:
    """n answers {"text", "finish"} to each record. finish is "stop", or "length" where max_new cut the answer off."""
    trees = [make_tree(tokens, record, []) for record in items]
    seeds = [[answer_seed(seed, record["id"], k) for k in range(n)] for record in items]
    answers = generate(model, [t.prompt for t in trees], [pixels(t.images) for t in trees], n=n, max_new=max_new,
                       temperature=temperature, top_p=top_p, seeds=seeds, eos=tokens.eos)
    return [[{"text": tokens.decode(a.ids), "finish": a.finish} for a in row] for row in answers]


def fill_answers(s: Settings, items: list[dict], out: Path, device: str) -> list[dict]:
    """Give every record without answers its n; returns the rejects. Of N processes each does every N-th batch."""
    folder = checkpoint.resolve(s.ckpt)
    config, _ = checkpoint.read_config(folder)
    tokens, pixels, keys, rejects = Tokens(folder, config), Pixels(config, s.crop), {}, []
    how = {"n": s.n, "temperature": s.temperature, "top_p": s.top_p, "max_new": s.max_new, "seed": s.seed}
    about = sha(checkpoint.stamp(folder), str(how), str(s.crop), s.dtype)
    for record in (r for r in items if not r["answers"]):
        try:
            check_room(len(make_tree(tokens, record, []).prompt) + s.max_new, config.text.max_position_embeddings)
            keys[record["id"]] = sha(about, record["id"], json.dumps(record["messages"]), record["images_sha"])
        except BadInput as problem:
            rejects.append({"id": record["id"], "reason": str(problem)})
    items[:] = [r for r in items if r["answers"] or r["id"] in keys]
    todo, have = [r for r in items if r["id"] in keys], read_answers(out)
    if todo:
        print(f"sampling: {s.n} answers to each of {len(todo)} records at temperature {s.temperature}; "
              f"{sum(key in have for key in keys.values())} were answered before")
    parts = [todo[at:at + s.batch] for at in range(0, len(todo), s.batch)][parallel.rank()::parallel.world()]
    missing = [part for part in parts if not all(keys[r["id"]] in have for r in part)]   # whole ones: rounding stays the same
    if missing:
        model = checkpoint.load(folder, *device_and_dtype(device, s.dtype))
        with closing(Journal(out / f"answers-{parallel.rank()}.jsonl")) as journal:
            for part in tqdm(missing, desc="sampling", unit="batch", disable=parallel.rank() > 0 or None, leave=False):
                for record, answers in zip(part, sample_batch(model, tokens, pixels, part, **how)):
                    if keys[record["id"]] not in have:
                        journal.append({"key": keys[record["id"]], "id": record["id"], "answers": answers})
    parallel.gather(None)                                                # everybody's answers are on the disk
    have = read_answers(out)
    for record in todo:
        record["answers"] = have.get(keys[record["id"]], [])
    return rejects


def check_room(longest: int, limit: int) -> None:
    if longest > limit:
        raise BadInput(f"prompt and answer may take {longest} tokens, more than the model was built for ({limit}); shorten it or "
                       "lower --max_new")


def read_answers(out: Path) -> dict[str, list]:
    """What all processes have sampled so far, this run or an earlier one, by key."""
    return {row["key"]: row["answers"] for path in sorted(out.glob("answers-*.jsonl")) for _, row in journal_rows(path)}


# ---- what it takes --------------------------------------------------------------------------------------------

ANSWER, COMMENT, SECONDS = 150, 90, 8.0     # guesses: tokens of an answer not yet sampled, of a graded comment; time of a call


def plan(s: Settings, items: list[dict]) -> str:
    """What judging these records would take, before a cent is spent, and what the judge would read."""
    answered = [r if r["answers"] else r | {"answers": [{"text": "(not sampled yet) " * (ANSWER // 6)}] * s.n} for r in items]
    journal = Path(s.out) / "journal.jsonl"
    state = {row["key"]: row["state"] for _, row in journal_rows(journal) if row["final"]} if journal.exists() else {}
    done = lambda q: q.key in state and not (s.retry_failed and state[q.key] != "ok")
    asked = [(q, len(r["answers"])) for r, q in ((r, ask(r, s)) for r in answered) if not done(q)]
    sent, back = sum(q.tokens for q, _ in asked), sum(n * COMMENT + ANSWER * s.golden for _, n in asked)
    minutes = max(len(asked) * SECONDS / s.workers / 60, len(asked) / s.rpm if s.rpm else 0, sent / s.tpm if s.tpm else 0)
    days = f", on {math.ceil(len(asked) / s.rpd)} days" if s.rpd and len(asked) > s.rpd else ""
    lines = [f"dry run, nothing is sent: {len(items)} records, {len(items) - len(asked)} judged before",
             f"  calls        {len(asked):12,}   one per record; a bad reply is asked again, up to {judge.ASKS} times",
             f"  tokens sent  {sent:12,}   {sent // max(1, len(asked)):,} per call, pictures counted as {IMAGE_TOKENS} each",
             f"  tokens back  {back:12,}   {COMMENT} per candidate assumed; thinking, where the model does, comes on top",
             f"  time         {minutes:8.0f} min   at {SECONDS:g} s a call, {s.workers} at once, within --rpm and --tpm{days}"]
    if not all(r["answers"] for r in items):
        lines.append(f"  answers not sampled yet are taken to be {ANSWER} tokens long")
    if asked:
        q = asked[0][0]
        lines.append(f"\nthe first call, about record {q.id}; pictures: {len(q.images)}\n\n{q.system}\n\n{q.text}")
    return "\n".join(lines)


# ---- putting it together --------------------------------------------------------------------------------------

def ask(record: dict, s: Settings) -> Question:
    return question(record, f"{s.judge} {s.thinking}", s.seed, s.golden)


def question(record: dict, about: str, seed: int, golden: bool) -> Question:
    """The one call that a record costs. `about` names the judge and its settings: with others, it is another question."""
    order = shown_order(record, seed)
    if len(order) > 26:
        raise BadInput(f"record {record['id']}: has {len(order)} answers, and there are 26 letters; remove some")

    candidates = []
    for place, k in enumerate(order):
        tag = f"candidate_{letter(place)}"
        candidates.append(f"<{tag}>\n{record['answers'][k]['text']}\n</{tag}>")
    text = f"The conversation:\n{conversation(record)}\n\nThe candidates:\n" + "\n".join(candidates)

    system = RUBRIC.text(golden)
    return Question(
        key=sha(about, system, record["id"], text, record["images_sha"]),
        id=record["id"],
        system=system,
        text=text,
        images=[Path(record["root"]) / name for name in record["images"]],      # formats.py: none leads outside
        schema=RUBRIC.schema(len(order), golden),
        check=lambda reply: RUBRIC.read(reply, len(order), golden),
    )


def ask_judge(s: Settings, items: list[dict], out: Path) -> list[dict]:
    """Every record judged -> the records with scores, states and what the judge was. The journal decides, not this run."""
    began = time.perf_counter()
    with closing(judge.Replies(out / "journal.jsonl")) as replies:
        if s.judge == "oracle":
            from toy.oracle import exact_reply
            for record in tqdm(items, desc="judging", unit="rec", disable=None, leave=False):
                q = ask(record, s)
                if q.key not in replies.state:
                    replies.keep(q, Reply("ok", exact_reply(record, shown_order(record, s.seed), s.golden), version="exact"))
        else:
            client = judge.Judge(s.judge, replies, s.judge_url, workers=s.workers, timeout=s.timeout, budget=s.budget,
                                 thinking=s.thinking, rpm=s.rpm, tpm=s.tpm, rpd=s.rpd)
            try:
                client.ask((ask(r, s) for r in items), len(items), s.retry_failed)
            finally:
                minutes, tokens = (time.perf_counter() - began) / 60, replies.used
                print(f"used: {client.limits.calls:,} calls in {minutes:.1f} min; tokens so far: {tokens['prompt']:,} sent, "
                      f"{tokens['answer']:,} back, {tokens['thoughts']:,} of thought")
        done = [with_scores(record, ask(record, s), replies, s) for record in items]
    states = Counter(r["judge"]["state"] for r in done)
    print("judged: " + ", ".join(f"{states[name]} {name}" for name in judge.STATES if states[name] or name == "ok"))
    for record in [r for r in done if r["judge"]["state"] != "ok"][:5]:
        print(f"  {record['id']}: {record['judge']['state']}, {record['judge']['reason']}")
    if len(done) > states["ok"]:
        print("  these carry no scores; --retry_failed 1 asks for them again")
    return done


def with_scores(record: dict, q: Question, replies: judge.Replies, s: Settings) -> dict:
    """The record with what its final reply says, read afresh from the raw text: a better parser needs no new call."""
    (reply, found), places = replies.final(q), shown_order(record, s.seed)
    answers = [{key: value for key, value in a.items() if key not in ("scores", "comment")} for a in record["answers"]]
    for k, (scores, comment) in zip(places, found["shown"] if found else []):
        answers[k] |= {"scores": scores, "comment": comment}
    about = {"model": s.judge, "version": reply.version, "prompt_sha": sha(RUBRIC.text(s.golden)), "state": reply.state,
             "order": places, "usage": reply.usage}
    return (record | {"answers": answers, "judge": about | ({} if found else {"reason": reply.reason})}
            | ({"golden": found["golden"]} if found and found["golden"] else {}))


def bring_pictures(record: dict, out: Path) -> None:
    """The record's pictures stand in `out` under their names (hard links where possible), and are read from there."""
    root = Path(record["root"]).resolve()
    sources = [records.image_path(root, name) for name in record["images"]]
    record |= {"images": [str(source.relative_to(root)) for source in sources], "root": str(out)}
    for source, target in zip(sources, (out / name for name in record["images"])):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, target)
            except OSError:                                              # another disk
                shutil.copyfile(source, f"{target}.part")
                os.replace(f"{target}.part", target)
        elif not filecmp.cmp(source, target, shallow=False):
            raise BadInput(f"record {record['id']}: {target} is another picture of that name; choose another --out")


def look(s: Settings, items: list[dict], out: Path) -> None:
    """Numbers, board and export, where asked for; and what to run next."""
    found = [(r, pair) for r in items if (pair := pairs.choose_pair(r, s.gap, s.seed))]
    if s.pairs:
        numbers = pairs.statistics(items, s.gap, s.seed)
        write_whole(out / "pairs.json", json.dumps(describe_run(s, pairs=numbers)) + "\n")
        print(pairs.show(numbers))
    if s.board:
        title = f"{Path(s.data).name}, judged by {s.judge or 'nobody here'}"
        write_whole(Path(s.board), pairs.board(items, out, s.gap, s.seed, title))
        print(f"board: {s.board}, to be opened in a browser")
    if s.export:
        write_jsonl(out / "trl.jsonl", (pairs.to_trl(r, pair) for r, pair in found))
        print(f"export: {out / 'trl.jsonl'}, {len(found)} pairs")
    if found:
        print(f"next: python dpo.py --ckpt {s.ckpt or 'DIR'} --data {out}/records.jsonl"
              + " --batch 16 --lr 1e-4" * isinstance(s, Story))
    elif not s.judge:
        print(f"next: python annotate.py --data {out}/records.jsonl --out {out} --judge gemini:MODEL --dry_run")


def miniature(s: Story) -> Story:
    """Draw the pictures and write the questions; the rest is as with any other data."""
    if parallel.world() > 1:
        raise BadInput("the miniature needs one process; with torchrun, give --data")
    if s.prompts < 1:
        raise BadInput("--prompts must be at least 1")
    items = tasks.draw(tasks.preference_prompts(s.prompts, s.seed), Path(s.out))
    path = Path(s.out) / "prompts.jsonl"
    write_jsonl(path, ({key: r[key] for key in r if key not in ("root", "answers")} for r in items))
    return replace(s, data=str(path), board=s.board or str(path.with_name("board.html")))


def annotate(s: Settings) -> list[dict]:
    """--data -> records with answers and scores, in memory and in --out; nothing in the processes that only sample."""
    out = Path(s.out)
    if not 1 <= s.n <= 26 or min(s.max_new, s.batch, s.gap) < 1 or not 0 <= s.temperature < math.inf or not 0 < s.top_p <= 1:
        raise BadInput("--n must lie from 1 to 26, --max_new, --batch and --gap be at least 1, --temperature not negative, "
                       "--top_p above 0 and at most 1")
    if s.export not in ("", "trl"):
        raise BadInput(f"--export {s.export}: the one format known is trl")
    if s.judge not in ("", "oracle") or s.dry_run:
        judge.door(s.judge, s.judge_url, s.workers, s.timeout, s.budget, s.rpm, s.tpm, s.rpd, s.dry_run)
    device = parallel.start(s.device)                                    # from here on process 0 alone speaks
    items, rejects = records.read(s.data, s.image_root)
    if rejects and Path(s.data).resolve() == (out / "records.jsonl").resolve():
        raise BadInput(f"{s.data} would lose {len(rejects)} records, the first being {rejects[0]['id']}: {rejects[0]['reason']}; "
                       "mend it, or choose another --out")
    records.report(s.data, len(items), rejects, None if s.dry_run or parallel.rank() else out)
    if s.dry_run:
        print(plan(s, items))
        return []
    if parallel.rank() == 0:
        for record in items:
            bring_pictures(record, out)
        write_whole(out / "config.json", json.dumps(describe_run(s), indent=1) + "\n")
    if any(not r["answers"] for r in items):
        if not s.ckpt:
            raise BadInput(f"{s.data} has records without answers; say with --ckpt which model gives them")
        if long := fill_answers(s, items, out, device):
            records.report(s.data, len(items), rejects + long, None if parallel.rank() else out)
    if parallel.rank():
        return []
    if not items:
        raise BadInput(f"{s.data}: no usable record; the reasons are above and in {out}/rejects.jsonl")
    if s.judge:
        items = ask_judge(s, items, out)
    items = [{key: value for key, value in record.items() if key not in ("root", "images_sha")} for record in items]
    write_jsonl(out / "records.jsonl", items)
    print(f"records: {out / 'records.jsonl'}, {len(items)} of them, {sum(len(r['answers']) for r in items)} answers")
    return items


def run(s: Settings) -> None:
    if isinstance(s, Story):
        s = miniature(s)
    if items := annotate(s):
        look(s, items, Path(s.out))


if __name__ == "__main__":
    alone = not any(arg == "--data" or arg.startswith("--data=") for arg in sys.argv[1:])
    main(Story if alone else Settings, run)
