"""The experiment in small: every stage in this process, a few records, and tables that say what the rows say.

    python -m pytest tests/test_reproduce.py -q
"""
import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

import reproduce
import smol
import story
import train
from benchmarks import harness
from common import BadInput, read_jsonl
from conftest import ROOT, tiny_checkpoint
from judge.rubric import RUBRIC
from toy import figures, items, moved, tasks

ALL = reproduce.RUNS                     # the experiment below makes do with few
FEW = ("SteerLM", "DPO", "DPO, 50% of the data", "DPO, 75% of labels flipped")


class Inline:
    """A pool that does the work at once."""
    def __init__(self, workers, context, first):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def map(self, work, jobs):
        return map(work, jobs)


@pytest.fixture
def inline(monkeypatch):
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(reproduce.torch, "set_num_threads", lambda n: None)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """One seed, three methods and two ablations, on few records and items; the experiment's folder."""
    out = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(items, "ITEMS", {"text": 4, "exist": 4, "attribute": 3, "describe": 2, "choice": 2})
        patch.setattr(items, "MAX_NEW", 10)
        patch.setattr(moved, "ASKED", 2)
        patch.setattr(story, "write_prompts", lambda n, seed, folder: tasks.write_prompts(32, seed, folder))
        patch.setattr(reproduce, "RUNS", {name: reproduce.RUNS[name] for name in FEW})
        patch.setattr(reproduce, "figures", SimpleNamespace(of_miniature=lambda rows: {}, save=lambda rows, out: out.mkdir()))
        patch.setattr(reproduce, "ProcessPoolExecutor", Inline)
        patch.setattr(reproduce.torch, "set_num_threads", lambda n: None)
        patch.setattr(train, "draw_metrics", lambda run: (run / "metrics.png").touch())     # a second each
        for method in reproduce.METHODS.values():
            patch.setattr(method, "Settings", partial(method.Settings, epochs=1))
        reproduce.run(reproduce.Settings(out=str(out)))
        yield out


def test_every_run_leaves_a_row_and_the_table_shows_it(experiment):
    rows = read_jsonl(experiment / "rows.jsonl")
    names = {"Vicuna-mini", "LLaVA-mini", *FEW, "SteerLM, verbosity 0", "SteerLM, not asked for scores"}
    assert {row["name"] for row in rows} == names
    assert all(row["seed"] == 10 and row["seconds"] >= 0 for row in rows) and any(row["seconds"] for row in rows if row["steps"])
    assert {row["name"]: row["lr"] for row in rows}["SteerLM"] == reproduce.LR["steerlm"]
    scores = {row["name"]: row["scores"] for row in rows}
    assert scores["SteerLM, not asked for scores"] != scores["SteerLM"], "a prompt that asks and one that does not"
    vicuna = next(row for row in rows if row["name"] == "Vicuna-mini")
    assert "judged" not in vicuna["scores"] and vicuna["steps"] == 0
    page = (experiment / "tables.txt").read_text()
    assert f"{vicuna['scores']['text']['mean']:.2f}" in page
    assert (experiment / "figures").is_dir() and "±0.00" not in page and "6.73" in page and "not sizes" in page


def test_sampling_training_and_measuring_are_in_one_precision_also_beside_a_gpu(experiment):
    said = [json.loads(path.read_text())["settings"] for path in experiment.glob("seed-*/*/config.json")]
    assert len(said) == 5 and {(s["device"], s["seed"]) for s in said} == {("cpu", 10)}, "four runs, and what they learn from"


def test_what_is_done_is_not_done_again(experiment, inline, monkeypatch):
    before = (experiment / "rows.jsonl").read_bytes()
    monkeypatch.setattr(reproduce, "RUNS", {name: reproduce.RUNS[name] for name in FEW})
    for room, name in ((reproduce, "train"), (reproduce, "measure"), (story, "sample")):
        monkeypatch.setattr(room, name, lambda *args: pytest.fail("this was done before"))
    monkeypatch.setattr(reproduce, "figures", SimpleNamespace(of_miniature=lambda rows: {}, save=lambda *args: None))
    reproduce.run(reproduce.Settings(out=str(experiment)))
    assert (experiment / "rows.jsonl").read_bytes() == before


