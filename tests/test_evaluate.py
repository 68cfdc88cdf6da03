"""The whole harness: two small checkpoints, six made-up benchmarks in the official formats, a judge on this machine.

    python -m pytest tests/test_evaluate.py -q
    REMEDY_BENCHMARKS=DIR python -m pytest ...      every stored-file command on the official questions, too
"""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import checkpoint
import common
import evaluate
import generate
import journal
import judge_server
from benchmarks import harness
from benchmarks.harness import Item, answer
from common import BadInput, read_jsonl
from test_annotate import Sampler
from conftest import ROOT, ended, picture, process, tiny_checkpoint
from data import Pixels, Tokens
from evaluate import BENCHES, Settings
from judge import client as judge
from judge.rubric import RUBRIC
from judge_server import LASTING, Server, expected, fault_of
from test_evaluate_scores import MAKERS, OFFICIAL, answered, items_of, official, write
from toy import items as miniature

SIX = [name for name in BENCHES if name not in ("ifeval", "likelihood")]      # those have files of their own
ALL = ",".join(SIX)


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(judge, "WAIT", 0.01)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Six small benchmarks with pictures made on the fly."""
    folder = tmp_path_factory.mktemp("data")
    for maker in MAKERS.values():
        maker(folder)
    names = [f"mm_vet/images/v1_{k}.png" for k in range(4)] + [f"llava_bench_wild/images/00{k}.jpg" for k in (1, 2)]
    for k, name in enumerate(names + [f"pope/val2014/COCO_{k}.jpg" for k in range(2)]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(30 + k, 40 - 2 * k, seed=k).save(folder / name)
    return str(folder)


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("ckpt") / "llava", "llama"))


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    """A text-only Llama."""
    return str(tiny_checkpoint(tmp_path_factory.mktemp("ckpt") / "vicuna", "llama", text_only=True, seed=3))


def settings_of(data, llava, out) -> Settings:
    return Settings(ckpt=llava, bench=ALL, data_dir=data, out=str(out), judge="openai:fake", max_new=6, workers=4, coverage=1.0, device="cpu")


@pytest.fixture
def settings(data, llava, tmp_path):
    return settings_of(data, llava, tmp_path / "out")


@pytest.fixture(scope="module")
def finished(data, llava, vicuna, tmp_path_factory):
    """Both checkpoints on all six benchmarks -> (settings, what was said, the judge's server, which is gone by now)."""
    said = io.StringIO()
    with Server() as server, redirect_stdout(said), redirect_stderr(said):
        s = replace(settings_of(data, llava, tmp_path_factory.mktemp("finished")), ckpt=f"{vicuna},{llava}", judge_url=server.url)
        evaluate.run(s)
    return s, said.getvalue(), server


@pytest.fixture
def out(finished, llava):
    """Where the results of the one with eyes are."""
    return Path(finished[0].out) / harness.slug(llava)


def results(out) -> dict[str, dict]:
    return {r["bench"]: r for r in json.loads((Path(out) / "results.json").read_text())["results"]}


def where(s) -> Path:
    """The folder of the one checkpoint, or of the stored answers."""
    return Path(s.out) / harness.slug(Path(s.answers).stem if s.answers else s.ckpt)


def files(out) -> dict[str, bytes]:
    """Everything that is written for others to read: answers and judgments in their own formats, and the scores."""
    found = {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.suffix in (".jsonl", ".json")
             and "journal" not in p.name and p.name != "results.json"}
    scores = [path.read_text().split('"results"')[1] for path in sorted(Path(out).rglob("results.json"))]
    return found | {"scores": "".join(scores).encode()}


def code(*argv) -> tuple[int, str]:
    """The exit code of the command in this process, and what it would say."""
    sys.argv = ["evaluate.py", *map(str, argv)]
    try:
        common.main(Settings, evaluate.run)
    except SystemExit as stop:
        return 1 if isinstance(stop.code, str) else stop.code or 0, str(stop.code)
    return 0, ""


# ---- end to end ------------------------------------------------------------------------------------------------

def test_both_kinds_of_checkpoint_run_through_all_six(finished, llava, vicuna):
    s, said, server = finished
    assert not server.complaints
    text, both = (Path(s.out) / harness.slug(name) for name in (vicuna, llava))
    assert set(results(both)) == set(SIX) and set(results(text)) == {"mt_bench", "alpaca_eval"}
    assert all(f"vicuna sees no pictures; left out: {name}" in said for name in ("mm_vet", "llava_bench", "pope", "mmbench"))
    assert "openai:fake (mock-1)" in said and "our own wording; there is no prompt.txt" in said
    for found in (*results(both).values(), *results(text).values()):
        first = next(iter(found["scores"].values()))
        assert found["coverage"] == 1 and first["mean"] is not None and first["n"] and found["total"] == found["ok"] and found["length"] > 0
        assert f"{first['mean']:{BENCHES[found['bench']].FORM}}" in said and found["cut"] is not None
    m = harness.slug(llava)
    for name in (f"mt_bench/model_answer/{m}.jsonl", "mt_bench/model_judgment/openai-fake_single.jsonl", "alpaca_eval/model_outputs.json",
                 "alpaca_eval/annotations.json", f"mm_vet/{m}.json", f"mm_vet/{m}_openai-fake-grade-1runs.json", f"llava_bench/answers/{m}.jsonl",
                 f"llava_bench/reviews/{m}_openai-fake.jsonl", f"pope/{m}.jsonl", f"mmbench/{m}.jsonl"):
        assert (both / name).is_file(), name
    assert all(n == 1 for n in server.asked.values()), "nothing is asked twice"
    page = (ROOT / "docs/benchmarks.md").read_text()
    assert all(f"`{figure}`" in page for found in results(both).values() for figure in found["scores"]), "each figure is explained"
    grades = [1 + judge_server.digest("grade", r["user_prompt"]) % 10 for r in read_jsonl(both / "mt_bench/model_judgment/openai-fake_single.jsonl")]
    assert len(grades) == 6 and results(both)["mt_bench"]["scores"]["score"]["mean"] == sum(grades) / 6


def test_what_was_written_scores_the_same_when_it_is_read_back(out, data, llava, capsys, tmp_path):
    for name in SIX:
        kind = BENCHES[name]
        path = out / name / (kind.JUDGMENTS or kind.ANSWERS).format(model=harness.slug(llava), judge="openai-fake")
        stored = {"judgments" if kind.JUDGMENTS else "answers": str(path)}
        evaluate.run(Settings(bench=name, data_dir=data, json=True, out=str(tmp_path), **stored))
        (again,), = json.loads(capsys.readouterr().out).values()
        assert again["scores"] == results(out)[name]["scores"] and again["coverage"] == 1
        assert not kind.JUDGMENTS or again["judge"] == path.name


def test_stored_answers_can_be_judged_without_a_model(settings, out, monkeypatch):
    monkeypatch.setattr(checkpoint, "load", lambda *a: pytest.fail("a model is loaded"))
    path = out / "mt_bench/model_answer" / f"{harness.slug(settings.ckpt)}.jsonl"
    with Server() as server:
        stored = replace(settings, judge_url=server.url, bench="mt_bench", answers=str(path))
        evaluate.run(stored)
    one, two = results(out)["mt_bench"], results(where(stored))["mt_bench"]
    assert one["scores"] == two["scores"] and one["length"] == two["length"] and two["cut"] is None, "such a file says nothing of what was cut off"


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    s, _, server = finished
    before, calls = files(s.out), len(server.arrivals)
    monkeypatch.setattr(checkpoint, "load", lambda *a: pytest.fail("a model is loaded"))
    evaluate.run(s)
    assert files(s.out) == before and len(server.arrivals) == calls


def test_an_answer_that_equals_the_reference_is_a_draw_that_nobody_is_asked_about(settings, data, tmp_path):
    rows = [{"instruction": item.row["instruction"], "output": item.row["output"]} for item in items_of(data, BENCHES["alpaca_eval"])]
    with Server() as server:
        stored = replace(settings, bench="alpaca_eval", answers=str(write(tmp_path / "same.json", rows)), judge_url=server.url)
        evaluate.run(stored)
    assert not server.asked and results(where(stored))["alpaca_eval"]["scores"]["win rate"]["mean"] == 50


def test_answered_but_not_judged(settings, capsys):
    evaluate.run(replace(settings, judge="", bench="mm_vet"))
    assert "not judged" in capsys.readouterr().out and results(where(settings))["mm_vet"]["scores"] == {}


# ---- batches, finish reasons, turns ----------------------------------------------------------------------------

def uneven_items(data: str, n: int = 24) -> list[Item]:
    """Questions of uneven length, half with a picture, some sampled, of one and of two turns."""
    words, out = "Describe the picture in one sentence . Write a short poem about the sea , which answer is better and why ?".split(), []
    for k in range(n):
        text = " ".join(words[k % 7:k % 7 + 1 + 5 * k % 17])
        images = [f"COCO_{k % 2}.jpg"] if k % 2 else []
        out.append(Item(f"q{k}", ["<image>\n" * len(images) + text] + ["And why ?"] * (k % 3 == 0), {}, images, f"{data}/pope/val2014",
                        0.7 if k % 4 == 0 else 0.0, 12))
    return out


def test_batches_of_1_4_and_16_give_the_same_answers_token_for_token(data, llava, monkeypatch):
    """The ids themselves, for decoding could hide a difference; greedy and sampled, one and two turns, with and without pictures."""
    model, ids, said = checkpoint.load(llava), {}, {}
    tokens, original = Tokens(Path(llava), model.config), generate.generate
    for size in (1, 4, 16):
        ids[size] = {}

        def spy(model, prompts, *rest, **how):
            rows = original(model, prompts, *rest, **how)
            assert len(prompts) <= size
            for prompt, seeds, (found,) in zip(prompts, how["seeds"], rows):
                ids[size][tuple(prompt), tuple(seeds)] = (tuple(found.ids), found.finish)
            return rows
        monkeypatch.setattr(generate, "generate", spy)
        said[size] = answer(uneven_items(data), lambda: model, tokens, Pixels(model.config), batch=size)
    assert ids[1] == ids[4] == ids[16] and len(ids[1]) == 32 and said[1] == said[4] == said[16]
    texts = [text for item in said[1] for text in item.texts]
    assert len(texts) == 32 and len(set(texts)) > 28 and {finish for item in said[1] for finish in item.finishes} <= {"stop", "length"}


def test_cut_off_answers_are_stored_and_counted(out, llava):
    m = harness.slug(llava)
    stored = {
        "mt_bench": [finish for row in harness.load(out / f"mt_bench/model_answer/{m}.jsonl") for finish in row["choices"][0]["finish"]],
        "alpaca_eval": [row["finish"] for row in harness.load(out / "alpaca_eval/model_outputs.json")],
    }
    for name, finishes in stored.items():
        assert results(out)[name]["cut"] == finishes.count("length") > 0 and set(finishes) <= {"stop", "length"}
    found = evaluate.summary("mm_vet", [Item("a", ["?"], texts=["xx", "xxxx", "xxxxxx"], finishes=["stop", "length", "length"])], None)
    assert (found["cut"], found["length"]) == (2, 4)


def prompts_of(s: Settings, monkeypatch) -> list[str]:
    """Every prompt that the model is given, decoded, and the pictures with it."""
    seen, original = [], harness.sample_answers

    def spy(model, tokens, pixels, trees, **how):
        for tree in trees:
            seen.append((tokens.tokenizer.decode(tree.ids(), skip_special_tokens=False), tree.images, how["temperature"]))
        return original(model, tokens, pixels, trees, **how)
    monkeypatch.setattr(harness, "sample_answers", spy)
    evaluate.run(replace(s, judge=""))
    return seen


def test_the_second_turn_holds_the_models_own_first_answer(settings, monkeypatch):
    seen = prompts_of(replace(settings, bench="mt_bench"), monkeypatch)
    rows = harness.load(where(settings) / "mt_bench/model_answer" / f"{harness.slug(settings.ckpt)}.jsonl")
    assert len(seen) == 6 and sorted(t for *_, t in seen) == [0, 0, 0.1, 0.1, 0.7, 0.7]
    for n, row in zip((81, 111, 151), rows):
        text = f"USER: first {n}? ASSISTANT: {row['choices'][0]['turns'][0]}</s>USER: second {{{n}}}? ASSISTANT:"
        assert sum(text in prompt.replace("</s> ", "</s>") for prompt, *_ in seen) == 1


def test_a_steerlm_model_is_asked_for_its_scores(settings, tmp_path, monkeypatch):
    folder = Path(shutil.copytree(settings.ckpt, tmp_path / "steered"))
    write(folder / "steer.json", {"text": " give {helpfulness} {correctness} {coherence} {complexity} {verbosity}", "grades": list("vwxyz"),
                                  "target": dict.fromkeys(RUBRIC.attributes, 4)})
    for target, asked in (("", "z z z z z"), ("4 4 4 4 0", "z z z z v")):
        seen = prompts_of(replace(settings, ckpt=str(folder), bench="mt_bench", target=target), monkeypatch)
        assert len(seen) == 6 and all(f"? give {asked} ASSISTANT:" in prompt for prompt, *_ in seen)


# ---- failures --------------------------------------------------------------------------------------------------

def test_calls_that_fail_in_every_way_leave_the_mean_over_the_rest(tmp_path, capsys, monkeypatch):
    """120 MT-Bench-like questions, 30 % of the calls meet a fault, every lasting kind among them: five states, no invented grade."""
    n, folder = 120, tmp_path / "data"
    MAKERS["mt_bench"](folder)
    write(folder / "mt_bench/question.jsonl", [{"question_id": 200 + k, "category": "writing", "turns": [f"say {k}", f"again {k}"]} for k in range(n)])
    answers = write(tmp_path / "m.jsonl", [{"question_id": 200 + k, "choices": [{"index": 0, "turns": [f"a {k}", f"b {k}"]}]} for k in range(n)])
    argv = ["--bench", "mt_bench", "--data_dir", folder, "--answers", answers, "--judge", "gemini:fake", "--out", tmp_path / "out", "--workers", 8,
            "--timeout", 1]
    monkeypatch.setenv("GEMINI_API_KEY", "a-key-of-twenty-characters")
    with Server(faults=0.3, stall=1.2, seed=10) as server:
        status, said = code(*argv, "--judge_url", server.url)
    table, found = capsys.readouterr().out, results(tmp_path / "out/m")["mt_bench"]
    rows = read_jsonl(tmp_path / "out/m/mt_bench/model_judgment/gemini-fake_single.jsonl")
    faults = {(r["question_id"], r["turn"]): fault_of(r["user_prompt"], 0.3, 10) for r in rows}
    states = {key: expected(kind) if kind else "ok" for key, kind in faults.items()}
    assert set(LASTING) <= set(faults.values()), "every lasting fault is met"
    assert found["states"] == {s: list(states.values()).count(s) for s in set(states.values())} and len(found["states"]) == 5
    good = [1 + judge_server.digest("grade", r["user_prompt"]) % 10 for r in rows if states[r["question_id"], r["turn"]] == "ok"]
    assert found["scores"]["score"]["mean"] == found["scores"]["strict"]["mean"] == sum(good) / len(good) and found["scores"]["score"]["n"] == len(good)
    assert found["coverage"] == len(good) / 240 and all(r["score"] == -1 for r in rows if states[r["question_id"], r["turn"]] != "ok")
    assert f"{found['states']['failed']} failed" in table and f"the first of them: {found['trouble'][:150]}" in table and len(found["trouble"]) > 5
    assert "a-key-of-twenty" not in "".join(p.read_text() for p in (tmp_path / "out").rglob("*") if p.is_file()) + table + said
    assert status == 1 and "less than --coverage 95% was scored" in said and f"{len(good) / 240:.1%}" in table
    assert code(*argv, "--judge_url", server.url, "--coverage", f"{len(good) / 240 - 0.001}")[0] == 0, "and nothing is asked again: the server is gone"


@pytest.mark.parametrize("name, bad", [("alpaca_eval", "I cannot rank these."), ("mm_vet", "2"), ("llava_bench", "0 99")])
def test_a_reply_that_says_nothing_is_no_score(settings, data, name, bad, monkeypatch):
    """The judge never says anything usable about one answer in each benchmark."""
    real, victim = judge_server.opinion, []

    def opinion(text, body, kind=""):
        victim[:] = victim or [text]
        return bad if text == victim[0] else real(text, body, kind)
    monkeypatch.setattr(judge_server, "opinion", opinion)
    with Server() as server, pytest.raises(BadInput, match="less than --coverage"):
        evaluate.run(replace(settings, bench=name, judge_url=server.url))
    found, total = results(where(settings))[name], len(items_of(data, BENCHES[name]))
    assert found["states"] == {"ok": total - 1, "unparseable": 1} and found["coverage"] == (total - 1) / total
    assert next(iter(found["scores"].values()))["n"] == total - 1 and server.asked[victim[0]] == judge.ASKS


def test_a_missing_picture_is_not_an_answer(settings, data, tmp_path, capsys):
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    os.remove(copy / "pope/val2014/COCO_1.jpg")
    with pytest.raises(BadInput, match="pope 50.0%"):
        evaluate.run(replace(settings, bench="pope", data_dir=str(copy), coverage=0.6, judge=""))
    found = results(where(settings))["pope"]
    assert found["scores"]["F1"]["n"] == 12 and len(found["unanswered"]) == 12 and "12 not answered (image" in capsys.readouterr().out
    evaluate.run(replace(settings, bench="pope", data_dir=str(copy), coverage=0.5, judge=""))


def test_who_failed_is_not_asked_its_next_turn():
    turns = []

    def ask(items):
        turns.append([item.id for item in items])
        return [(item, "no reply" if item.id == 1 else {"text": "a", "finish": "stop"}) for item in items]

    failed, whole = harness.in_turns([harness.Item(1, ["x", "y"]), harness.Item(2, ["x", "y"])], ask)
    assert turns == [[1, 2], [2]] and failed.failed == "no reply" and failed.texts == [] and whole.texts == ["a", "a"]


def test_a_prompt_that_is_too_long_and_an_answer_that_would_be_a_control_token(llava, monkeypatch):
    config, _ = checkpoint.read_config(Path(llava))
    monkeypatch.setattr(harness, "sample_answers", lambda m, t, p, trees, **how: [[{"text": "see <image>", "finish": "stop"}] for _ in trees])
    items = [Item("long", ["word " * 3000]), Item("short", ["word"]), Item("marked", ["first", "second"])]
    long, short, marked = answer(items, lambda: None, Tokens(Path(llava), config), Pixels(config))
    assert long.texts == [] and "more than the model was built for" in long.failed
    assert short.texts == ["see <image>"] and not short.failed
    assert marked.texts == [] and "message 1 contains <image>" in marked.failed, "its own first answer cannot be shown to it"


# ---- interruptions ---------------------------------------------------------------------------------------------

def slowly(argv: list):
    """The command with a breath before each line of a journal, so that a kill finds it at work."""
    append = journal.Journal.append
    journal.Journal.append = lambda *row: time.sleep(0.01) or append(*row)
    code(*argv)


def kill_when(path: Path, lines: int, argv: list) -> None:
    """Run the command and kill -9 it when its journal has so many lines."""
    with process(partial(slowly, argv)) as child:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (path.exists() and path.read_bytes().count(b"\n") >= lines):
            time.sleep(0.005)
        child.kill()
        assert ended(child) == -signal.SIGKILL, "it was over before it could be killed"


def test_kill_9_while_answering_and_while_judging(settings, data, tmp_path, one_thread):
    flags = lambda out, url: ["--ckpt", settings.ckpt, "--bench", "mt_bench,alpaca_eval,llava_bench", "--data_dir", data, "--judge", "openai:fake",
                              "--judge_url", url, "--max_new", "6", "--batch", "2", "--workers", "2", "--device", "cpu", "--out", out]
    with Server() as server:
        assert code(*flags(tmp_path / "whole", server.url)) == (0, "")
        asked = dict(server.asked)
    with Server(delay=0.1) as server:
        out = tmp_path / "killed"
        own = out / harness.slug(settings.ckpt)
        kill_when(own / "answers-journal.jsonl", 9, flags(out, server.url))
        answered = (own / "answers-journal.jsonl").read_bytes().count(b"\n")
        assert 9 <= answered < 15 and not (out / "judge-journal.jsonl").exists()
        with open(own / "answers-journal.jsonl", "ab") as f:
            f.write(b'{"key": "torn')
        kill_when(out / "judge-journal.jsonl", 5, flags(out, server.url))
        assert not (own / "results.json").exists()
        server.delay = 0
        assert code(*flags(out, server.url)) == (0, "")
        again = sum(server.asked.values()) - len(asked)
    assert files(out) == files(tmp_path / "whole") and set(server.asked) == set(asked)
    assert again <= 2, "only the calls in flight were asked twice"


def test_what_answers_depend_on_is_in_their_key(settings, tmp_path, monkeypatch):
    """Length, seed, precision, and another checkpoint in the same folder."""
    asked, original = [], harness.sample_answers
    monkeypatch.setattr(harness, "sample_answers", lambda *a, **how: asked.append(how["max_new"]) or original(*a, **how))
    ckpt = shutil.copytree(settings.ckpt, tmp_path / "ckpt")
    settings = replace(settings, bench="mt_bench", judge="", max_new=4, ckpt=str(ckpt))
    for change in ({}, {"max_new": 5}, {"seed": 1}, {"dtype": "bfloat16"}, {"ckpt": "another"}):
        if "ckpt" in change:
            evaluate.run(settings)
            assert not asked
            shutil.rmtree(ckpt)
            tiny_checkpoint(ckpt, "llama", seed=5)
            change = {}
        evaluate.run(replace(settings, **change))
        assert asked, f"{change} was answered from the journal of another run"
        asked.clear()


def test_another_picture_of_the_same_name_is_asked_about_anew(settings, data, tmp_path, monkeypatch):
    copy, seen = Path(shutil.copytree(data, tmp_path / "copy")), []
    settings = replace(settings, bench="llava_bench", judge="", data_dir=str(copy))
    evaluate.run(settings)
    original = harness.sample_answers
    monkeypatch.setattr(harness, "sample_answers", lambda *a, **how: seen.append(a) or original(*a, **how))
    evaluate.run(settings)
    assert not seen
    picture(50, 20, seed=9).save(copy / "llava_bench_wild/images/002.jpg")
    evaluate.run(settings)
    assert len(seen) == 1


# ---- stored files on the official questions --------------------------------------------------------------------

def synthetic(name: str, items: list[Item], folder: Path) -> tuple[dict, dict]:
    """Stored files as official tools write them, by a rule known here -> (flags, figures they must give)."""
    if name == "mt_bench":
        rows = [{"question_id": i.id, "model": "m", "judge": ["gpt-4", "x"], "user_prompt": "", "turn": t,
                 "judgment": f"Rating: [[{1 + i.id % 7 + t}]]", "score": 1 + i.id % 7 + t} for i in items for t in (1, 2)]
        return {"judgments": write(folder / "gpt-4_single.jsonl", rows)}, {"score": np.mean([r["score"] for r in rows])}
    if name == "alpaca_eval":
        rows = [{"instruction": i.row["instruction"], "output_1": i.row["output"], "output_2": "x" * (k % 900), "preference": 1 + (k % 3 > 0), "annotator": "a"}
                for k, i in enumerate(items)]
        (folder / "annotations.json").write_text(json.dumps(rows))
        return {"judgments": folder / "annotations.json"}, {"win rate": 100 * np.mean([r["preference"] - 1 for r in rows])}
    if name == "mm_vet":
        rows = {i.id: {"model": ["gpt-4-0613"], "content": [str(k % 11 / 10)], "score": [k % 11 / 10]} for k, i in enumerate(items)}
        ocr = [k % 11 / 10 for k, i in enumerate(items) if "ocr" in i.row["capability"]]
        return {"judgments": write(folder / "m_gpt-4-grade-1runs.json", rows)}, {"total": np.mean([k % 11 / 10 for k in range(218)]) * 100, "ocr": np.mean(ocr) * 100}
    if name == "llava_bench":
        rows = [{"id": k, "question_id": i.id, "category": f"llava_bench_{i.row['category']}", "content": f"9 {1 + k % 9}", "tuple": [9.0, 1.0 + k % 9]}
                for k, i in enumerate(items)]
        return {"judgments": write(folder / "review.jsonl", rows)}, {"relative": round(round(np.mean([1 + k % 9 for k in range(60)]), 3) / 9 * 100, 1)}
    if name == "pope":
        rows = [{"question_id": i.id, "text": "Yes" if i.id % 3 else "No"} for i in items]
        f1 = []
        for split in ("adversarial", "popular", "random"):
            mine = [(i.row["label"] == "yes", i.id % 3 > 0) for i in items if i.row["category"] == split]
            f1.append(2 * sum(a and b for a, b in mine) / (sum(a for a, _ in mine) + sum(b for _, b in mine)))
        return {"answers": write(folder / "pope.jsonl", rows)}, {"F1": np.mean(f1)}
    rows = [{"question_id": i.id, "text": i.row["answer"] if i.id % 5 else "E"} for i in items]
    return {"answers": write(folder / "mmbench.jsonl", rows)}, {
        "circular": np.mean([n % 5 > 0 for n in {i.id % 1000000 for i in items}])}    # a million is a multiple of five


@official
@pytest.mark.parametrize("name", SIX)
def test_every_stored_file_command_on_the_official_questions(name, tmp_path, capsys):
    stored, wanted = synthetic(name, items_of(OFFICIAL, BENCHES[name]), tmp_path)
    flags = [x for flag, path in stored.items() for x in (f"--{flag}", path)]
    assert code("--bench", name, "--data_dir", OFFICIAL, *flags, "--json", "--out", tmp_path / "out") == (0, "")
    (found,), = json.loads(capsys.readouterr().out).values()
    for figure, value in wanted.items():
        assert abs((found["scores"] | found["categories"] if figure == "ocr" else found["scores"])[figure]["mean"] - value) < 1e-9
    assert found["coverage"] == 1


def test_a_judgment_file_with_several_models_scores_each(tmp_path, capsys):
    rows = [{"question_id": 81, "turn": 1, "score": s, "model": m, "judge": ["gpt-4", "single-v1"], "judgment": f"[[{s}]]"} for m, s in (("a", 3), ("b", 8))]
    assert code("--bench", "mt_bench", "--judgments", write(tmp_path / "gpt-4_single.jsonl", rows), "--json") == (0, "")
    found = json.loads(capsys.readouterr().out)
    assert {m: r[0]["scores"]["score"]["mean"] for m, r in found.items()} == {"a": 3, "b": 8} and found["a"][0]["judge"] == "gpt-4_single.jsonl"


@pytest.mark.parametrize("flags, why", [
    ({"bench": "mt_bank"}, "choose among mm_vet"), ({"bench": "pope,mmbench", "answers": "x"}, "with --answers or --judgments, one"),
    ({"bench": "pope", "judgments": "x"}, "needs no judge; give --ckpt or --answers"), ({"bench": "pope"}, "--data_dir: pope/ holds no coco_pope_adversarial.json"),
    ({"bench": "mm_vet", "judgments": "x"}, "--data_dir: mm_vet/ holds no mm-vet.json"), ({"split": "train"}, "--split is dev or test"),
    ({"batch": 0}, "--batch at least 1"), ({"bench": "mt_bench", "judge": "oracle"}, "say gemini:MODEL"), ({"compare": ("nowhere",)}, "nowhere/results.json: cannot be read"),
    ({"bench": "alpaca_eval", "judgments": "nowhere.json"}, "nowhere.json: cannot be read")])
def test_the_door(flags, why, tmp_path):
    with pytest.raises(BadInput, match=why):
        evaluate.run(Settings(out=str(tmp_path), **flags))


def test_answers_to_other_questions_are_refused(data, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"question_id": "x", "text": "Yes"}])
    with pytest.raises(BadInput, match="answers none of the questions of pope"):
        evaluate.run(Settings(bench="pope", data_dir=data, answers=str(path), out=str(tmp_path)))


