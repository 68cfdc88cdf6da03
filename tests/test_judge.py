"""Asking a judge over HTTP: whatever it does, every record ends in one state, and nothing is invented, lost or leaked.

    python -m pytest tests/test_judge.py -q          with SLOW=1 a thousand records, two thousand, twenty kills

The judge is tests/judge_server.py, on this machine. What is killed runs in a process of its own.
"""
import base64
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from functools import partial
from types import SimpleNamespace

import pytest
import requests
from PIL import Image

import annotate
from judge import client as judge
import judge_server
import formats as records
from judge import rubric
from judge import wire
from common import BadInput, Journal
from conftest import ROOT, ended, picture, process
from judge_server import Server
from judge.wire import OpenAI, Gemini, Question, Reply

KEY = "AIza-test-KEY_0123456789"
SLOW = bool(os.environ.get("SLOW"))
KILLS = 20 if SLOW else 3


@pytest.fixture(autouse=True)
def key(monkeypatch):
    for name in ("GEMINI_API_KEY", "GOOGLE_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setattr(judge, "WAIT", 0.02)


def write_data(folder, n, answers=4, images=3, scale=1):
    """n records with answers; pictures that carry EXIF, and are turned by it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for k in range(images):
        exif = Image.Exif()
        exif[0x010e], exif[0x0112] = "a secret place", 6
        picture(60 * scale + k, 40 * scale, seed=k).save(folder / f"images/{k}.jpg", exif=exif)
    rows = [{"id": f"r{k:04d}", "images": [f"images/{k % images}.jpg"],
             "messages": [{"role": "user", "content": f"<image>\nWhat is in picture {k}?"}],
             "answers": [{"text": f"Answer {j} to {k}.", "finish": "stop"} for j in range(answers)], "note": {"kept": k}} for k in range(n)]
    (folder / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "data.jsonl"


def run(data, out, server, spec="gemini:mock", **more):
    settings = {"judge": spec, "judge_url": server.url, "workers": 16, "timeout": 1.0} | more
    annotate.run(annotate.Settings(data=str(data), out=str(out), **settings))
    return [json.loads(line) for line in open(out / "records.jsonl")]


def impatient(data, out, url, minute=60.0, **settings):
    """run, for a process of its own, which the fixture above does not reach."""
    judge.WAIT, judge.Limits = 0.02, partial(judge.Limits, minute=minute)
    run(data, out, SimpleNamespace(url=url), **settings)


def text_of(record):
    """What the judge was shown of a record, from what the record says about the order."""
    shown = "\n".join(f"<candidate_{chr(65 + p)}>\n{record['answers'][k]['text']}\n</candidate_{chr(65 + p)}>"
                      for p, k in enumerate(record["judge"]["order"]))
    asked = record["messages"][0]["content"].replace("<image>", "[picture 1]")
    return f"The conversation:\nuser: {asked}\n\nThe candidates:\n{shown}"


def check_scores(rows):
    """Only ok carries scores, and each answer has its own, whatever order it was shown in."""
    for row in rows:
        for answer in row["answers"]:
            assert ("scores" in answer) == ("comment" in answer) == (row["judge"]["state"] == "ok")
            if "scores" in answer:
                assert answer["scores"] == judge_server.grades(answer["text"])
                assert answer["comment"] == judge_server.comment(answer["text"])


def lines(out):
    return [json.loads(line) for line in open(out / "journal.jsonl")]


# ---- the storm -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, n", [("gemini:mock", 1000 if SLOW else 300), ("openai:mock", 300)], ids=["gemini", "openai"])
def test_with_faults_in_a_third_of_the_questions_every_record_ends_in_its_state(tmp_path, capsys, spec, n):
    data = write_data(tmp_path / "data", n)
    with Server(faults=0.3, stall=1.5) as server:
        rows = run(data, tmp_path / "out", server, spec, workers=32)
        assert not server.complaints, server.complaints[:3]
        assert all(len(sizes) == 1 for sizes in server.sizes.values()), "a retry sends the same prompt, never a longer one"
        asked = server.asked
    raw = [json.loads(line) for line in open(data)]
    assert [r["id"] for r in rows] == [r["id"] for r in raw] and [r["note"] for r in rows] == [r["note"] for r in raw]
    kinds = [judge_server.fault_of(text_of(r), 0.3, 0) for r in rows]
    assert len(set(kinds)) > 30 and 0.25 < sum(map(bool, kinds)) / n < 0.35
    for row, kind in zip(rows, kinds):
        assert row["judge"]["state"] == judge_server.expected(kind, "gemini" in spec), (kind, row["judge"])
        assert asked[text_of(row)] == 1 or kind
    check_scores(rows)
    final = Counter(line["key"] for line in lines(tmp_path / "out") if line["final"])
    assert len(final) == n and set(final.values()) == {1}
    said = capsys.readouterr()
    for text in (said.out, said.err, *(path.read_text(errors="replace") for path in (tmp_path / "out").glob("*.json*"))):
        assert KEY not in text
    assert {"always echo", "key in text"} & set(kinds) and "[key]" in (tmp_path / "out" / "journal.jsonl").read_text()


def test_what_did_not_come_is_asked_again_only_on_request(tmp_path):
    data = write_data(tmp_path / "data", 60)
    with Server() as server:
        server.refuse = lambda handler, body: (200, {"promptFeedback": {"blockReason": "OTHER"}})
        rows = run(data, tmp_path / "out", server)
        assert {r["judge"]["state"] for r in rows} == {"blocked"} and rows[0]["judge"]["reason"] == "prompt OTHER"
        server.refuse = None
        assert run(data, tmp_path / "out", server) == rows and len(server.arrivals) == 60
        rows = run(data, tmp_path / "out", server, retry_failed=True)
        assert {r["judge"]["state"] for r in rows} == {"ok"} and len(server.arrivals) == 120
        run(data, tmp_path / "out", server, retry_failed=True)
        assert len(server.arrivals) == 120, "what is ok is never asked again"
    check_scores(rows)


@pytest.mark.parametrize("change", [{"golden": True}, {"thinking": "low"}, {"spec": "gemini:other"}, {"seed": 1}], ids=str)
def test_another_question_is_asked_anew(tmp_path, change):
    data = write_data(tmp_path / "data", 8)
    with Server() as server:
        run(data, tmp_path / "out", server)
        rows = run(data, tmp_path / "out", server, **change)
        assert len(server.arrivals) > 8
    check_scores(rows)
    assert ("golden" in rows[0]) == ("golden" in change)


def test_a_truncated_reply_is_asked_again_once_with_twice_the_budget(tmp_path):
    data = write_data(tmp_path / "data", 1)
    with Server() as server:
        server.refuse = lambda handler, body: (200, {"candidates": [{"finishReason": "MAX_TOKENS"}]})
        row, = run(data, tmp_path / "out", server, budget=100)
        assert row["judge"]["state"] == "truncated" and list(server.budgets.values()) == [[100, 200]]


def test_a_field_that_the_server_does_not_take_is_left_out_from_then_on(tmp_path, capsys):
    data = write_data(tmp_path / "data", 30)
    bodies = []

    def refuse(handler, body):
        bodies.append(body)
        if "store" in body:
            return 400, {"error": {"code": 400, "message": 'Invalid JSON payload received. Unknown name "store": Cannot find field.'}}
        if "thinkingConfig" in body["generationConfig"]:
            return 400, [{"error": {"code": 400, "message": "Thinking level is not supported for this model."}}]
        return 200, {"candidates": [{"content": {"parts": [{"text": "no"}]}}]}
    with Server() as server:
        server.refuse = refuse
        rows = run(data, tmp_path / "out", server, thinking="low", workers=1)
    assert {r["judge"]["state"] for r in rows} == {"unparseable"} and len(bodies) == 2 + 30 * judge.ASKS
    assert "does not take store" in capsys.readouterr().out
    server_says = {"param": "max_tokens", "message": "Unsupported parameter: use 'max_completion_tokens' instead."}
    assert wire.rejected(OpenAI.optional, server_says) == {"max_tokens"}
    body = OpenAI.body("m", Question("k", "i", "s", "t"), [], 7, "", {"max_tokens", "temperature"})
    assert body["max_completion_tokens"] == 7 and "max_tokens" not in body and "temperature" not in body


# ---- stopping --------------------------------------------------------------------------------------------------

STOPS = {
    "wrong key": ((400, {"error": {"code": 400, "message": f"API key not valid: {KEY}", "status": "INVALID_ARGUMENT"}}), "GEMINI_API_KEY"),
    "unauthorized": ((401, {"error": {"message": "who are you"}}), "check GEMINI_API_KEY"),
    "region": ((400, {"error": {"message": "User location is not supported", "status": "FAILED_PRECONDITION"}}), "the key or the account"),
    "no model": ((404, {"error": {"message": "models/x is not found"}}), "those at http.*v1beta/models are"),
    "daily quota": ((429, {"error": {"message": "quota", "details": [{"violations": [
        {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}, {"retryDelay": "7s"}]}}), "the quota is spent"),
    "no quota": ((429, {"error": {"message": "Quota exceeded for metric: x, limit: 0, model: y"}}), "the quota is spent"),
    "no money": ((429, {"error": {"code": "insufficient_quota", "message": "check your plan"}}), "the quota is spent"),
    "a long wait": ((503, "busy", {"Retry-After": "4000"}), "asks to wait 4000 s"),
    "redirect": ((302, "", {"Location": "http://example.com/"}), "redirect"),
}


@pytest.mark.parametrize("case", STOPS)
def test_what_cannot_get_better_stops_the_run_says_what_to_do_and_loses_nothing(tmp_path, capsys, case):
    reply, remedy = STOPS[case]
    data, count = write_data(tmp_path / "data", 40), iter(range(10**6))
    with Server() as server:
        server.refuse = lambda handler, body: reply if next(count) >= 10 else (200, good(body))
        with pytest.raises(BadInput, match=remedy.replace("(", r"\(")) as error:
            run(data, tmp_path / "out", server, workers=4)
        assert KEY not in str(error.value) + capsys.readouterr().out
        kept = lines(tmp_path / "out")
        assert len(kept) == 10 and next(count) < 25
        server.refuse = None
        rows = run(data, tmp_path / "out", server)
    assert Counter(r["judge"]["state"] for r in rows) == {"ok": 40}


def good(body):
    text = body["contents"][0]["parts"][-1]["text"]
    rows = [{"id": name, "comment": judge_server.comment(said)} | judge_server.grades(said) for name, said in judge_server.candidates(text)]
    return {"candidates": [{"content": {"parts": [{"text": json.dumps({"candidates": rows})}]}, "finishReason": "STOP"}]}


def test_a_server_that_is_gone_ends_the_run_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "WAIT", 0.001)
    data = write_data(tmp_path / "data", 200)
    with Server() as server:
        pass
    began = time.perf_counter()
    with pytest.raises(BadInput, match="20 records in a row got no reply.*--retry_failed 1"):
        run(data, tmp_path / "out", server)
    assert time.perf_counter() - began < 20


def test_ctrl_c_keeps_what_is_in_flight(tmp_path, capsys, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs are started deaf to it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    data = write_data(tmp_path / "data", 100)

    def interrupt():
        while len(server.arrivals) < 20:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    with Server(delay=0.2) as server:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "out", server, workers=8)
        kept = len(lines(tmp_path / "out"))
        assert 8 <= kept == len(server.arrivals) < 100, "every call that was made is kept"
        assert "waited for and kept" in capsys.readouterr().out
        server.delay = 0
        assert len(run(data, tmp_path / "out", server)) == 100 and len(server.arrivals) == 100


# ---- kill -9 ---------------------------------------------------------------------------------------------------

def test_killed_again_and_again_the_result_is_that_of_an_undisturbed_run(tmp_path):
    n = 300 if SLOW else 90
    data, journal = write_data(tmp_path / "data", n), tmp_path / "out" / "journal.jsonl"
    settings = dict(workers=16, pairs=True, export="trl")
    with Server(faults=0.3, stall=1.2, delay=0.02) as server:
        rows = run(data, tmp_path / "whole", server, **settings)
    rng, count = random.Random(0), lambda: journal.read_bytes().count(b"\n") if journal.exists() else 0
    with Server(faults=0.3, stall=1.2, delay=0.02, port=server.server_address[1]) as server:         # it is echoed
        for _ in range(KILLS):
            want = count() + rng.randint(0, 5)
            with process(partial(impatient, data, tmp_path / "out", server.url, **settings)) as child:
                while count() < want and child.is_alive():
                    time.sleep(0.001)
                time.sleep(rng.uniform(0, 0.02))
                child.kill()
                assert ended(child) == -signal.SIGKILL, "it was over before it could be killed"
        assert 0 < count() < n, "it was killed in the midst of its work"
        assert run(data, tmp_path / "out", server, **settings) == rows
        clean = [times for text, times in server.asked.items() if not judge_server.fault_of(text, 0.3, 0)]
        assert sum(clean) - len(clean) <= KILLS * 16, "only calls in flight were made twice"
    for name in ("records.jsonl", "trl.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    final = Counter(line["key"] for line in lines(tmp_path / "out") if line["final"])
    assert set(final.values()) == {1} and len(final) == n


def test_a_torn_last_line_is_cut_off_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"key": "a", "x": 1}\n{"key": "b", "x": 2}\n{"key": "c", "x"')
    journal = Journal(path)
    assert "c" not in journal and journal["b"]["x"] == 2 and path.read_bytes().endswith(b'"x": 2}\n')
    journal.append({"key": "a", "x": "é\u2028"})
    assert journal["a"]["x"] == "é\u2028"
    with pytest.raises(BadInput, match="being written by another process"):
        Journal(path)
    journal.close()
    with closing(Journal(path)) as again:
        assert again["a"]["x"] == "é\u2028"
    path.write_bytes(b'{"key": "a"}\n{"key": \n{"key": "c"}\n')
    with pytest.raises(BadInput, match="line 2 is damaged"):
        Journal(path)


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"key": "a"})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        journal.append({"key": "b", "long": "x" * 100})
    monkeypatch.setattr(os, "write", real)
    journal.append({"key": "c"})
    assert [json.loads(line)["key"] for line in open(journal.path)] == ["a", "c"] and journal["c"] == {"key": "c"}


def test_replies_from_before_a_kill_count(tmp_path):
    """Two unparseable replies on disk leave one ask, and a truncated one has doubled the budget."""
    data = write_data(tmp_path / "data", 2)
    with Server() as server:
        server.refuse = lambda handler, body: (200, {"candidates": [{"content": {"parts": [{"text": "no"}]}}]})
        run(data, tmp_path / "out", server, workers=1)
        rows = lines(tmp_path / "out")
        assert [r["final"] for r in rows] == [False, False, True] * 2
        (tmp_path / "out" / "journal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:2] + [rows[3] | {"state": "truncated"}]))
        run(data, tmp_path / "out", server, workers=1, budget=100)
        assert len(server.arrivals) == 6 + 1 + 3 and sorted(map(tuple, server.budgets.values())) == [(8192,) * 3 + (100,), (8192,) * 3 + (200,) * 3]


def test_raw_replies_can_be_read_again_by_a_better_parser(tmp_path, monkeypatch):
    data = write_data(tmp_path / "data", 5)
    real = rubric.RUBRIC.read
    with Server() as server:
        monkeypatch.setattr(rubric, "read_scores", lambda text, n, golden: real(text + "]", n + 1, golden))
        rows = run(data, tmp_path / "out", server)
        assert {r["judge"]["state"] for r in rows} == {"unparseable"}
        monkeypatch.setattr(rubric, "read_scores", real)
        made = len(server.arrivals)
        rows = run(data, tmp_path / "out", server)
        assert {r["judge"]["state"] for r in rows} == {"ok"} and len(server.arrivals) == made
    check_scores(rows)


# ---- limits ----------------------------------------------------------------------------------------------------

def fullest(arrivals, window, weights=None):
    """The most that any window of this length holds."""
    arrivals = sorted(zip(arrivals, weights or [1] * len(arrivals)))
    return max(sum(w for t, w in arrivals if start <= t < start + window) for start, _ in arrivals)


@pytest.mark.parametrize("delay", [0.0, 0.15])
def test_no_sliding_minute_holds_more_than_the_limit_as_the_server_sees_it(tmp_path, monkeypatch, delay):
    """A minute is one second here."""
    real = judge.Limits
    monkeypatch.setattr(judge, "Limits", lambda *a: real(*a, minute=1.0))
    data = write_data(tmp_path / "data", 32)
    with Server(faults=0.2, stall=0.5, delay=delay) as server:
        run(data, tmp_path / "out", server, workers=16, rpm=20)
        assert 15 <= fullest(server.arrivals, 1.0) <= 20 and len(server.arrivals) > 32


def test_a_minute_goes_on_after_a_restart(tmp_path):
    data = write_data(tmp_path / "data", 20)
    with Server() as server:
        for stop in (12, 20):
            with process(partial(impatient, data, tmp_path / "out", server.url, minute=1.0, rpm=10, workers=4)) as child:
                while len(server.arrivals) < stop and child.is_alive():
                    time.sleep(0.005)
                time.sleep(0.05)
        assert 5 < fullest(server.arrivals, 1.0) <= 10, "calls in flight when it was killed count, too"


def test_tokens_per_minute_are_kept_with_what_the_server_counts(tmp_path):
    limits, stop, sent = judge.Limits(tmp_path / "log", tpm=1000, minute=0.2), threading.Event(), []
    for _ in range(20):
        guess = limits.enter(100, stop)
        sent.append((time.monotonic(), 250))
        limits.leave(guess, 250)                                         # two and a half times what was guessed
    times, weights = zip(*sent)
    assert limits.scale == 2.5 and fullest(times, 0.2, weights) <= 1000
    limits = judge.Limits(tmp_path / "other", tpm=10)
    assert limits.enter(100, stop)[1] == 100                             # larger than the limit: alone, but not never


def test_requests_per_day_stop_the_run_and_the_next_day_goes_on(tmp_path):
    data = write_data(tmp_path / "data", 10)
    with Server() as server:
        with pytest.raises(BadInput, match="the 6 requests of --rpd are spent"):
            run(data, tmp_path / "out", server, rpd=6)
        assert len(server.arrivals) == 6 == len(lines(tmp_path / "out"))
        with pytest.raises(BadInput, match="--rpd are spent"):
            run(data, tmp_path / "out", server, rpd=6)
        log = tmp_path / "out" / "calls.log"
        rows = [list(map(float, line.split())) for line in log.read_text().splitlines()]
        log.write_text("".join(" ".join(str(t - 90000 * (t > 1e9)) for t in row) + "\n" for row in rows))
        assert len(run(data, tmp_path / "out", server, rpd=6)) == 10 == len(server.arrivals)


def test_one_429_makes_every_worker_wait(tmp_path):
    data = write_data(tmp_path / "data", 60)
    first = threading.Event()

    def refuse(handler, body):
        if not first.is_set():
            first.set()
            return 429, {"error": {"message": "slow down", "details": [{"retryDelay": "0.7s"}]}}
        return 200, good(body)
    with Server() as server:
        server.refuse = refuse
        run(data, tmp_path / "out", server, workers=4)
        gaps = [b - a for a, b in zip(server.arrivals, server.arrivals[1:])]
        assert max(gaps) > 0.6 and gaps.index(max(gaps)) < 8


@pytest.mark.parametrize("headers, error, seconds", [
    ({}, {"details": [{"@type": "x"}, {"retryDelay": "26s"}]}, 26), ({}, {"details": [{"retryDelay": "45.837906927s"}]}, 45.837906927),
    ({"Retry-After": "12"}, {}, 12), ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, {}, 0), ({"Retry-After": "soon"}, {}, 0),
    ({}, {"details": "nonsense"}, 0), ({}, {}, 0)])
def test_the_delay_that_a_server_asks_for(headers, error, seconds):
    assert wire.delay_of(headers, error) == pytest.approx(seconds)


def test_instant_replies_come_in_at_two_hundred_a_second_in_flat_memory(tmp_path):
    """Server and client are processes of their own: the client judges few records, then many, and says its peak after each.
    Two hundred a second of two thousand, that is; of few the quick run asks no more than that they come."""
    few, many = (500, 2000) if SLOW else (100, 300)
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "judge_server.py", "--fast", "1"], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        jobs = [dict(data=str(write_data(tmp_path / f"data{n}", n, scale=4)), out=str(tmp_path / f"out{n}"), judge="gemini:mock", judge_url=url,
                     workers=32) for n in (few, many)]
        script = ("import annotate, judge, re, time; real = judge.Judge.ask\n"
                  "def ask(*a):\n began = time.perf_counter(); real(*a); print('ASK', time.perf_counter() - began)\n"
                  f"judge.Judge.ask = ask\nfor job in {jobs!r}:\n open('/proc/self/clear_refs', 'w').write('5')\n"          # forget the peak of the imports
                  " annotate.annotate(annotate.Settings(**job))\n print('PEAK', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds = float(re.findall(r"ASK (\S+)", done.stdout)[1])
        before, after = map(int, re.findall(r"PEAK (\d+)", done.stdout))
        print(f"{many / seconds:.0f} records/s, peak {before} KiB for {few} records, then {after} for {many}")
        assert many / seconds > (200 if SLOW else 20)
        per_record = (after - before) * 1024 / (many - few)
        assert per_record < 20_000, "a record and its names stay in memory, pictures and replies do not"
    finally:
        server.kill()


# ---- what is sent and what is read -----------------------------------------------------------------------------

def test_a_picture_goes_out_as_a_fresh_jpeg_upright_and_small(tmp_path):
    exif = Image.Exif()
    exif[0x010e], exif[0x0112] = "a secret place", 6
    picture(1500, 500).save(tmp_path / "a.jpg", exif=exif, comment=b"secret", icc_profile=b"secret profile")
    data = base64.b64decode(wire.jpeg(tmp_path / "a.jpg"))
    image = Image.open(io.BytesIO(data))
    assert image.format == "JPEG" and image.size == (341, 1024) and not len(image.getexif())
    assert b"secret" not in data and b"Exif" not in data
    picture(50, 50).convert("RGBA").save(tmp_path / "b.png")
    assert Image.open(io.BytesIO(base64.b64decode(wire.jpeg(tmp_path / "b.png")))).mode == "RGB"


def test_pictures_outside_the_root_are_refused_and_nothing_is_sent(tmp_path):
    data = write_data(tmp_path / "data", 1)
    picture(9, 9).save(tmp_path / "secret.png")
    row = json.loads(data.read_text())
    data.write_text("".join(json.dumps(row | {"id": str(k), "images": [name]}) + "\n"
                            for k, name in enumerate(("../secret.png", str(tmp_path / "secret.png"), "images/0.jpg"))))
    with Server() as server:
        rows = run(data, tmp_path / "out", server)
        assert len(rows) == 1 == len(server.arrivals)
    rejects = [json.loads(line) for line in open(tmp_path / "out" / "rejects.jsonl")]
    assert len(rejects) == 2 and all("leads outside" in r["reason"] for r in rejects)


def reply(grades=(1, 2, 3, 4, 0), n=2, **change):
    rows = [{"id": chr(65 + k), "comment": f"c{k}"} | dict(zip(records.ATTRIBUTES, grades)) | change for k in range(n)]
    return json.dumps({"candidates": rows})


@pytest.mark.parametrize("text", [reply(), f"```json\n{reply()}\n```", f"[{reply()}]", f"Here {{it}} is: {reply()} Bye.",
                                  '{"draft": 1} ' + reply()])
def test_a_right_reply_is_read_whatever_stands_around_it(text):
    found = rubric.RUBRIC.read(text, 2)
    assert found["golden"] is None and found["shown"] == [
        ({"helpfulness": 1, "correctness": 2, "coherence": 3, "complexity": 4, "verbosity": 0}, f"c{k}") for k in range(2)]


@pytest.mark.parametrize("text, why", [
    ("", "no whole JSON"), ("I cannot.", "no whole JSON"), (reply()[:-2], "no whole JSON"), (reply(n=1), "not A, B"), (reply(n=3), "not A, B"),
    (reply(id="A"), "not A, B"), (reply(id=0), "not A, B"), (reply(id="a"), "not A, B"), (reply((5, 0, 0, 0, 0)), "is 5, not an integer"),
    (reply((-1, 0, 0, 0, 0)), "is -1"), (reply(("3", 0, 0, 0, 0)), "is '3'"), (reply((3.0, 0, 0, 0, 0)), "is 3.0"), (reply((True, 0, 0, 0, 0)), "is True"),
    (reply((None, 0, 0, 0, 0)), "is None"), (reply((0, 0, 0, 0)), "verbosity is None"), (reply(("3/4", 0, 0, 0, 0)), "is '3/4'"),
    (reply(comment=None), "no comment"), (reply(comment=["x"]), "no comment"), ('{"candidates": 3}', "not A, B"), ('{"candidates": [1, 2]}', "not A, B"),
    ('{"candidates": {"A": 1}}', "not A, B"), (reply(comment="\ud800"), "surrogates"), ("{" * 5000, "no whole JSON"), ("[" * 100_000, "no whole JSON")])
def test_a_wrong_reply_has_no_scores_at_all(text, why):
    with pytest.raises(ValueError, match=why):
        rubric.RUBRIC.read(text, 2)


def test_a_golden_answer_is_wanted_where_it_was_asked_for():
    with pytest.raises(ValueError, match="no golden_answer"):
        rubric.RUBRIC.read(reply(), 2, golden=True)
    for bad in ('"golden_answer": 3, ', '"golden_answer": " ", ', '"golden_answer": "ends</s>", '):
        with pytest.raises(ValueError, match="golden"):
            rubric.RUBRIC.read(reply().replace("{", "{" + bad, 1), 2, golden=True)
    assert rubric.RUBRIC.read(reply().replace("{", '{"golden_answer": "Red.", ', 1), 2, golden=True)["golden"] == "Red."


@pytest.mark.parametrize("name, fields", [("gemini", {"candidates": [{"content": None}]}), ("gemini", {"candidates": [7]}), ("gemini", []), ("gemini", [3]),
                                          ("gemini", {"candidates": [{"content": {"parts": [{"text": 5}]}}]}), ("openai", {}), ("openai", {"choices": []}),
                                          ("gemini", {"candidates": [{}], "usageMetadata": {"promptTokenCount": "many"}}),
                                          ("openai", {"choices": [{"message": {"content": [1]}}]}), ("openai", {"choices": [None]})])
def test_a_reply_of_unknown_shape_is_unparseable_and_no_crash(tmp_path, name, fields):
    client = judge.Judge(f"{name}:m", judge.Replies(tmp_path / "j.jsonl"))
    assert client.read(fields).state == "unparseable"


def test_gemini_replies():
    def read(candidate=None, **more):
        return Gemini.reply(({"candidates": [candidate]} if candidate else {}) | more)
    part = lambda **fields: {"content": {"parts": [fields]}}
    assert read(part(text="x") | {"finishReason": "STOP"}, modelVersion="v", usageMetadata={"promptTokenCount": 3, "thoughtsTokenCount": 2}) == Reply(
        "ok", "x", version="v", usage={"prompt": 3, "answer": 0, "thoughts": 2})
    assert read(promptFeedback={"blockReason": "SAFETY"}).state == "blocked" and not read(promptFeedback={"blockReason": "SAFETY"}).again
    assert read(part(text="x") | {"finishReason": "SAFETY"}).state == "blocked"
    assert read({"finishReason": "RECITATION"}).again
    assert read(part(text="x") | {"finishReason": "MAX_TOKENS"}).state == "truncated"
    for nothing in (read(), read({"finishReason": "STOP"}), read(part(text="x", thought=True)), read(part(thoughtSignature="s"))):
        assert nothing.state == "unparseable" and nothing.reason
    assert read(part(text="x") | {"finishReason": "BRAND_NEW"}).state == "ok", "the caller's check decides"


# ---- the door --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, url, why", [
    ("gemini", "", "say gemini:MODEL"), ("gpt:4", "", "say gemini:MODEL"), ("gemini:", "", "say gemini:MODEL"), ("openai:m", "localhost:8000", "say http://host"),
    ("openai:m", "http://user:pass@host", "without a user"), ("openai:m", "http://host?key=1", "without a user"), ("openai:m", "ftp://host", "say http")])
def test_a_wrong_judge_is_refused_at_the_door(tmp_path, spec, url, why):
    with pytest.raises(BadInput, match=why) as error:
        judge.Judge(spec, judge.Replies(tmp_path / "j.jsonl"), url)
    assert "pass@" not in str(error.value)


def test_keys_come_from_the_environment_and_must_fit_a_header(monkeypatch, tmp_path):
    replies = judge.Replies(tmp_path / "j.jsonl")
    monkeypatch.setenv("GEMINI_API_KEY", f" {KEY}\n")
    assert judge.Judge("gemini:m", replies).key == KEY
    monkeypatch.setenv("GEMINI_API_KEY", "bad\nkey")
    with pytest.raises(BadInput, match="no header can carry") as error:
        judge.Judge("gemini:m", replies)
    assert "bad" not in str(error.value)
    monkeypatch.delenv("GEMINI_API_KEY")
    with pytest.raises(BadInput, match="set GEMINI_API_KEY or GOOGLE_API_KEY"):
        judge.Judge("gemini:m", replies)
    monkeypatch.setenv("GOOGLE_API_KEY", "other")
    assert judge.Judge("gemini:m", replies).key == "other"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert judge.Judge("openai:m", replies, "http://localhost:8000").key == "", "a server of one's own may need none"


@pytest.mark.parametrize("spec, url, full", [
    ("gemini:m-1", "", "https://generativelanguage.googleapis.com/v1beta/models/m-1:generateContent"),
    ("gemini:models/m?key=1", "http://h:1", "http://h:1/v1beta/models/m%3Fkey%3D1:generateContent"),
    ("openai:org/m", "http://h:1/", "http://h:1/v1/chat/completions"), ("openai:m", "https://h/api/v1/", "https://h/api/v1/chat/completions")])
def test_addresses(tmp_path, spec, url, full):
    client = judge.Judge(spec, judge.Replies(tmp_path / "j.jsonl"), url)
    assert client.wire.url(client.base, client.model) == full


def test_netrc_does_not_replace_the_key(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    data, seen = write_data(tmp_path / "data", 1), []

    def refuse(handler, body):
        seen.append(dict(handler.headers))
        return 200, {}
    with Server() as server:
        server.refuse = refuse
        run(data, tmp_path / "out", server, "openai:m")
    assert seen and all(h["Authorization"] == f"Bearer {KEY}" for h in seen)


def test_a_dry_run_sends_nothing_and_shows_what_would_be_sent(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY")
    data = write_data(tmp_path / "data", 50)
    with Server() as server:
        annotate.run(annotate.Settings(data=str(data), out=str(tmp_path / "out"), judge="gemini:m", judge_url=server.url, dry_run=True, rpm=10))
        assert not server.arrivals and not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "calls                  50" in said and "5 min" in said and "<candidate_D>" in said and "verbosity" in said


# ---- what reviews found wrong ---------------------------------------------------------------------------------

ASK = Question("k", "i", "correctness", "what?")


def one(tmp_path, server, spec="gemini:mock", **more):
    return judge.Judge(spec, judge.Replies(tmp_path / "j.jsonl"), server.url, **more)


@pytest.mark.parametrize("spec, reply", [("openai:m", {"choices": [{"message": {"content": [KEY]}}]}),
                                         ("gemini:m", {"candidates": [{}], "usageMetadata": {"promptTokenCount": KEY}})])
def test_the_key_is_taken_out_of_a_reply_of_unknown_shape(tmp_path, spec, reply):
    with Server() as server:
        server.refuse = lambda handler, body: (200, reply)
        one(tmp_path, server, spec).settle(ASK)
    assert KEY[:20] not in (tmp_path / "j.jsonl").read_text()


@pytest.mark.parametrize("before", [280, 300 - len(KEY) + 1])
def test_the_key_is_not_cut_in_two_before_it_is_searched_for(tmp_path, before):
    with Server() as server:
        server.refuse = lambda handler, body: (422, "x" * before + KEY)
        one(tmp_path, server).settle(ASK)
    assert KEY[:15] not in (tmp_path / "j.jsonl").read_text()


def test_a_key_in_json_escapes_is_found(tmp_path):
    data = write_data(tmp_path / "data", 1)

    def refuse(handler, body):
        reply = good(body)
        part = reply["candidates"][0]["content"]["parts"][0]
        part["text"] = part["text"].replace("It says", "".join(f"\\u{ord(c):04x}" for c in KEY))
        return 200, reply
    with Server() as server:
        server.refuse = refuse
        run(data, tmp_path / "out", server)
    assert KEY not in (tmp_path / "out" / "records.jsonl").read_text()


def test_a_reply_that_drips_is_given_up_after_the_timeout(tmp_path, monkeypatch):
    """With a Content-Length, iter_content waits until 64 KiB are there, and the clock is not looked at in between."""
    monkeypatch.setattr(judge, "TRIES", 1)

    def drip(handler, body):
        handler.send_response(200)
        handler.send_header("Content-Length", "1000")
        handler.end_headers()
        for _ in range(30):
            handler.wfile.write(b" ")
            handler.wfile.flush()
            time.sleep(0.1)
        raise ConnectionError
    with Server() as server:
        server.refuse, began = drip, time.monotonic()
        one(tmp_path, server, timeout=0.5).settle(ASK)
        assert time.monotonic() - began < 2


@pytest.mark.parametrize("body", ['{"candidates": [{}], "usageMetadata": {"promptTokenCount": 1e999}}', '{"candidates": [{}], "usageMetadata": {"promptTokenCount": Infinity}}'])
def test_an_infinite_count_is_a_reply_of_unknown_shape(tmp_path, body):
    with Server() as server:
        server.refuse = lambda handler, _: (200, body)
        assert one(tmp_path, server).settle(ASK) == "unparseable"


def test_error_details_of_any_shape_are_no_crash(tmp_path):
    for details in (5, True, 1.5):
        assert wire.delay_of({}, {"details": details}) == 0


@pytest.mark.parametrize("change", [{"id": "\ud800"}, {"note": "\ud800"}, {"answers": [{"text": "a", "comment": "\ud800"}, {"text": "b"}]}], ids=str)
@pytest.mark.parametrize("judged", [True, False])
def test_half_a_character_anywhere_in_a_record_is_rejected_before_anything_is_paid_for(tmp_path, change, judged):
    data = write_data(tmp_path / "data", 2)
    rows = [json.loads(line) for line in open(data)]
    data.write_text("".join(json.dumps(r) + "\n" for r in (rows[0], rows[1] | change)))
    with Server() as server:
        assert len(run(data, tmp_path / "out", server, **{} if judged else {"judge": ""})) >= 1


def test_a_dry_run_does_not_lock_the_journal(tmp_path, capsys):
    """Neither for the same process nor, while another one judges, against it."""
    data = write_data(tmp_path / "data", 1)
    with Server() as server:
        rows = run(data, tmp_path / "out", server)
        annotate.run(annotate.Settings(data=str(data), out=str(tmp_path / "out"), judge="gemini:mock", dry_run=True))
        assert run(data, tmp_path / "out", server) == rows


def test_journal_and_records_agree_about_the_state(tmp_path):
    """A good text under an unknown finish is paid for three times as unparseable, and then is ok in records.jsonl."""
    data = write_data(tmp_path / "data", 1)

    def refuse(handler, body):
        reply = good(body)
        reply["candidates"][0]["finishReason"] = "BRAND_NEW"
        return 200, reply
    with Server() as server:
        server.refuse = refuse
        row, = run(data, tmp_path / "out", server)
        assert row["judge"]["state"] == lines(tmp_path / "out")[-1]["state"] and (row["judge"]["state"] != "ok" or len(server.arrivals) == 1)


def test_what_a_better_parser_has_saved_is_not_asked_again(tmp_path, monkeypatch):
    """What is ok is never asked again. --retry_failed goes by the journal's old state, pays anew, and a worse reply wins."""
    data, real = write_data(tmp_path / "data", 3), rubric.RUBRIC.read
    with Server() as server:
        monkeypatch.setattr(rubric, "read_scores", lambda text, n, golden: real(text, n + 1, golden))
        run(data, tmp_path / "out", server)
        monkeypatch.setattr(rubric, "read_scores", real)
        made, rows = len(server.arrivals), run(data, tmp_path / "out", server)
        assert {r["judge"]["state"] for r in rows} == {"ok"}
        run(data, tmp_path / "out", server, retry_failed=True)
        assert len(server.arrivals) == made


def test_the_first_wait_is_at_most_WAIT(tmp_path, monkeypatch):
    longest = []
    monkeypatch.setattr(random, "uniform", lambda a, b: longest.append(b) or 0)
    with Server() as server:
        server.refuse = lambda handler, body: (500, "no")
        one(tmp_path, server).settle(ASK)
    assert longest[0] == judge.WAIT, "as the comment beside WAIT says"


# ---- what a mutation showed untested --------------------------------------------------------------------------

def test_a_row_is_read_from_its_place_whatever_bytes_stand_before_it(tmp_path):
    with closing(Journal(tmp_path / "j.jsonl")) as journal:
        journal.append({"key": "a", "x": "é€"})
        journal.append({"key": "b"})
        assert journal["b"] == {"key": "b"}


@pytest.mark.parametrize("line", ["3", "[1]", "null", '{"x": 1}'])
def test_a_line_that_is_no_row_is_damaged(tmp_path, line):
    (tmp_path / "j.jsonl").write_text('{"key": "a"}\n' + line + "\n")
    with pytest.raises(BadInput, match="line 2 is damaged"):
        Journal(tmp_path / "j.jsonl")


def test_a_row_is_flushed_to_disk_before_append_returns(tmp_path, monkeypatch):
    """Also where another row came in during a flush: that flush did not promise to hold it."""
    journal, real, flushed, others = Journal(tmp_path / "j.jsonl"), os.fsync, [], []

    def fsync(fd):
        flushed.append(journal.path.read_text())
        real(fd)
        if len(flushed) == 1:
            others.append(threading.Thread(target=journal.append, args=({"key": "late"},)))
            others[0].start()
            while '"late"' not in journal.path.read_text():
                time.sleep(0.001)
            time.sleep(0.05)
    monkeypatch.setattr(os, "fsync", fsync)
    journal.append({"key": "a"})
    others[0].join()
    assert len(flushed) == 2 and '"a"' in flushed[0] and '"late"' in flushed[1]


def test_what_gemini_is_sent():
    q = Question("k", "i", "be strict", "which?", schema={"type": "object"})
    body = Gemini.body("m", q, ["AAAA"], 7, "low", set())
    assert body["generationConfig"] == {"maxOutputTokens": 7, "responseMimeType": "application/json", "responseJsonSchema": q.schema,
                                        "thinkingConfig": {"thinkingLevel": "low"}}
    assert body["contents"][0]["parts"] == [{"inlineData": {"mimeType": "image/jpeg", "data": "AAAA"}}, {"text": "which?"}]
    assert body["store"] is False and {s["threshold"] for s in body["safetySettings"]} == {"BLOCK_NONE"}
    less = Gemini.body("m", q, [], 7, "low", set(Gemini.optional))
    assert less["generationConfig"] == {"maxOutputTokens": 7, "responseMimeType": "application/json"} and "store" not in less


def test_what_an_openai_style_server_is_sent():
    q = Question("k", "i", "be strict", "which?", schema={"type": "object"})
    body = OpenAI.body("m", q, ["AAAA"], 7, "low", set())
    assert (body["temperature"], body["max_tokens"], body["reasoning_effort"]) == (0, 7, "low")
    assert body["response_format"]["json_schema"]["schema"] == q.schema
    assert not set(OpenAI.optional) & set(OpenAI.body("m", q, [], 7, "low", set(OpenAI.optional)))
    assert OpenAI.headers("") == {}, "a server of one's own gets no empty key"


def test_what_a_question_costs_to_send_counts_its_pictures():
    assert Question("k", "i", "s" * 30, "t" * 60, [1, 2]).tokens == 30 + 2 * wire.IMAGE_TOKENS + 1


@pytest.mark.parametrize("finish", ["SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "IMAGE_SAFETY",
                                    "IMAGE_PROHIBITED_CONTENT", "IMAGE_RECITATION"])
def test_every_way_of_gemini_to_block_an_answer_is_known(finish):
    found = Gemini.reply({"candidates": [{"content": {"parts": [{"text": "x"}]}, "finishReason": finish}]})
    assert (found.state, found.reason, found.again) == ("blocked", finish, "RECITATION" in finish)


def test_a_gemini_reply_may_stand_in_a_list_or_lack_its_finish(tmp_path):
    reply = {"candidates": [{"content": {"parts": [{"text": "x"}]}}]}
    for body in (reply, [reply]):
        with Server() as server:
            server.refuse = lambda handler, _: (200, body)
            client = one(tmp_path, server)
            assert client.settle(ASK) == "ok" and client.replies["k"]["text"] == "x" and len(server.arrivals) == 1
            client.replies.close()


def test_openai_replies():
    read = lambda finish, **message: OpenAI.reply({"choices": [{"message": message, "finish_reason": finish}]}).state
    assert read("stop", content="x") == "ok" and read("stop", content="") == "unparseable"
    assert read("length", content="x") == "truncated" and read("content_filter", content="x") == "blocked"
    assert read("stop", content="x", refusal="no") == read("stop", content=None, refusal="no") == "blocked"


def test_what_went_wrong_is_found_in_any_error_body():
    assert wire.error_of({"error": {"message": "a"}}) == {"message": "a"}
    assert wire.error_of({"error": "a"}) == wire.error_of({"message": "a"}) == wire.error_of("<b>a</b>") == {"message": "a"}
    assert wire.error_of([]) == {"message": "[]"}


# ---- limits

def stopped_after(seconds):
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.daemon = True
    timer.start()
    return stop


def test_what_is_in_flight_counts(tmp_path):
    limits = judge.Limits(tmp_path / "log", rpd=2)
    limits.enter(1, threading.Event()), limits.enter(1, threading.Event())
    with pytest.raises(BadInput, match="--rpd are spent"):
        limits.enter(1, threading.Event())
    for limits in (judge.Limits(tmp_path / "a", rpm=1), judge.Limits(tmp_path / "b", tpm=100)):
        limits.enter(60, threading.Event())
        with pytest.raises(judge.Stopped):
            limits.enter(60, stopped_after(0.2))


def test_what_the_server_counted_fills_the_minute_not_what_was_guessed(tmp_path):
    limits = judge.Limits(tmp_path / "log", tpm=100)
    limits.leave(limits.enter(50, threading.Event()), 100)
    with pytest.raises(judge.Stopped):
        limits.enter(1, stopped_after(0.2))


def test_a_guess_once_raised_stays(tmp_path):
    limits = judge.Limits(tmp_path / "log", tpm=10**6)
    for used, scale in ((250, 2.5), (10, 2.5), (0, 2.5)):
        limits.leave(limits.enter(100, threading.Event()), used)
        assert limits.scale == scale


def test_a_short_pause_does_not_shorten_a_long_one_and_a_long_one_can_be_stopped(tmp_path):
    limits, began = judge.Limits(tmp_path / "log"), time.monotonic()
    limits.pause(0.4)
    limits.pause(0.01)
    limits.enter(1, threading.Event())
    assert time.monotonic() - began >= 0.4
    limits.pause(4)
    with pytest.raises(judge.Stopped):
        limits.enter(1, stopped_after(0.1))
    assert time.monotonic() - began < 3


def test_a_clock_that_was_set_back_does_not_block_the_next_run(tmp_path):
    (tmp_path / "log").write_text(f"{time.time() + 1000} 5 {time.time() + 1001}\n")
    judge.Limits(tmp_path / "log", rpm=1, minute=0.1).enter(1, stopped_after(3))


def test_a_restart_knows_the_tokens_of_the_last_minute_and_the_calls_that_a_kill_cut_off(tmp_path):
    limits = judge.Limits(tmp_path / "log", tpm=100)
    limits.leave(limits.enter(40, threading.Event()), 70)
    with pytest.raises(judge.Stopped):
        judge.Limits(tmp_path / "log", tpm=100).enter(40, stopped_after(0.1))
    limits = judge.Limits(tmp_path / "other", rpm=1, minute=0.2)
    limits.enter(1, threading.Event())                                   # and killed before there was a reply
    began = time.monotonic()
    judge.Limits(tmp_path / "other", rpm=1, minute=0.2, timeout=0.3).enter(1, threading.Event())
    assert 0.15 < time.monotonic() - began < 1.5, "it may have arrived as late as now"


# ---- one client

SAID = {"candidates": [{"content": {"parts": [{"text": "fine"}]}, "finishReason": "STOP"}]}


def in_turn(*replies):
    """The server's replies one after the other, the last one for ever."""
    replies = list(replies)
    return lambda handler, body: replies.pop(0) if len(replies) > 1 else replies[0]


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_a_status_that_passes_is_tried_again(tmp_path, status):
    with Server() as server:
        server.refuse = in_turn((status, "wait"), (200, SAID))
        assert one(tmp_path, server).settle(ASK) == "ok" and len(server.arrivals) == 2


@pytest.mark.parametrize("reply, calls, state", [((500, "no"), 6, "failed"), ((422, "no"), 1, "failed"), ((429, "no"), 24, "failed"),
                                                 ((200, "<html>Please sign in</html>"), 6, "failed"), ((200, "[" * 100_000), 6, "failed"),
                                                 ((200, {"candidates": []}), 3, "unparseable")])
def test_how_often_a_question_is_tried(tmp_path, monkeypatch, reply, calls, state):
    monkeypatch.setattr(judge, "WAIT", 0.001)
    with Server() as server:
        server.refuse = in_turn(reply)
        client = one(tmp_path, server)
        assert client.settle(ASK) == state == client.replies.state["k"] and len(server.arrivals) == calls


def test_truncated_replies_do_not_count_as_unparseable(tmp_path):
    cut = {"candidates": [{"finishReason": "MAX_TOKENS"}]}
    with Server() as server:
        server.refuse = in_turn((200, cut), (200, {}))
        client = one(tmp_path, server, budget=100)
        assert client.settle(ASK) == "unparseable" and server.budgets["what?"] == [100, 200, 200, 200]


def test_waits_double_up_to_the_longest(tmp_path, monkeypatch):
    longest = []
    monkeypatch.setattr(judge, "MOST", 0.1)
    monkeypatch.setattr(random, "uniform", lambda a, b: longest.append((a, b)) or 0)
    with Server() as server:
        server.refuse = in_turn((500, "no"))
        one(tmp_path, server).settle(ASK)
    assert {a for a, _ in longest} == {0} and len(longest) == 5, "full jitter"
    widths = [b for _, b in longest]
    assert all(b == min(2 * a, 0.1) for a, b in zip(widths, widths[1:])) and widths[-1] == 0.1 > widths[0]


def test_a_wait_ends_when_the_run_does(tmp_path):
    with Server() as server:
        server.refuse = in_turn((503, "busy", {"Retry-After": "4"}))
        client, began = one(tmp_path, server), time.monotonic()
        client.stop = stopped_after(0.2)
        with pytest.raises(judge.Stopped):
            client.settle(ASK)
        assert time.monotonic() - began < 3


def test_a_run_that_stops_does_not_wait_for_those_who_wait(tmp_path):
    data, began = write_data(tmp_path / "data", 2), time.monotonic()
    with Server() as server:
        server.refuse = in_turn((503, "busy", {"Retry-After": "4"}), (401, "no"))
        with pytest.raises(BadInput, match="refuses the key"):
            run(data, tmp_path / "out", server)
    assert time.monotonic() - began < 3


def test_calls_without_a_reply_leave_the_limits_and_replies_teach_them(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "WAIT", 0.001)
    with Server() as server:
        server.refuse = in_turn((200, SAID | {"usageMetadata": {"promptTokenCount": 10 * ASK.tokens}}))
        client = one(tmp_path, server)
        assert client.settle(ASK) == "ok" and client.limits.scale == 10 and client.limits.done[-1][1] == 10 * ASK.tokens
    client.base = "http://127.0.0.1:9"
    assert client.settle(ASK) == "failed" and not client.limits.busy and client.limits.calls == 1 + judge.TRIES


def test_a_server_that_never_takes_a_field_it_does_not_get_ends_as_failed(tmp_path):
    count = iter(range(10**6))
    with Server() as server:
        server.refuse = lambda handler, body: (400, {"error": {"message": "bad store"}}) if next(count) < 20 else (200, SAID)
        assert one(tmp_path, server).settle(ASK) == "failed" and len(server.arrivals) == 2


def test_a_reply_without_end_is_cut_off(tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "TRIES", 1)

    def drip(handler, body, piece=b" ", pause=0.1):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for _ in range(40):
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            handler.wfile.flush()
            time.sleep(pause)
        raise ConnectionError
    with Server() as server:
        client, began = one(tmp_path, server, timeout=0.5), time.monotonic()
        server.refuse = drip
        assert client.settle(ASK) == "failed" and time.monotonic() - began < 2 and "took longer than 0.5 s" in client.replies["k"]["reason"]
        client.timeout, server.refuse = 60, lambda handler, body: drip(handler, body, b" " * (1 << 20), 0)
        assert client.settle(ASK) == "failed" and "is endless" in client.replies["k"]["reason"]


def test_a_picture_that_is_gone_is_a_failed_question_and_nothing_is_sent(tmp_path):
    with Server() as server:
        client = one(tmp_path, server)
        assert client.settle(Question("k", "i", "s", "t", [tmp_path / "gone.png"])) == "failed" == client.replies.state["k"]
        assert "gone.png" in client.replies["k"]["reason"] and not server.arrivals


def test_failures_between_successes_do_not_end_the_run_and_twenty_in_a_row_do(tmp_path):
    data, count = write_data(tmp_path / "data", 50), iter(range(10**6))
    with Server() as server:
        server.refuse = lambda handler, body: (422, "no") if next(count) % 2 else (200, good(body))
        rows = run(data, tmp_path / "out", server, workers=1)
        assert Counter(r["judge"]["state"] for r in rows) == {"ok": 25, "failed": 25}
        server.refuse = in_turn((422, "no"))
        rows = run(write_data(tmp_path / "19", judge.DEAD - 1), tmp_path / "nineteen", server, workers=1)
        assert {r["judge"]["state"] for r in rows} == {"failed"}
        with pytest.raises(BadInput, match="20 records in a row"):
            run(write_data(tmp_path / "20", judge.DEAD), tmp_path / "twenty", server, workers=1)
        assert [r["state"] for r in lines(tmp_path / "twenty")] == ["failed"] * 20


def test_what_is_asked_again_on_request_has_all_its_replies_again(tmp_path):
    data = write_data(tmp_path / "data", 1)
    with Server() as server:
        server.refuse = in_turn((200, {}))
        for times in (1, 2):
            run(data, tmp_path / "out", server, retry_failed=True)
            assert len(server.arrivals) == times * judge.ASKS


def test_a_run_says_what_it_used_and_what_all_runs_did(tmp_path, capsys):
    data = write_data(tmp_path / "data", 4)
    reply = SAID | {"usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 2, "thoughtsTokenCount": 3}}
    with Server() as server:
        server.refuse = in_turn((200, reply))
        for every in (12, 24):
            rows = run(data, tmp_path / "out", server, retry_failed=True)
            assert re.search(rf"used: 12 calls in .*so far: {every}0 sent, {every * 2} back, {every * 3} of thought", capsys.readouterr().out)
    assert rows[0]["judge"]["usage"] == {"prompt": 10, "answer": 2, "thoughts": 3}


def test_a_blocked_reply_has_no_scores_whatever_its_text(tmp_path):
    data = write_data(tmp_path / "data", 1)

    def refuse(handler, body):
        reply = good(body)
        reply["candidates"][0]["finishReason"] = "SAFETY"
        return 200, reply
    with Server() as server:
        server.refuse = refuse
        row, = run(data, tmp_path / "out", server)
    assert row["judge"]["state"] == "blocked" and row["judge"]["reason"] == "SAFETY"
    check_scores([row])


def test_the_key_is_taken_out_of_version_reason_and_text(tmp_path):
    reply = {"candidates": [{"content": {"parts": [{"text": KEY}]}, "finishReason": KEY}], "modelVersion": KEY}
    with Server() as server:
        server.refuse = in_turn((200, reply), (200, {"promptFeedback": {"blockReason": KEY}}))
        client = one(tmp_path, server)
        client.settle(ASK), client.settle(ASK)
        written = (tmp_path / "j.jsonl").read_text()
        assert KEY not in written and '"version": "[key]"' in written and "prompt [key]" in written


def test_halves_of_characters_can_be_written_down(tmp_path):
    with Server() as server:
        server.refuse = in_turn((200, r'{"candidates": [{"content": {"parts": [{"text": "a\ud800"}]}}], "modelVersion": "\udfff"}'))
        client = one(tmp_path, server)
        assert client.settle(ASK) == "ok" and client.replies["k"]["text"] == "a?"


def test_a_server_of_ones_own_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    data = write_data(tmp_path / "data", 2)
    with Server() as server:
        check_scores(rows := run(data, tmp_path / "out", server, "openai:m"))
    assert {r["judge"]["state"] for r in rows} == {"ok"} and {r["judge"]["version"] for r in rows} == {"mock-1"}
    monkeypatch.delenv("GEMINI_API_KEY")
    with pytest.raises(BadInput, match="no key"), Server() as server:
        one(tmp_path, server)


@pytest.mark.parametrize("bad", [{"workers": 0}, {"timeout": 0}, {"budget": 0}, {"rpm": -1}, {"tpm": -1}, {"rpd": -1}], ids=str)
def test_numbers_that_make_no_sense_are_refused(tmp_path, bad):
    with pytest.raises(BadInput, match="must be positive"):
        judge.Judge("gemini:m", judge.Replies(tmp_path / "j.jsonl"), **bad)


@pytest.mark.parametrize("url", ["http://", "http:///v1", "http://host#key"])
def test_half_an_address_is_refused(url):
    with pytest.raises(BadInput, match="say http://host:port"):
        judge.base_url("https://x/v1", url)


@pytest.mark.parametrize("status, error, stops", [
    (403, {"message": "no"}, "refuses the key"), (400, {"message": "no", "details": [{"reason": "API_KEY_INVALID"}]}, "refuses the key"),
    (400, {"code": "model_not_found"}, "is not to be had"), (308, {}, "redirect"), (429, {"message": "limit: 0, model: x"}, "quota is spent"),
    (429, {"message": "limit: 0.5, model: x"}, ""), (429, {"message": "limit: 05"}, ""), (400, {"message": "a bad picture"}, "")])
def test_only_what_cannot_get_better_stops_the_run(tmp_path, status, error, stops):
    with Server() as server:
        client = one(tmp_path, server)
        if not stops:
            return client.stop_if_pointless(status, error, "")
        with pytest.raises(BadInput, match=stops):
            client.stop_if_pointless(status, error, "")


def test_proxies_and_certificates_of_the_environment_are_used(tmp_path, monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "ca.pem"))
    with Server() as server:
        monkeypatch.setenv("http_proxy", server.url)
        server.refuse, proxied = in_turn((200, SAID)), one(tmp_path, server)
        proxied.base = "http://judge.invalid/v1beta"
        real, trusted = requests.adapters.HTTPAdapter.send, []
        monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", lambda *a, **how: trusted.append(how["verify"]) or real(*a, **how))
        assert proxied.settle(ASK) == "ok" and len(server.arrivals) == 1
        assert trusted == [str(tmp_path / "ca.pem")]


def test_candidates_in_another_order_are_read_by_their_letters():
    rows = [{"id": name, "comment": name} | dict.fromkeys(records.ATTRIBUTES, grade) for name, grade in (("B", 1), ("A", 4))]
    found = rubric.RUBRIC.read(json.dumps({"candidates": rows}), 2)["shown"]
    assert [(scores["helpfulness"], comment) for scores, comment in found] == [(4, "A"), (1, "B")]


def test_a_dry_run_counts_what_is_left_its_tokens_and_the_limits(tmp_path, capsys):
    data = write_data(tmp_path / "data", 50)
    plan = lambda s: annotate.plan(s, records.read(data)[0])
    s = annotate.Settings(data=str(data), out=str(tmp_path / "out"), judge="gemini:mock")
    sent = int(re.search(r"tokens sent +([\d,]+)", plan(s))[1].replace(",", ""))
    assert 50 * wire.IMAGE_TOKENS < sent < 50 * (wire.IMAGE_TOKENS + 1500)
    s.tpm, s.rpd = sent // 7, 20
    assert re.search(r"time +7 min", plan(s)) and "on 3 days" in plan(s)
    with Server() as server:
        run(data, tmp_path / "out", server)
    said = plan(s)
    assert "50 records, 50 judged before" in said and "calls                   0" in said
