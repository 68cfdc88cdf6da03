"""A judge on this machine that speaks Gemini's and OpenAI's protocols, and misbehaves in every way that real ones do.

    python tests/judge_server.py --faults 0.3 --seed 0      prints its port; used by tests/test_judge.py and by hand

What it says depends on nothing but the question: the grades of a candidate are a hash of the candidate's text, so a client
that mixes up the order of the answers is found out. Which fault a question meets is a hash of its text, too, and how often
it met it is counted, so that faults pass or stay. The shapes are those that the services have been seen to send.
"""
import argparse
import base64
import hashlib
import io
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
# what happens on the way to a good reply, for one to three calls, and what never gets better; then the state it ends in
PASSING = ("429", "429 retryinfo", "429 list", "429 retry-after", "500", "503 html", "502 empty", "408", "drop", "stall", "200 html",
           "echo", "missing", "fifth", "out of range", "string", "float", "bool", "half", "prose only", "double id", "max_tokens",
           "recitation", "no candidates", "only thoughts", "other")
HARMLESS = ("thoughts", "split", "fenced", "listed", "prose around")
LASTING = {"blocked prompt": "blocked", "safety": "blocked", "always recitation": "blocked", "always max_tokens": "truncated",
           "always out of range": "unparseable", "always half": "unparseable", "always 500": "failed", "400": "failed",
           "always echo": "failed", "key in text": "unparseable"}


WRONG = ("missing", "fifth", "out of range", "string", "float", "bool", "half", "prose only", "double id")


def digest(*parts) -> int:
    return int(hashlib.sha256(repr(parts).encode()).hexdigest()[:12], 16)


def grades(text: str) -> dict:
    """The truth about a candidate, for tests to compare with."""
    return {name: digest(name, text) % 5 for name in ATTRIBUTES}


def comment(text: str) -> str:
    return f"It says {text[:20]!r}."


def fault_of(text: str, faults: float, seed: int) -> str:
    """The fault that the question with this text meets; "" for none. Half of the faults pass, the rest are harmless or stay."""
    if digest("fault?", seed, text) % 1000 >= 1000 * faults:
        return ""
    kinds = PASSING + HARMLESS + tuple(LASTING)
    return kinds[digest("which?", seed, text) % len(kinds)]


