"""The page's server over HTTP, and the page in a real browser where there is one.

    python -m pytest tests/test_web.py -q        with chromium, chromium-driver and selenium also the page
"""
import base64
import http.client
import json
import os
import shutil
import socket
import struct
import threading
import time
from io import BytesIO
from types import SimpleNamespace
from urllib.request import urlopen

import pytest
from PIL import Image

import chat
import web
from common import BadInput
from conftest import ROOT
from data import Pixels, make_tree
from generate import sample_answers
from judge.rubric import RUBRIC
from toy import tasks

MODELS = ("toy/llava", "toy/vicuna")


@pytest.fixture(scope="module")
def speakers():
    return [chat.Speaker(name, chat.Settings()) for name in MODELS]


@pytest.fixture
def serve():
    """serve(speakers) -> its port; every server ends with the test."""
    running = []

    def start(speakers):
        server = web.listen(speakers, chat.drawn, chat.Settings(port=0))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def ask(server, method="POST", path="/say", body=b"", **headers):
    """One request -> its status, and what came: a list of [kind, text] for a stream, else JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(method, path, body, headers)
    reply = connection.getresponse()
    text = reply.read().decode()
    connection.close()
    if "ndjson" in reply.headers["Content-Type"]:
        return reply.status, [list(json.loads(line).items())[0] for line in text.splitlines()]
    return reply.status, json.loads(text) if "json" in reply.headers["Content-Type"] else text


def said(text, *pictures):
    return {"role": "user", "text": text, "pictures": [{"name": "p.png", "data": base64.b64encode(data).decode()} for data in pictures]}


def question(*turns, **changes):
    return {"model": 0, "temperature": 0, "scores": None, "turns": list(turns)} | changes


def png(image):
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_the_page_and_its_models(serve, speakers):
    server = serve(speakers)
    status, page = ask(server, "GET", "/")
    assert status == 200 and page == (ROOT / "web.html").read_text()
    status, models = ask(server, "GET", "/models")
    assert models == [{"name": "toy/llava", "sees": True, "target": None, "temperature": 0.0}, {"name": "toy/vicuna", "sees": False, "target": None, "temperature": 0.0}]
    drawn = ask(server, "GET", "/draw")[1]
    assert Image.open(BytesIO(base64.b64decode(drawn["data"]))).size == (48, 48) and "?" in drawn["question"]
    assert ask(server, "GET", "/draw")[1] != drawn


def test_the_stream_is_what_sampling_says_with_and_without_a_picture_over_two_turns(serve, speakers, tmp_path):
    server = serve(speakers)
    [record] = tasks.draw(tasks.items("attribute", 1), tmp_path)
    data = (tmp_path / record["images"][0]).read_bytes()
    first = record["messages"][0]["content"].removeprefix("<image>\n")
    for k, speaker in enumerate(speakers):
        sees = speaker.model.config.vision is not None
        turns, messages = [], []
        for text in (first, "what is the opposite of big ?"):
            turns.append(said(text, *([] if turns else [data])))
            messages.append({"role": "user", "content": ("<image>\n" if sees and not messages else "") + text})
            status, events = ask(server, body=question(*turns, model=k))
            answer = "".join(text for kind, text in events if kind == "text")
            tree = make_tree(speaker.tokens, {"id": "x", "messages": messages, "images": record["images"][:sees], "root": record["root"]}, [])
            expected = sample_answers(speaker.model, speaker.tokens, Pixels(speaker.model.config), [tree], n=1, temperature=0.0)[0][0]["text"]
            assert status == 200 and answer == expected and events[-1] == ("end", "")
            assert (("note", "toy/vicuna sees no pictures, and is asked without") in events) == (not sees and len(turns) == 1)
            turns.append({"role": "assistant", "text": answer})
            messages.append({"role": "assistant", "content": answer})


GOOD = question(said("what is two plus two ?"))


@pytest.mark.parametrize("body, why", [
    (b"{", "not a question of this page"), (b"[]", "not a question of this page"), (b"[" * 100_000, "not a question of this page"),
    (b"\xff", "not a question of this page"), (GOOD | {"turns": []}, "the user has the last"), (GOOD | {"turns": 3}, "not a question"),
    (GOOD | {"model": 2}, "no model 2"), (GOOD | {"model": "0"}, "no model"), (GOOD | {"model": 0.0}, "no model"), (GOOD | {"model": True}, "no model"), (GOOD | {"temperature": 10**400}, "temperature 1"), (GOOD | {"temperature": -1}, "temperature -1"),
    (GOOD | {"temperature": float("nan")}, "temperature nan"), (GOOD | {"temperature": "hot"}, "temperature 'hot'"), (GOOD | {"scores": "9"}, "5 numbers"),
    (question(said("a"), said("b")), "take turns"), (question({"role": "system", "text": "a"}), "take turns"), (question({"role": "user", "text": 5}), "no text"),
    (question(said("a", b"no picture")), "image p.png: cannot be decoded"), (question(said("a", png(Image.new("RGB", (8, 8)))[:45])), "image p.png: cannot be decoded"),
    (question({"role": "user", "text": "a", "pictures": [{"name": "x", "data": "!"}]}), "not a question of this page"),
    (question({"role": "user", "text": "a", "pictures": ["/etc/passwd"]}), "not a question of this page"),
], ids=str)
def test_what_is_no_question_gets_one_message(serve, speakers, body, why):
    status, reply = ask(serve(speakers), body=body)
    assert status == 400 and list(reply) == ["error"] and why in reply["error"] and len(reply["error"]) < 400


def test_what_cannot_be_answered_is_said_in_the_stream(serve, speakers):
    server = serve(speakers)
    assert ask(server, body=question(said("count from one to five . " * 120)))[1][-1][0] == "error"
    assert "</s>" in ask(server, body=question(said("a </s> b")))[1][-1][1]
    assert ask(server, body=GOOD | {"scores": "4 4 4 4 4"})[1] == [("error", ask(server, body=GOOD | {"scores": "4 4 4 4 4"})[1][0][1])]
    assert ask(server, body=GOOD)[1][-1] == ("end", ""), "and the model is free again"


def test_only_its_own_page_is_answered(serve, speakers, monkeypatch):
    server = serve(speakers)
    own = f"127.0.0.1:{server.server_port}"
    for headers in ({"Host": "evil.example"}, {"Host": f"evil.example:{server.server_port}"}, {"Origin": "http://evil.example"}, {"Origin": "null"}):
        for method, path in (("POST", "/say"), ("GET", "/"), ("GET", "/draw")):
            status, reply = ask(server, method, path, GOOD, **headers)
            assert status == 403 and reply == {"error": f"only the page at http://{own} is answered"}
    assert ask(server, body=GOOD, Origin=f"http://{own}")[0] == 200
    for forwarded in (f"localhost:{server.server_port}", "localhost:9000", "127.0.0.1"):
        assert ask(server, body=GOOD, Host=forwarded, Origin=f"http://{forwarded}")[0] == 200
        assert ask(server, body=GOOD, Host=forwarded, Origin="http://127.0.0.1:1")[0] == 403
    with urlopen(f"http://{own}") as page:
        assert "frame-ancestors 'none'" in page.headers["Content-Security-Policy"], "nor is it shown inside another page"
    assert ask(server, "GET", "/../chat.py") == (404, {"error": "there is no /../chat.py here"}) == ask(server, "POST", "/../chat.py", b"x" * 10)
    monkeypatch.setattr(web, "LIMIT", 1000)
    status, reply = ask(server, body=b"x" * 3_000_000)
    assert status == 413 and "3,000,000 bytes" in reply["error"]
    with socket.create_connection(("127.0.0.1", server.server_port)) as raw:
        raw.sendall(f"POST /say HTTP/1.1\r\nHost: {own}\r\n\r\n".encode())
        assert b" 411 " in raw.recv(100)
    assert ask(server, **{"Content-Length": "9" * 5000})[0] == 411


def test_pictures_are_bounded_together(serve, speakers, monkeypatch):
    monkeypatch.setattr(web, "MAX_PIXELS", 1000)
    square = png(Image.new("RGB", (20, 20)))
    server = serve(speakers)
    assert ask(server, body=question(said("a", square, square)))[0] == 200
    status, reply = ask(server, body=question(said("a", square, square), {"role": "assistant", "text": "b"}, said("c", square)))
    assert status == 400 and "more than 1,000 pixels together" in reply["error"]


def test_a_model_that_fails_says_so_and_is_free_again(serve):
    class Failing(Slow):
        def answer(self, turns, temperature, scores):
            yield "text", "a"
            raise RuntimeError("CUDA out of memory. Tried to allocate much")

    server = serve([Failing()])
    for _ in range(2):
        assert ask(server, body=GOOD)[1] == [("text", "a"), ("error", "slow: CUDA out of memory. Tried to allocate much")]


def test_who_goes_away_at_any_moment_leaves_no_traceback(serve, speakers, capfd):
    server = serve(speakers)
    for part in (b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", b"POST /say HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 1000, b"PO"):
        raw = socket.create_connection(("127.0.0.1", server.server_port))
        raw.sendall(part)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))         # a reset, not a farewell
        raw.close()
    time.sleep(0.3)
    assert ask(server, "GET", "/models")[0] == 200 and "Traceback" not in capfd.readouterr().err


def test_a_port_that_is_taken_is_named(serve, speakers):
    with pytest.raises(BadInput, match="--port 0 takes any"):
        web.listen(speakers, chat.drawn, chat.Settings(port=serve(speakers).server_port))
    with pytest.raises(BadInput, match="--port 70000"):
        web.listen(speakers, chat.drawn, chat.Settings(port=70000))


class Slow:
    """Says what it was told to; without end, one word when it may."""
    name = "slow"
    s = SimpleNamespace(target="", temperature=0.0)
    tokens = SimpleNamespace(steer=None, patches=0)

    def __init__(self, text="", pause=0.02):
        self.text, self.pause, self.tokens_said, self.closed = text, pause, 0, threading.Event()

    def answer(self, turns, temperature, scores):
        self.asked = temperature, scores
        try:
            if self.text:
                yield "text", self.text
            while not self.text:
                self.tokens_said += 1
                yield "text", "word "
                time.sleep(self.pause)
            yield "end", "cut after 1 tokens"
        finally:
            self.closed.set()


def test_who_closes_the_page_frees_the_model_within_a_token(serve):
    speaker = Slow(pause=0.5)
    server = serve([speaker])
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("POST", "/say", json.dumps(GOOD))
    reply = connection.getresponse()
    assert json.loads(reply.readline()) == {"text": "word "}
    before = speaker.tokens_said
    reply.close()
    connection.close()
    assert speaker.closed.wait(5) and speaker.tokens_said <= before + 1
    time.sleep(0.05)
    assert not server.locks[0].locked()


def test_one_answer_at_a_time_and_the_other_is_told_that_it_waits(serve):
    speaker = Slow("done")
    server = serve([speaker])
    server.locks[0].acquire()
    threading.Timer(0.7, server.locks[0].release).start()
    began = time.monotonic()
    _, events = ask(server, body=GOOD)
    assert events == [("note", "slow is still answering; waiting"), ("text", "done"), ("end", "cut after 1 tokens")]
    assert time.monotonic() - began > 0.5


# ---- the page itself -----------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium")
QUIET = ("--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
         "--disable-sync").split()


@pytest.fixture
def browser(tmp_path):
    selenium = pytest.importorskip("selenium.webdriver", reason="pip install selenium: the page is tried in a browser")
    if not CHROMIUM or not shutil.which("chromedriver"):
        pytest.skip("chromium and chromium-driver are not installed: the page is tried in a browser")
    options = selenium.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*QUIET, f"--user-data-dir={tmp_path}/profile"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = selenium.Chrome(options, selenium.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the page did not get there"
        time.sleep(0.05)


def console(browser):
    """What the page left on the console; the compositor's own remarks about screenshots are not the page's."""
    return [entry for entry in browser.get_log("browser") if entry["source"] != "rendering"]


def found(browser, selector):
    return browser.find_elements("css selector", selector)


def show(browser, width, height, dark):
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500})


def test_a_picture_and_a_question_get_both_answers(serve, speakers, browser, tmp_path):
    """With SCREENSHOTS=DIR its three pictures are kept; docs/web.png is the first."""
    kept = os.environ.get("SCREENSHOTS", str(tmp_path))
    server = serve(speakers)
    show(browser, 1280, 640, dark=False)
    browser.get(f"http://127.0.0.1:{server.server_port}")
    until(lambda: found(browser, ".names h2"))
    [record] = tasks.draw(tasks.items("attribute", 1), tmp_path)
    found(browser, "#file")[0].send_keys(str(tmp_path / record["images"][0]))
    until(lambda: found(browser, "#waiting img"))
    asked = record["messages"][0]["content"].removeprefix("<image>\n")
    found(browser, "#box")[0].send_keys(asked + "\n")
    until(lambda: not found(browser, ".live") and len(found(browser, ".said")) == 2)
    found(browser, "#box")[0].send_keys("which fruit is yellow ?\n")
    until(lambda: not found(browser, ".live") and len(found(browser, ".said")) == 4)
    texts = [cell.text for cell in found(browser, ".said")]
    for k, speaker in enumerate(speakers):
        events = speaker.answer([{"role": "user", "text": asked, "pictures": [Image.open(tmp_path / record["images"][0]).convert("RGB")]}], 0)
        assert texts[k] == "".join(text for kind, text in events if kind == "text").strip()
    assert all(texts[2:])
    size = browser.execute_script("const i = document.querySelector('.question img'); return [i.naturalWidth, i.naturalHeight]")
    assert size == [48, 48], "the thumbnail is the picture"
    for name, width, height, dark in (("wide", 1280, 640, False), ("narrow", 390, 844, False), ("dark", 390, 844, True)):
        show(browser, width, height, dark)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "nothing sticks out"
        browser.save_screenshot(f"{kept}/{name}.png")
    assert console(browser) == []


def test_escape_stops_sliders_ask_and_a_script_in_an_answer_stays_text(serve, browser):
    Keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    evil = "<script>document.title = 'owned'</script><img src=x onerror=\"document.title = 'owned'\">"
    endless, steered = Slow(), Slow(evil)
    steered.tokens = SimpleNamespace(steer={"target": dict.fromkeys(RUBRIC.attributes, 4)}, patches=0)
    server = serve([endless, steered])
    browser.get(f"http://127.0.0.1:{server.server_port}")
    until(lambda: found(browser, ".names h2"))
    sliders = found(browser, "input[type=range]")
    sliders[-1].send_keys(Keys.HOME)
    found(browser, "#temperature")[0].send_keys(Keys.ARROW_UP)
    found(browser, "#box")[0].send_keys("<b>bold</b>\n")
    until(lambda: "word word" in found(browser, ".said")[0].text and found(browser, ".said")[1].text == evil)
    assert len(sliders) == 5 and steered.asked == (0.1, {name: 0 if name == "verbosity" else 4 for name in RUBRIC.attributes})
    assert endless.asked == (0.1, None), "no scores for a model that was not trained to be asked for them"
    found(browser, "#box")[0].send_keys(Keys.ESCAPE)
    until(lambda: not found(browser, ".live"))
    assert endless.closed.wait(5) and "stopped" in found(browser, ".answer")[0].text and "cut after 1 tokens" in found(browser, ".answer")[1].text
    assert found(browser, ".question")[0].text == "<b>bold</b>" and browser.title == "remedy: a conversation"
    found(browser, "#box")[0].send_keys("again\n")
    until(lambda: len(found(browser, ".said")) == 4 and "word" in found(browser, ".said")[2].text)
    found(browser, "#stop")[0].click()
    until(lambda: not found(browser, ".live") and "stopped" in found(browser, ".answer")[2].text)
    found(browser, "#anew")[0].click()
    assert not found(browser, ".question")
    assert console(browser) == []


def test_a_new_conversation_begins_with_nothing_and_silence_does_not_end_one(serve, browser):
    class Silent(Slow):
        def answer(self, turns, temperature, scores):
            self.heard = [turn["text"] for turn in turns]
            yield "text", "" if len(turns) == 1 else "well"
            yield "end", ""

    slow, silent = Slow(), Silent()
    real, slow.heard = slow.answer, []
    slow.answer = lambda turns, *more: slow.heard.append([turn["text"] for turn in turns]) or real(turns, *more)
    server = serve([slow, silent])
    browser.get(f"http://127.0.0.1:{server.server_port}")
    until(lambda: found(browser, ".names h2"))
    box = found(browser, "#box")[0]
    box.send_keys("old\n")
    until(lambda: "word" in found(browser, ".said")[0].text)
    found(browser, "#anew")[0].click()
    until(lambda: not found(browser, "#ask:disabled"))
    box.send_keys("new\n")
    until(lambda: found(browser, ".said") and "word" in found(browser, ".said")[0].text)
    assert slow.heard == [["old"], ["new"]]
    found(browser, "#stop")[0].click()
    until(lambda: not found(browser, ".live"))
    box.send_keys("more\n")
    until(lambda: len(found(browser, ".said")) == 4 and "word" in found(browser, ".said")[2].text)
    assert silent.heard == ["more"], "what was met with silence is not sent again"
    assert slow.heard[-1][0] == "new" and "word" in slow.heard[-1][1], "what was stopped is"
    found(browser, "#stop")[0].click()
    until(lambda: not found(browser, ".live"))
    found(browser, "#ask")[0].click()
    assert found(browser, "#trouble")[0].text == "Ask something first."
