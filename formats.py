"""Every file of preferences, conversations or questions that people already have -> records.

The problem. Such data comes in as many shapes as there are papers. Everything downstream sees one
shape only: a conversation about images with n candidate answers, some of them scored (data.py).

The trick. A foreign shape is recognised by its fields, never by its file's name, and each is one
small function that takes out of the row what it understands: the conversation, its answers.

    LLaVA           conversations: [{from: human, value}, {from: gpt, value}, ...], image
    the authors'    question, chosen, rejected: {from, value}, image (findalexli/mllm-dpo)
    TRL             prompt, chosen, rejected: [{role, content}], images; prompt may be left implicit
    RLHF-V          question, chosen, rejected: strings, image or image_path (or all in "text")
    ms-swift        messages that end with the chosen answer, rejected_response
    LLaVA-RLHF      conversations, output_1, output_2, preference: 1 or 2
    questions       text, image (LLaVA's question files); question, answer, image_id (LRV-Instruct);
                    q_a_pairs, image_file (SciGraphQA; the last question is the one asked);
                    instruction, input, output, system, history (Alpaca)

What no shape took travels along and is counted; where it surely means something (MEANT), the row is
refused. One record has one prompt, whatever shape it came in: a picture that stands first or last
in its turn goes first, with a newline behind it, as LLaVA trains and asks. Objects may be spelled
as text, in JSON or Python; pictures may be {bytes, path}, as on the hub.

Another shape is a function that takes the JSON object and returns the fields of a record, and a
line in SHAPES. Nothing is dropped silently: what cannot be used comes back as (id, reason), is
counted and printed. And nothing piles up: `stream` gives one record after another.
"""
import ast
import gzip
import hashlib
import json
import os
import re
import reprlib
import tempfile
import warnings
import zlib
from base64 import b64decode, b64encode
from codecs import BOM_UTF8
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from itertools import islice
from pathlib import Path

import parallel
from common import BadInput, progress, sha, shown, write_jsonl
from data import MARKER
from judge.rubric import RUBRIC
from vision import decode_image, image_path, read_image

UNREADABLE = (ValueError, TypeError, SyntaxError, MemoryError, RecursionError)
AT_ONCE = 1024                                 # records in memory while their images are looked at
PEEK = 1 << 16                                 # bytes that tell what a file is
DEEPEST = 50                                   # objects within objects
AROUND = ("data", "rows", "train", "instances", "samples", "examples", "records")
SPEAKERS = {"human": "user", "gpt": "assistant"}


# ---- what shapes are made of ---------------------------------------------------------------------

