"""Asking a judge over HTTP: whatever it does, every record ends in one state, and nothing is invented, lost or leaked.

    python -m pytest tests/test_judge.py -q          with SLOW=1 a thousand records, twenty kills, memory

The judge is tests/judge_server.py, on this machine. What is killed runs in a process of its own.
"""
import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import requests
from PIL import Image

import annotate
import formats
import judge_server
from common import BadInput, sha
from conftest import ROOT, ended, picture, process
from journal import Journal
from judge import client, report, wire
from judge.client import Judge, JudgeSettings, Replies
from judge.rubric import RUBRIC, Rubric
from judge.wire import PROTOCOLS, Question, reply_of
from judge_server import Server

KEY = "AIza-test-KEY_0123456789"
SLOW = bool(os.environ.get("SLOW"))
GEMINI, OPENAI = PROTOCOLS["gemini"], PROTOCOLS["openai"]


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.delenv("GOOGLE_API_KEY", raising=False)
    for name in ("GEMINI_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    monkeypatch.setattr(client, "WAIT", 0.01)


def write_data(folder, n, answers=4, images=3, scale=1):
    """n records with answers; pictures that carry EXIF, and are turned by it."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for k in range(images):
        exif = Image.Exif()
        exif[0x010e], exif[0x0112] = "a secret place", 6
        picture(60 * scale + k, 40 * scale, seed=k).save(folder / f"images/{k}.jpg", exif=exif)
    rows = []
    for k in range(n):
        rows.append({"id": f"r{k:04d}", "images": [f"images/{k % images}.jpg"],
                     "messages": [{"role": "user", "content": f"<image>\nWhat is in picture {k}?"}],
                     "answers": [{"text": f"Answer {j} to {k}.", "finish": "stop"} for j in range(answers)],
                     "note": {"kept": k}})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def run(data, out, server, spec="gemini:mock", **more):
    settings = {"judge": spec, "judge_url": server.url, "workers": 16, "timeout": 1.0} | more
    annotate.run(annotate.Settings(data=str(data), out=str(out), **settings))
    return [json.loads(line) for line in open(out / "records.jsonl")]


def impatient(data, out, url, **settings):
    """run, for a process of its own, which the fixture above does not reach."""
    client.WAIT = 0.01
    run(data, out, SimpleNamespace(url=url), **settings)


def one(tmp_path, server, spec="gemini:mock", **more):
    return Judge(JudgeSettings(judge=spec, judge_url=server.url, **more), Replies(tmp_path / "j.jsonl"))


ASK = Question("k", "i", "correctness", "what?")


def in_turn(*replies):
    """The server's replies one after the other, the last one for ever."""
    replies = list(replies)
    return lambda handler, body: replies.pop(0) if len(replies) > 1 else replies[0]


def gemini(text, finish="STOP", **more):
    return {"candidates": [{"content": {"parts": [{"text": text}]}, "finishReason": finish}]} | more


SAID = gemini("fine")


def good(body):
    """What a judge says that does its work."""
    text = body["contents"][0]["parts"][-1]["text"]
    rows = [{"id": name, "comment": judge_server.comment(said)} | judge_server.grades(said)
            for name, said in judge_server.candidates(text)]
    return gemini(json.dumps({"candidates": rows}))


def text_of(record):
    """What the judge was shown of a record, from what the record says about the order."""
    fence = sha(*(record["answers"][k]["text"] for k in record["judge"]["order"]))
    shown = "\n".join(f"<candidate_{chr(65 + p)}>\n{fence}\n{record['answers'][k]['text']}\n{fence}\n</candidate_{chr(65 + p)}>"
                      for p, k in enumerate(record["judge"]["order"]))
    asked = record["messages"][0]["content"].replace("<image>", "[picture 1]")
    return f"The conversation:\nuser: {asked}\n\nThe candidates, each between two lines of {fence}:\n{shown}"


def check_scores(rows):
    """Only ok carries scores, and each answer has its own, whatever order it was shown in."""
    for row in rows:
        for answer in row["answers"]:
            assert ("scores" in answer) == ("comment" in answer) == (row["judge"]["state"] == "ok")
            if "scores" in answer:
                assert answer["scores"] == judge_server.grades(answer["text"])
                assert answer["comment"] == judge_server.comment(answer["text"])


def states(rows):
    return Counter(row["judge"]["state"] for row in rows)


def lines(out):
    return [json.loads(line) for line in open(out / "journal.jsonl")]


# ---- the storm -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("spec, n", [("gemini:mock", 1000 if SLOW else 300), ("openai:mock", 300)], ids=["gemini", "openai"])
def test_with_faults_in_a_third_of_the_questions_every_record_ends_in_its_state(tmp_path, capsys, spec, n):
    data = write_data(tmp_path / "data", n)
    with Server(faults=0.3, stall=1.2) as server:
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
    data = write_data(tmp_path / "data", 20)
    with Server() as server:
        server.refuse = in_turn((200, {"promptFeedback": {"blockReason": "OTHER"}}))
        rows = run(data, tmp_path / "out", server)
        assert states(rows) == {"blocked": 20} and rows[0]["judge"]["reason"] == "prompt OTHER"
        server.refuse = None
        assert run(data, tmp_path / "out", server) == rows and len(server.arrivals) == 20
        rows = run(data, tmp_path / "out", server, retry_failed=True)
        assert states(rows) == {"ok": 20} and len(server.arrivals) == 40
        run(data, tmp_path / "out", server, retry_failed=True)
        assert len(server.arrivals) == 40, "what is ok is never asked again"
        check_scores(rows)

        server.refuse = in_turn((200, {}))
        for times in (1, 2):
            run(data, tmp_path / "new", server, workers=1, retry_failed=True)
            assert len(server.arrivals) == 40 + times * 20 * client.ASKS, "all its replies again"


def test_another_question_is_asked_anew(tmp_path):
    data = write_data(tmp_path / "data", 8)
    with Server() as server:
        run(data, tmp_path / "out", server)
        for change in ({"golden": True}, {"thinking": "low"}, {"spec": "gemini:other"}, {"seed": 1}):
            before = len(server.arrivals)
            rows = run(data, tmp_path / "out", server, **change)
            assert len(server.arrivals) > before, change
            check_scores(rows)
            assert ("golden" in rows[0]) == ("golden" in change)


def test_a_blocked_reply_has_no_scores_whatever_its_text(tmp_path):
    def refuse(handler, body):
        reply = good(body)
        reply["candidates"][0]["finishReason"] = "SAFETY"
        return 200, reply
    with Server() as server:
        server.refuse = refuse
        row, = run(write_data(tmp_path / "data", 1), tmp_path / "out", server)
    assert row["judge"]["state"] == "blocked" and row["judge"]["reason"] == "SAFETY"
    check_scores([row])


def test_the_check_decides_under_a_finish_that_nobody_knows(tmp_path):
    """And once: a good text is not paid for three times."""
    def refuse(handler, body):
        reply = good(body)
        reply["candidates"][0]["finishReason"] = "BRAND_NEW"
        return 200, reply
    with Server() as server:
        server.refuse = refuse
        row, = run(write_data(tmp_path / "data", 1), tmp_path / "out", server)
        assert row["judge"]["state"] == "ok" == lines(tmp_path / "out")[-1]["state"] and len(server.arrivals) == 1


# ---- fields that a server does not take ------------------------------------------------------------------------

def test_a_field_that_the_server_does_not_take_is_left_out_from_then_on(tmp_path, capsys):
    bodies = []

    def refuse(handler, body):
        bodies.append(body)
        if "store" in body:
            return 400, {"error": {"code": 400, "message": 'Invalid JSON payload received. Unknown name "store": Cannot find field.'}}
        return 200, gemini("no")
    with Server() as server:
        server.refuse = refuse
        rows = run(write_data(tmp_path / "data", 10), tmp_path / "out", server, workers=1)
    assert states(rows) == {"unparseable": 10} and len(bodies) == 1 + 10 * client.ASKS
    assert "responseJsonSchema" in bodies[-1]["generationConfig"], "the others stay"
    assert "does not take store" in capsys.readouterr().out


def test_a_refusal_that_names_no_field_is_answered_without_the_schema(tmp_path):
    """Servers refuse a schema in many words: too many states, no grammar, an invalid argument."""
    def refuse(handler, body):
        if "responseJsonSchema" in body["generationConfig"]:
            return 400, {"error": {"code": 400, "message": "Request contains an invalid argument."}}
        return 200, good(body)
    with Server() as server:
        server.refuse = refuse
        rows = run(write_data(tmp_path / "data", 6), tmp_path / "out", server, workers=1)
        assert states(rows) == {"ok": 6} and len(server.arrivals) == 7
        check_scores(rows)
        server.refuse = in_turn((400, {"error": {"message": "Unable to process input image."}}))
        rows = run(write_data(tmp_path / "data", 1), tmp_path / "bad", server)
        assert states(rows) == {"failed": 1} and len(server.arrivals) == 9, "and then it is the question's own fault"


def test_a_level_of_thinking_that_the_server_does_not_take_is_never_left_out(tmp_path):
    """Without it the model might think more, and cost more, than was asked for."""
    with Server() as server:
        server.refuse = in_turn((400, {"error": {"message": "Thinking level is not supported for this model."}}))
        with pytest.raises(BadInput, match="does not take --thinking minimal.* Thinking level is not supported"):
            run(write_data(tmp_path / "data", 30), tmp_path / "out", server, thinking="minimal", workers=1)
        assert len(server.arrivals) < 4, "the next may be on its way"


def test_a_server_that_never_takes_a_field_it_does_not_get_ends_as_failed(tmp_path):
    with Server() as server:
        server.refuse = in_turn((400, {"error": {"message": "bad store"}}))
        assert one(tmp_path, server).settle(ASK) == "failed" and len(server.arrivals) == 2


# ---- stopping --------------------------------------------------------------------------------------------------

STOPS = {
    "wrong key": ((400, {"error": {"code": 400, "message": f"API key not valid: {KEY}", "status": "INVALID_ARGUMENT"}}), "GEMINI_API_KEY"),
    "daily quota": ((429, {"error": {"message": "quota", "details": [{"violations": [
        {"quotaId": "GenerateRequestsPerDayPerProjectPerModel-FreeTier"}]}, {"retryDelay": "7s"}]}}), "the quota is spent"),
    "a long wait": ((503, "busy", {"Retry-After": "4000"}), "asks to wait 4000 s"),
    "redirect": ((302, "", {"Location": "http://example.com/"}), "redirect"),
}


@pytest.mark.parametrize("case", STOPS)
def test_what_cannot_get_better_stops_the_run_says_what_to_do_and_loses_nothing(tmp_path, capsys, case):
    reply, remedy = STOPS[case]
    data, count = write_data(tmp_path / "data", 40), iter(range(10**6))
    with Server() as server:
        server.refuse = lambda handler, body: reply if next(count) >= 10 else (200, good(body))
        with pytest.raises(BadInput, match=remedy) as error:
            run(data, tmp_path / "out", server, workers=4)
        assert KEY not in str(error.value) + capsys.readouterr().out
        assert len(lines(tmp_path / "out")) == 10 and next(count) < 25
        server.refuse = None
        assert states(run(data, tmp_path / "out", server)) == {"ok": 40}


@pytest.mark.parametrize("status, error, stops", [
    (401, {"message": "who are you"}, "check GOOGLE_API_KEY or GEMINI_API_KEY"), (403, {"message": "no"}, "refuses the key"),
    (400, {"message": "no", "details": [{"reason": "API_KEY_INVALID"}]}, "refuses the key"),
    (400, {"message": "User location is not supported", "status": "FAILED_PRECONDITION"}, "the key or the account"),
    (404, {"message": "models/x is not found"}, "those at http.*v1beta/models are"), (400, {"code": "model_not_found"}, "is not to be had"),
    (429, {"code": "insufficient_quota"}, "quota is spent"), (429, {"message": "limit: 0, model: x"}, "quota is spent"), (308, {}, "redirect"),
    (429, {"message": "limit: 0.5, model: x"}, ""), (429, {"message": "limit: 05"}, ""), (400, {"message": "a bad picture"}, "")])
def test_only_what_cannot_get_better_stops_the_run(tmp_path, status, error, stops):
    asking = one(tmp_path, SimpleNamespace(url="http://host"))
    if not stops:
        return asking.stop_if_pointless(status, error, "")
    with pytest.raises(BadInput, match=stops):
        asking.stop_if_pointless(status, error, "")


def test_a_server_that_is_gone_ends_the_run_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "WAIT", 0.001)
    with Server() as server:
        pass
    began = time.perf_counter()
    with pytest.raises(BadInput, match="20 records in a row got no reply.*--retry_failed 1"):
        run(write_data(tmp_path / "data", 100), tmp_path / "out", server)
    assert time.perf_counter() - began < 20


