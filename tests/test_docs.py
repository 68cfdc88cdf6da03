"""The pages in docs/ tell the truth: the walkthrough's outputs are real, every fork applies and runs.

    python -m pytest tests/test_docs.py -q
"""
import doctest
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, process, rows_of, tiny_checkpoint

FORKS = dict(re.findall(r"<!-- fork: (\w+) -->\n\n```diff\n(.*?)```\n", (ROOT / "docs/forking.md").read_text(), re.S))
COMMANDS = re.findall(r"^    python (\w+\.py .*)", (ROOT / "docs/forking.md").read_text(), re.M)


# ---- one record through every room ---------------------------------------------------------------------------------

def test_the_walkthrough_prints_what_it_shows():
    failed, tried = doctest.testfile(str(ROOT / "docs/walkthrough.md"), module_relative=False)
    assert not failed and tried > 40


def test_the_walkthrough_shows_its_records_picture():
    """Six times as large, the nine patches ruled."""
    from toy import tasks
    from toy.world import render
    record = tasks.preference_prompts(44, seed=0)[43]
    picture = render(record["truth"]["scene"], record["truth"]["seed"]).resize((288, 288), Image.Resampling.NEAREST)
    for k in (96, 192):
        picture.paste((120, 120, 120), (k, 0, k + 1, 288))
        picture.paste((120, 120, 120), (0, k, 288, k + 1))
    shown = np.asarray(Image.open(ROOT / "docs/star.png"), dtype=int)
    assert abs(np.asarray(picture, dtype=int) - shown).mean() < 1, "beyond what another Pillow draws"


# ---- forks -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """A file of image questions of the miniature, each with the full answer, the bare one, and one that is wrong."""
    from common import write_jsonl
    from toy import oracle, tasks
    folder = tmp_path_factory.mktemp("judged")
    records = tasks.draw(tasks.preference_prompts(8, seed=0), folder)
    for record in records:
        turn = record["truth"]["turns"][-1]
        answers = [{"text": text} for text in (turn["full"], turn["bare"], "i see one object .")]
        for answer in answers:
            answer["scores"], _ = oracle.judge(record, answer["text"])
        record["answers"] = answers
        del record["root"]
    write_jsonl(folder / "records.jsonl", records)
    return folder / "records.jsonl"