def test_half_the_data_and_flipped_labels_reach_the_training(experiment):
    def pairs(name):
        return json.loads((experiment / "seed-10" / reproduce.slug(name) / "config.json").read_text())["pairs"]

    def first_step(name):
        return read_jsonl(experiment / "seed-10" / reproduce.slug(name) / "metrics.jsonl")[0]
    assert 0 < pairs("DPO, 50% of the data") < pairs("DPO") == pairs("DPO, 75% of labels flipped")
    assert first_step("DPO")["logp_chosen"] != first_step("DPO, 75% of labels flipped")["logp_chosen"]


def test_the_figures_are_drawn_from_the_rows(tmp_path):
    old, today = (read_jsonl(ROOT / "results" / f"{name}.jsonl") for name in ("reproduce", "today"))
    assert list(figures.of_miniature(today)) == ["forgetting"], "its rows have no shares of the data"
    figures.save(figures.of_miniature(old), tmp_path / "old")
    assert {path.name for path in (tmp_path / "old").iterdir()} == {"forgetting.png", "curves.png"}
    assert len(figures.forgetting(today).axes) == 2 and len(figures.forgetting(old).axes) == 1, "the older rows have no KL"


def test_the_figure_of_a_real_model_has_a_dot_for_every_seed_and_the_start_as_a_level():
    rows = read_jsonl(ROOT / "results" / "smol.jsonl")
    axes = figures.real(rows).axes
    tuned = sorted(row["scores"]["words"]["mean"] for row in rows if row["name"] == "LLaVA-Smol")
    drawn = [dots.get_offsets().data for dots in axes[0].collections]
    start = next(row["scores"]["words"]["mean"] for row in rows if row["name"] == "SmolLM2")
    assert any(sorted(dots[:, 0]) == tuned and set(dots[:, 1]) == {1} for dots in drawn), "on its own line, the second"
    assert [line.get_xdata()[0] for line in axes[0].lines] == [start] and len(axes) == len(figures.REAL)
    assert not axes[-1].lines, "the language model sees nothing"


def test_from_scratch_every_seed_starts_from_its_own_models_and_the_first_has_a_second_size(tmp_path, inline, monkeypatch):
    built, starts = [], {}
    monkeypatch.setattr(reproduce, "make", lambda folder, seed, width, replay=0.0: built.append((folder.name, seed, width)))
    monkeypatch.setattr(story, "sample", lambda *args: None)
    monkeypatch.setattr(reproduce, "report", lambda rows: "")
    monkeypatch.setattr(reproduce, "figures", SimpleNamespace(of_miniature=lambda rows: {}, save=lambda *args: None))

    def outcome(job):
        starts[job.seed, job.name] = str(job.ckpt.relative_to(tmp_path))
        return []

    monkeypatch.setattr(reproduce, "outcome", outcome)
    reproduce.run(reproduce.Settings(out=str(tmp_path), seeds=2, from_scratch=True))
    assert built == [("toy", 10, 128), ("narrow", 10, 96), ("toy", 11, 128)]
    assert starts[10, "Vicuna-mini"] == "seed-10/toy/vicuna" and starts[11, "DPO"] == "seed-11/toy/llava"
    assert starts[10, "DPO of a narrower model"] == "seed-10/narrow/llava"
    assert (11, "DPO of a narrower model") not in starts


def judged(k, S):
    answers = [{"text": t, "scores": dict.fromkeys(RUBRIC.attributes, s)} for t, s in zip("ab", S)]
    return {"id": str(k), "answers": answers, "truth": {"turns": [{"bare": "red"}]}, "golden": "it is red ."}