def test_failures_between_successes_do_not_end_the_run_and_twenty_in_a_row_do(tmp_path):
    data, count = write_data(tmp_path / "data", 50), iter(range(10**6))
    with Server() as server:
        server.refuse = lambda handler, body: (422, "no") if next(count) % 2 else (200, good(body))
        assert states(run(data, tmp_path / "out", server, workers=1)) == {"ok": 25, "failed": 25}
        server.refuse = in_turn((422, "no"))
        rows = run(write_data(tmp_path / "19", client.DEAD - 1), tmp_path / "nineteen", server, workers=1)
        assert states(rows) == {"failed": 19}
        with pytest.raises(BadInput, match="20 records in a row"):
            run(write_data(tmp_path / "20", client.DEAD), tmp_path / "twenty", server, workers=1)
        assert [r["state"] for r in lines(tmp_path / "twenty")] == ["failed"] * 20


def test_ctrl_c_keeps_what_is_in_flight(tmp_path, capsys, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background jobs are started deaf to it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    data = write_data(tmp_path / "data", 60)

    def interrupt():
        while len(server.arrivals) < 20:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    with Server(delay=0.1) as server:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run(data, tmp_path / "out", server, workers=8)
        kept = len(lines(tmp_path / "out"))
        assert 8 <= kept == len(server.arrivals) < 60, "every call that was made is kept"
        assert "waited for and kept" in capsys.readouterr().out
        server.delay = 0
        assert len(run(data, tmp_path / "out", server)) == 60 and len(server.arrivals) == 60


def stopped_after(seconds):
    stop = threading.Event()
    timer = threading.Timer(seconds, stop.set)
    timer.daemon = True
    timer.start()
    return stop


def test_a_wait_ends_when_the_run_does(tmp_path):
    """Whether one waits for a server that is busy, for --rpm, or in a pause that a 429 has made."""
    with Server() as server:
        for refuse, settings in (((503, "busy", {"Retry-After": "4"}), {}), ((429, "busy", {"Retry-After": "4"}), {}), ((200, SAID), {"rpm": 1})):
            server.refuse = in_turn(refuse)
            with closing(Replies(tmp_path / f"{len(server.arrivals)}.jsonl")) as replies:
                asking, began = Judge(JudgeSettings("gemini:m", server.url, **settings), replies), time.monotonic()
                asking.stop = stopped_after(0.2)
                with pytest.raises(client.Stopped):
                    asking.settle(ASK), asking.settle(Question("k2", "i", "", "and?"))
                assert time.monotonic() - began < 3

        server.refuse = in_turn((503, "busy", {"Retry-After": "4"}), (401, "no"))
        began = time.monotonic()
        with pytest.raises(BadInput, match="refuses the key"):           # and what stops the run is said, not that it was stopped
            run(write_data(tmp_path / "data", 2), tmp_path / "out", server)
        assert time.monotonic() - began < 3


# ---- kill -9 ---------------------------------------------------------------------------------------------------

def test_killed_again_and_again_the_result_is_that_of_an_undisturbed_run(tmp_path):
    n, kills = (300, 20) if SLOW else (60, 2)
    data, journal = write_data(tmp_path / "data", n), tmp_path / "out" / "journal.jsonl"
    settings = dict(workers=16, pairs=True, export="trl")
    with Server(faults=0.3, stall=1.2, delay=0.02) as server:
        rows = run(data, tmp_path / "whole", server, **settings)
    rng, count = random.Random(0), lambda: journal.read_bytes().count(b"\n") if journal.exists() else 0
    with Server(faults=0.3, stall=1.2, delay=0.02, port=server.server_address[1]) as server:         # it is echoed
        for _ in range(kills):
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
        assert sum(clean) - len(clean) <= kills * 16, "only calls in flight were made twice"
    for name in ("records.jsonl", "trl.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    final = Counter(line["key"] for line in lines(tmp_path / "out") if line["final"])
    assert set(final.values()) == {1} and len(final) == n


def test_a_torn_last_line_is_cut_off_and_a_damaged_one_is_named(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"key": "a", "x": 1}\n{"key": "b", "x": "\xc3\xa9"}\n{"key": "c", "x"')
    journal = Journal(path)
    assert "c" not in journal and journal["b"]["x"] == "é" and path.read_bytes().endswith(b"\xa9\"}\n")
    journal.append({"key": "a", "x": "é\u2028"})
    assert journal["a"]["x"] == "é\u2028" and journal["b"]["x"] == "é", "a row is read from its place, whatever bytes stand before it"
    with pytest.raises(BadInput, match="being written by another process"):
        Journal(path)
    journal.close()
    with closing(Journal(path)) as again:
        assert again["a"]["x"] == "é\u2028"
    for k, line in enumerate(("3", "[1]", "null", '{"x": 1}', '{"key": ')):
        path = tmp_path / f"{k}.jsonl"
        path.write_text('{"key": "a"}\n' + line + '\n{"key": "c"}\n')
        with pytest.raises(BadInput, match="line 2 is damaged"):
            Journal(path)
    with pytest.raises(BadInput, match="line 1 is damaged"):
        Journal(path, answer="an object")


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append({"key": "a"})
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:5]))
    with pytest.raises(OSError, match="the disk is full"):
        journal.append({"key": "b", "long": "x" * 100})
    monkeypatch.setattr(os, "write", real)
    journal.append({"key": "c"})
    assert [json.loads(line)["key"] for line in open(journal.path)] == ["a", "c"] and journal["c"] == {"key": "c"}


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


