"""The experiment in small: every stage in this process, a few records, and tables that say what the rows say.

    python -m pytest tests/test_reproduce.py -q
"""
import json
import shutil
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

import annotate
from toy import items as miniature
import reproduce
from common import BadInput, read_jsonl
from conftest import ROOT
from formats import ATTRIBUTES


class Inline:
    """A pool that does the work at once."""
    def __init__(self, workers, context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *args):
        pass

    def submit(self, function, job):
        future = Future()
        try:
            future.set_result(function(job))
        except Exception as problem:
            future.set_exception(problem)
        return future

    def shutdown(self, **how):
        pass


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """One seed, three methods and two ablations, on few records and items; the folder and what the run printed."""
    out = tmp_path_factory.mktemp("reproduce")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(miniature, "ITEMS", {"text": 11, "exist": 8, "attribute": 8, "describe": 4, "choice": 4})
        patch.setattr(miniature, "MAX_NEW", 10)
        patch.setattr(annotate, "Story", partial(annotate.Story, prompts=32, max_new=10))
        for method in set(reproduce.METHODS.values()):
            patch.setattr(method, "Settings", partial(method.Settings, epochs=1))
        patch.setattr(reproduce, "ProcessPoolExecutor", Inline)
        patch.setattr(reproduce.torch, "set_num_threads", lambda n: None)
        settings = reproduce.Settings(out=str(out), methods="SFT, full answers;SteerLM;DPO;DPO, 50% of the data;DPO, 75% of labels flipped")
        reproduce.run(settings)
        yield out, settings


def test_every_run_leaves_a_row_and_the_table_shows_it(experiment, capsys):
    out, settings = experiment
    rows = read_jsonl(out / "rows.jsonl")
    assert {row["name"] for row in rows} == {"Vicuna-mini", "LLaVA-mini", "SFT, full answers", "SteerLM", "SteerLM, verbosity 0",
                                             "SteerLM, not asked for scores", "DPO", "DPO, 50% of the data", "DPO, 75% of labels flipped"}
    assert all(row["seed"] == 10 for row in rows) and {row["name"]: row["lr"] for row in rows}["SteerLM"] == reproduce.LR["steerlm"]
    vicuna = next(row for row in rows if row["name"] == "Vicuna-mini")
    assert "judged" not in vicuna["scores"] and vicuna["steps"] == 0
    page = (out / "tables.txt").read_text()
    assert f"{vicuna['scores']['text']['mean']:.2f}" in page and "±0.00" not in page and "6.73" in page and "not sizes" in page


def test_sampling_training_and_measuring_are_in_one_precision_also_beside_a_gpu(experiment):
    out, _ = experiment
    said = [json.loads(path.read_text())["settings"]["device"] for path in out.glob("seed-*/*/config.json")]
    assert len(said) == 6 and set(said) == {"cpu"}, "five runs, and what they learn from"


def test_what_is_done_is_not_done_again(experiment, monkeypatch):
    out, settings = experiment
    before = (out / "rows.jsonl").read_bytes()
    monkeypatch.setattr(reproduce, "task", lambda job: pytest.fail(f"{job} was done before"))
    monkeypatch.setattr(reproduce.figures, "draw", lambda *a: None)
    reproduce.run(settings)
    assert (out / "rows.jsonl").read_bytes() == before


def test_half_the_data_and_flipped_labels_reach_the_training(experiment):
    out, _ = experiment
    count = lambda name: json.loads((out / "seed-10" / reproduce.slug(name) / "config.json").read_text())["pairs"]
    assert 0 < count("DPO, 50% of the data") < count("DPO") == count("DPO, 75% of labels flipped")
    metrics = lambda name: read_jsonl(out / "seed-10" / reproduce.slug(name) / "metrics.jsonl")[0]
    assert metrics("DPO")["logp_chosen"] != metrics("DPO, 75% of labels flipped")["logp_chosen"]


def test_the_figures_are_drawn_from_the_rows(experiment):
    out, _ = experiment
    assert {p.name for p in (out / "figures").iterdir()} == {f"{name}.png" for name in ("forgetting", "dynamics", "curves", "attributes", "board")}


def test_figures_of_an_experiment_with_fewer_methods(experiment, tmp_path, monkeypatch):
    out, settings = experiment
    few = Path(shutil.copytree(out, tmp_path / "few"))
    shutil.rmtree(few / "figures")
    shutil.rmtree(few / "seed-10" / "DPO")
    monkeypatch.setattr(reproduce, "task", lambda job: pytest.fail(f"{job} was done before"))
    reproduce.run(replace(settings, out=str(few), methods="SFT, full answers"))
    assert {p.stem for p in (few / "figures").iterdir()} == {"forgetting", "curves", "attributes", "board"}


def judged(k, S):
    answers = [{"text": t, "scores": dict.fromkeys(ATTRIBUTES, s)} for t, s in zip("ab", S)]
    return {"id": str(k), "answers": answers, "truth": {"turns": [{"bare": "red"}]}, "golden": "it is red ."}


def test_changes_of_the_records():
    items = [judged(k, (4, 0)) for k in range(400)] + [judged(999, (2, 2))]
    assert all(r["golden"] == "red" for r in reproduce.change(items, "short", 0))
    half, quarter = (reproduce.change(items, f"share {share}", 0) for share in (0.5, 0.25))
    assert 170 < len(half) < 230 and {r["id"] for r in quarter} < {r["id"] for r in half}, "less data is part of more data"
    flipped = reproduce.change(items, "flip 0.25", 0)
    pairs = [tuple(r.get("pair", ())) for r in flipped]
    assert 70 < pairs.count((1, 0)) < 130 and pairs.count((1, 0)) + pairs.count(()) == 401 and "pair" not in flipped[-1]
    assert "pair" not in items[0], "the records themselves are left alone"


def test_a_table_by_hand():
    assert reproduce.cell([5.0]).strip() == "5.00" and reproduce.cell([]) == "-"
    rows = [{"name": "x", "seed": k, "steps": 7, "scores": {"text": {"mean": v}}} for k, v in enumerate((1.0, 3.0))]
    head, line = reproduce.table(rows, ["x"], ("text", "core")).splitlines()
    assert line.split() == ["x", "7", "2.00", "±1.41", "-"] and head.split() == ["steps", "text", "core"]


@pytest.mark.parametrize("flags, why", [({"methods": "PPO"}, "choose among SFT"), ({"seeds": 0}, "at least 1"), ({"only": "eat"}, "--only build")])
def test_the_door(flags, why):
    with pytest.raises(BadInput, match=why):
        reproduce.run(reproduce.Settings(**flags))


def test_a_failed_run_names_its_log(tmp_path, monkeypatch):
    def fails(job):
        raise ValueError("no")
    monkeypatch.setattr(reproduce, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(reproduce, "task", fails)
    with pytest.raises(BadInput, match=r"annotate: no; see .*data.log"):
        reproduce.run(reproduce.Settings(out=str(tmp_path)))


def test_the_readmes_tables_are_drawn_from_results():
    rows = read_jsonl(ROOT / "results" / "reproduce.jsonl")
    readme = [line.strip() for line in (ROOT / "README.md").read_text().splitlines()]
    for line in reproduce.report(rows).splitlines():
        assert line.strip() in readme, f"not in README.md: {line}"
