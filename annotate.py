"""Where preferences come from: sample n answers to each question, have a judge score them.

The recipe (arXiv:2402.10884). The model answers each image question n = 4 times at temperature >
0. A judge that sees image, conversation and all n answers gives each five integers from 0 to 4,
and where they differ enough there is a pair. The model is thus taught by its own answers: nothing
that it could not already say is asked of it.

Nothing is computed or paid for twice. Answers go to answers-RANK.jsonl and replies to
journal.jsonl as they come; each line is named by a hash of everything it depends on, so the same
command goes on where it was stopped, and a changed prompt, picture, model or setting is asked
anew. records.jsonl appears when all is done: every record as it came, in its order, with answers
and scores, and the pictures beside it (hard links where possible), so that the folder stands
alone. Where all has answers and no judge is named, there is only a look: no record is written.

    python annotate.py --data prompts.jsonl --judge gemini:MODEL --dry_run     what would it cost?
    python annotate.py --data prompts.jsonl --judge gemini:MODEL --ckpt DIR    sample and judge
    torchrun --nproc_per_node 8 -- annotate.py ...                             sample on 8 GPUs

docs/annotate.md walks through it.
"""
import filecmp
import json
import math
import os
import shutil
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import common  # first: it tells OpenMP how to wait

import checkpoint
import formats
import parallel
from common import (
    BadInput, describe_run, device_and_dtype, lock, main, progress, sha, write_json, write_jsonl,
    write_whole,
)
from data import GAP, Pixels, Tokens, choose_pair, make_tree
from generate import check_room, sample_answers
from journal import Journal, journal_rows
from judge import report
from judge.client import ASKS, STATES, Judge, JudgeSettings, Replies, continuation, door
from judge.rubric import RUBRIC, conversation, letter, shown_order
from judge.wire import IMAGE_TOKENS, Question, Reply
from vision import image_path

ANSWER = 150         # guess: tokens of an answer not yet sampled
COMMENT = 90         # guess: tokens that the judge writes about one candidate
THOUGHT = 1000       # guess: tokens that a judge thinks for a call
SECONDS = 8.0        # guess: how long a call takes


@dataclass
class Settings(JudgeSettings):
    """Sample answers to image questions, have them judged, look at the pairs."""
    data: str = ""               # records, questions or preference files (see formats.py)
    ckpt: str = ""               # who answers; needed for records that have no answers yet
    sampler: str = ""            # or a server does: openai:MODEL, as vLLM and SGLang serve it
    sampler_url: str = ""        # where, http://host:port/v1; empty: OpenAI's own
    image_root: str = ""         # folder the image names start from; empty: the data file's own
    follow_links: bool = False   # images may be links that lead out of that folder
    keep_marker: bool = False    # leave <image> where the data has it; else first in its turn
    out: str = "runs/annotate"   # records.jsonl, pictures, journals; the same again: go on there
    template: str = ""           # how the model wants its prompts; empty: as its tokenizer says
    seed: int = 0                # of sampling, of the order of answers, of the rejected one
    device: str = "auto"         # cpu, cuda, ...
    dtype: str = "auto"          # float32, bfloat16; auto: float32 on the CPU
    n: int = 4                   # answers per question (the paper's 4)
    temperature: float = 1.2     # of the sampling (the authors' script; some reviews say 0.7)
    top_p: float = 1.0           # of the sampling; 1: everything
    max_new: int = 1024          # longest answer in tokens (the authors' script)
    batch: int = 16              # questions answered at once
    judge: str = ""              # gemini:MODEL, openai:MODEL, oracle (the miniature); empty: none
    golden: bool = False         # ask the judge for an answer of its own, too
    dry_run: bool = False        # say what judging would take, show the first call, send nothing
    price: str = ""              # dollars for a million tokens sent and back, "0.5,3": says dollars
    gap: int = GAP               # smallest difference in S of a pair (the paper's 2)
    pairs: bool = False          # print yield, scores, correlations, lengths, position bias
    board: str = ""              # write a page of records and pairs to this file
    export: str = ""             # trl: also write the pairs in TRL's format, to trl.jsonl


# ---- sampling -----------------------------------------------------------------------------------

