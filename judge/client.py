"""Asking a model over HTTP, and surviving it: five states, one journal.

The problem. A judge is a program somewhere else. It answers late, or never, or with half a JSON
object, or with a score of 7 out of 4. Code that papers over this with a default score or a dropped
row puts invented numbers into published tables.

The trick. Every question ends in exactly one of five states, and only the first may carry scores:

    ok            the reply passed the caller's own strict check
    blocked       the server refused (safety, recitation, a content filter)
    truncated     cut off at the token budget, and again at twice the budget
    unparseable   ASKS replies to the same unchanged prompt, and none passed the check
    failed        no reply: the network, the server's errors, a request that it calls invalid

Each reply, good or bad, is a line on disk (journal.jsonl, raw text included) before anything else
is asked about the same question. Kill the program at any moment: the same command goes on from
there, nothing is paid for twice but the calls in flight, and a better parser can read the old
replies again.

Traffic. --rpm spaces the calls out evenly. What is worth another try (429, 5xx, a broken
connection, a reply that is no JSON) waits min(60, 2^k) seconds times a random number ("full
jitter") and whatever the server asked for; a 429 makes every worker wait. What is not (a wrong
key, an unknown model, an empty quota) stops the run with the remedy.

The key travels in a header only, redirects are not followed, .netrc is not read, and whatever a
server sends back is searched for the key before it is printed or stored.
"""
import json
import os
import random
import re
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from urllib.parse import urlsplit

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm

from common import BadInput, progress, sha
from journal import Journal
from judge.wire import PROTOCOLS, Question, Reply, delay_of, error_of, jpeg, names, reply_of
from vision import image_path

STATES = ("ok", "blocked", "truncated", "unparseable", "failed")
ASKS = 3            # replies to one question before it counts as unparseable
TRIES = 6           # calls without a reply before it counts as failed; a 429 counts a quarter
WAIT = 1.0          # seconds: the first wait is at most so long, each further one twice as long,
MOST = 60.0         # up to this
PATIENCE = 300      # seconds: a server that asks for more is not waited for
DEAD = 20           # questions failed in a row, and the server is gone
FLEX_TIMEOUT = 900  # seconds: calls of --flex wait for a place
LONGEST = 1 << 22   # bytes of a reply
STOPS = {           # status and error -> what no other question would escape, and the remedy
    r"429.*(PerDay|per day|\bRPD\b|\bTPD\b|insufficient_quota|limit: 0\b(?!\.))":
        "the quota is spent; wait for the next day or have it raised",
    "40[13]|400.*(API_KEY_INVALID|API key not valid|FAILED_PRECONDITION)":
        "the server refuses the key or the account; check {keys}",
    "404|400.*model_not_found": "{model} is not to be had at {base}; those at {base}/models are",
    r"(?i)400.*max_?(completion_?|output_?)?tokens.{0,80}(too large|exceed|at most|less than)":
        "the server does not take such a long --budget; give a smaller one",
    r"(?i)400.*(thinking_? ?(level|config)|reasoning_? ?effort)":
        "the server does not take --thinking {thinking}; give another, or none",
    "3": "{base} answers with a redirect; give the final address as --judge_url",
}
KEPT = "what was judged is kept; run the same command again afterwards"


@dataclass
class JudgeSettings:
    """Who judges, and how patiently; scripts that ask a judge inherit these flags."""
    judge: str = ""              # gemini:MODEL, openai:MODEL (and others like it); empty: none
    judge_url: str = ""          # another server, http://host:port
    thinking: str = ""           # how much the judge thinks: low, medium, high; empty: its default
    budget: int = 8192           # longest reply in tokens, with its thoughts; doubled once
    workers: int = 16            # calls at once
    timeout: float = 120.0       # seconds until a call counts as lost
    flex: bool = False           # Gemini's slow service at half the price; calls may take 900 s
    same_version: bool = False   # stop where the server changes the model behind the name
    rpm: int = 0                 # requests per minute that your account allows; 0: no limit
    retry_failed: bool = False   # ask again for what was blocked, truncated, unparseable or failed


