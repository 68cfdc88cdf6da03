"""One record, and every file people already have.

The problem. Preference data comes in as many shapes as there are papers. Everything downstream of this file
sees one shape only: a conversation about images, with n candidate answers, some of them scored.

    {"id": "lrv-000123",
     "images": ["images/123.jpg"],                      relative to the file (or --image_root), never outside it
     "messages": [{"role": "user", "content": "<image>\\nWhat is odd here?"}],    any number of turns, the last a user's;
                                                        the k-th <image> marker stands for images[k]
     "answers": [{"text": "...", "finish": "stop", "scores": {"helpfulness": 4, ...}, "comment": "..."}, ...],
     "golden": "...",                                   the judge's or the dataset's own answer, where there is one
     "pair": [0, 1]}                                    answers[0] was preferred to answers[1], where the data says so

The trick. A foreign record is recognised by its fields, not by its file's name:

    LLaVA               conversations: [{from: human, value}, {from: gpt, value}, ...], image
    the authors' DPO    question, chosen, rejected: {from, value}, image           (github.com/findalexli/mllm-dpo)
    TRL conversational  prompt, chosen, rejected: [{role, content}], images        (prompt may be left implicit)
    RLHF-V              question, chosen, rejected: strings, image or image_path   (or the three inside "text")
    questions           text, image (LLaVA's question files); question, answer, image_id (LRV-Instruct: ID.jpg);
                        conversations or q_a_pairs, image_file (SciGraphQA; the last question is the one asked)

Nothing is dropped silently: what cannot be used comes back as (id, reason), is counted and printed. And nothing piles up:
`stream` gives one record after another, so a file may be larger than memory.

Previous: checkpoint.py.  Next: data.py (what the loss sees).
"""
import hashlib
import json
import os
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice, takewhile
from pathlib import Path
from typing import Iterator

from tqdm import tqdm

import parallel
import vision
from common import BadInput, write_jsonl

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
TAKEN = ("conversations", "q_a_pairs", "chosen", "rejected", "prompt", "question", "text", "answer", "image", "image_path",
         "image_file", "image_id")             # fields of foreign shapes that become something else in ours
AT_ONCE = 1024                                 # records in memory while their images are looked at
CONTROL = ("<s>", "</s>", "<unk>", "<pad>")    # these would be read as control tokens, not as text


def quality(answer: dict) -> int:
    """S = helpfulness + correctness + coherence of a scored answer, 0 to 12: what the paper ranks answers by."""
    return sum(answer["scores"][name] for name in ATTRIBUTES[:3])


# ---- foreign shapes -> ours ---------------------------------------------------------------------------------

def convert(raw: dict, where: str) -> dict:
    """A raw JSON object in any accepted shape -> a record. Raises BadInput with the reason."""
    if not isinstance(raw, dict):
        raise BadInput("is not a JSON object")
    inner = raw["text"] if isinstance(raw.get("text"), str) else ""
    if "chosen" in inner and inner.lstrip()[:1] in ("{", "[") and "question" not in raw:        # RLHF-V as on the hub
        try:
            raw = raw | json.loads(inner)
        except (ValueError, TypeError, RecursionError):
            raise BadInput("its 'text' field is not JSON") from None
    if "chosen" in raw and "rejected" in raw and "answers" not in raw:
        record = from_preference(raw)
    elif "messages" in raw:
        record = from_messages(raw)
    elif "conversations" in raw:
        record = from_llava(raw)
    elif any(isinstance(raw.get(key), str) for key in ("text", "question")) or raw.get("q_a_pairs"):
        record = from_question(raw)
    else:
        raise BadInput(f"has none of the known shapes (fields: {', '.join(raw) or 'none'}); see formats.py")
    record = {key: value for key, value in raw.items() if key not in TAKEN} | record           # what we do not know travels along
    record["id"] = identity(raw, where)
    images = next((raw[key] for key in ("images", "image", "image_path", "image_file") if raw.get(key)), [])
    if not images and raw.get("image_id") is not None:                   # LRV names Visual Genome's pictures by number
        images = f"{raw['image_id']}.jpg"
    record["images"] = images if isinstance(images, list) else [images]
    if "messages" not in raw and not any("<image>" in str(m["content"]) for m in record["messages"]):
        for first in record["messages"][:1]:                             # foreign data may leave the marker implicit
            if isinstance(first["content"], str):
                first["content"] = "<image>\n" * len(record["images"]) + first["content"]
    return record