def test_replies_from_before_a_kill_count(tmp_path):
    """Two unparseable replies on disk leave one ask, and a truncated one has doubled the budget."""
    data = write_data(tmp_path / "data", 2)
    with Server() as server:
        server.refuse = in_turn((200, gemini("no")))
        run(data, tmp_path / "out", server, workers=1)
        rows = lines(tmp_path / "out")
        assert [r["final"] for r in rows] == [False, False, True] * 2
        (tmp_path / "out" / "journal.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows[:2] + [rows[3] | {"state": "truncated"}]))
        run(data, tmp_path / "out", server, workers=1, budget=100)
        assert len(server.arrivals) == 6 + 1 + 3
        assert sorted(map(tuple, server.budgets.values())) == [(8192,) * 3 + (100,), (8192,) * 3 + (200,) * 3]


def test_raw_replies_can_be_read_again_by_a_better_parser(tmp_path, monkeypatch):
    data, real = write_data(tmp_path / "data", 5), Rubric.read
    with Server() as server:
        with monkeypatch.context() as worse:
            worse.setattr(Rubric, "read", lambda self, text, n, golden: real(self, text, n + 1, golden))
            assert states(run(data, tmp_path / "out", server)) == {"unparseable": 5}
        made = len(server.arrivals)
        rows = run(data, tmp_path / "out", server)
        assert states(rows) == {"ok": 5} and len(server.arrivals) == made
        run(data, tmp_path / "out", server, retry_failed=True)
        assert len(server.arrivals) == made, "what a better parser has saved is not asked again"
    check_scores(rows)


# ---- waiting and trying again -----------------------------------------------------------------------------------

def test_calls_are_spaced_out_evenly_over_the_minute(tmp_path):
    with Server() as server:
        run(write_data(tmp_path / "data", 20), tmp_path / "out", server, rpm=1200)
        arrivals = sorted(server.arrivals)
        assert arrivals[-1] - arrivals[0] > 0.9 and arrivals[10] - arrivals[0] > 0.4


def test_one_429_makes_every_worker_wait(tmp_path):
    first = threading.Event()

    def refuse(handler, body):
        if not first.is_set():
            first.set()
            return 429, {"error": {"message": "slow down", "details": [{"retryDelay": "0.7s"}]}}
        return 200, good(body)
    with Server() as server:
        server.refuse = refuse
        run(write_data(tmp_path / "data", 60), tmp_path / "out", server, workers=4)
        gaps = [b - a for a, b in zip(server.arrivals, server.arrivals[1:])]
        assert max(gaps) > 0.6 and gaps.index(max(gaps)) < 8


def test_a_short_pause_does_not_shorten_a_long_one(tmp_path):
    asking, began = one(tmp_path, SimpleNamespace(url="http://host")), time.monotonic()
    asking.pause(0.3)
    asking.pause(0.01)
    asking.wait_for_turn()
    assert time.monotonic() - began >= 0.3


@pytest.mark.parametrize("headers, error, seconds", [
    ({}, {"details": [{"@type": "x"}, {"retryDelay": "26s"}]}, 26), ({}, {"details": [{"retryDelay": "45.837906927s"}]}, 45.837906927),
    ({"Retry-After": "12"}, {}, 12), ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, {}, 0), ({"Retry-After": "soon"}, {}, 0),
    ({}, {"details": "nonsense"}, 0), ({}, {"details": 5}, 0), ({}, {}, 0)])
