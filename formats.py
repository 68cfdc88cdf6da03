"""Every file of preferences, conversations or questions that people already have -> records.

The problem. Such data comes in as many shapes as there are papers. Everything downstream sees one
shape only: a conversation about images with n candidate answers, some of them scored (data.py).

The trick. A foreign shape is recognised by its fields, never by its file's name, and each is one
small function that says what of it is the conversation and what its answers:

    LLaVA           conversations: [{from: human, value}, {from: gpt, value}, ...], image
    the authors'    question, chosen, rejected: {from, value}, image (findalexli/mllm-dpo)
    TRL             prompt, chosen, rejected: [{role, content}], images; prompt may be left implicit
    RLHF-V          question, chosen, rejected: strings, image or image_path (or all in "text")
    questions       text, image (LLaVA's question files); question, answer, image_id (LRV-Instruct);
                    q_a_pairs, image_file (SciGraphQA; the last question is the one asked)

Another shape is a function that takes the JSON object and returns the fields of a record, and a
line in SHAPES. Nothing is dropped silently: what cannot be used comes back as (id, reason), is
counted and printed. And nothing piles up: `stream` gives one record after another.
"""
import hashlib
import json
import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from tqdm import tqdm

import parallel
from common import BadInput, write_jsonl
from data import MARKER
from judge.rubric import RUBRIC
from vision import decode_image, image_path, read_image

AT_ONCE = 1024                                 # records in memory while their images are looked at
SPEAKERS = {"human": "user", "gpt": "assistant"}


# ---- what shapes are made of ---------------------------------------------------------------------

def as_messages(value, role):
    """A text, {from, value} or a list of {role, content} -> messages; `role` speaks by default."""
    if isinstance(value, str):
        value = {"content": value}
    turns = value if isinstance(value, list) else [value]
    if not turns:
        raise BadInput("has no messages")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadInput("a turn must be a text, {from, value} or a list of {role, content}")
        speaker = turn.get("role", turn.get("from", role))
        content = turn.get("content", turn.get("value"))
        messages.append({"role": SPEAKERS.get(str(speaker), speaker), "content": flat(content)})
    return messages


def flat(content):
    """TRL's content may be a list of parts. Images come first, as in LLaVA's training."""
    if not isinstance(content, list):
        return content
    markers, texts = "", ""
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            markers += f"{MARKER}\n"
        elif kind == "text" and isinstance(part.get("text"), str):
            texts += part["text"]
        else:
            raise BadInput(f"has a content part of type {kind!r}; known: image, text with its text")
    return markers + texts


def first_of(raw, *keys):
    """What stands under the first of these keys that has something; None where none has."""
    for key in keys:
        if raw.get(key):
            return raw[key]


def asked(messages):
    """A conversation that ends with an answer has it as its golden one."""
    if not messages or messages[-1]["role"] != "assistant":
        return {"messages": messages}
    *messages, answer = messages
    if answer["content"] is None or not str(answer["content"]).strip():
        return {"messages": messages}
    return {"messages": messages, "golden": answer["content"]}


# ---- shapes --------------------------------------------------------------------------------------

def from_messages(raw):
    """Ours, or LLaVA's conversations."""
    messages = as_messages(raw.get("messages", raw.get("conversations")), "user")
    return {"messages": messages} if raw.get("golden") else asked(messages)


def from_question(raw):
    question = as_messages(first_of(raw, "text", "question"), "user")
    return asked([*question, {"role": "assistant", "content": raw.get("answer")}])


def from_pairs(raw):
    """SciGraphQA: the last question is asked, the others came before it."""
    messages = []
    for pair in raw["q_a_pairs"]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadInput("q_a_pairs must be a list of [question, answer]")
        messages += as_messages(pair[0], "user") + [{"role": "assistant", "content": pair[1]}]
    return asked(messages)


def from_preference(raw):
    """The prompt stands in a field of its own, or chosen and rejected are whole conversations, and
    it is their common beginning."""
    *messages, chosen = as_messages(raw["chosen"], "assistant")
    *others, rejected = as_messages(raw["rejected"], "assistant")
    if messages != others:
        raise BadInput("chosen and rejected must each be one assistant turn after a shared prompt")
    prompt = first_of(raw, "prompt", "question", "messages", "conversations")
    if prompt:
        prompt = as_messages(prompt, "user")
        if messages[:len(prompt)] != prompt:
            messages = prompt + messages
    answers = [{"text": chosen["content"]}, {"text": rejected["content"]}]
    return {"messages": messages, "answers": answers, "pair": [0, 1]}


# The fields that tell a shape, and its function; the first that fits counts.
SHAPES = [
    ({"messages", "answers"}, from_messages),
    ({"chosen", "rejected"}, from_preference),
    ({"messages"}, from_messages),
    ({"conversations"}, from_messages),
    ({"q_a_pairs"}, from_pairs),
    ({"text"}, from_question),
    ({"question"}, from_question),
]
TAKEN = {                                                # fields that become something else in ours
    "answers", "conversations", "q_a_pairs", "chosen", "rejected", "prompt", "question", "text",
    "answer", "image", "image_path", "image_file", "image_id",
}


