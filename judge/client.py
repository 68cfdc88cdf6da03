"""Asking a model over HTTP, and surviving it: five states, one journal.

The problem. A judge is a program somewhere else. It answers late, or never, or with half a JSON object, or with a score of
7 out of 4. Code that papers over this with a default score or a dropped row puts invented numbers into published tables.

The trick. Every question ends in exactly one of five states, and only the first may carry scores:

    ok            the reply passed the caller's own strict check
    blocked       the server refused (safety, recitation, a content filter)
    truncated     cut off at the token budget, and again at twice the budget
    unparseable   ASKS replies to the same unchanged prompt, and none passed the check
    failed        no reply: the network, the server's errors, a request that the server calls invalid

Each reply, good or bad, is a line on disk (journal.jsonl, raw text included) before anything else is asked about the same
question. Kill the program at any moment: the same command goes on from there, nothing is paid for twice but the calls in
flight, and a better parser can read the old replies again.

Traffic. Limits per minute and day are kept on this side. What is worth another try (429, 5xx, a broken connection, a reply
that is no JSON) waits min(60, 2^k) seconds times a random number ("full jitter") and whatever the server asked for; a 429
makes every worker wait. What is not (a wrong key, an unknown model, an empty quota) stops the run with the remedy.

The key travels in a header only, redirects are not followed, .netrc is not read, and whatever a server sends back is searched
for the key before it is printed or stored.

Previous: judge/wire.py.  Next: judge/rubric.py (what the judge is asked).
"""
import json
import math
import os
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from urllib.parse import urlsplit

import requests
import urllib3
from tqdm import tqdm

from common import BadInput, Journal
from judge.wire import PROTOCOLS, Question, Reply, delay_of, error_of, jpeg, rejected

STATES = ("ok", "blocked", "truncated", "unparseable", "failed")
ASKS = 3                 # replies to one question before it counts as unparseable
TRIES = 6                # calls without a reply before it counts as failed; a 429 counts a quarter
WAIT, MOST = 1.0, 60.0   # seconds: the first wait is at most WAIT, it doubles with every try, up to MOST
PATIENCE = 300           # seconds: a server that asks for more is not waited for
DEAD = 20                # questions failed in a row, and the server is gone
NETWORK = (requests.RequestException, urllib3.exceptions.HTTPError)
KEPT = "what was judged is kept; run the same command again afterwards"


# ---- limits and journal ---------------------------------------------------------------------------------------

class Limits:
    """At most `rpm` requests and `tpm` tokens in any minute, `rpd` requests in any day, as the server sees it (0: no limit).

    The server sees a request at some moment between its sending and its reply. So it counts from its sending until a
    minute after its reply, and no window of a minute can hold more, however the network delays things. Both are noted in `log`,
    so that a restart knows of them; a call without a reply there may have arrived up to `timeout` later. Tokens are a guess
    until the server has counted some: while it has not, one call goes out alone.
    """

    def __init__(self, log: Path, rpm: int = 0, tpm: int = 0, rpd: int = 0, timeout: float = 0, minute: float = 60):
        self.rpm, self.tpm, self.rpd, self.minute = rpm, tpm, rpd, minute
        self.busy, self.until, self.scale, self.calls, self.turn = [], 0.0, 0.0, 0, threading.Condition()
        rows = [list(map(float, line.split())) for line in log.read_text().splitlines()] if log.exists() else []
        past = {row[0]: (row[2] if len(row) > 2 else row[0] + timeout, row[1]) for row in rows if len(row) > 1}
        ages = sorted((max(0.0, time.time() - when), tokens) for when, tokens in past.values())[::-1]
        self.done = deque((time.monotonic() - age, tokens) for age, tokens in ages)      # (when its reply came, tokens)
        self.today = deque(when for when, _ in self.done)
        self.log = open(log, "a")

    def enter(self, guess: int, stop: threading.Event) -> tuple[float, int]:
        """Wait until about `guess` tokens may be sent; returns what to hand to `leave`. Raises Stopped, or BadInput where
        the day is spent."""
        with self.turn:
            while not stop.is_set():
                now, tokens = time.monotonic(), math.ceil(guess * (self.scale or 1))
                while self.done and self.done[0][0] <= now - self.minute:
                    self.done.popleft()
                while self.today and self.today[0] <= now - 86400:
                    self.today.popleft()
                if self.rpd and len(self.today) + len(self.busy) >= self.rpd:
                    raise BadInput(f"the {self.rpd} requests of --rpd are spent; {KEPT}")
                count = len(self.busy) + len(self.done)
                load = sum(t for _, t in [*self.busy, *self.done]) if self.tpm else 0
                full = self.rpm and count >= self.rpm or self.tpm and (
                    count and load + tokens > self.tpm or self.busy and not self.scale)
                if now >= self.until and not full:
                    self.busy.append((time.time(), tokens))
                    self.note(*self.busy[-1])
                    return self.busy[-1]
                self.turn.wait(0.1)
            raise Stopped

    def note(self, sent: float, tokens: int, *replied: float) -> None:
        print(f"{sent:.6f}", tokens, *replied, file=self.log, flush=True)

    def leave(self, call: tuple[float, int], used: int) -> None:
        """The reply is there; it counted `used` tokens (0: nobody says). Guesses that were too low are raised from now on."""
        with self.turn:
            now, (sent, tokens) = time.monotonic(), call
            self.busy.remove(call)
            self.note(sent, used or tokens, time.time())
            self.done.append((now, used or tokens))
            self.scale = max(self.scale, (self.scale or 1) * used / tokens)
            self.today.append(now)
            self.calls += 1
            self.turn.notify_all()

    def pause(self, seconds: float) -> None:
        """Nobody sends anything for so long."""
        with self.turn:
            self.until = max(self.until, time.monotonic() + seconds)