def test_the_delay_that_a_server_asks_for(headers, error, seconds):
    assert wire.delay_of(headers, error) == pytest.approx(seconds)


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 529])
def test_a_status_that_passes_is_tried_again(tmp_path, status):
    with Server() as server:
        server.refuse = in_turn((status, "wait"), (200, SAID))
        assert one(tmp_path, server).settle(ASK) == "ok" and len(server.arrivals) == 2


@pytest.mark.parametrize("reply, calls, state", [((500, "no"), 6, "failed"), ((422, "no"), 1, "failed"), ((429, "no"), 24, "failed"),
                                                 ((200, "<html>Please sign in</html>"), 6, "failed"), ((200, "[" * 100_000), 6, "failed"),
                                                 ((200, {"candidates": []}), 3, "unparseable")])
def test_how_often_a_question_is_tried(tmp_path, monkeypatch, reply, calls, state):
    monkeypatch.setattr(client, "WAIT", 0.001)
    with Server() as server:
        server.refuse = in_turn(reply)
        asking = one(tmp_path, server)
        assert asking.settle(ASK) == state == asking.replies["k"]["state"] and len(server.arrivals) == calls == asking.calls


def test_truncated_replies_get_twice_the_budget_once_and_do_not_count_as_unparseable(tmp_path):
    cut = {"candidates": [{"finishReason": "MAX_TOKENS"}]}
    with Server() as server:
        server.refuse = in_turn((200, cut))
        with closing(Replies(tmp_path / "a.jsonl")) as replies:
            assert Judge(JudgeSettings("gemini:m", server.url, budget=100), replies).settle(ASK) == "truncated"
        assert server.budgets.pop("what?") == [100, 200]
        server.refuse = in_turn((200, cut), (200, {}))
        assert one(tmp_path, server, budget=100).settle(ASK) == "unparseable" and server.budgets["what?"] == [100, 200, 200, 200]


