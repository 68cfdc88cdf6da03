"""What is said on the wire to a judge: questions and replies, as two kinds of server spell them.

Pure functions between Python and JSON; nothing here sends anything (judge/client.py does). Every
server has its own way of not answering, with status 200: Gemini leaves the candidates out where
the prompt was blocked, sends a candidate without content where the answer was, thinks until no
room is left to speak, and splits its text over parts, thoughts among them. Each of these becomes
one of judge/client.py's states, none of them an empty answer.

    Gemini    POST /v1beta/models/MODEL:generateContent   https://ai.google.dev/api/generate-content
    OpenAI    POST /v1/chat/completions                   also vLLM's and many others'

Another kind of server is another class with the same members, and a line in PROTOCOLS.

Deliberate: responseJsonSchema without "additionalProperties", which the endpoint refuses; no
temperature for Gemini, whose newer models ignore or refuse it; store false, because what is judged
is not ours to leave lying there.
"""
import base64
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from vision import load_image

SIDE = 1024             # pictures go out as JPEG, so many pixels on the longest side
QUALITY = 90            # of the JPEG
MOST_TOKENS = 10**8     # of one call
IMAGE_TOKENS = 1120     # what a picture costs at most on Gemini 3.x at its default resolution


@dataclass
class Question:
    """One call. `check` takes the reply's text and raises ValueError where it cannot be used."""
    key: str                       # names everything the reply depends on
    id: str
    system: str
    text: str
    images: list[Path] = field(default_factory=list)
    schema: dict | None = None     # JSON schema of the reply; None: plain text
    check: Callable[[str], object] = str
    messages: list[dict] | None = None         # a whole conversation instead of system and text,
    sampling: dict | None = None               # to be gone on with so: temperature, seed, ...

    @property
    def tokens(self) -> int:
        """About what it costs to send; three bytes to the token is on the high side for English."""
        return len((self.system + self.text).encode()) // 3 + IMAGE_TOKENS * len(self.images) + 1


@dataclass
class Reply:
    state: str                     # "ok" from a server means no more than that there is text
    text: str = ""
    reason: str = ""               # why it is not ok
    version: str = ""              # the model that the server says it used
    usage: dict = field(default_factory=dict)
    again: bool = False            # blocked, but such a block comes and goes

    def checked(self, check: Callable[[str], object]) -> tuple["Reply", object]:
        """(the reply in its true state, what `check` makes of its text). The check alone tells ok
        from unparseable, in a reply of long ago, too: a better parser needs no new call."""
        if not self.text or self.state not in ("ok", "unparseable"):
            return self, None
        try:
            found = check(self.text)
        except ValueError as problem:
            return replace(self, state="unparseable", reason=str(problem)), None
        return replace(self, state="ok", reason=""), found


def jpeg(path: Path, side: int = SIDE) -> str:
    """An image file, as base64 of a fresh JPEG: upright, RGB, at most `side` on a side, no EXIF."""
    image = load_image(path, small=side)
    image.thumbnail((side, side))
    image.info = {}
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


# ---- two servers --------------------------------------------------------------------------------

class Gemini:
    base = "https://generativelanguage.googleapis.com/v1beta"
    keys = ("GOOGLE_API_KEY", "GEMINI_API_KEY")      # in this order, as Google's SDK has it
    optional = ("responseJsonSchema", "store")       # left out where refused; the schema is first
    version = "modelVersion"
    usage = {
        "prompt": ("usageMetadata", "promptTokenCount"),
        "answer": ("usageMetadata", "candidatesTokenCount"),
        "thoughts": ("usageMetadata", "thoughtsTokenCount"),
    }
    harms = ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")
    blocks = (
        "SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE",
        "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION",
    )

    def url(self, base, model) -> str:
        return f"{base}/models/{quote(model.removeprefix('models/'), safe='')}:generateContent"

    def headers(self, key) -> dict:
        return {"x-goog-api-key": key}

    def body(self, model, q, images, budget, thinking, without) -> dict:
        parts = [{"inlineData": {"mimeType": "image/jpeg", "data": image}} for image in images]
        config = {
            "maxOutputTokens": budget,
            "responseMimeType": "application/json" if q.schema else None,
            "responseJsonSchema": q.schema,
            "thinkingConfig": {"thinkingLevel": thinking} if thinking else None,
        }
        return pruned({
            "systemInstruction": {"parts": [{"text": q.system}]} if q.system else None,
            "contents": [{"role": "user", "parts": [*parts, {"text": q.text}]}],
            "generationConfig": pruned(config, without),
            "safetySettings": [
                {"category": f"HARM_CATEGORY_{harm}", "threshold": "BLOCK_NONE"}
                for harm in self.harms
            ],
            "store": False,
        }, without)

    def said(self, data) -> tuple:
        """(the text, how it ended, whether something was blocked)."""
        refused = dig(data, str, "promptFeedback", "blockReason")
        if refused:
            return "", f"prompt {refused}", True
        finish = dig(data, str, "candidates", 0, "finishReason")
        parts = dig(data, list, "candidates", 0, "content", "parts")
        text = "".join(dig(part, str, "text") for part in parts if not dig(part, bool, "thought"))
        return text, finish, finish in self.blocks