def test_changes_of_the_records():
    records = [judged(k, (4, 0)) for k in range(400)] + [judged(999, (2, 2))]
    assert all(r["golden"] == "red" for r in reproduce.change(records, "short", 0))
    half, quarter = (reproduce.change(records, f"share {share}", 0) for share in (0.5, 0.25))
    assert 170 < len(half) < 230 and {r["id"] for r in quarter} < {r["id"] for r in half}, "less data is part of more data"
    flipped = reproduce.change(records, "flip 0.25", 0)
    pairs = [tuple(r.get("pair", ())) for r in flipped]
    assert 70 < pairs.count((1, 0)) < 130 and pairs.count((1, 0)) + pairs.count(()) == 401 and "pair" not in flipped[-1]
    assert "pair" not in records[0], "the records themselves are left alone"


def test_swapped_pictures_are_all_the_others_and_nobody_keeps_their_own():
    records = [{"id": str(k), "images": [f"{k}.png"]} for k in range(50)]
    swapped = reproduce.change(records, "swap", 0)
    assert sorted(r["images"] for r in swapped) == sorted(r["images"] for r in records) and [r["id"] for r in swapped] == [r["id"] for r in records]
    assert all(a["images"] != b["images"] for a, b in zip(records, swapped))
    assert swapped == reproduce.change(records, "swap", 0) != reproduce.change(records, "swap", 1)


def test_today_s_runs_begin_where_they_should_and_those_of_dpo_s_model_wait_for_it(tmp_path, inline, monkeypatch):
    started, built = [], []
    monkeypatch.setattr(reproduce, "RUNS", ALL)
    monkeypatch.setattr(reproduce, "make", lambda folder, seed, width, replay=0.0: built.append(replay))
    monkeypatch.setattr(story, "sample", lambda *args: None)
    monkeypatch.setattr(reproduce, "outcome", lambda job: started.append((job.name, str(job.ckpt.relative_to(tmp_path)))) or [])
    monkeypatch.setattr(reproduce, "today", lambda rows: "")
    monkeypatch.setattr(reproduce, "figures", SimpleNamespace(of_miniature=lambda rows: {}, save=lambda *args: None))
    reproduce.run(reproduce.Settings(out=str(tmp_path), today=True, from_scratch=True, first=30))
    names = [name for name, _ in started]
    assert built == [0.33] and len(set(names)) == len(names) == 2 + 5 + 18 + 1
    assert set(names[-4:]) == {"DPO, a second round", *(f"DPO + {share} Vicuna-mini" for share in (0.25, 0.5, 0.75))}
    found = dict(started)
    assert found["DPO, a second round"] == "seed-30/DPO/model" and found[reproduce.REPLAYED] == "seed-30/toy/replayed"
    assert found["DPO, pictures swapped"] == found["LLaVA-mini"] == found["LLaVA-mini + 0.5 Vicuna-mini"] == "seed-30/toy/llava"
    assert found["DPO + 0.5 Vicuna-mini"] == "seed-30/DPO/model"


def test_a_run_finds_its_own_data(tmp_path, monkeypatch):
    """A second round samples DPO's model, text pairs have questions without pictures, replay is a second file, a mixture is none."""
    asked = []
    monkeypatch.setattr(story, "sample", lambda ckpt, out, n, seed, device: asked.append((ckpt.parent.name, out.name, seed)))
    monkeypatch.setattr(story, "answer", lambda ckpt, file, out, seed, device: asked.append((ckpt.name, file.name, len(read_jsonl(file)))))
    monkeypatch.setattr(reproduce.sft, "run", lambda s: asked.append([Path(path).name for path in s.data] + [s.share]))
    monkeypatch.setattr(reproduce.checkpoint, "mix", lambda a, b, alpha, out: asked.append((str(a.relative_to(tmp_path)), b.name, alpha)))
    toy = tmp_path / "toy/llava"

    def job(name, ckpt=toy):
        return reproduce.Job(tmp_path / reproduce.slug(name), name, reproduce.TODAY_RUNS[name], ckpt, toy, 30, reproduce.Settings())

    again = reproduce.data_of(job("DPO, a second round", tmp_path / "DPO/model"), "again")
    text = reproduce.data_of(job("DPO, text pairs alone"), "text")
    assert again == tmp_path / "again/records.jsonl" and text == tmp_path / "text/records.jsonl"
    reproduce.train(job("SFT, full answers, 33% text"))
    reproduce.train(job("DPO + 0.25 Vicuna-mini", tmp_path / "DPO/model"))
    assert asked == [("DPO", "again", 1030), ("llava", "prompts.jsonl", 1000), ["records.jsonl", "replay-SFT-full-answers-33-text.jsonl", 0.33], ("DPO/model", "vicuna", 0.25)]
    assert len(read_jsonl(tmp_path / "replay-SFT-full-answers-33-text.jsonl")) == 500