def test_waits_begin_with_WAIT_and_double_up_to_the_longest(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(client, "MOST", 5 * client.WAIT)
    monkeypatch.setattr(random, "uniform", lambda a, b: drawn.append((a, b)) or 0)
    with Server() as server:
        server.refuse = in_turn((500, "no"))
        one(tmp_path, server).settle(ASK)
    assert {a for a, _ in drawn} == {0}, "full jitter"
    assert [b / client.WAIT for _, b in drawn[:5]] == pytest.approx([1, 2, 4, 5, 5]), "as the comment beside WAIT says"


def drip(piece, pause, header, times=30):
    """A reply that never ends, in drips. With a Content-Length, iter_content would wait until 64 KiB are there."""
    def refuse(handler, body):
        handler.send_response(200)
        handler.send_header(*header)
        handler.end_headers()
        for _ in range(times):
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(pause)
        raise ConnectionError
    return refuse


@pytest.mark.parametrize("piece, pause, header, timeout", [
    (b" ", 0.1, ("Content-Length", "1000"), 0.4), (b"1\r\n \r\n", 0.1, ("Transfer-Encoding", "chunked"), 0.4),
    (b" " * (1 << 20), 0, ("Content-Length", str(1 << 30)), 60)], ids=["slow", "slow chunks", "endless"])
def test_a_reply_without_end_is_given_up(tmp_path, monkeypatch, piece, pause, header, timeout):
    monkeypatch.setattr(client, "TRIES", 1)
    with Server() as server:
        server.refuse, began = drip(piece, pause, header), time.monotonic()
        asking = one(tmp_path, server, timeout=timeout)
        endless = timeout == 60
        assert asking.settle(ASK) == ("unparseable" if endless else "failed") and time.monotonic() - began < 2
        assert ("far too much of it" if endless else "took longer than 0.4 s") in asking.replies["k"]["reason"]


def test_headers_that_never_end_are_given_up(tmp_path, monkeypatch):
    """A letter every tenth of a second: each comes in time, the whole never does."""
    monkeypatch.setattr(client, "TRIES", 1)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listening.accept()
        connection.recv(1 << 16)
        with suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\n")
            while True:
                connection.sendall(b"X")
                time.sleep(0.1)
    threading.Thread(target=serve, daemon=True).start()
    server = SimpleNamespace(url=f"http://127.0.0.1:{listening.getsockname()[1]}")
    asking, began = one(tmp_path, server, timeout=0.5), time.monotonic()
    assert asking.settle(ASK) == "failed" and 0.4 < time.monotonic() - began < 2


def test_a_key_that_comes_back_as_a_broken_status_line_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "TRIES", 1)
    listening = socket.create_server(("127.0.0.1", 0))

    def serve():
        connection, _ = listening.accept()
        connection.recv(1 << 16)
        connection.sendall(f"{KEY} {KEY}\r\n\r\n".encode())
    threading.Thread(target=serve, daemon=True).start()
    asking = one(tmp_path, SimpleNamespace(url=f"http://127.0.0.1:{listening.getsockname()[1]}"))
    assert asking.settle(ASK) == "failed" and "[key]" in asking.replies["k"]["reason"]
    assert KEY not in (tmp_path / "j.jsonl").read_text()


@pytest.mark.parametrize("usage", [{"promptTokenCount": -5}, {"promptTokenCount": 10**30}], ids=str)
def test_an_impossible_cost_is_not_believed(tmp_path, usage):
    reply = wire.reply_of(wire.PROTOCOLS["gemini"], gemini("hello") | {"usageMetadata": usage})
    assert reply.state == "unparseable" and "impossible number of tokens" in reply.reason


def test_a_grade_that_is_given_twice_counts_for_nothing():
    one_of = json.dumps({"candidates": [{"id": "A", "comment": "c", **dict.fromkeys(RUBRIC.attributes, 2)}]})
    assert RUBRIC.read(one_of, 1)["shown"]
    with pytest.raises(ValueError, match="a field stands twice"):
        RUBRIC.read(one_of.replace('"helpfulness": 2', '"helpfulness": 0, "helpfulness": 4'), 1)


@pytest.mark.parametrize("row", [{"key": "x"}, {"key": ["x"]}, {"final": True}, [], 5, {"key": "x", "final": True, "state": "ok", "text": None,
                                 "reason": "", "version": "", "usage": {}}], ids=str)
def test_a_journal_row_without_its_fields_is_named(tmp_path, row):
    path = tmp_path / "journal.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput, match="journal.jsonl: line 1 is damaged; remove that line"):
        Replies(path)


@pytest.mark.parametrize("said, flags, why", [
    ("'max_tokens' or 'max_completion_tokens' is too large: 8192. This model's maximum context length is 8192 tokens.", {}, "such a long --budget"),
    ("Thinking level is not supported for this model.", {"thinking": "low"}, "does not take --thinking low; give another, or none")])
def test_what_the_user_asked_for_is_never_left_out(tmp_path, said, flags, why):
    with Server() as server:
        server.refuse = lambda *more: (400, {"error": {"code": 400, "message": said, "status": "INVALID_ARGUMENT"}})
        with pytest.raises(BadInput, match=why):
            one(tmp_path, server, **flags).settle(ASK)


def test_another_model_behind_the_name_is_said_counted_and_may_stop_the_run(tmp_path, capsys):
    asking = Judge(JudgeSettings("openai:m", "http://127.0.0.1:1"), None)
    for version in ("m-1", "", "m-1", "m-2", "m-2"):
        asking.look_at(version)
    assert capsys.readouterr().out.count("the model behind m is now m-2, and was m-1") == 1
    asking.s = replace(asking.s, same_version=True)
    with pytest.raises(BadInput, match="is now m-3, and was m-2; --same_version stops here; what was judged is kept"):
        asking.look_at("m-3")
    rows = [{"answers": [{"text": "a", "scores": dict.fromkeys(RUBRIC.attributes, 1)}], "judge": {"version": name, "order": [0]}} for name in ("m-1", "m-1", "m-2")]
    assert "not one judge but several: 2 by m-1, 1 by m-2" in report.show(report.statistics(rows))


def test_flex_is_sent_and_gets_its_time(tmp_path):
    with Server() as server:
        bodies = []
        server.refuse = lambda handler, body: bodies.append(body) or (200, SAID)
        asking = one(tmp_path, server, flex=True)
        assert asking.s.timeout == 900
        asking.settle(ASK)
    assert bodies[0]["serviceTier"] == "flex"
    with pytest.raises(BadInput, match="--flex is a service of Gemini's"):
        client.door(JudgeSettings("openai:m", "http://127.0.0.1:1", flex=True))


