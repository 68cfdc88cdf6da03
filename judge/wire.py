"""What is said on the wire to a judge: a question, a reply, and how Gemini and OpenAI-style servers spell them.

Pure functions between Python and JSON; nothing here sends anything (judge/client.py does). Every server has its own way of not
answering, with status 200: Gemini leaves the candidates out where the prompt was blocked, sends a candidate without content
where the answer was, thinks until no room is left to speak, and splits its text over parts, thoughts among them. Each of
these becomes one of judge/client.py's states, none of them an empty answer.

    Gemini    POST /v1beta/models/MODEL:generateContent     https://ai.google.dev/api/generate-content
    OpenAI    POST /v1/chat/completions                     also vLLM's and many others'

Deliberate: responseJsonSchema without "additionalProperties", which the endpoint refuses; no temperature for Gemini, whose
newer models ignore or refuse it; store false, because what is judged is not ours to leave lying there.

Previous: toy/build.py.  Next: judge/client.py (asking, and surviving it).
"""
import base64
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import quote

from vision import load_image

SIDE, QUALITY = 1024, 90           # pictures go out as JPEG, longest side in pixels
IMAGE_TOKENS = 1120                # what one costs at most on Gemini 3.x at its default resolution


@dataclass
class Question:
    """One call. `check` takes the reply's text and raises ValueError where it cannot be used."""
    key: str                        # names everything the reply depends on
    id: str
    system: str
    text: str
    images: list[Path] = field(default_factory=list)
    schema: dict | None = None      # JSON schema of the reply; None: plain text
    check: Callable[[str], object] = str

    @property
    def tokens(self) -> int:
        """About what it costs to send; three bytes to the token is on the high side for English."""
        return len((self.system + self.text).encode()) // 3 + IMAGE_TOKENS * len(self.images) + 1


@dataclass
class Reply:
    state: str                      # "ok" so far means that there is text
    text: str = ""
    reason: str = ""
    again: bool = False             # blocked, but such a block comes and goes
    version: str = ""               # the model that the server says it used
    usage: dict = field(default_factory=dict)

    def read(self, check: Callable[[str], object]) -> object:
        """What `check` makes of the text, or None: it decides between ok and unparseable, also for replies of long ago, so that
        a better parser needs no new call."""
        if not self.text or self.state not in ("ok", "unparseable"):
            return None
        try:
            found = check(self.text)
            self.state, self.reason = "ok", ""
            return found
        except ValueError as problem:
            self.state, self.reason = "unparseable", str(problem)


def jpeg(path: Path, side: int = SIDE) -> str:
    """An image file, as base64 of a fresh JPEG: upright, RGB, at most `side` on a side, no EXIF."""
    image, buffer = load_image(path, small=side), BytesIO()
    image.thumbnail((side, side))
    image.info = {}
    image.save(buffer, "JPEG", quality=QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


# ---- two servers ----------------------------------------------------------------------------------------------

class Gemini:
    """Names that belong together; there is never an object of it, nor of the next."""
    base, keys = "https://generativelanguage.googleapis.com/v1beta", ("GEMINI_API_KEY", "GOOGLE_API_KEY")
    optional = ("store", "thinkingLevel", "responseJsonSchema")
    blocks = ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "IMAGE_SAFETY",
              "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION")

    def url(base: str, model: str) -> str:
        return f"{base}/models/{quote(model.removeprefix('models/'), safe='')}:generateContent"

    def headers(key: str) -> dict:
        return {"x-goog-api-key": key}

    def body(model: str, q: Question, images: list[str], budget: int, thinking: str, without: set) -> dict:
        config = {"maxOutputTokens": budget} | ({"responseMimeType": "application/json"} if q.schema else {})
        if q.schema and "responseJsonSchema" not in without:
            config["responseJsonSchema"] = q.schema
        if thinking and "thinkingLevel" not in without:
            config["thinkingConfig"] = {"thinkingLevel": thinking}
        parts = [{"inlineData": {"mimeType": "image/jpeg", "data": data}} for data in images] + [{"text": q.text}]
        safety = [{"category": f"HARM_CATEGORY_{kind}", "threshold": "BLOCK_NONE"}
                  for kind in ("HARASSMENT", "HATE_SPEECH", "SEXUALLY_EXPLICIT", "DANGEROUS_CONTENT")]
        body = {"contents": [{"role": "user", "parts": parts}], "safetySettings": safety, "generationConfig": config}
        return (body | ({"systemInstruction": {"parts": [{"text": q.system}]}} if q.system else {})
                | ({"store": False} if "store" not in without else {}))

    def reply(data: dict) -> Reply:
        used, candidates = data.get("usageMetadata") or {}, data.get("candidates") or []
        about = {"version": str(data.get("modelVersion", "")), "usage": {
            "prompt": used.get("promptTokenCount", 0), "answer": used.get("candidatesTokenCount", 0),
            "thoughts": used.get("thoughtsTokenCount", 0)}}
        if not candidates:
            why = (data.get("promptFeedback") or {}).get("blockReason")
            return Reply("blocked" if why else "unparseable", "", f"prompt {why}" if why else "no candidates", **about)
        parts = (candidates[0].get("content") or {}).get("parts") or []
        text = "".join(part.get("text", "") for part in parts if not part.get("thought"))
        finish = candidates[0].get("finishReason", "STOP")
        if finish == "MAX_TOKENS":
            return Reply("truncated", text, "stopped at maxOutputTokens (thinking counts)", **about)
        if finish in Gemini.blocks:
            return Reply("blocked", text, finish, "RECITATION" in finish, **about)
        return Reply("ok" if text else "unparseable", text, "" if text else f"no text, {finish}", **about)