class Replies(Journal):
    """The journal of a judge: how questions ended, how open ones went so far, what it cost."""
    fields = {
        "final": "true or false",
        "state": "a text",
        "text": "a text",
        "reason": "a text",
        "version": "a text",
        "usage": "whole numbers by name",
    }

    def __init__(self, path):
        self.earlier = defaultdict(list)     # key of an open question -> the states of its replies
        self.used = Counter()                # tokens, by kind
        super().__init__(path, **self.fields)

    def seen(self, row) -> bool:
        self.used.update(row["usage"])
        if row["final"]:
            self.earlier.pop(row["key"], None)
        else:
            self.earlier[row["key"]].append(row["state"])
        return row["final"]

    def final(self, q: Question) -> tuple[Reply, object]:
        """How a settled question ended: (the reply, what the check makes of it today)."""
        row = self[q.key]
        reply = Reply(row["state"], row["text"], row["reason"], row["version"], row["usage"])
        return reply.checked(q.check)

    def answer(self, q: Question) -> dict | str:
        """A sampled answer, and who the server says gave it; or why there is none."""
        row = self[q.key]
        if row["state"] != "ok":
            return f"{row['state']}: {row['reason']}"
        finish = "length" if row["reason"] == "length" else "stop"
        return {"text": row["text"], "finish": finish, "model": row["version"]}


def continuation(model: str, record: dict, pictures: str, how: dict) -> Question:
    """The call in which a server's model goes on with a record's conversation. `how` it samples:
    temperature, max_tokens, seed. `pictures` names the record's by their content."""
    links = record.get("follow_links", False)
    return Question(
        key=sha(model, record["id"], json.dumps([record["messages"], how]), pictures),
        id=record["id"],
        system="",
        text="",
        images=[image_path(record["root"], name, links) for name in record["images"]],
        messages=record["messages"],
        sampling=how,
    )


class Stopped(Exception):
    """The run is ending; this call was not made."""