def test_a_table_by_hand():
    rows = [{"name": "x", "seed": k, "steps": 7, "scores": {"text": {"mean": v}}} for k, v in enumerate((1.0, 3.0))]
    head, line = reproduce.table(rows, ["x", "nobody"]).splitlines()
    unknown = rows + [{"name": "x", "seed": 2, "steps": 7, "scores": {"text": {"mean": None}}}]
    assert reproduce.cell(unknown, "text") == "-", "a mean over the seeds that have one would be of other seeds"
    assert line.split() == ["x", "7", "2.00", "±1.41"] + ["-"] * 9 and head.split()[:4] == ["steps", "text", "core", "pictured"]


def test_a_folder_has_the_rows_of_one_experiment(tmp_path):
    reproduce.same_experiment(reproduce.Settings(), tmp_path)
    reproduce.same_experiment(reproduce.Settings(seeds=5, today=True), tmp_path)
    for other in ({"from_scratch": True}, {"split": "dev"}, {"smol": True}, {"dtype": "bfloat16"}):
        with pytest.raises(BadInput, match="holds runs of another experiment"):
            reproduce.same_experiment(reproduce.Settings(**other), tmp_path)


def test_the_door():
    with pytest.raises(BadInput, match="at least 1"):
        reproduce.run(reproduce.Settings(seeds=0))