def convert(raw, name: str) -> dict:
    """A JSON object in any known shape -> the record `name`. Raises BadInput with the reason."""
    if not isinstance(raw, dict):
        raise BadInput("is not a JSON object")
    raw = unfolded(raw)
    shapes = [shape for wanted, shape in SHAPES if wanted <= raw.keys()]
    if not shapes:
        fields = ", ".join(raw) or "none"
        raise BadInput(f"has none of the known shapes (fields: {fields}); see formats.py")

    record = {"answers": raw.get("answers") or []}
    for key, value in raw.items():
        if key not in TAKEN:                             # what we do not know travels along
            record[key] = value
    record |= shapes[0](raw) | {"id": name, "images": images_of(raw)}
    add_markers(record)
    return record


def unfolded(raw):
    """RLHF-V as on the hub: question, chosen and rejected are JSON inside "text"."""
    inner = raw.get("text")
    if "question" in raw or not isinstance(inner, str) or "chosen" not in inner:
        return raw
    if inner.lstrip()[0] not in "{[":                    # somebody asks what was chosen
        return raw
    try:
        return raw | json.loads(inner)
    except (ValueError, TypeError, RecursionError):
        raise BadInput("its 'text' field is not JSON") from None


def images_of(raw):
    images = first_of(raw, "images", "image", "image_path", "image_file") or []
    if not images and raw.get("image_id") is not None:   # LRV gives Visual Genome's numbers
        images = f"{raw['image_id']}.jpg"
    return images if isinstance(images, list) else [images]


def add_markers(record):
    """Where no turn says where the images stand, they stand before the first question."""
    messages = record["messages"]
    if any(MARKER in str(message["content"]) for message in messages):
        return
    for message in messages:
        if message["role"] == "user" and isinstance(message["content"], str):
            message["content"] = f"{MARKER}\n" * len(record["images"]) + message["content"]
            return


# ---- why a record cannot be used -----------------------------------------------------------------

def check(record: dict) -> None:
    """Raises BadInput with the reason a record cannot be used; looks at its text and numbers, not
    at its files."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError) as error:
        raise BadInput(f"cannot be written to a file: {error}") from None
    answers = record.get("answers", [])
    check_messages(record["messages"], len(record["images"]))
    check_answers(answers)
    check_text(record.get("golden") or "", "golden")
    check_pair(record.get("pair"), answers)
    check_judge(record.get("judge") or {}, len(answers))


def check_messages(messages, images):
    roles = [message["role"] for message in messages]
    if roles[:1] == ["system"]:
        del roles[0]
    if not roles:
        raise BadInput("has no messages")
    alternating = ["user", "assistant"] * (len(roles) // 2) + ["user"]
    if roles != alternating:
        found = ", ".join(map(str, roles))
        raise BadInput(f"turns must alternate, first and last the user's, and they are {found}")

    markers = 0
    for k, message in enumerate(messages):
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise BadInput(f"message {k} has no text")
        found = message["content"].count(MARKER)
        if found and message["role"] != "user":
            raise BadInput(f"message {k} contains {MARKER}, which only a user's may; remove it")
        markers += found
    if markers != images:
        raise BadInput(f"has {markers} {MARKER} markers but {images} images")


def check_text(text, what):
    if not isinstance(text, str):
        raise BadInput(f"{what} is no text")
    if MARKER in text:
        raise BadInput(f"{what} contains {MARKER}, which only a user's turn may; remove it")


def check_answers(answers):
    if not isinstance(answers, list):
        raise BadInput("answers must be a list")
    for k, answer in enumerate(answers):
        if not isinstance(answer, dict):
            raise BadInput(f"answer {k} is no object")
        check_text(answer.get("text"), f"answer {k}")
        if not isinstance(answer.get("comment") or "", str):
            raise BadInput(f"answer {k}: its comment is no text")
        if answer.get("scores") is not None:
            RUBRIC.check(answer["scores"], f"answer {k}")


def check_pair(pair, answers):
    if pair is None:
        return
    places = range(len(answers))
    named = isinstance(pair, list) and all(type(k) is int and k in places for k in pair)
    if not named or len(pair) != 2:
        raise BadInput(f"pair {pair} does not name two of its {len(answers)} answers")
    chosen, rejected = (answers[k]["text"].strip() for k in pair)
    if chosen == rejected:
        raise BadInput("chosen and rejected are the same text")


def check_judge(judge, answers):
    """Whoever takes answers out of judged records leaves an order that does not fit."""
    order = judge.get("order") or [] if isinstance(judge, dict) else None
    if not isinstance(order, list):
        raise BadInput("judge must be an object, and its order a list")
    if order and sorted(map(repr, order)) != sorted(map(repr, range(answers))):
        raise BadInput("judge's order is not one of these answers; remove judge to judge afresh")


# ---- reading -------------------------------------------------------------------------------------

def raw_objects(path):
    """(a name from its place, object or BadInput) of everything in a file of JSON lines, one after
    another, or in a JSON array, which is read into memory whole (jq -c ".[]" a.json > a.jsonl makes
    lines of a large one)."""
    stem = Path(path).stem
    try:
        with open(path, "rb") as file:
            if file.peek().lstrip(BOM_UTF8 + b" \t\r\n")[:1] == b"[":
                for k, raw in enumerate(json.loads(file.read())):
                    yield f"{stem}-{k:06d}", raw
                return
            lines = tqdm(file, desc="reading", unit=" lines", disable=None, leave=False)
            for number, line in enumerate(lines, 1):
                line = line.strip()
                if line:
                    yield json_line(line, stem, number)
    except OSError as error:
        raise BadInput(f"--data {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--data {path}: malformed JSON array ({error})") from None


def json_line(line, stem, number):
    try:
        return f"{stem}-{number:06d}", json.loads(line)
    except (ValueError, RecursionError) as error:        # no JSON, or no UTF-8
        return f"line {number}", BadInput(f"malformed JSON ({error})")


def identity(raw, place):
    """A record's own id, in letters that can be written, or its place in the file."""
    if isinstance(raw, dict):
        for key in ("id", "question_id", "idx"):
            if raw.get(key) is not None:
                return str(raw[key]).encode("utf8", "replace").decode()
    return place