class Judge:
    """Asks questions, several at once; every reply goes to `replies` before the next step.

    Raises BadInput for a judge, url or key that cannot be used."""

    def __init__(self, s: JudgeSettings, replies: Replies):
        self.wire, self.model, self.base, self.key = door(s)
        self.s = replace(s, timeout=max(s.timeout, FLEX_TIMEOUT)) if s.flex else s
        self.replies = replies
        self.without = set()             # optional fields that the server does not take
        self.version = ""                # of the model, as the server last said
        self.failures = 0                # questions failed in a row
        self.calls = 0
        self.next_call = 0.0             # when one may be made, on time.monotonic's clock
        self.turn = threading.Lock()     # held to change calls and next_call
        self.stop = threading.Event()
        self.session = requests.Session()
        self.session.auth = lambda request: request      # or .netrc would replace our header
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, WithDeadline(pool_maxsize=s.workers))

    # ---- questions ------------------------------------------------------------------------------

    def ask(self, questions: Iterable[Question]) -> None:
        """Settle every question. Raises BadInput where going on is pointless."""
        states = Counter()
        bar = progress(desc="asking", unit="call", leave=False)
        with bar, ThreadPoolExecutor(self.s.workers) as pool:
            try:
                jobs = [pool.submit(self.settle, q) for q in questions]
                bar.reset(len(jobs))
                for job in as_completed(jobs):
                    states[job.result()] += 1            # raises what the job raised
                    bar.set_postfix(states, refresh=False)
                    bar.update()
            except BaseException as problem:
                self.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(problem, KeyboardInterrupt):
                    tqdm.write("stopping; the calls in flight are waited for and kept "
                               f"(up to {self.s.timeout:g} s)")
                raise

    def settle(self, q: Question) -> str:
        """Ask until the question has its final state, which is returned."""
        if q.key in self.replies:
            reply, _ = self.replies.final(q)
            if reply.state == "ok" or not self.s.retry_failed:
                return reply.state

        images = [jpeg(path) for path in q.images]
        earlier = list(self.replies.earlier[q.key])      # also from before a kill
        while True:
            budget = self.s.budget * (2 if "truncated" in earlier else 1)
            reply = self.post(q, images, budget)
            if q.sampling is None:
                reply, _ = reply.checked(q.check)
            elif reply.state == "truncated" and reply.text:
                reply = replace(reply, state="ok", reason="length")      # as long as it may be
            final = is_final(reply, earlier)
            about = {"key": q.key, "id": q.id, "final": final, "time": time.time()}
            self.replies.append(about | asdict(reply))
            self.look_at(reply.version)

            self.failures = self.failures + 1 if reply.state == "failed" else 0
            if self.failures >= DEAD:
                raise BadInput(
                    f"{DEAD} records in a row got no reply from {self.base}: {reply.reason}; "
                    "when the server is back, run the same command with --retry_failed 1"
                )
            if final:
                return reply.state
            earlier.append(reply.state)

    def look_at(self, version) -> None:
        """Another model behind the same name is another judge."""
        before, self.version = self.version, version or self.version
        if before and before != self.version:
            said = f"the model behind {self.model} is now {self.version}, and was {before}"
            if self.s.same_version:
                raise BadInput(f"{said}; --same_version stops here; {KEPT}")
            tqdm.write(said)

    # ---- calls ----------------------------------------------------------------------------------

    def post(self, q, images, budget) -> Reply:
        """The reply of a 200, or one that says why there is none. Raises BadInput where the whole
        run must stop, Stopped where another question has stopped it."""
        tries = 0.0
        without = set(self.without)
        while True:
            body = self.wire.body(self.model, q, images, budget, self.s.thinking, without)
            if self.s.flex:
                body["serviceTier"] = "flex"
            self.wait_for_turn()
            status, headers, data = self.send(body)
            if status == 200 and isinstance(data, dict) and not data.get("error"):
                if without > self.without:
                    tqdm.write(f"the server does not take {', '.join(without)}; going on without")
                    self.without |= without
                return reply_of(self.wire, data)

            error = error_of(data)
            said = str(error.get("message") or error)[:500]
            what = f"HTTP {status}: {said}" if status else said
            self.stop_if_pointless(status, error, what)
            if status == 400:
                # Not every server names the field that it refuses; the schema is the likeliest.
                optional = self.wire.optional
                refused = {field for field in optional if names(error, field)} or {optional[0]}
                if not refused <= without:
                    without |= refused
                    continue
            if status not in (0, 200, 408, 409, 425, 429) and status < 500:
                return Reply("failed", reason=what)

            jitter = random.uniform(0, min(MOST, WAIT * 2 ** tries))
            tries += 0.25 if status == 429 else 1
            if tries >= TRIES:
                return Reply("failed", reason=f"{what} ({TRIES} tries)")
            asked = delay_of(headers, error)
            if asked > PATIENCE:
                raise BadInput(f"the server asks to wait {asked:.0f} s ({what}); {KEPT}")
            if status == 429:
                self.pause(asked + jitter)
            elif self.stop.wait(asked + jitter):
                raise Stopped

    def wait_for_turn(self) -> None:
        """Return when the next call may be made: 60 / rpm seconds after the last, in no pause."""
        while not self.stop.is_set():
            with self.turn:
                wait = self.next_call - time.monotonic()
                if wait <= 0:
                    self.calls += 1
                    if self.s.rpm:
                        self.next_call = time.monotonic() + 60 / self.s.rpm
                    return
            self.stop.wait(wait)
        raise Stopped

    def pause(self, seconds) -> None:
        """Nobody sends anything for so long."""
        with self.turn:
            self.next_call = max(self.next_call, time.monotonic() + seconds)

    def send(self, body: dict) -> tuple[int, dict, object]:
        """One call -> (status, headers, JSON or text); (0, {}, what went wrong) for no reply."""
        url = self.wire.url(self.base, self.model)
        until = time.monotonic() + self.s.timeout
        content = bytearray()
        try:
            with self.session.post(
                url, json=body, headers=self.wire.headers(self.key),
                stream=True, allow_redirects=False, timeout=(20, self.s.timeout),
            ) as response:
                # read1 returns what is there: a reply may come in drips.
                while chunk := response.raw.read1(1 << 16, decode_content=True):
                    content += chunk
                    if time.monotonic() > until:
                        raise requests.Timeout(f"the reply took longer than {self.s.timeout:g} s")
                    if len(content) > LONGEST:
                        return 200, {}, {"error": None}  # no text: unparseable
        except (requests.RequestException, urllib3.exceptions.HTTPError) as problem:
            return 0, {}, self.scrub(f"no reply: {type(problem).__name__}: {problem}")

        text = self.scrub(content.decode("utf8", "replace"))
        try:
            # Half a character, which no file can hold, becomes "?".
            data = json.dumps(json.loads(text), ensure_ascii=False).encode("utf8", "replace")
            data = json.loads(data)
        except (ValueError, RecursionError):
            data = text
        if data and isinstance(data, list):              # Google's errors may stand in one
            data = data[0]
        return response.status_code, response.headers, data

    def scrub(self, text) -> str:
        """Without the key, should a server echo it, in whatever way JSON spells its characters."""
        if len(self.key) < 8:
            return text
        spelled = [rf"\\*({re.escape(c)}|u00{ord(c):02x})" for c in self.key]
        return re.sub("".join(spelled), "[key]", text, flags=re.IGNORECASE)

    def stop_if_pointless(self, status, error, what) -> None:
        for pattern, remedy in STOPS.items():
            ours = "{thinking}" in remedy and not self.s.thinking        # nobody asked for it
            if not ours and re.match(pattern, f"{status} {json.dumps(error)}"):
                keys = " or ".join(self.wire.keys)
                remedy = remedy.format(
                    keys=keys, model=self.model, base=self.base, thinking=self.s.thinking
                )
                raise BadInput(f"{remedy} ({what}); {KEPT}")