class OpenAI:
    base, keys = "https://api.openai.com/v1", ("OPENAI_API_KEY",)
    optional = ("max_tokens", "temperature", "reasoning_effort", "response_format")

    def url(base: str, model: str) -> str:
        return f"{base}/chat/completions"

    def headers(key: str) -> dict:
        return {"Authorization": f"Bearer {key}"} if key else {}

    def body(model: str, q: Question, images: list[str], budget: int, thinking: str, without: set) -> dict:
        parts = [{"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}} for data in images]
        body = {"model": model, "temperature": 0, "max_tokens": budget,
                "messages": ([{"role": "system", "content": q.system}] if q.system else [])
                + [{"role": "user", "content": parts + [{"type": "text", "text": q.text}]}]}
        if q.schema:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "reply", "schema": q.schema}}
        if thinking:
            body["reasoning_effort"] = thinking
        if "max_tokens" in without:                                      # reasoning models have renamed it
            body["max_completion_tokens"] = budget
        return {name: value for name, value in body.items() if name not in without}

    def reply(data: dict) -> Reply:
        used, choice = data.get("usage") or {}, data["choices"][0]
        about = {"version": str(data.get("model", "")), "usage": {
            "prompt": used.get("prompt_tokens", 0), "answer": used.get("completion_tokens", 0),
            "thoughts": (used.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)}}
        message, finish = choice.get("message") or {}, choice.get("finish_reason")
        text = message.get("content") or ""
        if finish == "length":
            return Reply("truncated", text, "stopped at max_tokens", **about)
        if finish == "content_filter" or message.get("refusal"):
            return Reply("blocked", text, str(message.get("refusal") or finish), **about)
        return Reply("ok" if text else "unparseable", text, "" if text else f"no text, {finish}", **about)


PROTOCOLS = {"gemini": Gemini, "openai": OpenAI}


# ---- refusals -------------------------------------------------------------------------------------------------

def error_of(data) -> dict:
    """What went wrong, from an error body: {"error": {...}}, {"message": ...}, a string, HTML."""
    error = data.get("error", data) if isinstance(data, dict) else data
    return error if isinstance(error, dict) else {"message": re.sub(r"<[^>]*>|\s+", " ", str(error)).strip()}


def rejected(optional: tuple, error: dict) -> set[str]:
    """Which of these fields a 400 complains about: "Thinking level is not supported ...", {"param": "max_tokens"}."""
    squeeze = lambda text: re.sub(r"[\s_]", "", text).lower()
    return {name for name in optional if squeeze(name) in squeeze(str(error.get("param") or error.get("message")))}


def delay_of(headers: dict, error: dict) -> float:
    """Seconds that a server asks to wait, in RetryInfo ("26s") or Retry-After (a number); 0 where it does not."""
    details = error.get("details")
    for detail in details if isinstance(details, list) else []:
        if isinstance(detail, dict) and (found := re.fullmatch(r"(\d+(?:\.\d+)?)s", str(detail.get("retryDelay")))):
            return float(found[1])
    after = headers.get("Retry-After", "")
    return float(after) if re.fullmatch(r"\d+(\.\d+)?", after) else 0.0