def test_official_files_that_do_not_fit_each_other(settings, data, tmp_path):
    copy = Path(shutil.copytree(data, tmp_path / "copy"))
    write(copy / "llava_bench_wild/context.jsonl", [{"id": "001", "image": "001.jpg", "caption": "a"}])
    with pytest.raises(BadInput, match="context.jsonl: has no '002.jpg'; is it the benchmark's own file"):
        evaluate.run(replace(settings, bench="llava_bench", data_dir=str(copy), judge_url="http://127.0.0.1:1"))
    for name, file, text in (("mt_bench", "question.jsonl", '{"question_id": 1}'), ("mmbench", "dev.tsv", "index\tanswer\n1\tA"),
                             ("pope", "llava_pope_test.jsonl", '{"image": "a.jpg", "text": "?", "category": "random"}')):
        write(copy / name / file, text)
        with pytest.raises(BadInput, match=f"{name}/.*((category|question_id) is (missing|null), but must be|has no '?.*; is it the benchmark's own)"):
            evaluate.run(replace(settings, bench=name, data_dir=str(copy), judge=""))


def test_a_checkpoint_that_is_not_there_is_noticed_before_the_first_is_asked(settings):
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        evaluate.run(replace(settings, ckpt=f"{settings.ckpt},nowhere", judge=""))
    assert not Path(settings.out).exists()