class WithDeadline(HTTPAdapter):
    """A server may send its headers letter by letter, for ever, and each letter is in time: so the
    socket is shut when the time for all of them is over."""

    def init_poolmanager(self, *args, **how):
        super().init_poolmanager(*args, **how)
        pools = self.poolmanager.pool_classes_by_scheme
        self.poolmanager.pool_classes_by_scheme = {scheme: timed(pools[scheme]) for scheme in pools}


def timed(pool):
    """A pool like this one, whose connections wait for whole headers as long as for one letter."""
    class Connection(pool.ConnectionCls):
        def getresponse(self):
            timer = threading.Timer(self.timeout, self.sock.shutdown, [socket.SHUT_RDWR])
            timer.daemon = True
            timer.start()
            try:
                return super().getresponse()
            finally:
                timer.cancel()

    return type(pool.__name__, (pool,), {"ConnectionCls": Connection})


def is_final(reply: Reply, earlier: list[str]) -> bool:
    """Is this reply the last word, after replies that ended in the states `earlier`?"""
    if reply.state == "truncated":
        return "truncated" in earlier
    if reply.state == "unparseable" or reply.again:
        others = [state for state in earlier if state != "truncated"]
        return len(others) + 1 >= ASKS
    return True


# ---- the door -----------------------------------------------------------------------------------

def door(s: JudgeSettings, dry: bool = False) -> tuple:
    """(wire format, model, base URL, key) of a judge; a dry run needs no key. Raises BadInput."""
    if min(s.workers, s.budget) < 1 or not 0 < s.timeout < 1e6 or s.rpm < 0:
        raise BadInput("--workers, --timeout and --budget must be positive, --rpm not negative")
    name, _, model = s.judge.partition(":")
    if name not in PROTOCOLS or not model:
        raise BadInput(f"--judge {s.judge}: say gemini:MODEL or openai:MODEL")
    if s.flex and name != "gemini":
        raise BadInput("--flex is a service of Gemini's; leave it out")
    wire = PROTOCOLS[name]
    key = "" if dry else find_key(wire.keys, needed=name == "gemini" or not s.judge_url)
    return wire, model, base_url(wire.base, s.judge_url), key


def base_url(usual, url) -> str:
    """--judge_url replaces scheme and host, or the whole base where it has a path."""
    if not url:
        return usual
    found = re.fullmatch(r"(https?://[\w.:\[\]-]+)(/[^?#@]*)?", url.rstrip("/"))
    if not found:
        raise BadInput("--judge_url: say http://host:port or https://host/v1, "
                       "without a user, password or key in it")
    return found[1] + (found[2] or urlsplit(usual).path)


def find_key(variables, needed) -> str:
    found = [os.environ.get(name, "").strip() for name in variables]
    key, *more = [*filter(None, found), ""]
    if any(more):
        print(f"note: {variables[0]} is used, as Google's own SDK does", file=sys.stderr)
    where = " or ".join(variables)
    if not key and needed:
        raise BadInput(f"no key: set {where} in the environment")
    if not re.fullmatch(r"[\x21-\x7e]*", key):
        raise BadInput(f"the key in {where} has characters that no header can carry; copy it again")
    return key