class Replies(Journal):
    """The journal of a judge: what is settled and how, what was replied to questions not yet settled, what it all cost."""

    def __init__(self, path: Path):
        self.state, self.before, self.used = {}, {}, Counter()
        super().__init__(path)

    def seen(self, row: dict) -> bool:
        self.used.update(row["usage"])
        if row["final"]:
            self.state[row["key"]] = row["state"]
            self.before.pop(row["key"], None)
        else:
            self.before.setdefault(row["key"], []).append(row["state"])
        return row["final"]

    def final(self, q: Question) -> tuple[Reply, object]:
        """(how a settled question ended, what its check makes of the text today)."""
        row = self[q.key]
        reply = Reply(row["state"], row["text"], row["reason"], version=row["version"], usage=row["usage"])
        return reply, reply.read(q.check)

    def keep(self, q: Question, reply: Reply, final: bool = True) -> None:
        self.append({"key": q.key, "id": q.id, "state": reply.state, "final": final, "reason": reply.reason,
                     "version": reply.version, "usage": reply.usage, "time": round(time.time(), 3), "text": reply.text})


# ---- the client -----------------------------------------------------------------------------------------------

class Stopped(Exception):
    """The run is ending; this call was not made."""


class Failed(Exception):
    """This question gets no reply; the message says why."""