# ---- the miniature ---------------------------------------------------------------------------------------------

def test_a_second_checkpoint_that_is_missing_is_told_before_the_first_takes_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(miniature, "measure", lambda *a: pytest.fail("it began"))
    with pytest.raises(BadInput, match="--ckpt nowhere: no such folder"):
        evaluate.run(Settings(ckpt="toy,nowhere", out=str(tmp_path)))


def test_without_arguments_the_miniature_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(miniature, "ITEMS", {"text": 22, "exist": 4, "attribute": 4, "describe": 3, "choice": 3})
    assert code("--out", tmp_path) == (0, "")
    head, vicuna, llava, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == list(miniature.COLUMNS) and vicuna.split()[0] == "toy/vicuna" and vicuna.split()[-1] == "-" and "±" in llava
    said = {r["id"]: r["answers"] for r in read_jsonl(tmp_path / "toy-vicuna" / "answers.jsonl")}
    assert len(said) == 22 and all(len(pair) == 2 for pair in said.values())
    assert json.loads((tmp_path / "toy-llava" / "scores.json").read_text())["scores"]["toy/llava"]["exist"]["n"] == 4

    # One at a time into the same folder: neither is lost.
    assert code("--out", tmp_path, "--ckpt", "toy/vicuna") == (0, "")
    found = [json.loads((tmp_path / name / "scores.json").read_text())["scores"] for name in ("toy-vicuna", "toy-llava")]
    assert [list(scores) for scores in found] == [["toy/vicuna"], ["toy/llava"]]


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="half a minute; SLOW=1 runs it")
def test_the_whole_of_it_takes_less_than_a_minute(tmp_path):
    began = time.monotonic()
    done = subprocess.run([sys.executable, str(ROOT / "evaluate.py"), "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0 and time.monotonic() - began < 60
    story = json.loads((ROOT / "results/story.jsonl").read_text().split("\n")[0])["scores"]     # it begins with the same two models
    scores = [json.loads((tmp_path / name / "scores.json").read_text())["scores"][f"toy/{name[4:]}"] for name in ("toy-vicuna", "toy-llava")]
    for ours, theirs in zip(scores, (story["Vicuna-mini"], story["LLaVA-mini"])):
        assert {name: figure["mean"] for name, figure in ours.items()} == pytest.approx({name: figure["mean"] for name, figure in theirs.items()})


# ---- side by side ----------------------------------------------------------------------------------------------

def test_checkpoints_that_come_one_by_one_keep_their_results_and_can_be_compared(settings, data, tmp_path, capsys):
    folders = []
    for name in ("a", "b"):
        stored = write(tmp_path / f"{name}.jsonl", [{"question_id": item.id, "text": "yes" if name == "a" else "no"} for item in items_of(data, BENCHES["pope"])])
        evaluate.run(replace(settings, bench="pope", answers=str(stored), judge=""))
        folders.append(f"{settings.out}/{name}")
    capsys.readouterr()
    evaluate.run(Settings(compare=tuple(folders), out=str(tmp_path / "compare")))
    rows = [line.split()[:2] for line in capsys.readouterr().out.splitlines() if line.split()[:1] in (["a"], ["b"])]
    assert len(rows) == 2 and rows[0][1] != rows[1][1]


def test_compare_shows_the_papers_layout(finished, llava, vicuna, tmp_path, capsys):
    for name, ckpt in (("a", llava), ("b", vicuna)):
        shutil.copytree(Path(finished[0].out) / harness.slug(ckpt), tmp_path / name)
    path = tmp_path / "a" / "results.json"                               # a random model is never right in every rotation
    path.write_text(path.read_text().replace('"circular": {\n     "mean": 0.0', '"circular": {\n     "mean": 0.674'))
    capsys.readouterr()
    argv = ["--compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c"]
    assert code(*argv) == (0, "")
    said = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in said.splitlines()}
    assert lines["DPO"].split()[1:] == ["41.2", "79.1", "0.870", "66.8", "6.73", "86.4"] and lines["Vicuna-1.5"].split()[1:5] == ["-"] * 4
    one = results(tmp_path / "a")
    assert f"{one['mt_bench']['scores']['score']['mean']:.2f} ±" in lines["a"] and "67.4 ±" in lines["a"]
    assert "openai:fake (mock-1)" in lines["a"] and lines["b"].split()[1:5] == ["-"] * 4 and "cannot be compared down" not in said
    assert (tmp_path / "c/table.txt").read_text() == said.split("table: ")[0]
    other = json.loads((tmp_path / "b" / "results.json").read_text())
    other["results"][0] |= {"versions": ["mock-2"], "coverage": 0.9}
    (tmp_path / "b" / "results.json").write_text(json.dumps(other))
    code(*argv)
    said = capsys.readouterr().out
    assert "judged by different judges: mt_bench; " in said and "!: not everything" in said and re.search(r"^b .*\d!", said, re.M)


# ---- a server that has the model --------------------------------------------------------------------------------

def test_a_model_behind_a_server_answers_benchmarks_and_is_not_asked_twice(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-key-of-twenty-letters")
    server = Sampler()
    ckpt = f"openai:llava@{server.url}"
    s = Settings(ckpt=ckpt, bench="mt_bench,pope", data_dir=data, out=str(tmp_path / "out"))
    evaluate.run(s)
    calls = sum(server.calls.values())
    [answers] = (tmp_path / "out").glob("*/mt_bench/model_answer/*.jsonl")
    rows = [json.loads(line) for line in open(answers)]
    second = next(body for body in server.bodies if len(body["messages"]) == 3)
    assert second["messages"][1] == {"role": "assistant", "content": f"{second['messages'][0]['content']} None"}, "its own first answer"
    assert all(len(row["choices"][0]["turns"]) == 2 for row in rows)
    pope = [body for body in server.bodies if isinstance(body["messages"][0]["content"], list)]
    assert pope and all([part["type"] for part in body["messages"][0]["content"]] == ["image_url", "text"] for body in pope)
    evaluate.run(s)
    assert sum(server.calls.values()) == calls
    assert not any(b"sk-a-key" in path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file())


@pytest.mark.parametrize("name", ["../private.png", "/private.png"])
def test_a_picture_outside_its_folder_is_sent_to_no_server(name, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a-key-of-twenty-letters")
    root = tmp_path / "images"
    root.mkdir()
    for k in (root / "fine.png", tmp_path / "private.png"):
        picture(8, 8).save(k)
    name = name if name[0] == "." else str(tmp_path) + name
    items = [Item("out", ["<image>\nWhat?"], images=[name], root=str(root)), Item("in", ["<image>\nWhat?"], images=["fine.png"], root=str(root))]
    server = Sampler()
    with closing(judge.Replies(tmp_path / "journal.jsonl")) as replies:
        client = judge.Judge(judge.JudgeSettings(judge="openai:llava", judge_url=server.url), replies)
        outside, inside = harness.answer_from_server(items, client)
    assert "leads outside" in outside.failed and not outside.texts and inside.texts and len(server.bodies) == 1