def forked(name: str, folder):
    """A copy of the repository with a fork's diff applied."""
    copy = folder / "copy"
    copy.mkdir()
    for path in ROOT.glob("*.py"):
        shutil.copy(path, copy)
    for part in ("benchmarks", "judge", "kernels", "toy"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__", "llava", "vicuna"))
    (copy / "toy/llava").symlink_to(ROOT / "toy/llava")
    done = subprocess.run(["git", "apply", "-"], input=FORKS[name], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, f"docs/forking.md: the fork {name!r} does not apply any more\n{done.stderr}"
    return copy


def script(copy, *line: str):
    """Run `python line` as if in a terminal in `copy`; for a process of its own, which has none of our modules yet."""
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    sys.argv = list(line)
    runpy.run_path(line[0], run_name="__main__")


def run(copy, *line: str) -> str:
    """The same in such a process -> what it said."""
    log = copy / "log.txt"
    with process(partial(script, copy, *line), log) as child:
        child.join()
    assert child.exitcode == 0, log.read_text()[-2000:]
    return log.read_text()


def train(copy, line: str, data, *more: str) -> str:
    """A command of the page, shortened: two steps on eight records."""
    flags = re.sub(r"--(data|out|batch|epochs) \S+", "", line).split()
    return run(copy, *flags, "--data", str(data), "--out", "out", "--batch", "4", "--steps", "2",
               "--dtype", "float32", *more)


def command(words: str) -> str:
    """The page's command that has these words."""
    [found] = [line for line in COMMANDS if words in line]
    return found


def changed(name: str) -> int:
    """Lines that a fork adds or removes."""
    return len(re.findall(r"^[+-](?!--|\+\+)", FORKS[name], re.M))


def test_the_loss_that_the_page_shows_is_the_one_that_stands_there():
    [shown] = re.findall(r"```python\n(.*?)```", (ROOT / "docs/forking.md").read_text(), re.S)
    assert shown in (ROOT / "dpo.py").read_text()


def test_another_preference_loss_is_one_function(tmp_path, judged):
    assert changed("loss") <= 10
    said = train(forked("loss", tmp_path), command("--loss dpop"), judged)
    assert "step-0 contract holds: loss 0.6931" in said               # a GPU's products err a little


def test_simpo_is_15_lines_and_computes_no_reference(tmp_path, judged):
    assert changed("simpo") <= 15
    copy = forked("simpo", tmp_path)
    train(copy, command("--loss simpo"), judged)
    assert (copy / "out/model").exists() and not (copy / "out/reference.jsonl").exists()
    assert abs(rows_of(copy / "out/metrics.jsonl")[0]["margin"]) > 0.1, "its margin is not 0 at step 0"


def test_kto_is_100_lines_and_starts_at_one_half(tmp_path, judged):
    assert changed("kto") <= 100
    copy = forked("kto", tmp_path)
    train(copy, command("kto.py"), judged)
    first, second = rows_of(copy / "out/metrics.jsonl")
    assert first["loss"] == pytest.approx(0.5, abs=1e-4) and first["z"] == pytest.approx(0, abs=1e-4)
    assert second["loss"] < 0.5 and (copy / "out/model").exists()


def test_another_reward_is_one_function(tmp_path, judged):
    assert changed("grpo") <= 25
    copy = forked("grpo", tmp_path)
    data = judged.with_name("golden.jsonl")
    data.write_text("".join(json.dumps(record | {"golden": "red", "answers": []}) + "\n" for record in rows_of(judged)))
    train(copy, command("grpo.py"), data)
    rows = rows_of(copy / "out/metrics.jsonl")
    assert [row["answers"] for row in rows] == [16, 16] and all(0 <= row["score"] <= 1 for row in rows)
    assert (copy / "out/model").exists()


def test_a_template_is_one_entry_and_goes_with_the_model(tmp_path, judged):
    assert changed("template") <= 15
    folder = tiny_checkpoint(tmp_path / "model", image_size=48, patch=16)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in ("<start_of_turn>", "<end_of_turn>"):
        known = tokenizer["added_tokens"]
        known.append(known[-1] | {"id": len(tokenizer["model"]["vocab"]) + len(known), "content": token})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    copy = forked("template", tmp_path)
    train(copy, "dpo.py", judged, "--ckpt", str(folder), "--template", "gemma")
    stored = json.loads((copy / "out/model/template.json").read_text())
    assert stored["name"] == "gemma" and stored["ends"] == ["<end_of_turn>", "<eos>"]


def test_a_rubric_is_one_edit(tmp_path, judged):
    copy = forked("rubric", tmp_path)
    records = rows_of(judged)
    for record in records:
        for answer, grade in zip(record["answers"], (5, 3, 1)):
            answer["scores"] = {"faithfulness": grade, "coverage": grade, "clarity": 5}
    data = judged.with_name("rubric.jsonl")
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "pairs: 8 to train on" in train(copy, "dpo.py", data)
    said = run(copy, "annotate.py", "--data", str(data), "--out", "seen", "--pairs", "--board", "board.html")
    assert "faith" in said and (copy / "board.html").exists()


class Messages(BaseHTTPRequestHandler):
    """Anthropic's server, as far as it is needed: every candidate is as good as its text is long."""

    def do_POST(self):
        from judge.rubric import RUBRIC
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        *pictures, words = asked["messages"][0]["content"]
        assert self.path == "/v1/messages" and self.headers["x-api-key"] == "a-key" and asked["max_tokens"]
        assert pictures[0]["source"]["media_type"] == "image/jpeg" and "correctness" in asked["system"]
        grades = []
        for letter, text in re.findall(r"<candidate_(.)>\n.*\n(.*)\n", words["text"]):
            grades.append({"id": letter, "comment": "", **dict.fromkeys(RUBRIC.attributes, min(4, len(text) // 6))})
        text = json.dumps({"candidates": grades})
        reply = {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": text}],
                 "model": "one", "stop_reason": "end_turn", "usage": {"input_tokens": 9, "output_tokens": 5}}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *about):
        pass


def test_a_judge_is_one_class(tmp_path, judged, monkeypatch):
    copy = forked("judge", tmp_path)
    monkeypatch.setenv("ANTHROPIC_API_KEY", "a-key")
    with ThreadingHTTPServer(("127.0.0.1", 0), Messages) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        run(copy, "annotate.py", "--data", str(judged), "--judge", "anthropic:one", "--out", "out",
            "--judge_url", f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    for record in rows_of(copy / "out/records.jsonl"):
        assert record["judge"]["state"] == "ok" and record["judge"]["version"] == "one"
        for answer in record["answers"]:
            assert answer["scores"]["correctness"] == min(4, len(answer["text"]) // 6)


def test_a_benchmark_is_one_file_and_its_name(tmp_path):
    assert changed("benchmark") <= 40
    copy = forked("benchmark", tmp_path)
    folder = tmp_path / "data/gsm8k"
    folder.mkdir(parents=True)
    rows = [{"question": "what is two plus two ?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"},
            {"question": "how many days have three years ?", "answer": "#### 1,095"}]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = [{"question_id": 1, "text": "It is 4."}, {"question_id": 2, "text": "1095 days, or 1,096."}]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    flags = ["--bench", "gsm8k", "--data_dir", str(tmp_path / "data"), "--out", str(tmp_path / "out")]
    said = run(copy, "evaluate.py", *flags, "--answers", str(tmp_path / "mine.jsonl"), "--json")
    assert json.loads(said)["mine"][0]["scores"]["exact"]["mean"] == 0.5
    run(copy, "evaluate.py", *flags, "--ckpt", "toy/llava", "--max_new", "4")
    assert len(rows_of(tmp_path / "out/toy-llava/gsm8k/toy-llava.jsonl")) == 2