@pytest.mark.skipif(not SLOW, reason="SLOW=1: two thousand records")
def test_instant_replies_come_in_at_two_hundred_a_second_in_flat_memory(tmp_path):
    """Server and client are processes of their own: the client judges few records, then many, and says its peak after each."""
    few, many = 500, 2000
    server = subprocess.Popen([sys.executable, ROOT / "tests" / "judge_server.py", "--fast", "1"], stdout=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        jobs = [dict(data=str(write_data(tmp_path / f"data{n}", n, scale=4)), out=str(tmp_path / f"out{n}"), judge="gemini:mock", judge_url=url,
                     workers=32) for n in (few, many)]
        script = ("import annotate, re, time; from judge.client import Judge; real = Judge.ask\n"
                  "def ask(*a):\n began = time.perf_counter(); real(*a); print('ASK', time.perf_counter() - began)\n"
                  f"Judge.ask = ask\nfor job in {jobs!r}:\n open('/proc/self/clear_refs', 'w').write('5')\n"          # forget the peak of the imports
                  " annotate.annotate(annotate.Settings(**job))\n print('PEAK', re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])")
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seconds = float(re.findall(r"ASK (\S+)", done.stdout)[1])
        before, after = map(int, re.findall(r"PEAK (\d+)", done.stdout))
        print(f"{many / seconds:.0f} records/s, peak {before} KiB for {few} records, then {after} for {many}")
        assert many / seconds > 200
        assert (after - before) * 1024 / (many - few) < 20_000, "a record, its question and reply stay in memory, pictures do not"
    finally:
        server.kill()


# ---- what is sent ----------------------------------------------------------------------------------------------

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
        assert len(run(data, tmp_path / "out", server)) == 1 == len(server.arrivals)
    rejects = [json.loads(line) for line in open(tmp_path / "out" / "rejects.jsonl")]
    assert len(rejects) == 2 and all("leads outside" in r["reason"] for r in rejects)


def test_a_picture_that_is_gone_stops_the_run_by_its_name_and_nothing_is_sent(tmp_path):
    with Server() as server:
        with pytest.raises(BadInput, match="gone.png"):
            one(tmp_path, server).ask([Question("k", "i", "s", "t", [tmp_path / "gone.png"])])
        assert not server.arrivals


def test_what_gemini_is_sent():
    q = Question("k", "i", "be strict", "which?", schema={"type": "object"})
    body = GEMINI.body("m", q, ["AAAA"], 7, "low", set())
    assert body["generationConfig"] == {"maxOutputTokens": 7, "responseMimeType": "application/json", "responseJsonSchema": q.schema,
                                        "thinkingConfig": {"thinkingLevel": "low"}}
    assert body["contents"][0]["parts"] == [{"inlineData": {"mimeType": "image/jpeg", "data": "AAAA"}}, {"text": "which?"}]
    assert body["store"] is False and {s["threshold"] for s in body["safetySettings"]} == {"BLOCK_NONE"}
    assert body["systemInstruction"] == {"parts": [{"text": "be strict"}]}
    less = GEMINI.body("m", q, [], 7, "", set(GEMINI.optional))
    assert less["generationConfig"] == {"maxOutputTokens": 7, "responseMimeType": "application/json"} and "store" not in less
    assert "responseMimeType" not in GEMINI.body("m", ASK, [], 7, "", set())["generationConfig"], "no schema: plain text"


def test_what_an_openai_style_server_is_sent():
    q = Question("k", "i", "be strict", "which?", schema={"type": "object"})
    body = OPENAI.body("m", q, ["AAAA"], 7, "low", set())
    assert (body["temperature"], body["max_tokens"], body["reasoning_effort"]) == (0, 7, "low")
    assert body["response_format"]["json_schema"]["schema"] == q.schema
    assert [m["role"] for m in body["messages"]] == ["system", "user"] and len(body["messages"][1]["content"]) == 2
    less = OPENAI.body("m", q, [], 7, "low", set(OPENAI.optional))
    assert not set(OPENAI.optional) & set(less) and less["max_completion_tokens"] == 7, "reasoning models have renamed it"
    assert wire.names({"param": "max_tokens", "message": "use 'max_completion_tokens' instead."}, "max_tokens")
    assert OPENAI.headers("") == {}, "a server of one's own gets no empty key"


def test_what_a_question_costs_to_send_counts_its_pictures():
    assert Question("k", "i", "s" * 30, "t" * 60, [1, 2]).tokens == 30 + 2 * wire.IMAGE_TOKENS + 1


# ---- what is read ----------------------------------------------------------------------------------------------

def reply(grades=(1, 2, 3, 4, 0), n=2, **change):
    rows = [{"id": chr(65 + k), "comment": f"c{k}"} | dict(zip(RUBRIC.attributes, grades)) | change for k in range(n)]
    return json.dumps({"candidates": rows})


@pytest.mark.parametrize("text", [reply(), f"```json\n{reply()}\n```", f"[{reply()}]", f"Here it is: {reply()} Bye.",
                                  f'<think>Let me draft {{"candidates": [}}</think>\n{reply()}'],
                         ids=["plain", "fenced", "listed", "in prose", "behind thoughts"])
def test_a_right_reply_is_read_whatever_stands_around_it(text):
    found = RUBRIC.read(text, 2)
    assert found["golden"] is None and found["shown"] == [
        ({"helpfulness": 1, "correctness": 2, "coherence": 3, "complexity": 4, "verbosity": 0}, f"c{k}") for k in range(2)]


@pytest.mark.parametrize("text, why", [
    ("", "no whole JSON"), ("I cannot.", "no whole JSON"), (reply()[:-2], "no whole JSON"), (reply() + reply(), "no whole JSON"),
    (reply(n=1), "not A, B"), (reply(n=3), "not A, B"), (reply(n=3).replace('"C"', '"B"'), "not A, B"), (reply(id="A"), "not A, B"), (reply(id=0), "not A, B"), (reply(id="a"), "not A, B"),
    (reply((5, 0, 0, 0, 0)), "is 5, not an integer"), (reply((-1, 0, 0, 0, 0)), "is -1"), (reply(("3", 0, 0, 0, 0)), "is '3'"),
    (reply((3.0, 0, 0, 0, 0)), "is 3.0"), (reply((True, 0, 0, 0, 0)), "is True"), (reply((None, 0, 0, 0, 0)), "is None"),
    (reply((0, 0, 0, 0)), "verbosity is None"), (reply(("3/4", 0, 0, 0, 0)), "is '3/4'"), (reply(comment=None), "no comment"),
    (reply(comment=["x"]), "no comment"), ('{"candidates": 3}', "not A, B"), ('{"candidates": [1, 2]}', "not A, B"),
    ('{"candidates": {"A": 1}}', "not A, B"), (reply(comment="\ud800"), "surrogates"), ("{" * 5000, "no whole JSON"), ("[" * 100_000, "no whole JSON")])
def test_a_wrong_reply_has_no_scores_at_all(text, why):
    with pytest.raises(ValueError, match=why):
        RUBRIC.read(text, 2)


def test_a_golden_answer_is_wanted_where_it_was_asked_for():
    for bad in ("", '"golden_answer": 3, ', '"golden_answer": " ", ', '"golden_answer": "an <image>", ', '"golden_answer": "\\ud800", '):
        with pytest.raises(ValueError, match="golden|surrogates"):
            RUBRIC.read(reply().replace("{", "{" + bad, 1), 2, golden=True)
    assert RUBRIC.read(reply().replace("{", '{"golden_answer": "Red.", ', 1), 2, golden=True)["golden"] == "Red."


def test_candidates_in_another_order_are_read_by_their_letters():
    rows = [{"id": name, "comment": name} | dict.fromkeys(RUBRIC.attributes, grade) for name, grade in (("B", 1), ("A", 4))]
    found = RUBRIC.read(json.dumps({"candidates": rows}), 2)["shown"]
    assert [(scores["helpfulness"], comment) for scores, comment in found] == [(4, "A"), (1, "B")]


@pytest.mark.parametrize("name, fields", [
    ("gemini", {"candidates": [{"content": None}]}), ("gemini", {"candidates": [7]}), ("gemini", {"candidates": 7}),
    ("gemini", {"candidates": [{"content": {"parts": [{"text": 5}, 6]}}]}), ("gemini", {"candidates": [{"content": {"parts": 5}}]}),
    ("gemini", {"candidates": [{}], "usageMetadata": {"promptTokenCount": "many"}}),
    ("gemini", {"candidates": [{}], "usageMetadata": {"promptTokenCount": float("inf")}}), ("openai", {}), ("openai", {"choices": []}),
    ("openai", {"choices": [{"message": {"content": [1]}}]}), ("openai", {"choices": [None]}), ("openai", {"choices": {"a": 1}})])
def test_a_reply_of_unknown_shape_is_unparseable_and_no_crash(name, fields):
    found = reply_of(PROTOCOLS[name], fields)
    assert found.state == "unparseable" and found.reason and set(found.usage.values()) == {0}


def test_gemini_replies():
    def read(candidate=None, **more):
        return reply_of(GEMINI, ({"candidates": [candidate]} if candidate else {}) | more)

    def part(**fields):
        return {"content": {"parts": [fields]}}
    found = read(part(text="x") | {"finishReason": "STOP"}, modelVersion="v", usageMetadata={"promptTokenCount": 3, "thoughtsTokenCount": 2})
    assert (found.state, found.text, found.version, found.usage) == ("ok", "x", "v", {"prompt": 3, "answer": 0, "thoughts": 2})
    assert read(promptFeedback={"blockReason": "SAFETY"}).state == "blocked" and not read(promptFeedback={"blockReason": "SAFETY"}).again
    assert read({"finishReason": "RECITATION"}).again
    assert read(part(text="x") | {"finishReason": "MAX_TOKENS"}).state == "truncated"
    for nothing in (read(), read({"finishReason": "STOP"}), read(part(text="x", thought=True)), read(part(thoughtSignature="s"))):
        assert nothing.state == "unparseable" and nothing.reason
    assert read(part(text="x") | {"finishReason": "BRAND_NEW"}).state == "ok", "the caller's check decides"
    for finish in ("SAFETY", "RECITATION", "BLOCKLIST", "PROHIBITED_CONTENT", "SPII", "LANGUAGE", "IMAGE_SAFETY", "IMAGE_PROHIBITED_CONTENT",
                   "IMAGE_RECITATION"):
        found = read(part(text="x") | {"finishReason": finish})
        assert (found.state, found.reason, found.again) == ("blocked", finish, "RECITATION" in finish)


def test_a_gemini_reply_may_stand_in_a_list_or_lack_its_finish(tmp_path):
    body = {"candidates": [{"content": {"parts": [{"text": "x"}]}}]}
    with Server() as server:
        for k, found in enumerate((body, [body])):
            server.refuse = in_turn((200, found))
            with closing(Replies(tmp_path / f"{k}.jsonl")) as replies:
                assert Judge(JudgeSettings("gemini:m", server.url), replies).settle(ASK) == "ok" and replies["k"]["text"] == "x"
        assert len(server.arrivals) == 2


def test_openai_replies():
    def read(finish, **message):
        return reply_of(OPENAI, {"choices": [{"message": message, "finish_reason": finish}]}).state
    assert read("stop", content="x") == "ok" and read("stop", content="") == read("stop", content=None) == "unparseable"
    assert read("length", content="x") == "truncated" and read("content_filter", content="x") == "blocked"
    assert read("stop", content="x", refusal="no") == read("stop", content=None, refusal="no") == "blocked"


def test_what_went_wrong_is_found_in_any_error_body():
    assert wire.error_of({"error": {"message": "a"}}) == {"message": "a"}
    assert wire.error_of({"error": "a"}) == wire.error_of({"message": "a"}) == wire.error_of("<b>a</b>") == {"message": "a"}
    assert wire.error_of([]) == {"message": "[]"}


# ---- the key ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("replies", [
    [(200, {"choices": [{"message": {"content": [KEY]}}]})], [(200, {"candidates": [{}], "usageMetadata": {"promptTokenCount": KEY}})],
    [(422, "x" * 480 + KEY)], [(422, "x" * (500 - len(KEY) + 1) + KEY)],
    [(200, gemini(KEY, KEY, modelVersion=KEY)), (200, {"promptFeedback": {"blockReason": KEY}})],
    [(200, gemini("".join(f"\\u{ord(c):04X}" for c in KEY)))], [(500, {"error": {"message": f"your key {KEY}"}})]],
    ids=["text of unknown shape", "count of unknown shape", "at the cut", "before the cut", "version and reason", "JSON escapes", "error"])
