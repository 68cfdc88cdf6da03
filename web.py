"""The conversation of chat.py on a page: two models answer the same question side by side.

    python chat.py --vs runs/dpo/model --web

No framework: Python's own HTTP server, one HTML file, and one answer at a time per model. Nothing is
kept here. The page sends the whole conversation with every question, its pictures with it, and gets
the answer as lines of JSON while it is made: {"note": ...}, {"text": ...}, last {"end": ...} or
{"error": ...}.

Whose page? A server on this machine can be reached by every page that the browser shows, so two
headers are checked: the request must be for our own name (or a foreign name could be pointed here),
and a question must come from our own page. The port may be another, for it can be forwarded.

    GET  /         the page
    GET  /models   [{"name", "sees", "target", "temperature"}]
    GET  /draw     a picture of the miniature's world, and a question about it
    POST /say      {"model": 0, "turns": [...], "temperature": 0, "scores": "4 4 4 4 4"}
"""
import base64
import json
import select
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from itertools import count

from common import HERE, BadInput, shown
from data import target_scores
from vision import MAX_PIXELS, decode_image

LIMIT = 64 * 2**20       # bytes of a question with all its pictures
RULES = ("default-src 'self'; img-src data:; script-src 'unsafe-inline'; "
         "style-src 'unsafe-inline'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'")


def serve(speakers, drawn, s):
    """Answer the page until Ctrl+C. `drawn(k)` gives the miniature's k-th picture."""
    server = listen(speakers, drawn, s)
    print(f"open http://127.0.0.1:{server.server_port} in a browser   (Ctrl+C ends this)",
          flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


def listen(speakers, drawn, s):
    """The server, bound to its port. Raises BadInput where the port is taken."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", s.port), Page)
    except (OSError, OverflowError) as error:
        raise BadInput(f"--port {s.port}: {error}; --port 0 takes any that is free") from None
    server.speakers = speakers
    server.locks = [threading.Lock() for _ in speakers]
    server.pictures = map(drawn, count())
    return server


# ---- what the page sends -------------------------------------------------------------------------

def question(body: bytes, speakers):
    """POST /say -> model's number, turns, temperature, scores or None. Raises BadInput."""
    room = MAX_PIXELS                                    # for all pictures together
    turns = []
    try:
        asked = json.loads(body)
        model = asked["model"]
        temperature = asked["temperature"]
        for turn in asked["turns"]:
            turns.append(turn_of(turn, room))
            room -= sum(image.width * image.height for image in turns[-1]["pictures"])
        scores = target_scores(asked["scores"]) if asked.get("scores") else None
    except BadInput:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"not a question of this page ({shown(repr(error))})") from None
    if type(model) is not int or model not in range(len(speakers)):
        raise BadInput(f"there is no model {shown(repr(model))}")
    if not isinstance(temperature, (int, float)) or not 0 <= temperature <= 100:
        raise BadInput(f"temperature {shown(repr(temperature))}: a number from 0 to 100")
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise BadInput("turns: user and assistant take turns, and the user has the last")
    return model, turns, temperature, scores


def turn_of(turn, room):
    """A turn with its pictures decoded, which have at most `room` pixels together."""
    pictures = []
    for picture in turn.get("pictures", []):
        data = base64.b64decode(picture["data"], validate=True)
        image = decode_image(data, shown(str(picture["name"])))
        room -= image.width * image.height
        if room < 0:
            raise BadInput(f"the pictures of this conversation have more than {MAX_PIXELS:,} pixels "
                           "together; begin anew, or take smaller ones")
        pictures.append(image)
    if not isinstance(turn["text"], str):
        raise BadInput("a turn's text is no text")
    return {"role": turn["role"], "text": turn["text"], "pictures": pictures}


# ---- the server ----------------------------------------------------------------------------------

class Page(BaseHTTPRequestHandler):
    """One request. Errors are one message: {"error": ...}."""

    def log_message(self, *args):
        pass                                             # the terminal stays quiet

    def handle(self):
        try:
            super().handle()
        except ConnectionError:                          # the page was closed, or stop pressed
            self.close_connection = True

    def do_GET(self):
        server = self.server
        if not self.from_home():
            return
        if self.path == "/":
            self.send(200, "text/html; charset=utf-8", (HERE / "web.html").read_bytes())
        elif self.path == "/models":
            self.send_json(200, [describe(speaker) for speaker in server.speakers])
        elif self.path == "/draw":
            image, about, ask = next(server.pictures)
            file = BytesIO()
            image.save(file, "PNG")
            data = base64.b64encode(file.getvalue()).decode()
            self.send_json(200, {"data": data, "about": about, "question": ask})
        else:
            self.send_json(404, {"error": f"there is no {shown(self.path)} here"})

    def do_POST(self):
        if not self.from_home():
            return
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or len(length) > 15:
            self.send_json(411, {"error": "how long is it? Content-Length is missing or wrong"})
            return
        size = int(length)
        if self.path != "/say":
            self.skip(size)
            self.send_json(404, {"error": f"there is no {shown(self.path)} here"})
            return
        if size > LIMIT:
            self.skip(size)
            self.send_json(413, {"error": f"{size:,} bytes with all pictures, more than {LIMIT:,}; "
                                          "begin anew, or take smaller pictures"})
            return
        try:
            asked = question(self.rfile.read(size), self.server.speakers)
        except BadInput as problem:
            self.send_json(400, {"error": str(problem)})
            return
        self.say(*asked)

    def from_home(self):
        """Whether this is for our own name, and from no foreign page. If not, it is answered."""
        host = self.headers.get("Host", "")
        ours = host.partition(":")[0] in ("127.0.0.1", "localhost")
        if ours and self.headers.get("Origin", "") in ("", f"http://{host}"):
            return True
        self.close_connection = True
        home = f"http://127.0.0.1:{self.server.server_port}"
        self.send_json(403, {"error": f"only the page at {home} is answered"})
        return False

    def say(self, model, turns, temperature, scores):
        """Stream an answer. Who closes the page stops it with the next token."""
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson; charset=utf-8")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        speaker, lock = self.server.speakers[model], self.server.locks[model]
        if not lock.acquire(blocking=False):
            self.tell("note", f"{speaker.name} is still answering; waiting")
            while not lock.acquire(timeout=0.5):
                self.tell("text", "")
        try:
            for kind, text in speaker.answer(turns, temperature, scores):
                self.tell(kind, text)
        except BadInput as problem:
            self.tell("error", str(problem))
        except RuntimeError as problem:                  # out of memory, for one
            self.tell("error", f"{speaker.name}: {shown(str(problem), 200)}")
        finally:
            lock.release()

    def tell(self, kind, text):
        """One line to the page. Raises ConnectionError where nobody listens any more."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        if readable and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionAbortedError
        if text or kind == "end":
            self.wfile.write(json.dumps({kind: text}).encode() + b"\n")

    def skip(self, size):
        """Read what will not be used: a browser sees no answer before it has sent everything."""
        while size > 0:
            got = len(self.rfile.read(min(size, 2**20)))
            size = size - got if got else 0

    def send_json(self, status, value):
        self.send(status, "application/json", json.dumps(value).encode())

    def send(self, status, kind, data):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Security-Policy", RULES)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)


def describe(speaker):
    """What the page has to know: `target` are the scores that a SteerLM model is asked for."""
    steer = speaker.tokens.steer
    target = steer and steer["target"]
    if speaker.s.target:
        target = target_scores(speaker.s.target)
    return {
        "name": speaker.name,
        "sees": speaker.tokens.patches > 0,
        "target": target or None,
        "temperature": speaker.s.temperature,
    }