def from_messages(raw: dict) -> dict:
    """Ours, or its common variations: content in parts, the last turn an assistant's (then it is the golden answer)."""
    record = dict(raw)
    if isinstance(raw["messages"], list) and all(isinstance(m, dict) for m in raw["messages"]):
        turns = [m | {"content": flatten(m.get("content"))} for m in raw["messages"]]
        if turns and turns[-1].get("role") == "assistant" and not raw.get("answers") and not raw.get("golden"):
            record["golden"] = turns.pop()["content"]
        record["messages"] = turns
    return record


def identity(raw: dict, where: str) -> str:
    return str(next((raw[key] for key in ("id", "question_id", "idx") if raw.get(key) is not None), where))


def from_llava(raw: dict) -> dict:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
    try:
        turns = [{"role": roles[t["from"]], "content": t["value"]} for t in raw["conversations"]]
    except (KeyError, TypeError):
        raise BadInput("conversations must be a list of {from: human|gpt, value}") from None
    record = {"messages": turns}
    if turns and turns[-1]["role"] == "assistant":
        record |= {"messages": turns[:-1], "golden": turns[-1]["content"]}
    return record


def from_question(raw: dict) -> dict:
    """LLaVA's question files (text), LRV-Instruct (question, answer), SciGraphQA's q_a_pairs, the last of which is asked."""
    pairs = raw.get("q_a_pairs") or [[raw.get("text") or raw.get("question"), raw.get("answer")]]
    if not isinstance(pairs, list) or not all(isinstance(p, (list, tuple)) and len(p) == 2 for p in pairs):
        raise BadInput("q_a_pairs must be a list of [question, answer]")
    turns = [{"role": role, "content": text} for pair in pairs for role, text in zip(("user", "assistant"), pair)]
    golden = turns.pop()["content"]
    return {"messages": turns} | ({"golden": golden} if isinstance(golden, str) and golden.strip() else {})


def from_preference(raw: dict) -> dict:
    """chosen and rejected as strings, {from, value}, or message lists; the prompt as question, prompt, messages or
    conversations, or inside chosen and rejected, which then are whole conversations."""
    prompt = next((raw[key] for key in ("prompt", "question", "messages") if raw.get(key) is not None), None)
    if prompt is None and "conversations" in raw:
        prompt = from_llava(raw)["messages"]
    chosen, rejected = (as_messages(raw[key], "assistant") for key in ("chosen", "rejected"))
    if prompt is None or [m["role"] for m in chosen[:1]] == ["user"]:    # TRL's implicit prompt: the common beginning
        same = len([*takewhile(lambda turns: turns[0] == turns[1], zip(chosen, rejected))])
        prompt, chosen, rejected = chosen[:same], chosen[same:], rejected[same:]
    if len(chosen) != 1 or len(rejected) != 1:
        raise BadInput("chosen and rejected must each be one assistant turn after a shared prompt")
    answers = [{"text": chosen[0]["content"]}, {"text": rejected[0]["content"]}]
    return {"messages": as_messages(prompt, "user"), "answers": answers, "pair": [0, 1]}


def as_messages(value, role: str) -> list[dict]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if isinstance(value, dict):
        return [{"role": role, "content": value.get("value", value.get("content"))}]
    if not isinstance(value, list) or not all(isinstance(m, dict) and "content" in m for m in value):
        raise BadInput("a turn must be a string, {from, value} or a list of {role, content}")
    return [{"role": m.get("role", role), "content": flatten(m["content"])} for m in value]