def nothing(value) -> bool:
    """Whether a field is empty as tables have it: null, NaN, "", [], [null], {"path": null}."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return all(map(nothing, value))
    return value is None or value != value or isinstance(value, str) and not value.strip()


def take(row, *names):
    """Take these fields out of a row -> the first that has something; None where none has."""
    for name in names:
        value = row.pop(name, None)
        if not nothing(value):
            return value


def check_depth(value, room=DEEPEST) -> None:
    if not room:
        raise BadInput(f"is nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        value = [*value.values()]
    for below in value if isinstance(value, list | tuple) else []:
        check_depth(below, room - 1)


def spelled(text):
    """The value that a text spells in JSON or Python; None where it spells none."""
    for read in (json.loads, ast.literal_eval):
        with warnings.catch_warnings(), suppress(*UNREADABLE):
            warnings.simplefilter("ignore")              # of "\\d" and its like
            found = read(text.strip())
            check_depth(found)
            return found


def unspelled(value):
    """Turns, where a text spells them; any other value as it is."""
    if not isinstance(value, str) or not re.match(r"""\s*\[?\s*\{\s*["']""", value):
        return value
    keys = set(re.findall(r"""["'](\w+)["']\s*:""", value))
    if not ({"role", "content"} <= keys or {"from", "value"} <= keys):
        return value                                     # JSON may be what was asked for
    found = spelled(value)
    if found is None:
        raise BadInput("a text that begins like a list of turns is neither JSON nor Python")
    turns = found if isinstance(found, list) else [found]
    alike = all(isinstance(turn, dict) and {"content", "value"} & turn.keys() for turn in turns)
    return found if alike else value


def as_messages(value, role):
    """A text, {from, value} or a list of {role, content} -> messages; `role` speaks by default.
    Where a turn's own parts name pictures, it has them as "pictures"."""
    value = unspelled(value)
    if isinstance(value, str):
        value = {"content": value}
    turns = value if isinstance(value, list) else [value]
    if not turns:
        raise BadInput("has no messages")
    messages = []
    for turn in turns:
        if not isinstance(turn, dict):
            raise BadInput("a turn must be a text, {from, value} or a list of {role, content}")
        rest = dict(turn)
        speaker = take(rest, "role", "from") or role
        content, value = rest.pop("content", None), rest.pop("value", None)
        text, pictures = flat(value if content is None else content)
        heed(rest, pictures)
        message = {"role": SPEAKERS.get(str(speaker), speaker), "content": text}
        messages.append(message | {"pictures": pictures} if pictures else message)
    return messages


def flat(content):
    """TRL's content may be a list of parts -> its text, and the pictures that its parts name."""
    if not isinstance(content, list):
        return content, []
    text, pictures = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "image_url"):
            text += MARKER
            named = take(dict(part), "image", "image_url", "path", "url")
            pictures += [named] if named else []
        elif kind == "text" and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise BadInput(
                f"has a content part of type {shown(reprlib.repr(kind))}; known: image, text with "
                "its text"
            )
    return pictures_first(text), pictures


def pictures_first(text):
    """Pictures before or behind a turn's words -> before them, a newline behind each. Pictures
    among the words stay where they are."""
    first, *others = pieces = text.split(MARKER)
    if "".join(pieces[:-1]).strip() and "".join(others).strip():
        return text
    words = pieces[-1].lstrip() or first.rstrip()
    if not others or not words:
        return text
    return f"{MARKER}\n" * len(others) + words


def asked(messages):
    """A conversation that ends with an answer has it as its golden one."""
    if not messages or messages[-1]["role"] != "assistant":
        return {"messages": messages}
    *messages, answer = messages
    if nothing(answer["content"]):
        return {"messages": messages}
    return {"messages": messages, "golden": answer["content"]}


def of_pairs(pairs, name):
    """[[question, answer], ...] -> messages."""
    messages = []
    for pair in pairs if isinstance(pairs, list) else [None]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadInput(f"{name} must be a list of [question, answer]")
        messages += as_messages(pair[0], "user") + [{"role": "assistant", "content": pair[1]}]
    return messages


def prompt_of(row, *names):
    """What is asked, under the first of these names or Alpaca's, after what was said before."""
    history = of_pairs(take(row, "history") or [], "history")
    question = take(row, *names)
    if question is None:
        parts = [take(row, "instruction"), take(row, "input")]
        question = "\n".join(str(part) for part in parts if part)
    for name in ("instruction", "input", "context"):
        if isinstance(question, str) and not nothing(row.get(name)):
            raise BadInput(f"'{name}' belongs to the question, too; write it into the question")
    return history + (as_messages(question, "user") if question else [])


def continued(prompt, turns):
    """A prompt and the turns that both answers begin with -> one conversation; what both have is
    said once."""
    def words(messages):
        return [(m["role"], str(m["content"]).replace(MARKER, "").strip()) for m in messages]

    system = None
    if turns and turns[0]["role"] == "system":
        system, *turns = turns
    shared = min(len(prompt), len(turns))
    while words(prompt[len(prompt) - shared:]) != words(turns[:shared]):
        shared -= 1
    if not shared and turns and words(turns[:1]) == words(prompt[:1]):
        raise BadInput("the prompt's history and the turns before the answers disagree")
    if MARKER in str(turns[:shared]) and MARKER not in str(prompt):
        prompt = prompt[:len(prompt) - shared] + turns[:shared]
    return with_system(prompt + turns[shared:], system and system["content"])


def with_system(messages, system):
    """Messages with the system's in front, unless it stands there."""
    if system is None:
        return messages
    if not isinstance(system, str):
        raise BadInput("system is no text")
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] != system:
        raise BadInput("has two system messages that differ")
    return messages