def expected(kind: str, gemini: bool = True) -> str:
    """The state in which a question with this fault ends; only Gemini says why it filtered, so only there it is asked again."""
    return "blocked" if kind == "recitation" and not gemini else LASTING.get(kind, "ok")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1                                        # one packet per reply

    def log_message(self, *args):
        pass

    def send(self, status: int, body, headers: dict | None = None):
        body = body if isinstance(body, bytes) else (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": len(body)} | (headers or {})).items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def do_GET(self):
        server = self.server
        if self.path == "/stats":
            with server.lock:
                self.send(200, {"arrivals": server.arrivals, "asked": server.asked, "complaints": server.complaints})
        else:
            self.send(404, {"error": {"code": 404, "message": "not found"}})

    def do_POST(self):
        server, now = self.server, time.time()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        gemini = ":generateContent" in self.path
        key = self.headers.get("x-goog-api-key") if gemini else (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if gemini:
            parts = body["contents"][0]["parts"]
            system = body.get("systemInstruction", {"parts": [{"text": ""}]})["parts"][0]["text"]
            budget, schema = body["generationConfig"]["maxOutputTokens"], body["generationConfig"].get("responseJsonSchema")
            images = [p["inlineData"]["data"] for p in parts if "inlineData" in p]
        else:
            parts = body["messages"][-1]["content"]
            system = body["messages"][0]["content"] if len(body["messages"]) > 1 else ""
            budget = body.get("max_tokens") or body.get("max_completion_tokens")
            schema = body.get("response_format", {}).get("json_schema", {}).get("schema")
            images = [p["image_url"]["url"].split(",", 1)[1] for p in parts if p["type"] == "image_url"]
        text = next(p["text"] for p in parts if "text" in p)
        with server.lock:
            server.arrivals.append(now)
            times = server.asked[text] = server.asked.get(text, 0) + 1
            server.sizes.setdefault(text, set()).add((len(system), len(text), len(images)))
            server.budgets.setdefault(text, []).append(budget)
        self.look_at(images, text, system, schema)
        if server.refuse:                                                # a whole protocol's refusal, set by a test
            return self.send(*server.refuse(self, body))
        kind = fault_of(text, server.faults, server.seed)
        lasting = kind in LASTING
        if kind and not lasting and kind not in HARMLESS and times > server.patience:
            kind = ""
        time.sleep(server.delay)
        self.answer(kind.removeprefix("always "), gemini, key, body, text, budget)

    def look_at(self, images, text, system, schema):
        """What must never be sent, or must always be."""
        if self.server.fast:
            return
        from PIL import Image
        complaints = []
        if "key=" in self.path or "?" in self.path:
            complaints.append(f"the URL carries something: {self.path}")
        for data in images:
            image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            if image.format != "JPEG" or image.mode != "RGB" or max(image.size) > 1024 or len(image.getexif()) or b"Exif" in base64.b64decode(data):
                complaints.append(f"a picture is {image.format} {image.mode} {image.size}, EXIF {dict(image.getexif())}")
        if schema and ("additionalProperties" in json.dumps(schema) or schema["properties"]["candidates"]["minItems"] != len(candidates(text))):
            complaints.append(f"schema {json.dumps(schema)[:200]}")
        if candidates(text) and system.find("correctness") < 0:
            complaints.append("no rubric")
        with self.server.lock:
            self.server.complaints += complaints

    def answer(self, kind: str, gemini: bool, key: str, body: dict, text: str, budget: int):
        overloaded = {"error": {"code": 503, "message": "The model is overloaded.", "status": "UNAVAILABLE"}}
        quota = {"error": {"code": 429, "message": "You exceeded your current quota.", "status": "RESOURCE_EXHAUSTED", "details": [
            {"@type": "type.googleapis.com/google.rpc.QuotaFailure", "violations": [
                {"quotaMetric": "generativelanguage.googleapis.com/generate_content_requests",
                 "quotaId": "GenerateRequestsPerMinutePerProjectPerModel", "quotaValue": "5"}]}]}}
        if kind == "drop":
            self.close_connection = True
            return self.connection.close()
        if kind == "stall":
            time.sleep(self.server.stall)
            self.close_connection = True
            return
        replies = {"429": (429, quota), "500": (500, {"error": {"code": 500, "message": "Internal error.", "status": "INTERNAL"}}),
                   "429 list": (429, [quota]), "429 retry-after": (429, quota, {"Retry-After": "0"}),
                   "503 html": (503, "<html><head><title>503</title></head><body>Service unavailable</body></html>"),
                   "502 empty": (502, b""), "408": (408, overloaded), "200 html": (200, "<html>Please sign in</html>"),
                   "echo": (500, {"error": {"message": f"your key was {key}, your headers {dict(self.headers)}"}}),
                   "400": (400, {"error": {"code": 400, "message": "Unable to process input image.", "status": "INVALID_ARGUMENT"}})}
        if kind == "429 retryinfo":
            quota["error"]["details"].append({"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "0.05s"})
            return self.send(429, quota)
        if kind in replies:
            return self.send(*replies[kind])

        rows = [{"id": name, "comment": comment(said)} | grades(said) for name, said in candidates(text)]
        if not rows:
            pass
        elif kind == "missing":
            rows.pop()
        elif kind == "fifth":
            rows.append(rows[-1] | {"id": "E"})
        elif kind == "double id":
            rows[-1]["id"] = rows[0]["id"]
        elif kind in ("out of range", "string", "float", "bool"):
            rows[0]["correctness"] = {"out of range": 5, "string": "3", "float": 3.0, "bool": True}[kind]
        said = json.dumps({"golden_answer": "what I would say", "candidates": rows}) if rows else opinion(text, body, kind)
        said = {"half": said[:len(said) // 2], "key in text": f"Your key is {key}.", "prose only": "I would give A a 3 {or so}.", "fenced": f"```json\n{said}\n```",
                "listed": f"[{said}]", "prose around": f"Here you are: {said} I hope that helps!"}.get(kind if rows or kind == "key in text" else "", said)
        finish, parts = "STOP", [said]
        if kind == "max_tokens" and (budget <= self.server.budget or kind_is_lasting(text, self.server)):
            finish, parts = "MAX_TOKENS", [said[:20]]
        finish = {"safety": "SAFETY", "recitation": "RECITATION", "other": "OTHER"}.get(kind, finish)
        parts = [] if kind in ("safety", "recitation", "other", "only thoughts") else parts
        tokens = len(json.dumps(body)) // 4
        if gemini:
            said = [{"text": x} for x in parts]
            if kind == "split":
                said = [{"text": parts[0][:30]}, {"text": parts[0][30:]}, {"thoughtSignature": "abc"}]
            elif kind in ("thoughts", "only thoughts"):
                said = [{"text": 'Let me see {"candidates": []} ...', "thought": True}] + said
            candidate = {"content": {"role": "model", "parts": said}, "finishReason": finish, "index": 0}
            if kind in ("safety", "recitation"):
                del candidate["content"]
            reply = {"candidates": [candidate], "modelVersion": "mock-1", "responseId": "x",
                     "usageMetadata": {"promptTokenCount": tokens, "candidatesTokenCount": 50, "thoughtsTokenCount": 7, "totalTokenCount": tokens}}
            if kind in ("blocked prompt", "no candidates"):
                del reply["candidates"]
            if kind == "blocked prompt":
                reply["promptFeedback"] = {"blockReason": "PROHIBITED_CONTENT"}
            return self.send(200, reply)
        finish = {"STOP": "stop", "MAX_TOKENS": "length", "SAFETY": "content_filter", "RECITATION": "content_filter"}.get(finish, finish)
        message = {"role": "assistant", "content": parts[0] if parts else None}
        if kind == "blocked prompt":
            message = {"role": "assistant", "content": None, "refusal": "I can't help with that."}
        reply = {"id": "x", "object": "chat.completion", "model": "mock-1", "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                 "usage": {"prompt_tokens": tokens, "completion_tokens": 57, "completion_tokens_details": {"reasoning_tokens": 7}}}
        if kind == "no candidates":
            reply["choices"] = []
        self.send(200, reply)


def opinion(text: str, body: dict, kind: str = "") -> str:
    """What it says about a published benchmark's prompt: the shape is told by the prompt, the grade is a hash of it."""
    bad, grade, asked = kind.removeprefix("always ") in WRONG, digest("grade", text), json.dumps(body)
    if "model_1" in asked:
        rank = 3 if bad else 1 + grade % 2
        return str([{"model": "model_1", "rank": rank}, {"model": "model_2", "rank": 3 - rank}])
    if "[[rating]]" in asked:
        return "I like it. Rating: [[85]]" if bad else f"I like it. Rating: [[{1 + grade % 10}]]"
    if "[Context]" in text:
        return "twelve 99\nBoth are fine." if bad else f"{1 + grade % 10} {1 + grade // 10 % 10}\nThe second is so so."
    return "2" if bad else f"{grade % 11 / 10}"


def kind_is_lasting(text, server) -> bool:
    return fault_of(text, server.faults, server.seed) in LASTING


def candidates(text: str) -> list[tuple[str, str]]:
    return re.findall(r"<candidate_([A-Z])>\n(?:[0-9a-f]{16})\n(.*?)\n(?:[0-9a-f]{16})\n</candidate_\1>", text, re.S)


class Server(ThreadingHTTPServer):
    """Serve in a thread: with Server(faults=0.3) as server: ... server.url"""
    daemon_threads, request_queue_size, allow_reuse_address = True, 256, True

    def __init__(self, faults: float = 0.0, seed: int = 0, delay: float = 0.0, stall: float = 3.0, patience: int = 1,
                 budget: int = 8192, fast: bool = False, port: int = 0):
        super().__init__(("127.0.0.1", port), Handler)
        self.faults, self.seed, self.delay, self.stall, self.patience, self.budget, self.fast = (
            faults, seed, delay, stall, patience, budget, fast)
        self.lock, self.arrivals, self.asked, self.sizes, self.budgets, self.complaints = threading.Lock(), [], {}, {}, {}, []
        self.refuse = None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        pass                                                             # a client that was killed

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()     # how long a shutdown waits
        return self

    def __exit__(self, *args):
        self.shutdown()
        self.server_close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, value in (("faults", 0.0), ("seed", 0), ("delay", 0.0), ("stall", 3.0), ("patience", 1), ("port", 0), ("fast", 0)):
        parser.add_argument(f"--{name}", type=type(value), default=value)
    server = Server(**vars(parser.parse_args()))
    print(server.server_address[1], flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        sys.exit()