def distinct(name, seen):
    """LLaVA's own files repeat ids, one per picture: the second a is a#2."""
    seen[name] += 1
    return name if seen[name] == 1 else distinct(f"{name}#{seen[name]}", seen)


def checked(path):
    """(id, record or why it cannot be used) of everything in a file, images not looked at yet."""
    seen = Counter()
    for place, found in raw_objects(path):
        name = distinct(identity(found, place), seen)
        try:
            if isinstance(found, BadInput):
                raise found
            found = convert(found, name)
            check(found)
        except BadInput as problem:
            found = problem
        yield name, found


def check_images(record: dict, root: Path, size: int, follow_links: bool) -> str:
    """Open and decode every image of a record (JPEGs at reduced size) -> a hash of their bytes."""
    digest = hashlib.sha256()
    for name in record["images"]:
        path = image_path(root, name, follow_links)
        data = read_image(path)
        decode_image(data, path, small=size)
        digest.update(data)
    return digest.hexdigest()[:16]


def stream(
    path: str | Path, image_root: str = "", image_size: int = 336, follow_links: bool = False
) -> Iterator[tuple[str, dict | BadInput]]:
    """(id, usable record or why it is none) of everything in a data file, in order, few of them in
    memory. Every image is decoded once, in threads; of several processes that have met each decodes
    its share, so all must read to the end.

    A usable record also carries "root" (the folder its image names start from), "follow_links" and
    "images_sha" (of their bytes). Raises BadInput only where the file as a whole cannot be read.
    """
    root = Path(image_root or Path(path).absolute().parent)
    rank, world = parallel.seat()

    def look(entry) -> str | BadInput:
        """The hash of a record's images, or why it cannot be used."""
        _, found = entry
        try:
            if isinstance(found, BadInput):
                raise found
            return check_images(found, root, image_size, follow_links)
        except BadInput as problem:
            return problem

    entries = checked(path)
    threads = min(32, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:            # Pillow decodes outside Python's lock
        while block := list(islice(entries, AT_ONCE)):
            mine = list(pool.map(look, block[rank::world]))
            shares = parallel.gather(mine) if world > 1 else [mine]
            for k, (name, record) in enumerate(block):
                found = shares[k % world][k // world]
                if not isinstance(found, BadInput):
                    found = record | {
                        "root": str(root), "follow_links": follow_links, "images_sha": found,
                    }
                yield name, found


def read(
    path: str | Path, image_root: str = "", image_size: int = 336, follow_links: bool = False
) -> tuple[list, list]:
    """The same in memory: (usable records, rejects {"id", "reason"})."""
    records, rejects = [], []
    for name, found in stream(path, image_root, image_size, follow_links):
        if isinstance(found, BadInput):
            rejects.append({"id": name, "reason": str(found)})
        else:
            records.append(found)
    return records, rejects


def report(path, kept: int, rejects: list[dict], out: Path | None) -> None:
    """Print what was rejected and why, counted; keep the whole list in `out`/rejects.jsonl."""
    print(f"{path}: {kept} records usable, {len(rejects)} rejected")
    for reject in rejects[:5]:
        print(f"  {reject['id']}: {reject['reason']}")
    if len(rejects) > 5:
        reasons = Counter(reject["reason"].split(":")[0][:60] for reject in rejects)
        counts = [f"{n} x {reason}" for reason, n in reasons.most_common(5)]
        print(f"  ... by reason: {'; '.join(counts)}")
    if out:
        write_jsonl(out / "rejects.jsonl", rejects)
        if rejects:
            print(f"  all of them, with reasons: {out / 'rejects.jsonl'}")