class OpenAI:
    base = "https://api.openai.com/v1"
    keys = ("OPENAI_API_KEY",)
    optional = ("response_format", "max_tokens", "temperature")
    version = "model"
    usage = {
        "prompt": ("usage", "prompt_tokens"),
        "answer": ("usage", "completion_tokens"),
        "thoughts": ("usage", "completion_tokens_details", "reasoning_tokens"),
    }

    def url(self, base, model) -> str:
        return f"{base}/chat/completions"

    def headers(self, key) -> dict:
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(self, model, q, images, budget, thinking, without) -> dict:
        urls = [f"data:image/jpeg;base64,{image}" for image in images]
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        parts.append({"type": "text", "text": q.text})
        system = [{"role": "system", "content": q.system}] if q.system else []
        schema = {"name": "reply", "schema": q.schema}
        messages = [*system, {"role": "user", "content": parts}]
        if q.messages:
            messages = spoken(q.messages, parts)
        return pruned({
            "model": model,
            "messages": messages,
            "temperature": 0,
            "max_tokens": budget,
            # Reasoning models have renamed it.
            "max_completion_tokens": budget if "max_tokens" in without else None,
            "reasoning_effort": thinking or None,
            "response_format": {"type": "json_schema", "json_schema": schema} if q.schema else None,
        } | (q.sampling or {}), without)

    def said(self, data) -> tuple:
        refusal = dig(data, str, "choices", 0, "message", "refusal")
        finish = dig(data, str, "choices", 0, "finish_reason")
        text = dig(data, str, "choices", 0, "message", "content")
        return text, refusal or finish, bool(refusal) or finish == "content_filter"


def spoken(messages, pictures) -> list[dict]:
    """A record's messages, the k-th <image> in them replaced by the k-th picture."""
    pictures = iter(pictures)
    said = []
    for message in messages:
        content = message["content"]
        if "<image>" in content:
            found = parts(content)
            content = [next(pictures) if part["type"] == "image" else part for part in found]
        said.append({"role": message["role"], "content": content})
    return said


def parts(content) -> list[dict]:
    """"<image>\\nWhat?" -> [{"type": "image"}, {"type": "text", "text": "What?"}]."""
    found = []
    for piece in re.split(r"(<image>)\n?", content):
        if piece == "<image>":
            found.append({"type": "image"})
        elif piece:
            found.append({"type": "text", "text": piece})
    return found


PROTOCOLS = {"gemini": Gemini(), "openai": OpenAI()}


def pruned(fields, without) -> dict:
    """The fields that have a value and that the server takes."""
    return {name: x for name, x in fields.items() if x is not None and name not in without}


def reply_of(wire, data) -> Reply:
    """What a server says, in one of our states."""
    text, finish, blocked = wire.said(data)
    usage = {name: dig(data, int, *path) for name, path in wire.usage.items()}
    reply = Reply("ok", text, finish, dig(data, str, wire.version)[:200], usage)
    if not all(type(n) is int and 0 <= n < MOST_TOKENS for n in usage.values()):
        return Reply("unparseable", reason="it says that it cost an impossible number of tokens")
    if blocked:
        reply.state = "blocked"
        reply.again = "RECITATION" in finish         # such a block comes and goes
    elif finish in ("MAX_TOKENS", "length"):
        reply.state = "truncated"
        reply.reason = f"{finish}: a larger --budget gives it more room (thinking counts)"
    elif not text:
        reply.state = "unparseable"
        reply.reason = f"no text, {finish or 'or far too much of it'}"
    return reply


def dig(data, kind, *path):
    """data[path[0]][path[1]]..., or an empty `kind` where nothing of that kind is there."""
    for step in path:
        try:
            data = data[step]
        except (LookupError, TypeError):
            return kind()
    return data if isinstance(data, kind) else kind()


# ---- refusals -----------------------------------------------------------------------------------

def error_of(data) -> dict:
    """What went wrong, from an error body: {"error": {...}}, {"message": ...}, a string, HTML."""
    error = data.get("error", data) if isinstance(data, dict) else data
    if isinstance(error, dict):
        return error
    return {"message": re.sub(r"<[^>]*>|\s+", " ", str(error)).strip()}


def names(error, field) -> bool:
    """Does an error complain about this field? "Thinking level is not supported ..." does."""
    complaint = re.sub(r"[\s_]", "", str(error.get("param") or error.get("message")))
    return field.replace("_", "").lower() in complaint.lower()


def delay_of(headers, error) -> float:
    """Seconds that a server asks to wait, in RetryInfo ("26s") or Retry-After (a number); or 0."""
    asked = re.search(r'"retryDelay": "(\d+(\.\d+)?)s"', json.dumps(error))
    asked = asked or re.fullmatch(r"(\d+(\.\d+)?)", headers.get("Retry-After", ""))
    return float(asked[1]) if asked else 0.0