# ---- shapes --------------------------------------------------------------------------------------
# Each takes out of the row what it understands.

def from_messages(row):
    """Ours, or LLaVA's conversations."""
    messages = as_messages(row.pop("messages", row.pop("conversations", None)), "user")
    return {"messages": messages} if row.get("golden") else asked(messages)


def from_question(row):
    messages = prompt_of(row, "text", "question", "query")
    answer = take(row, "answer", "response", "output")
    return asked(messages + (as_messages(answer, "assistant") if answer is not None else []))


def from_pairs(row):
    """SciGraphQA: the last question is asked, the others came before it."""
    return asked(of_pairs(row.pop("q_a_pairs"), "q_a_pairs"))


def from_preference(row):
    """The prompt stands in a field of its own, or chosen and rejected are whole conversations, and
    it is their common beginning."""
    *messages, chosen = as_messages(row.pop("chosen"), "assistant")
    *others, rejected = as_messages(row.pop("rejected"), "assistant")
    if messages != others or {chosen["role"], rejected["role"]} & {"user", "system"}:
        raise BadInput("chosen and rejected must each be one assistant turn after a shared prompt")
    prompt = prompt_of(row, "prompt", "question", "query", "messages", "conversations")
    answers = [{"text": chosen["content"]}, {"text": rejected["content"]}]
    return {"messages": continued(prompt, messages), "answers": answers, "pair": [0, 1]}


def from_rejected(row):
    """ms-swift: a whole conversation ends with the chosen answer; the rejected one, or the whole
    conversation that ends with it, has a field of its own."""
    chosen = unspelled(take(row, "messages", "conversations"))
    if chosen is None:
        chosen = [{"role": "assistant", "content": row.pop("response", None)}]
    if not isinstance(chosen, list):
        raise BadInput("its messages are no list of turns")
    rejected = take(row, "rejected_response", "rejected_messages", "rejected_conversations")
    rejected = unspelled(rejected)
    if not isinstance(rejected, list):
        rejected = [{"role": "assistant", "content": rejected}]
    if len(rejected) == 1:
        rejected = chosen[:-1] + rejected
    row |= {"chosen": chosen, "rejected": rejected}
    return from_preference(row)


def from_outputs(row):
    """LLaVA-RLHF: two outputs, and the number of the better one."""
    outputs = [row.pop("output_1"), row.pop("output_2")]
    better = row.pop("preference")
    if better not in (1, 2):
        raise BadInput(f"preference is {shown(reprlib.repr(better))}, but must be 1 or 2")
    row["chosen"], row["rejected"] = outputs if better == 1 else outputs[::-1]
    return from_preference(row)


# The fields that tell a shape, and its function; the first that fits counts.
SHAPES = [
    ({"messages", "answers"}, from_messages),
    ({"chosen", "rejected"}, from_preference),
    ({"rejected_response"}, from_rejected),
    ({"rejected_messages"}, from_rejected),
    ({"rejected_conversations"}, from_rejected),
    ({"output_1", "output_2", "preference"}, from_outputs),
    ({"messages"}, from_messages),
    ({"conversations"}, from_messages),
    ({"q_a_pairs"}, from_pairs),
    ({"text"}, from_question),
    ({"question"}, from_question),
    ({"query"}, from_question),
    ({"instruction"}, from_question),
]
NAMES = ("id", "question_id", "idx")
OURS = {*NAMES, "images", "messages", "answers", "golden", "pair", "judge", "truth", "root",
        "images_sha", "follow_links"}


def known_shapes(row) -> list:
    """The functions of the shapes whose fields a row has, in order."""
    return [shape for wanted, shape in SHAPES if wanted <= row.keys()]