def flatten(content):
    """TRL content may be a list of parts, {type: image} and {type: text, text}. Images come first, as in LLaVA's training."""
    if not isinstance(content, list):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
    unknown = [kind for kind in kinds if kind not in ("image", "text")]
    if unknown:
        raise BadInput(f"has a content part of type {unknown[0]!r}; known are image and text")
    texts = [part.get("text") for part in content if part["type"] == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise BadInput("has a content part of type 'text' without text")
    return "<image>\n" * kinds.count("image") + "".join(texts)


# ---- lint: why a record cannot be used ------------------------------------------------------------------------

def check(record: dict) -> None:
    """Raises BadInput with the reason a record cannot be used; looks at its text and numbers, not at its files."""
    messages, answers = record["messages"], record.setdefault("answers", [])
    if not isinstance(messages, list) or not messages:
        raise BadInput("has no messages")
    for k, m in enumerate(messages):
        expected = "assistant" if k % 2 else "user"
        if not isinstance(m, dict) or not isinstance(m.get("content"), str):
            raise BadInput(f"message {k} has no text content")
        if m.get("role") == "system":
            raise BadInput("has a system message; the vicuna_v1 template has its own, put yours into the user's turn")
        if m.get("role") != expected or k % 2 and k == len(messages) - 1:
            raise BadInput(f"message {k} is {m.get('role')!r}'s; turns must alternate, first and last the user's")
        if not m["content"].strip():
            raise BadInput(f"message {k} is empty")
        clean(m["content"], f"message {k}", markers=expected == "user")
    markers = sum(m["content"].count("<image>") for m in messages)
    if markers != len(record["images"]):
        raise BadInput(f"has {markers} <image> markers but {len(record['images'])} images")
    if not isinstance(answers, list):
        raise BadInput("answers must be a list")
    for k, answer in enumerate(answers):
        if not isinstance(answer, dict) or not isinstance(answer.get("text"), str):
            raise BadInput(f"answer {k} has no text")
        clean(answer["text"], f"answer {k}")
        if not isinstance(answer.get("comment") or "", str):
            raise BadInput(f"answer {k}: its comment is no text")
        check_scores(answer.get("scores"), k)
    if record.get("golden") is not None:
        if not isinstance(record["golden"], str):
            raise BadInput("golden must be text")
        clean(record["golden"], "golden")
    judge = record.get("judge") or {}
    order = judge.get("order") or [] if isinstance(judge, dict) else None
    if not isinstance(order, list) or order and Counter(map(repr, order)) != Counter(map(repr, range(len(answers)))):
        raise BadInput("judge must be an object, its order a permutation of the answers; remove it to judge afresh")
    pair = record.get("pair")
    if pair is not None:
        if type(pair) is not list or len(pair) != 2 or not all(type(k) is int and 0 <= k < len(answers) for k in pair):
            raise BadInput(f"pair {pair} does not name two of its {len(answers)} answers")
        if answers[pair[0]]["text"].strip() == answers[pair[1]]["text"].strip():
            raise BadInput("chosen and rejected are the same text")


def check_scores(scores, k: int) -> None:
    if scores is None:
        return
    if not isinstance(scores, dict):
        raise BadInput(f"answer {k}: scores must be an object of {', '.join(ATTRIBUTES)}")
    for name in ATTRIBUTES:
        value = scores.get(name)
        if type(value) is not int or not 0 <= value <= 4:
            raise BadInput(f"answer {k}: score {name} is {value!r}, not an integer from 0 to 4")


def clean(text: str, what: str, markers: bool = False) -> None:
    """Raises BadInput for what a tokenizer would read as a control token, and for what no file can hold."""
    for token in CONTROL + (() if markers else ("<image>",)):
        if token in text:
            raise BadInput(f"{what} contains {token}, which the tokenizer reads as a control token; remove it")
    whole(text, what)


def whole(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(f"{what} is not valid Unicode: it holds half of a character that was cut in two") from None


def image_path(root: Path, name) -> Path:
    """The file an image name stands for; a name that leads out of `root` (.., absolute, symlink) is refused."""
    if not isinstance(name, str):
        raise BadInput(f"image {str(name)[:60]} is not a file name; write embedded images to files and name those")
    root = Path(root).resolve()
    try:
        path = (root / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:                 # a zero byte, a loop of symlinks
        raise BadInput(f"image {name!r} is not a file name ({error})") from None
    if not path.is_relative_to(root):
        raise BadInput(f"image {name} leads outside {root}; move it inside or set --image_root")
    return path


def check_images(record: dict, root: Path, size: int) -> str:
    """Open and decode every image of a record (JPEGs at reduced size). Returns a hash of their bytes."""
    digest = hashlib.sha256()
    for name in record["images"]:
        path = image_path(root, name)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadInput(f"image {path}: {error.strerror}; fix the path or set --image_root") from None
        vision.decode_image(data, path, small=size)
        digest.update(data)
    return digest.hexdigest()[:16]


# ---- reading ----------------------------------------------------------------------------------------------------

def raw_objects(path: Path) -> Iterator[tuple[str, object]]:
    """(where, object or BadInput) of JSON lines, one after another, or of a JSON array, which is read into memory whole (jq -c
    ".[]" a.json > a.jsonl makes lines of a large one)."""
    stem = Path(path).stem
    try:
        with open(path, "rb") as f, tqdm(total=os.fstat(f.fileno()).st_size, desc="reading", unit="B", unit_scale=True,
                                         disable=None, leave=False) as bar:
            if f.peek().removeprefix(BOM_UTF8).lstrip()[:1] == b"[":
                yield from ((f"{stem}-{k:06d}", x) for k, x in enumerate(json.loads(f.read().decode("utf-8-sig"))))
                return
            for number, line in enumerate(f, 1):                         # bytes end at \n; text would, too, at U+2028
                bar.update(len(line))
                text = line.decode("utf8" if number > 1 else "utf-8-sig").rstrip("\r\n")         # a byte-order mark is no JSON
                if text.strip():
                    try:
                        found = f"{stem}-{number:06d}", json.loads(text)
                    except (ValueError, RecursionError) as error:
                        found = f"line {number}", BadInput(f"malformed JSON ({error})")
                    yield found
    except OSError as error:
        raise BadInput(f"--data {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"--data {path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--data {path}: malformed JSON array ({error})") from None


def checked(path: Path, root: Path) -> Iterator[tuple[str, dict | BadInput]]:
    """(id, record, or why it cannot be used) of everything in a file; images are not looked at yet."""
    seen = Counter()                                                     # by hash: an int of an id, however long
    for where, raw in raw_objects(path):
        name = where
        try:
            if isinstance(raw, BadInput):
                raise raw
            if isinstance(raw, dict):
                name = identity(raw, where).encode("utf8", "replace").decode()
            found = convert(raw, where)
            seen[hash(name)] += 1
            if seen[hash(name)] > 1 and "messages" not in raw:           # LLaVA's own files repeat ids, one per picture
                name = found["id"] = f"{name}#{seen[hash(name)]}"
                seen[hash(name)] += 1
            if seen[hash(name)] > 1:
                raise BadInput("a record with this id came before")
            check(found)
            whole(json.dumps(found, ensure_ascii=False), "a field")
            found["root"] = str(root)
        except BadInput as problem:
            found = problem
        yield name, found


def stream(path: str | Path, image_root: str = "", image_size: int = 336) -> Iterator[tuple[str, dict | BadInput]]:
    """(id, usable record, or why it is none) of everything in a data file, in order, few of them in memory. Every image is
    decoded once, in threads; of several processes that have met each decodes its share, so all must read to the end.

    A usable record also carries "root" (the folder its image names start from) and "images_sha" (of their bytes).
    Raises BadInput only where the file as a whole cannot be read.
    """
    root = Path(image_root) if image_root else Path(path).resolve().parent

    def look(entry) -> tuple[str, str]:                                  # (hash of the images' bytes, "") or ("", what is wrong)
        try:
            return ("", str(entry[1])) if isinstance(entry[1], BadInput) else (check_images(entry[1], root, image_size), "")
        except BadInput as problem:
            return "", str(problem)
    entries, (rank, world) = checked(path, root), parallel.seat()
    with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:       # Pillow decodes outside Python's lock
        while some := list(islice(entries, AT_ONCE)):
            mine = list(pool.map(look, some[rank::world]))
            shares = parallel.gather(mine) if world > 1 else [mine]
            for k, (name, record) in enumerate(some):
                images_sha, problem = shares[k % world][k // world]
                yield name, BadInput(problem) if problem else record | {"images_sha": images_sha}


def read(path: str | Path, image_root: str = "", image_size: int = 336) -> tuple[list[dict], list[dict]]:
    """The same in memory: (usable records, rejects {"id", "reason"})."""
    found = list(stream(path, image_root, image_size))
    return ([record for _, record in found if not isinstance(record, BadInput)],
            [{"id": name, "reason": str(problem)} for name, problem in found if isinstance(problem, BadInput)])


def report(path, kept: int, rejects: Sequence[dict], out: Path | None) -> None:
    """Print what was rejected and why, counted; keep the whole list in `out`/rejects.jsonl."""
    print(f"{path}: {kept} records usable, {len(rejects)} rejected")
    for reject in islice(rejects, 5):
        print(f"  {reject['id']}: {reject['reason']}")
    if len(rejects) > 5:
        kinds = Counter(r["reason"].split(":")[0][:60] for r in rejects)
        print("  ... by reason: " + "; ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5)))
    if out:
        write_jsonl(Path(out) / "rejects.jsonl", rejects)
        if rejects:
            print(f"  all of them, with reasons: {Path(out) / 'rejects.jsonl'}")