def sample(s, records, out, device) -> tuple[dict, list]:
    """n answers to each of these records -> ({id: answers}, rejects). Of N processes each does every
    N-th batch."""
    folder = checkpoint.resolve(s.ckpt)
    config, _ = checkpoint.read_config(folder)
    tokens = Tokens(folder, config, s.template)
    pixels = Pixels(config)
    how = {name: getattr(s, name) for name in ("n", "temperature", "top_p", "max_new", "seed")}
    about = sha(checkpoint.stamp(folder), str(tokens.template), str(how), s.dtype)

    todo = {}                        # what the answers depend on -> the tree to be answered
    rejects = []
    for record in records:
        try:
            tree = make_tree(tokens, record, [])
            check_room(tree.length + s.max_new, tokens.room)
        except BadInput as problem:
            rejects.append({"id": record["id"], "reason": str(problem)})
        else:
            key = sha(about, tree.id, json.dumps(record["messages"]), record["images_sha"])
            todo[key] = tree
    known = read_answers(out)
    if todo:
        print(f"sampling: {s.n} answers to each of {len(todo)} records at temperature "
              f"{s.temperature}; {len(todo.keys() & known)} were answered before")

    # A batch is answered whole or not at all: rounding depends on what is computed together. Prompts
    # of one length go together, for a cache has room for the longest of its batch.
    keys = sorted(todo, key=lambda key: todo[key].length)
    batches = [keys[start:start + s.batch] for start in range(0, len(keys), s.batch)]
    mine = batches[parallel.rank()::parallel.world()]
    missing = [batch for batch in mine if not known.keys() >= set(batch)]
    if missing:
        model = checkpoint.load(folder, *device_and_dtype(device, s.dtype))
        with closing(Journal(out / f"answers-{parallel.rank()}.jsonl")) as journal:
            for batch in progress(missing, "sampling", unit="batch", leave=False):
                trees = [todo[key] for key in batch]
                answers = dict(zip(batch, sample_answers(model, tokens, pixels, trees, **how)))
                for key in [key for key in batch if key not in known]:
                    journal.append({"key": key, "id": todo[key].id, "answers": answers[key]})
    parallel.gather(None)                                # everybody's answers are on the disk

    known = read_answers(out)
    return {tree.id: known[key] for key, tree in todo.items()}, rejects


def sample_from_server(s, records, out) -> tuple[dict, list]:
    """The same from a server that has the model: a call for each answer, all journalled."""
    asked = {}                                           # record -> its questions
    for record in records:
        asked[record["id"]] = [sampled_question(record, s, k) for k in range(s.n)]
    with closing(Replies(out / "samples.jsonl")) as replies:
        server = replace(s, judge=s.sampler, judge_url=s.sampler_url, thinking="", flex=False)
        client = Judge(server, replies)
        print(f"sampling: {s.n} answers to each of {len(asked)} records from {s.sampler} at "
              f"temperature {s.temperature}; the server spells the prompt, by its own template")
        client.ask([q for questions in asked.values() for q in questions])

        sampled, rejects = {}, []
        for name, questions in asked.items():
            answers = list(map(replies.answer, questions))
            bad = [answer for answer in answers if isinstance(answer, str)]
            if bad:
                reason = f"{len(bad)} of {s.n} answers {bad[0]}; --retry_failed 1 asks again"
                rejects.append({"id": name, "reason": reason})
            else:
                sampled[name] = answers
    return sampled, rejects


def sampled_question(record, s, k) -> Question:
    """The k-th answer has a seed of its own; some servers refuse to give several in one call."""
    digest = int(sha(f"{s.seed} {k}", record["id"]), 16)
    how = {"temperature": s.temperature, "top_p": s.top_p, "max_tokens": s.max_new,
           "seed": digest % 2**31}
    return continuation(s.sampler, record, record["images_sha"], how)


def read_answers(out) -> dict[str, list]:
    """What all processes have sampled so far, this run or an earlier one, by key."""
    known = {}
    for path in out.glob("answers-*.jsonl"):
        for _, row in journal_rows(path, {"answers": "a list"}):
            known[row["key"]] = row["answers"]
    return known


# ---- judging ------------------------------------------------------------------------------------