def convert(raw, name: str, keep_marker: bool = False) -> dict:
    """A JSON object in any known shape -> the record `name`, its images as they came: names or
    {bytes, path}. Raises BadInput with the reason."""
    if not isinstance(raw, dict):
        raise BadInput("is not a JSON object")
    check_depth(raw)
    row = unfolded(raw)
    shapes = known_shapes(row)
    if not shapes:
        fields = shown(", ".join(row) or "none", 200)
        raise BadInput(f"has none of the known shapes (fields: {fields}); see formats.py")

    # What a shape takes is used; the rest travels along, unless it surely means something.
    images = images_of(row)
    system = take(row, "system", "system_prompt", "system_message")
    record = shapes[0](row)
    messages = record["messages"] = with_system(record["messages"], system)
    named = [picture for message in messages for picture in message.pop("pictures", [])]
    if named and images and named != images:
        raise BadInput("its images and the pictures that its content parts name are not the same")
    images = images or named
    heed(row, images, record.get("answers") or row.get("answers"))
    heed_texts(record, images)
    record = {"answers": []} | row | record | {"id": name, "images": images}
    record["answers"] = record["answers"] or []
    add_markers(record, keep_marker)
    return record


def unfolded(raw):
    """A copy of the row; RLHF-V of the hub has question, chosen, rejected as JSON in "text"."""
    row = dict(raw)
    inner = row.get("text")
    begins = isinstance(inner, str) and re.match(r"\s*[{\[].*chosen", inner, re.DOTALL)
    if "question" in row or not begins:                  # somebody may ask what was chosen
        return row
    found = spelled(row.pop("text"))
    if not isinstance(found, dict):
        raise BadInput("its 'text' field is not JSON")
    return row | found


def images_of(row) -> list:
    """A row's pictures as it names them, taken out of it."""
    path = row.get("image_path")
    images = take(row, "images", "image", "image_path", "image_file")
    if images is None and not nothing(row.get("image_id")):      # LRV gives Visual Genome's numbers
        images = f"{row.pop('image_id')}.jpg"
    if isinstance(images, str) and images.lstrip()[:1] in ("[", "{"):
        images = spelled(images) or images
    if isinstance(images, dict) and isinstance(path, str):       # RLAIF-V has both
        row.pop("image_path")
        images = {"image_path": path} | images
    if not isinstance(images, list):
        images = [images]
    return [image for image in images if not nothing(image)]


def add_markers(record, keep_marker):
    """Where no turn says where the images stand, they stand before the first question."""
    users = [m for m in record["messages"] if m["role"] == "user" and isinstance(m["content"], str)]
    if users and not any(MARKER in str(message["content"]) for message in record["messages"]):
        markers = f"{MARKER}\n" * len(record["images"])
        users[0]["content"] = markers + users[0]["content"]
    for message in users:
        if not keep_marker:
            message["content"] = pictures_first(message["content"])


# ---- what would be lost, or read as words --------------------------------------------------------

# Fields that no shape took and that surely mean something: (their names, what makes them harmless
# where it is there, the remedy). A number is never one of them.
MEANT = [
    (r"tools?|functions?|(tool|function)_calls?", None, "nothing here teaches the use of tools"),
    (r"(video|audio)s?(_?(path|file|url|name)s?)?", None, "only pictures are read"),
    (r"(image|img|picture|photo)s?_?\d+|(chosen|rejected)_im(age|g)\w*", None,
     "name all pictures in 'images'; both answers are about the same ones"),
    (r".*(image|img|picture|photo|pixel|screenshot).*|file_?names?", "images",
     "name the picture in 'image'"),
    (r"(chosen|rejected)_\w+|(output|response|answer)(_[a-z\d]|\d)|preference", "answers",
     "name the two answers 'chosen' and 'rejected'"),
]
FILE = re.compile(r"\S+\.(jpe?g|png|webp|gif|bmp|tiff?)|data:image/\S+", re.I)

# What other projects write for pictures, roles and ends. In all texts; in a user's beside pictures
# (elsewhere it may be HTML); in a user's; in answers.
SPELLED = re.compile(
    r"(?i:<\|\w+\|>|\[/?INST\]|<</?SYS>>|<(start|end)_of_\w+>|<im_(start|end|patch)>"
    r"|<ImageHere>|<image[_ ]?\d+>|<image[-_]\w+>|<IMG_\w+>|<img>\S*</img>|<bbox>|<ref-object>"
    r"|<fake_token_around_image>)"
)
PICTURED = re.compile(
    rf"(?!{MARKER})(?i:<[/\w-]*(image|img|picture|photo|video|audio)[\w-]*>"
    r"|\[/?(IMG|IMAGE|VIDEO|AUDIO)\w*\])"
)
TEMPLATED = re.compile(
    r"(^|\s)USER:\s(?=.*\sASSISTANT:)|(^|\s)(ASSISTANT|Assistant|### Response):\s*$", re.DOTALL
)
ANSWERED = re.compile(r"^\s*(ASSISTANT|Assistant):")