def test_the_key_is_taken_out_of_whatever_comes_back(tmp_path, monkeypatch, replies):
    """Also where a long message is cut: the key is looked for first."""
    monkeypatch.setattr(client, "TRIES", 1)
    with Server() as server:
        server.refuse = in_turn(*replies)
        asking = one(tmp_path, server)
        for k in range(2):
            asking.settle(Question(str(k), "i", "", "what?"))
    written = (tmp_path / "j.jsonl").read_text()
    assert KEY[:15] not in re.sub(r"\\\\u00(..)", lambda escape: chr(int(escape[1], 16)), written)
    assert len(replies) < 2 or '"version": "[key]"' in written and "prompt [key]" in written


def test_halves_of_characters_can_be_written_down(tmp_path):
    with Server() as server:
        server.refuse = in_turn((200, r'{"candidates": [{"content": {"parts": [{"text": "a\ud800"}]}}], "modelVersion": "\udfff"}'))
        asking = one(tmp_path, server)
        assert asking.settle(ASK) == "ok" and asking.replies["k"]["text"] == "a?"


def test_netrc_does_not_replace_the_key(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password wrong\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    seen = []
    with Server() as server:
        server.refuse = lambda handler, body: seen.append(dict(handler.headers)) or (200, {})
        one(tmp_path, server, "openai:m").settle(ASK)
    assert seen and all(h["Authorization"] == f"Bearer {KEY}" for h in seen)


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


# ---- the door --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings, why", [
    ({"judge": "gemini"}, "say gemini:MODEL"), ({"judge": "gpt:4"}, "say gemini:MODEL"), ({"judge": "gemini:"}, "say gemini:MODEL"),
    *(({"judge": "openai:m", "judge_url": url}, "say http://host:port or https://host/v1, without a user")
      for url in ("localhost:8000", "http://user:pass@host", "http://host?key=1", "ftp://host", "http://", "http:///v1", "http://host/v1?key=1", "http://host/v1#key")),
    *(({"judge": "gemini:m", name: value}, "must be positive") for name, value in (("workers", 0), ("timeout", 0), ("budget", 0), ("rpm", -1)))], ids=str)