def question(record: dict, s: Settings) -> Question:
    """The one call that a record costs. Its key names all that the reply depends on."""
    order = shown_order(record, s.seed)
    n = len(order)
    if n > 26:
        raise BadInput(f"record {record['id']}: has {n} answers, and there are 26 letters")
    texts = [record["answers"][k]["text"] for k in order]
    fence = sha(*texts)                                  # which no answer can know, and close
    shown = []
    for place, answer in enumerate(texts):
        tag = f"candidate_{letter(place)}"
        shown.append(f"<{tag}>\n{fence}\n{answer}\n{fence}\n</{tag}>")
    candidates = "\n".join(shown)
    text = (f"The conversation:\n{conversation(record)}\n\n"
            f"The candidates, each between two lines of {fence}:\n{candidates}")
    system = RUBRIC.text(s.golden)
    return Question(
        key=sha(f"{s.judge} {s.thinking}", system, record["id"], text, record["images_sha"]),
        id=record["id"],
        system=system,
        text=text,
        images=[Path(record["root"]) / name for name in record["images"]],
        schema=RUBRIC.schema(n, s.golden),
        check=lambda reply: RUBRIC.read(reply, n, s.golden),
    )


def plan(s, records) -> str:
    """What judging would take, before a cent is spent, and what the judge would read."""
    journal = Path(s.out) / "journal.jsonl"
    settled = set()
    for _, row in journal_rows(journal, Replies.fields) if journal.exists() else []:
        if row["final"] and (row["state"] == "ok" or not s.retry_failed):
            settled.add(row["key"])

    asked = []
    back = 0
    for record in records:
        answers = record["answers"] or [{"text": "(not sampled yet) " * (ANSWER // 6)}] * s.n
        q = question(record | {"answers": answers}, s)
        if q.key not in settled:
            asked.append(q)
            back += len(answers) * COMMENT + (ANSWER if s.golden else 0)

    calls = len(asked)
    sent = sum(q.tokens for q in asked)
    minutes = calls * SECONDS / s.workers / 60
    if s.rpm:
        minutes = max(minutes, calls / s.rpm)
    lines = [
        f"dry run, nothing is sent: {len(records)} records, {len(records) - calls} judged before",
        f"  calls        {calls:12,}   "
        f"one per record; a bad reply is asked again, up to {ASKS} times",
        f"  tokens sent  {sent:12,}   "
        f"{sent // max(1, calls):,} per call, pictures counted as {IMAGE_TOKENS} each",
        f"  tokens back  {back:12,}   "
        f"{COMMENT} per candidate assumed",
        f"  of thought   {calls * THOUGHT:12,}   "
        f"{THOUGHT:,} per call assumed; they cost as much as those sent back",
        f"  time         {minutes:8.0f} min   "
        f"at {SECONDS:g} s a call, {s.workers} at once, within --rpm",
    ]
    if s.price:
        each_in, each_out = prices(s.price)
        dollars = (sent * each_in + (back + calls * THOUGHT) * each_out) / 1e6
        half = ", half of it with --flex" if s.flex else ""
        lines.append(f"  dollars      {dollars / (2 if s.flex else 1):12,.2f}   "
                     f"at --price {s.price} for a million tokens sent and back{half}")
    if s.sampler:
        missing = sum(not record["answers"] for record in records)
        lines.append(f"  before that  {missing * s.n:12,}   answers sampled from {s.sampler}")
    if not all(record["answers"] for record in records):
        lines.append(f"  answers not sampled yet are taken to be {ANSWER} tokens long")
    for q in asked[:1]:
        lines.append(f"\nthe first call, about record {q.id}; pictures: {len(q.images)}\n")
        lines.append(f"{q.system}\n\n{q.text}")
    return "\n".join(lines)


def prices(text) -> list[float]:
    """"0.5,3": dollars for a million tokens sent, and back."""
    try:
        sent, back = (float(amount) for amount in text.split(","))
    except ValueError:
        raise BadInput(f"--price {text}: two numbers, dollars for a million tokens sent and back, "
                       "as in 0.5,3") from None
    return [sent, back]


def scored(s, records, out) -> list[dict]:
    """Every record judged -> the records with scores, states and what the judge was."""
    if s.judge == "oracle":
        replies = ask_oracle(s, records)
    else:
        replies = ask_judge(s, records, out)
    judged = []
    for record, (reply, found) in zip(records, replies):
        judged.append(with_scores(record, reply, found, s))
    return judged


def judge(s, records, out) -> list[dict]:
    """The same, and what came of it in print."""
    judged = scored(s, records, out)
    states = Counter(record["judge"]["state"] for record in judged)
    counts = [f"{states[name]} {name}" for name in STATES if states[name] or name == "ok"]
    print("judged: " + ", ".join(counts))
    failed = [record for record in judged if record["judge"]["state"] != "ok"]
    for record in failed[:5]:
        print(f"  {record['id']}: {record['judge']['state']}, {record['judge']['reason']}")
    if failed:
        print("  these carry no scores; --retry_failed 1 asks for them again")
    return judged


def ask_oracle(s, records) -> list[tuple]:
    """[(reply, what it says)]; the miniature's own judge, which is exact and needs no journal."""
    from toy.oracle import exact_reply
    replies = []
    for record in records:
        text = exact_reply(record, shown_order(record, s.seed), s.golden)
        replies.append(Reply("ok", text, version="exact").checked(question(record, s).check))
    return replies


def ask_judge(s, records, out) -> list[tuple]:
    """[(reply, what it says)], read from the journal's raw text."""
    began = time.perf_counter()
    questions = [question(record, s) for record in records]
    with closing(Replies(out / "journal.jsonl")) as replies:
        client = Judge(s, replies)
        try:
            client.ask(questions)
        finally:
            minutes = (time.perf_counter() - began) / 60
            used = replies.used
            print(f"used: {client.calls:,} calls in {minutes:.1f} min; "
                  f"tokens so far: {used['prompt']:,} sent, {used['answer']:,} back, "
                  f"{used['thoughts']:,} of thought")
        return [replies.final(q) for q in questions]


def with_scores(record, reply, found, s) -> dict:
    """The record with what the judge replied; nothing remains of an earlier judge."""
    order = shown_order(record, s.seed)
    answers = [without(answer, "scores", "comment") for answer in record["answers"]]
    about = {
        "model": s.judge,
        "version": reply.version,
        "prompt_sha": sha(RUBRIC.text(s.golden)),
        "state": reply.state,
        "order": order,
        "usage": reply.usage,
    }
    judged = record | {"answers": answers, "judge": about}
    if not found:
        about["reason"] = reply.reason
        return judged
    for k, (scores, comment) in zip(order, found["shown"]):
        answers[k] |= {"scores": scores, "comment": comment}
    if found["golden"]:
        judged["golden"] = found["golden"]
    return judged


def without(row, *names) -> dict:
    return {name: value for name, value in row.items() if name not in names}


# ---- putting it together ------------------------------------------------------------------------

def bring_pictures(record, out) -> dict:
    """The record with its pictures in `out`, under their names (hard links where possible)."""
    root = Path(record["root"]).absolute()
    names = []
    for name in record["images"]:
        source = image_path(root, name, record.get("follow_links", False))
        inside = root if source.is_relative_to(root) else root.resolve()
        name = source.relative_to(inside)
        names.append(str(name))
        if name.suffix in (".json", ".jsonl", ".part") or str(name) == "lock":
            raise BadInput(f"record {record['id']}: image {name} has the name of a file of the "
                           "run; rename it")
        target = out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            try:
                os.link(source.resolve(), target)
            except OSError:                              # another disk
                shutil.copyfile(source, f"{target}.part")
                os.replace(f"{target}.part", target)
        elif not filecmp.cmp(source, target, shallow=False):
            raise BadInput(f"record {record['id']}: {target} is another picture of that name; "
                           "choose another --out")
    return record | {"images": names, "root": str(out), "follow_links": False}


def check_settings(s) -> None:
    if not s.data:
        raise BadInput("--data is needed: records, questions, preference pairs; see formats.py")
    if not 1 <= s.n <= 26 or min(s.max_new, s.batch, s.gap) < 1:
        raise BadInput("--n must lie from 1 to 26, --max_new, --batch and --gap be at least 1")
    if not 0 <= s.temperature < math.inf or not 0 < s.top_p <= 1:
        raise BadInput("--temperature must not be negative, --top_p above 0 and at most 1")
    if s.export not in ("", "trl"):
        raise BadInput(f"--export {s.export}: the one format known is trl")
    if s.judge == "oracle" and s.dry_run:
        raise BadInput("--judge oracle costs nothing; leave --dry_run out")
    if s.judge not in ("", "oracle") or s.dry_run:
        door(s, dry=s.dry_run)
    if s.sampler:
        if not s.sampler.startswith("openai:"):
            raise BadInput(f"--sampler {s.sampler}: say openai:MODEL")
        door(replace(s, judge=s.sampler, judge_url=s.sampler_url, flex=False), dry=s.dry_run)
    if s.price:
        prices(s.price)


def annotate(s: Settings):
    """--data -> (records with answers and scores, the file that holds them, where its pictures
    are); that file is in --out, or --data itself where nothing was to be sampled or judged. None
    in the processes that only sample."""
    check_settings(s)
    device = parallel.start(s.device)                    # from here on process 0 alone speaks
    first = parallel.rank() == 0
    out = Path(s.out)
    file = out / "records.jsonl"
    records, rejects = formats.read(
        s.data,
        s.image_root,
        follow_links=s.follow_links,
        keep_marker=s.keep_marker,
        out=None if s.dry_run else out,
    )
    unused = Counter(name for record in records for name in formats.unused(record))
    looks = s.dry_run or not s.judge and all(record["answers"] for record in records)
    lost = set()                                         # ids that writing the file would lose
    if not looks and file.exists():
        lost = {name for name, _ in formats.checked(file)} - {record["id"] for record in records}
    writes = first and not looks and not lost
    if writes:
        lock(out)
    formats.report(s.data, len(records), rejects, out if writes else None, unused)
    if lost:
        raise BadInput(f"{file} would lose {len(lost)} records, which {s.data} does not hold or "
                       "which were rejected; choose another --out")
    if s.dry_run:
        print(plan(s, records))
        return None

    if first and not looks:
        records = [bring_pictures(record, out) for record in records]
    unanswered = [record for record in records if not record["answers"]]
    if unanswered:
        if bool(s.ckpt) == bool(s.sampler):
            raise BadInput(f"{s.data} has records without answers; say with --ckpt or with "
                           "--sampler who gives them")
        if s.sampler:
            sampled, refused = sample_from_server(s, unanswered, out)
        else:
            sampled, refused = sample(s, unanswered, out, device)
        for record in unanswered:
            record["answers"] = sampled.get(record["id"], [])
        records = [record for record in records if record["answers"]]
        if refused:
            formats.report(s.data, len(records), rejects + refused, out if first else None)
    if not first:
        return None
    if not records:
        raise BadInput(f"{s.data}: no usable record; the reasons stand above")

    root = records[0]["root"]
    if s.judge:
        records = judge(s, records, out)
    records = [without(record, "root", "images_sha", "follow_links") for record in records]
    if looks:
        return records, s.data, root
    write_jsonl(file, records)
    write_json(out / "config.json", describe_run(s))
    answers = sum(len(record["answers"]) for record in records)
    print(f"records: {file}, {len(records)} of them, {answers} answers")
    return records, file, root


def look(s, records, data, root) -> None:
    """Numbers, board and export, where asked for; and what to run next."""
    out = Path(s.out)
    if s.pairs:
        numbers = report.statistics(records, s.gap, s.seed)
        write_json(out / "pairs.json", describe_run(s, pairs=numbers))
        print(report.show(numbers))
    if s.board:
        write_whole(Path(s.board), report.board(records, root, s.gap, s.seed))
        print(f"board: {s.board}, to be opened in a browser")

    pairs = []
    for record in records:
        pair = choose_pair(record, s.gap, s.seed)
        if not pair:
            continue
        if s.export:                                     # its pictures lie beside it, as always
            where = {"root": root, "follow_links": s.follow_links}
            record = bring_pictures(record | where, out)
        pairs.append(report.to_trl(record, pair))
    if s.export:
        write_jsonl(out / "trl.jsonl", pairs)
        print(f"export: {out / 'trl.jsonl'}, {len(pairs)} pairs")
    if pairs:
        ckpt = "DIR"
        rates = ""
        aligned = "runs/aligned"
        if (records[0].get("judge") or {}).get("model") == "oracle":
            ckpt = "toy/llava"
            rates = " --batch 16 --lr 5e-5"              # as in docs/experiment.md
        while Path(aligned).exists():
            aligned += "-again"
        print(f"next: python dpo.py --ckpt {s.ckpt or ckpt} --data {data}{rates} --out {aligned}")
    elif not s.judge:
        print(f"next: python annotate.py --data {data} --out {out} --judge gemini:MODEL --dry_run")


def run(s: Settings) -> None:
    found = annotate(s)
    if found:
        look(s, *found)


if __name__ == "__main__":
    main(Settings, run)