class Judge:
    """Asks questions with several threads at once; every reply goes to `replies` before the next step.

    spec     "gemini:MODEL" or "openai:MODEL"
    url      another server: its scheme and host, or the whole base up to and including /v1
    Raises BadInput for a spec, url or key that cannot be used.
    """

    def __init__(self, spec: str, replies: Replies, url: str = "", *, workers: int = 16, timeout: float = 120, budget: int = 8192,
                 thinking: str = "", rpm: int = 0, tpm: int = 0, rpd: int = 0):
        self.wire, self.model, self.base, self.key = door(spec, url, workers, timeout, budget, rpm, tpm, rpd)
        self.replies, self.workers, self.timeout, self.budget, self.thinking = replies, workers, timeout, budget, thinking
        self.limits = Limits(replies.path.with_name("calls.log"), rpm, tpm, rpd, timeout)
        self.stop, self.local = threading.Event(), threading.local()
        self.without: set[str] = set()                                   # optional fields that the server does not take
        self.dead = 0                                                    # questions failed in a row

    def ask(self, questions: Iterable[Question], total: int = 0, retry_failed: bool = False) -> None:
        """Settle every question. Raises BadInput where going on is pointless; what was replied is in the journal."""
        turn, rest, said = threading.Lock(), iter(questions), Counter()
        bar = tqdm(total=total or None, desc="judging", unit="rec", disable=None, leave=False)

        def work() -> None:
            while not self.stop.is_set():
                with turn:
                    q = next(rest, None)
                if q is None:
                    return
                state = self.replies.state.get(q.key)
                if state is None or retry_failed and state != "ok" and self.replies.final(q)[0].state != "ok":
                    state = self.settle(q)
                with turn:
                    said[state] += 1
                    bar.set_postfix(said, refresh=False)
                    bar.update()

        with bar, ThreadPoolExecutor(self.workers) as pool:
            try:
                for worker in as_completed([pool.submit(work) for _ in range(self.workers)]):
                    worker.result()                                      # raises what it raised
            except BaseException as problem:
                self.stop.set()
                if isinstance(problem, KeyboardInterrupt):
                    tqdm.write(f"stopping; the calls in flight are waited for and kept (up to {self.timeout:g} s)")
                raise

    def settle(self, q: Question) -> str:
        """Ask until the question has its final state, which is returned."""
        before = list(self.replies.before.get(q.key, ()))                # replies from before a kill count
        try:
            images = [jpeg(path) for path in q.images]
        except BadInput as problem:
            self.replies.keep(q, Reply("failed", reason=str(problem)))
            return "failed"
        while True:
            try:
                reply = self.post(q, images, self.budget * (2 if "truncated" in before else 1))
            except Failed as problem:
                self.replies.keep(q, Reply("failed", reason=str(problem)))
                self.dead += 1
                if self.dead >= DEAD:
                    raise BadInput(f"{DEAD} records in a row got no reply from {self.base}: {problem}; when the server is "
                                   "back, run the same command with --retry_failed 1") from None
                return "failed"
            self.dead = 0
            reply.read(q.check)
            bad = sum(state != "truncated" for state in before)
            final = (reply.state == "ok" or reply.state == "blocked" and not reply.again
                     or ("truncated" in before if reply.state == "truncated" else bad + 1 >= ASKS))
            self.replies.keep(q, reply, final)
            if final:
                return reply.state
            before.append(reply.state)

    def read(self, data) -> Reply:
        try:
            reply = self.wire.reply(data)
            reply.usage = {name: int(n or 0) for name, n in reply.usage.items()}
            if not isinstance(reply.text, str):
                raise TypeError(f"text is {type(reply.text)}")
        except (ArithmeticError, AttributeError, IndexError, KeyError, TypeError, ValueError) as problem:
            reply = Reply("unparseable", "", f"a reply of unknown shape ({type(problem).__name__}: {problem})")
        reply.text, reply.reason, reply.version = map(self.scrub, (reply.text, reply.reason, reply.version))
        return reply

    def post(self, q: Question, images: list[str], budget: int) -> Reply:
        """One question -> the reply of a 200. Raises Failed, Stopped, or BadInput where the whole run must stop."""
        tries, url = 0.0, self.wire.url(self.base, self.model)
        while True:
            without, reply = set(self.without), None
            body = json.dumps(self.wire.body(self.model, q, images, budget, self.thinking, without)).encode()
            call = self.limits.enter(q.tokens, self.stop)
            try:
                status, headers, data = self.send(url, body)
                reply = self.read(data) if status == 200 and isinstance(data, dict) and not data.get("error") else None
            except NETWORK as problem:
                status, headers, data = 0, {}, f"{type(problem).__name__}: {problem}"
            finally:
                self.limits.leave(call, reply.usage.get("prompt", 0) if reply else 0)
            if reply:
                return reply
            error = error_of(data)
            what = self.scrub(f"{f'HTTP {status}' if status else 'no reply'}: {error.get('message') or error}")[:500]
            if status == 400 and (names := rejected(self.wire.optional, error) - without):
                if names - self.without:
                    tqdm.write(f"the server does not take {', '.join(names)}; going on without ({what[:100]})")
                self.without |= names
                continue
            self.stop_if_pointless(status, error, what)
            if status not in (0, 200, 408, 409, 425, 429) and status < 500:
                raise Failed(what)
            most = min(MOST, WAIT * 2 ** tries)
            tries += 0.25 if status == 429 else 1
            if tries >= TRIES:
                raise Failed(f"{what} ({TRIES} tries)")
            asked = delay_of(headers, error)
            if asked > PATIENCE:
                raise BadInput(f"the server asks to wait {asked:.0f} s ({what}); {KEPT}")
            wait = asked + random.uniform(0, most)
            if status == 429:
                self.limits.pause(wait)
            elif self.stop.wait(wait):
                raise Stopped

    def send(self, url: str, body: bytes) -> tuple[int, dict, object]:
        """One HTTP call -> status, headers, JSON out of the list that it may stand in (or the text, where it is none)."""
        if not hasattr(self.local, "session"):
            self.local.session = requests.Session()
            self.local.session.auth = lambda request: request            # or .netrc would replace our header
        headers = self.wire.headers(self.key) | {"Content-Type": "application/json"}
        until = time.monotonic() + self.timeout
        with self.local.session.post(url, data=body, headers=headers, stream=True, allow_redirects=False,
                                     timeout=(min(20, self.timeout), self.timeout)) as r:
            content = bytearray()
            while chunk := r.raw.read1(1 << 16, decode_content=True):    # what is there: a reply may come in drips
                content += chunk
                if time.monotonic() > until or len(content) > 1 << 24:
                    raise requests.Timeout(f"the reply took longer than {self.timeout:g} s, or is endless")
            try:
                data = json.loads(content)
            except (ValueError, RecursionError):
                data = content.decode("utf8", "replace")
            return r.status_code, r.headers, data[0] if data and isinstance(data, list) else data

    def stop_if_pointless(self, status: int, error: dict, what: str) -> None:
        said = json.dumps(error)
        if status == 429 and re.search(r"PerDay|per day|\bRPD\b|\bTPD\b|insufficient_quota|limit: 0\b(?!\.)", said):
            raise BadInput(f"the quota is spent ({what}); wait for the next day or have it raised; {KEPT}")
        if status in (401, 403) or status == 400 and re.search("API_KEY_INVALID|API key not valid|FAILED_PRECONDITION", said):
            raise BadInput(f"the server refuses the key or the account ({what}); check {' or '.join(self.wire.keys)}; {KEPT}")
        if status == 404 or status == 400 and "model_not_found" in said:
            raise BadInput(f"{self.model} is not to be had at {self.base} ({what}); those at {self.base}/models are; {KEPT}")
        if 300 <= status < 400:
            raise BadInput(f"{self.base} answers with a redirect ({what}); give the final address as --judge_url")

    def scrub(self, text: str) -> str:
        """Without the key, should a server echo it; halves of characters, which no file can hold, become "?"."""
        text = str(text).encode("utf8", "replace").decode()
        plain = re.sub(r"\\u00([2-7][0-9a-fA-F])", lambda escape: chr(int(escape[1], 16)), text)     # JSON can spell it so, too
        return (text if self.key not in plain else plain).replace(self.key, "[key]") if len(self.key) > 7 else text