def heed(row, images, answers=None) -> None:
    """Raises BadInput where a field that nobody took surely means something."""
    there = {None: False, "images": images, "answers": answers}
    for name, value in row.items():
        if name in OURS or nothing(value) or isinstance(value, int | float):
            continue
        for pattern, known, remedy in MEANT:
            if not there[known] and re.fullmatch(pattern, name, re.I):
                raise BadInput(f"'{shown(name)}' would be lost: {remedy}, or drop the field")
        if not images and is_picture(value):
            raise BadInput(
                f"'{shown(name)}' holds a picture; name it in 'image', or drop the field"
            )


def is_picture(value):
    if isinstance(value, list):
        return any(map(is_picture, value))
    if isinstance(value, dict):
        return "bytes" in value
    return isinstance(value, str) and FILE.fullmatch(value)


def heed_texts(record, images) -> None:
    """Raises BadInput where a text holds what another project's code would have replaced, or went
    through a template."""
    texts = []
    for k, message in enumerate(record["messages"]):
        patterns = [SPELLED]
        if message["role"] == "user":
            patterns += [TEMPLATED] + [PICTURED] * bool(images)
        texts.append((f"message {k}", message["content"], patterns))
    answers = [answer["text"] for answer in record.get("answers", [])]
    for text in [*answers, record.get("golden")]:
        texts.append(("an answer", text, [SPELLED, ANSWERED]))

    for what, text, patterns in texts:
        for pattern in patterns if isinstance(text, str) else []:
            found = pattern.search(text)
            if found:
                raise BadInput(
                    f"{what} contains {shown(found[0].strip())}, another project's spelling; write "
                    f"words alone, and {MARKER} where a picture stands"
                )


# ---- pictures that are no files yet --------------------------------------------------------------

def with_files(record, root: Path, follow_links: bool, out: Path | None) -> dict:
    """The record with its images as names of files, and "root", the folder these start from.

    {bytes, path} of the hub is the file at its image_path or path, where one is there and holds
    these bytes. Else the bytes are written to `out`/pictures.
    """
    images = [file_of(image, root, follow_links) for image in record["images"]]
    kinds = set(map(type, images))
    if bytes in kinds:
        if len(kinds) > 1:
            raise BadInput("has pictures as files and others as bytes; write all of them to files")
        root = Path(out or temporary().name)
        images = [stored(data, root) for data in images]
    return record | {"images": images, "root": str(root)}


def file_of(image, root, follow_links):
    """The name of a picture's file, or where there is none its bytes, which are base64 in JSON."""
    if not isinstance(image, dict):
        return image
    data = image.get("bytes")
    try:
        data = None if nothing(data) else b64decode(data, validate=True)
    except (ValueError, TypeError):
        raise BadInput("an image's bytes are not base64") from None
    keys = ("image_path", "path", "url", "src")
    named = [image[key] for key in keys if isinstance(image.get(key), str)]
    for name in named:
        try:
            path = image_path(root, name, follow_links)
            if path.is_file() and data in (None, path.read_bytes()):
                return name
        except (BadInput, OSError):
            continue
    if data is None and not named:
        raise BadInput("an image has neither a path nor bytes")
    return named[0] if data is None else data


def stored(data, out):
    """Write a picture's bytes to a file that their content names, whole or not at all -> its name
    below `out`."""
    path = out / "pictures" / sha(data)
    if not path.exists() or path.stat().st_size != len(data):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f"{path.name}.{os.getpid()}.part")
        aside.write_bytes(data)
        os.replace(aside, path)
    return f"pictures/{path.name}"