ORPHANS = """
import multiprocessing, sys, time
from concurrent.futures import ProcessPoolExecutor
import reproduce, os
if __name__ == "__main__":
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), reproduce.end_with_parent) as pool:
        print(*{pool.submit(os.getpid).result() for _ in range(20)}, flush=True)
        time.sleep(100)
"""


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="three processes begin; SLOW=1 runs it")
def test_workers_end_with_the_process_that_started_them_even_killed(tmp_path):
    script = tmp_path / "orphans.py"
    script.write_text(ORPHANS)
    parent = subprocess.Popen([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert workers and not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_failed_run_names_its_log(tmp_path, monkeypatch, inline):
    def fails(*args):
        raise ValueError("no")
    monkeypatch.setattr(reproduce, "measure", fails)
    with pytest.raises(BadInput, match=r"DPO: no; see .*dpo\.log"):
        toy = Path("toy/llava")
        reproduce.outcome(reproduce.Job(tmp_path / "dpo", "DPO", None, toy, toy, 0, reproduce.Settings()))


def test_the_pages_tables_are_drawn_from_results():
    rows = read_jsonl(ROOT / "results" / "reproduce.jsonl")
    page = [line.strip() for line in (ROOT / "docs" / "experiment.md").read_text().splitlines()]
    drawn = reproduce.report(rows) + "\n" + reproduce.today(read_jsonl(ROOT / "results" / "today.jsonl"))
    for line in drawn.splitlines():
        assert line.strip() in page, f"not in docs/experiment.md: {line}"

    rows = read_jsonl(ROOT / "results" / "smol.jsonl")
    page = [line.strip() for line in (ROOT / "docs" / "smol.md").read_text().splitlines()]
    for line in reproduce.table(rows, [*reproduce.SMOL_FIRST, *reproduce.SMOL_RUNS], reproduce.REAL_COLUMNS).splitlines():
        assert line.strip() in page, f"not in docs/smol.md: {line}"
    for run in read_jsonl(ROOT / "results" / "smol_ifeval.jsonl"):
        [result] = run["results"]
        cells = [harness.shown(result["scores"][name], "5.1f", 100) for name in ("strict", "prompt", "instruction", "short", "long")]
        cells.append(f"{result['style']['looping']['mean']:.2f}")
        assert any(line.split() == " ".join([run["name"], *cells]).split() for line in page), f"not in docs/smol.md: {run['name']} {cells}"


# ---- a real language model ---------------------------------------------------------------------------------------

def test_a_real_model_has_the_columns_of_its_own_table(tmp_path, monkeypatch):
    """Measured on the smallest doubles of everything: a random LLaVA, six prompts, nine given answers."""
    data = tmp_path / "data"
    (data / "ifeval").mkdir(parents=True)
    (data / "likelihood").mkdir()
    prompts = [{"key": k, "prompt": f"What is {k}?", "instruction_id_list": ["punctuation:no_comma", "combination:two_responses"], "kwargs": [{}, {}]}
               for k in range(6)]
    (data / "ifeval/input_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (data / "likelihood/given.json").write_text(json.dumps([{"instruction": "What?", "output": "This."}] * 9))
    monkeypatch.setattr(items, "ITEMS", dict.fromkeys(items.ITEMS, 2))
    monkeypatch.setattr(items, "MAX_NEW", 4)
    eyes = tiny_checkpoint(tmp_path / "llava", "byte", image_size=48, patch=16)
    blind = tiny_checkpoint(tmp_path / "lm", "byte", text_only=True)
    seeing = smol.measure(eyes, "LLaVA-Smol", data_dir=str(data))
    assert set(seeing) == set(reproduce.REAL_COLUMNS)
    assert seeing["ifeval"]["n"] == 6 and seeing["nll"]["n"] == 2, "every fifth prompt with two instructions; every eighth answer"
    text = smol.measure(blind, "SmolLM2", data_dir=str(data))
    assert set(text) == set(reproduce.REAL_COLUMNS) - {"exist", "attribute", "describe", "choice", "judged"}
    rows = [{"name": "LLaVA-Smol", "steps": 0, "seed": 3, "scores": seeing}, {"name": "SmolLM2", "steps": 0, "seed": 3, "scores": text}]
    table = reproduce.table(rows, [*reproduce.SMOL_FIRST, *reproduce.SMOL_RUNS], reproduce.REAL_COLUMNS)
    assert set(smol.measure(blind, "SmolLM2")) == {"words", "looping", "scene talk"}, "without files: everyday questions"
    assert "scene talk" in table and "half and half" not in table


def test_a_real_model_s_seed_is_made_sampled_and_aligned_with_adapters(tmp_path, monkeypatch, inline):
    done = []
    monkeypatch.setattr(reproduce.smol, "run", lambda s: done.append(("made", s.out, s.seed)))
    monkeypatch.setattr(smol.tasks, "write_prompts", lambda n, seed, folder, english: done.append(("asked", english)) or folder)
    monkeypatch.setattr(story.annotate, "annotate", lambda s: done.append(("judged", s.ckpt, s.judge)))
    monkeypatch.setattr(reproduce.checkpoint, "mix", lambda a, b, alpha, out: done.append(("mixed", a.name, b.name, alpha)))
    monkeypatch.setattr(reproduce, "outcome", lambda job: done.append((job.name, job.how and job.how[1]["lora"], job.ckpt.name)) or [])
    monkeypatch.setattr(reproduce, "table", lambda *args: "")
    monkeypatch.setattr(reproduce, "figures", SimpleNamespace(real=lambda rows: None, save=lambda found, out: None))
    reproduce.run(reproduce.Settings(out=str(tmp_path), smol=True, data_dir="DATA"))
    made = str(tmp_path / "seed-10/smol")
    assert done[:4] == [("made", made, 10), ("asked", True), ("judged", f"{made}/llava", "oracle"), ("mixed", "llava", "lm", 0.5)]
    assert ("SmolLM2", None, "lm") in done and ("DPO", 8, "llava") in done and len(done) == 4 + 7
    with pytest.raises(BadInput, match="--smol needs --data_dir"):
        reproduce.run(reproduce.Settings(out=str(tmp_path), smol=True))