def door(spec: str, url: str, workers: int, timeout: float, budget: int, rpm: int, tpm: int, rpd: int,
         dry: bool = False) -> tuple:
    """(wire format, model, base URL, key) of a judge; a dry run needs no key. Raises BadInput for what cannot be used."""
    if min(workers, budget) <= 0 or not 0 < timeout < 1e6 or min(rpm, tpm, rpd) < 0:
        raise BadInput("--workers, --timeout and --budget must be positive, --rpm, --tpm and --rpd not negative (0: none)")
    name, _, model = spec.partition(":")
    if name not in PROTOCOLS or not model:
        raise BadInput(f"--judge {spec}: say gemini:MODEL, openai:MODEL or, for the miniature, oracle")
    wire = PROTOCOLS[name]
    return wire, model, base_url(wire.base, url), "" if dry else find_key(wire.keys, needed=name == "gemini" or not url)


def base_url(usual: str, url: str) -> str:
    """--judge_url replaces scheme and host, or the whole base where it has a path."""
    if not url:
        return usual
    found = re.fullmatch(r"(https?://[\w.:\[\]-]+)(/[^?#@]*)?", url.rstrip("/"))
    if not found:
        raise BadInput("--judge_url: say http://host:port or https://host/v1, without a user, password or key in it")
    return found[1] + (found[2] or urlsplit(usual).path)


def find_key(names: tuple, needed: bool) -> str:
    key = next((os.environ[name].strip() for name in names if os.environ.get(name, "").strip()), "")
    if not key and needed:
        raise BadInput(f"no key: set {' or '.join(names)} in the environment")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise BadInput(f"the key in {' or '.join(names)} holds characters that no header can carry; copy it again")
    return key