@cache
def temporary():
    """A folder that ends with the process."""
    return tempfile.TemporaryDirectory()


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
        found = shown(", ".join(map(str, roles)), 200)
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
    """(a name from its place, object or BadInput) of everything in a data file, one after another:
    JSON lines, parquet, or JSON as a whole, which is read into memory (jq -c ".[]" a.json > a.jsonl
    makes lines of a large array). JSON may be gzipped. Raises BadInput naming the file."""
    try:
        with open(path, "rb", buffering=PEEK) as file:
            if file.peek().startswith(b"\x1f\x8b"):
                file = gzip.GzipFile(fileobj=file)
            yield from objects_of(file, path)
    except BadInput:                                     # a ValueError, too
        raise
    except OSError as error:
        raise BadInput(f"--data {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"--data {path}: malformed JSON array ({error})") from None
    except (EOFError, zlib.error) as error:
        raise BadInput(f"--data {path}: damaged gzip file ({error})") from None


def objects_of(file, path):
    stem = Path(path).stem
    begin = file.peek(PEEK).lstrip(BOM_UTF8 + b" \t\r\n")
    if begin.startswith(b"PAR1"):
        for k, row in enumerate(parquet_rows(path)):
            yield f"{stem}-{k:06d}", row
        return
    check_json(begin, path)

    # An object whose first line is not the whole of it, or lines of which that one is bad.
    first, more, _ = begin.partition(b"\n")
    if begin[:1] == b"[" or more and not first.rstrip().endswith(b"}"):
        try:
            yield from rows_of(json.loads(file.read()), stem)
            return
        except ValueError:
            if begin[:1] == b"[":
                raise
            file.seek(0)
    lines = progress(file, desc="reading", unit=" lines", leave=False)
    for number, line in enumerate(lines, 1):
        line = line.strip()
        if line:
            yield from json_line(line, stem, number)


def check_json(begin, path):
    """Raises BadInput where a file does not begin as JSON, in its first line or a later one."""
    binary = b"\0" in begin[:1000]
    if begin and begin[:1] not in b"[{" and (binary or not re.search(rb'^\{\s*"', begin, re.M)):
        raise BadInput(
            f"--data {path} is neither JSON nor parquet; unpack it if it is packed, write a table "
            "with pandas' to_json(orient='records', lines=True)"
        )


def rows_of(found, place):
    """The rows that a list holds, or an object around one: {"data": [...]}, {"rows": [...]}, the
    hub's {"rows": [{"row": {...}}]}."""
    if isinstance(found, dict) and not known_shapes(found):
        lists = [found.get(key) for key in AROUND]
        found = next((rows for rows in lists if isinstance(rows, list)), found)
    if not isinstance(found, list):
        yield place, found
        return
    for k, row in enumerate(found):
        inner = row.get("row") if isinstance(row, dict) else None
        if isinstance(inner, dict) and not known_shapes(row):
            cut = BadInput("was cut short by the hub's viewer; take the file itself")
            row = cut if row.get("truncated_cells") else inner
        yield f"{place}-{k:06d}", row


def parquet_rows(path):
    """The rows of a parquet file, few in memory at a time, as datasets.to_json writes them."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise BadInput(f"--data {path}: parquet is read by pyarrow: pip install pyarrow") from None

    def plain(value):
        return b64encode(value).decode() if isinstance(value, bytes) else str(value)

    try:
        file = parquet.ParquetFile(path)
        rows = progress(total=file.metadata.num_rows, desc="reading", leave=False)
        for batch in file.iter_batches(batch_size=16, use_threads=False):
            for row in batch.to_pylist():
                rows.update()
                yield json.loads(json.dumps(row, default=plain))
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise BadInput(f"--data {path}: damaged parquet file ({shown(str(error), 200)})") from None


def json_line(line, stem, number):
    """(place, object or BadInput) of what a line holds: nearly always one."""
    place = f"{stem}-{number:06d}"
    try:
        found = json.loads(line)
    except (ValueError, RecursionError) as error:        # no JSON, or no UTF-8
        yield f"line {number}", BadInput(f"malformed JSON ({shown(str(error), 200)})")
        return
    if isinstance(found, dict):                          # it may be one around rows
        yield from rows_of(found, place)
    else:
        yield place, found


def identity(raw, place):
    """A record's own id, in letters that can be written, or its place in the file."""
    if isinstance(raw, dict):
        for key in NAMES:
            if not nothing(raw.get(key)):
                return str(raw[key]).encode("utf8", "replace").decode()
    return place


def distinct(name, seen):
    """LLaVA's own files repeat ids, one per picture: the second a is a#2."""
    seen[name] += 1
    return name if seen[name] == 1 else distinct(f"{name}#{seen[name]}", seen)


def checked(path, root=Path(), follow_links=False, keep_marker=False, out=None):
    """(id, record or why it cannot be used) of everything in a file, images not looked at yet."""
    seen = Counter()
    for place, found in raw_objects(path):
        name = distinct(identity(found, place), seen)
        try:
            if isinstance(found, BadInput):
                raise found
            found = with_files(convert(found, name, keep_marker), root, follow_links, out)
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
    path: str | Path,
    image_root: str = "",
    image_size: int = 336,
    follow_links: bool = False,
    keep_marker: bool = False,
    out: Path | None = None,
) -> Iterator[tuple[str, dict | BadInput]]:
    """(id, usable record or why it is none) of everything in a data file, in order, few of them in
    memory. Every image is decoded once, in threads; of several processes each decodes
    its share, so all must read to the end. Pictures that are no files become some in
    `out`/pictures, or where there is no `out`, in a temporary folder.

    A usable record also carries "root" (the folder its image names start from), "follow_links" and
    "images_sha" (of their bytes). Raises BadInput only where the file as a whole cannot be read.
    """
    root = Path(image_root or Path(path).absolute().parent)
    rank, world = parallel.rank(), parallel.world()

    def look(entry) -> str | BadInput:
        """The hash of a record's images, or why it cannot be used."""
        _, found = entry
        try:
            if isinstance(found, BadInput):
                raise found
            return check_images(found, Path(found["root"]), image_size, follow_links)
        except BadInput as problem:
            return problem

    entries = checked(path, root, follow_links, keep_marker, out)
    threads = min(32, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:            # Pillow decodes outside Python's lock
        while block := list(islice(entries, AT_ONCE)):
            mine = list(pool.map(look, block[rank::world]))
            shares = parallel.gather(mine)
            for k, (name, record) in enumerate(block):
                found = shares[k % world][k // world]
                if not isinstance(found, BadInput):
                    found = record | {"follow_links": follow_links, "images_sha": found}
                yield name, found


def read(path: str | Path, image_root: str = "", **how) -> tuple[list, list]:
    """The same in memory: (usable records, rejects {"id", "reason"})."""
    records, rejects = [], []
    for name, found in stream(path, image_root, **how):
        if isinstance(found, BadInput):
            rejects.append({"id": name, "reason": str(found)})
        else:
            records.append(found)
    return records, rejects


def unused(record: dict) -> set[str]:
    """The fields of a record that nothing here uses."""
    return record.keys() - OURS


def report(path, kept: int, rejects: list[dict], out: Path | None, unused=Counter()) -> None:
    """Print what was rejected and why, counted, and how many records have which `unused` fields;
    keep the whole list of rejects in `out`/rejects.jsonl."""
    print(f"{path}: {kept} records usable, {len(rejects)} rejected")
    if unused:
        fields = [f"{shown(name, 30)} ({n})" for name, n in unused.most_common(12)]
        more = ", ..." if len(unused) > 12 else ""
        print(f"  fields not used: {', '.join(fields)}{more}")
    for reject in rejects[:5]:
        print(f"  {shown(reject['id'])}: {shown(reject['reason'], 300)}")
    if len(rejects) > 5:
        reasons = Counter(shown(reject["reason"].split(":")[0]) for reject in rejects)
        counts = [f"{n} x {reason}" for reason, n in reasons.most_common(5)]
        print(f"  ... by reason: {'; '.join(counts)}")
    if out:
        write_jsonl(out / "rejects.jsonl", rejects)
        if rejects:
            print(f"  all of them, with reasons: {out / 'rejects.jsonl'}")