def test_a_judge_that_cannot_be_asked_is_refused_at_the_door(settings, why):
    with pytest.raises(BadInput, match=why) as error:
        client.door(JudgeSettings(**settings))
    assert "pass@" not in str(error.value)


def test_keys_come_from_the_environment_and_must_fit_a_header(monkeypatch, capsys):
    def key(spec, url=""):
        return client.door(JudgeSettings(spec, url))[-1]
    monkeypatch.setenv("GEMINI_API_KEY", f" {KEY}\n")
    assert key("gemini:m") == KEY
    monkeypatch.setenv("GEMINI_API_KEY", "bad\nkey")
    with pytest.raises(BadInput, match="no header can carry") as error:
        key("gemini:m")
    assert "bad" not in str(error.value)
    monkeypatch.delenv("GEMINI_API_KEY")
    with pytest.raises(BadInput, match="set GOOGLE_API_KEY or GEMINI_API_KEY"):
        key("gemini:m", "http://localhost:8000")
    monkeypatch.setenv("GOOGLE_API_KEY", "other")
    assert key("gemini:m") == "other"
    monkeypatch.setenv("GEMINI_API_KEY", "one")
    assert key("gemini:m") == "other" and "note: GOOGLE_API_KEY is used" in capsys.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    assert key("openai:m", "http://localhost:8000") == "", "a server of one's own may need none"


def test_a_server_of_ones_own_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with Server() as server:
        check_scores(rows := run(write_data(tmp_path / "data", 2), tmp_path / "out", server, "openai:m"))
    assert states(rows) == {"ok": 2} and {r["judge"]["version"] for r in rows} == {"mock-1"}


@pytest.mark.parametrize("spec, url, full", [
    ("gemini:m-1", "", "https://generativelanguage.googleapis.com/v1beta/models/m-1:generateContent"),
    ("gemini:models/m?key=1", "http://h:1", "http://h:1/v1beta/models/m%3Fkey%3D1:generateContent"),
    ("openai:org/m", "http://h:1/", "http://h:1/v1/chat/completions"), ("openai:m", "https://h/api/v1/", "https://h/api/v1/chat/completions")])
def test_addresses(spec, url, full):
    protocol, model, base, _ = client.door(JudgeSettings(spec, url))
    assert protocol.url(base, model) == full


def test_half_a_character_anywhere_in_a_record_is_rejected_before_anything_is_paid_for(tmp_path):
    data = write_data(tmp_path / "data", 4)
    rows = [json.loads(line) for line in open(data)]
    bad = [{"id": "\ud800"}, {"note": "\ud800"}, {"answers": [{"text": "a", "comment": "\ud800"}, {"text": "b"}]}]
    data.write_text("".join(json.dumps(row | change) + "\n" for row, change in zip(rows, [{}, *bad])))
    with Server() as server:
        assert len(run(data, tmp_path / "out", server)) == len(server.arrivals) >= 1


# ---- what it says ----------------------------------------------------------------------------------------------

def test_a_run_says_what_it_used_and_what_all_runs_did(tmp_path, capsys):
    data = write_data(tmp_path / "data", 4)
    with Server() as server:
        server.refuse = in_turn((200, SAID | {"usageMetadata": {"promptTokenCount": 10, "candidatesTokenCount": 2, "thoughtsTokenCount": 3}}))
        for every in (12, 24):
            rows = run(data, tmp_path / "out", server, retry_failed=True)
            said = capsys.readouterr().out
            assert re.search(rf"used: 12 calls in .*so far: {every}0 sent, {every * 2} back, {every * 3} of thought", said)
            assert "judged: 0 ok, 4 unparseable\n" in said and "--retry_failed 1 asks for them again" in said
    assert rows[0]["judge"]["usage"] == {"prompt": 10, "answer": 2, "thoughts": 3}


def test_a_dry_run_sends_nothing_locks_nothing_and_counts_what_is_left(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("GEMINI_API_KEY")
    data = write_data(tmp_path / "data", 50)
    with Server() as server:
        settings = annotate.Settings(data=str(data), out=str(tmp_path / "out"), judge="gemini:mock", judge_url=server.url, dry_run=True, rpm=10)
        annotate.run(settings)
        assert not server.arrivals and not (tmp_path / "out").exists()
        said = capsys.readouterr().out
        assert "calls                  50" in said and "5 min" in said and "<candidate_D>" in said and "verbosity" in said
        sent = int(re.search(r"tokens sent +([\d,]+)", said)[1].replace(",", ""))
        assert 50 * wire.IMAGE_TOKENS < sent < 50 * (wire.IMAGE_TOKENS + 1500)

        monkeypatch.setenv("GEMINI_API_KEY", KEY)
        rows = run(data, tmp_path / "out", server)
        with closing(Replies(tmp_path / "out" / "journal.jsonl")):       # another process is judging there
            said = annotate.plan(settings, formats.read(data)[0])
        assert "50 records, 50 judged before" in said and "calls                   0" in said
        assert run(data, tmp_path / "out", server) == rows

        journal = tmp_path / "out" / "journal.jsonl"
        journal.write_text(journal.read_text().replace('"state": "ok"', '"state": "blocked"', 3))
        settings.retry_failed = True
        assert "50 records, 47 judged before" in annotate.plan(settings, formats.read(data)[0])
