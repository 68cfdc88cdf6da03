"""Two and three processes do what one does: the same losses, the same weights, and nobody waits for ever.

    python -m pytest tests/test_parallel.py -q          gloo on the CPU; SLOW=1 for all runs, and for torchrun
"""
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dpo
import parallel
import sft
import steerlm
import train
from conftest import RECORDS, ROOT, meet, rows_of, tiny_checkpoint, write_data
from data import split

CASES = {    # what differs from `settings` below
    "full": (dpo, {"holdout": 0.4, "checkpointing": True}),
    "lora": (dpo, {"lora": 4, "lr": 1e-3, "projector_lr": 1e-4}),
    "one pair a step": (dpo, {"batch": 1, "steps": 6}),      # some without a picture; one process alone has work
    "one pair a step, lora": (dpo, {"batch": 1, "steps": 6, "lora": 4}),
    "sft": (sft, {"batch": 4, "pack": 100}),
    "sft, lora": (sft, {"batch": 4, "pack": 100, "lora": 4}),
    "bfloat16": (dpo, {"dtype": "bfloat16", "steps": 2, "lr": 1e-3}),
    "tied": (dpo, {"ckpt": "tied", "steps": 2}),
    "text only": (dpo, {"ckpt": "text", "data": "text.jsonl", "steps": 2}),
    "steerlm": (steerlm, {"batch": 7, "steps": 2}),
}
SLOW = bool(os.environ.get("SLOW"))
QUICK = {2: ["full", "lora", "one pair a step", "bfloat16"], 3: ["sft", "one pair a step, lora"]}
RUNS = {world: list(CASES) if SLOW else QUICK[world] for world in QUICK}
STOPPED = {2: ["full"], 3: ["one pair a step, lora"] if SLOW else []}
slow = pytest.mark.skipif(not SLOW, reason="SLOW=1 runs it")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parallel")
    tiny_checkpoint(folder / "tiny", "byte")
    tiny_checkpoint(folder / "tied", "byte", tie=True)
    tiny_checkpoint(folder / "text", "byte", text_only=True)
    write_data(folder / "data", rows=[RECORDS[k % 6] for k in range(9)])
    write_data(folder / "data", "text.jsonl", rows=[RECORDS[k] for k in (1, 5, 1, 5)])
    return folder


def settings(place, world, name, resume=False, ckpt="tiny", data="data.jsonl", **changes) -> dict:
    given = {"ckpt": str(place / ckpt), "data": str(place / "data" / data), "out": str(place / str(world) / name),
             "device": "cpu", "steps": 3, "batch": 5, "pack": 150, "lr": 1e-4, "save_every": 0, "resume": resume}
    return given | changes


@dataclass
class Job:
    run: object          # a script's
    settings: object
    stops: bool = False


@pytest.fixture(scope="module")
def worlds(place):
    """The folder of all runs: number of processes / name. Some also stop, and go on."""
    torch.set_num_threads(1)
    for name in dict.fromkeys(RUNS[2] + RUNS[3]):
        script, changes = CASES[name]
        script.run(script.Settings(**settings(place, 1, name, **changes)))
    for world in RUNS:
        jobs = []
        for name in RUNS[world]:
            script, changes = CASES[name]
            jobs.append(Job(script.run, script.Settings(**settings(place, world, name, **changes))))
        for name in STOPPED[world]:
            script, changes = CASES[name]
            for stops in (True, False):
                given = settings(place, world, f"stopped {name}", resume=not stops, **changes)
                jobs.append(Job(script.run, script.Settings(**given), stops))
        log = place / f"{world}.txt"
        assert meet(world, partial(part_of, jobs), log), log.read_text()[-6000:]
    return place


def part_of(jobs: list[Job]) -> None:
    """One process's part: the runs one after the other."""
    train.draw_metrics = lambda out: None                # it takes longer than such a run
    for job in jobs:
        undo = stop_process_1_in_step_2() if job.stops else lambda: None
        try:
            job.run(job.settings)
            assert not job.stops
        except SystemExit as end:
            assert job.stops and end.code == 143
        undo()
    torch.distributed.destroy_process_group()


def stop_process_1_in_step_2():
    """SIGTERM reaches one process only, in the midst of a step."""
    real, calls = parallel.sum_gradients, [0]

    def stop(*a):
        calls[0] += 1
        if calls[0] == 2 and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*a)
    parallel.sum_gradients = stop
    return lambda: setattr(parallel, "sum_gradients", real)


def weights(folder: Path) -> dict:
    """Of model/ or adapter/."""
    found = {}
    for file in sorted(folder.glob("*/*.safetensors")):
        found |= load_file(file)
    return found


# ---- one result ----------------------------------------------------------------------------------

@pytest.mark.parametrize("world, name", [(world, name) for world in RUNS for name in RUNS[world] if name != "bfloat16"])
def test_losses_and_weights_are_those_of_one_process(worlds, world, name):
    one, many = worlds / "1" / name, worlds / str(world) / name
    expected, found = rows_of(one / "metrics.jsonl"), rows_of(many / "metrics.jsonl")
    assert [list(row) for row in expected] == [list(row) for row in found]
    # One pair alone: the norm that clips is summed in another order, so the weights behind it differ
    # in their last bits, and there is no mean over pairs to even that out.
    close = 3e-6 if "one pair" in name else 1e-6
    for row, other in zip(expected, found):
        assert row["loss"] == pytest.approx(other["loss"], abs=close, rel=1e-6), row["step"]
        for key in row:
            if not key.endswith("_per_s"):
                assert row[key] == pytest.approx(other[key], rel=1e-4, abs=2e-6), (row["step"], key)

    before = load_file(worlds / CASES[name][1].get("ckpt", "tiny") / "model.safetensors")
    expected, found = weights(one), weights(many)
    assert set(expected) == set(found)
    learned = max((p - before.get(key, 0 * p)).abs().max() for key, p in expected.items() if "lora_A" not in key)
    assert learned > 5e-5
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], atol=1e-5, rtol=0, msg=key)


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=slow)])
def test_a_model_that_computes_in_16_bits_trains_through_shards_in_fp32(worlds, world):
    """The same steps in nearly all weights, which only fp32 allows; and the same losses, which only
    angles in fp32 give."""
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    before = load_file(worlds / "tiny" / "model.safetensors")[key].bfloat16()
    expected, found = (weights(worlds / str(w) / "bfloat16")[key] for w in (1, world))
    assert (found != before).float().mean() > 0.3 and (found == expected).float().mean() > 0.9
    expected, found = (rows_of(worlds / str(w) / "bfloat16" / "metrics.jsonl") for w in (1, world))
    assert [row["loss"] for row in expected] == pytest.approx([row["loss"] for row in found], abs=5e-4)


def test_the_reference_and_what_is_held_out_are_the_same(worlds):
    for name in ("full", "lora"):
        one, many = (rows_of(worlds / world / name / "reference.jsonl") for world in "12")
        assert one == many, "the same packs give the same bits"
    one, many = (json.loads((worlds / world / "full" / "heldout.json").read_text()) for world in "12")
    assert one["after"]["pairs"] == many["after"]["pairs"] > 0
    assert one["after"] == pytest.approx(many["after"], rel=1e-4, abs=2e-6)


@pytest.mark.parametrize("world, name", [(world, name) for world in STOPPED for name in STOPPED[world]])
def test_sigterm_to_one_of_them_stops_all_and_they_go_on_to_the_same_bits(worlds, world, name):
    whole, stopped = worlds / str(world) / name, worlds / str(world) / f"stopped {name}"
    assert not (stopped / "state").exists()
    expected, found = weights(whole), weights(stopped)
    assert expected and all(torch.equal(expected[key], found[key]) for key in expected)
    expected, found = (rows_of(folder / "metrics.jsonl") for folder in (whole, stopped))
    assert [(row["step"], row["loss"]) for row in expected] == [(row["step"], row["loss"]) for row in found]


# ---- torchrun ------------------------------------------------------------------------------------

def torchrun(**given):
    """dpo.py in two processes that torchrun starts."""
    flags = [f"--{name}={value}" for name, value in given.items()]
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--",
         str(ROOT / "dpo.py"), *flags],
        capture_output=True, text=True, timeout=120, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


@slow
def test_torchrun_starts_the_very_processes_that_meet_here(worlds):
    done = torchrun(**settings(worlds, "torchrun", "lora", **CASES["lora"][1]) | {"resume": 0})
    assert done.returncode == 0, done.stderr[-3000:]
    expected, found = weights(worlds / "2" / "lora"), weights(worlds / "torchrun" / "lora")
    assert expected and all(torch.equal(expected[key], found[key]) for key in expected)


@slow
def test_a_message_comes_once_and_torchrun_fails(place):
    done = torchrun(data=place / "none.jsonl", out=place / "none", device="cpu")
    assert done.returncode != 0 and (done.stdout + done.stderr).count("dpo.py: --data") == 1, done.stderr[-3000:]


@slow
@pytest.mark.parametrize("rank, drawn", [("0", True), ("1", False)])
def test_the_first_process_alone_draws_bars_and_on_a_terminal_alone(rank, drawn):
    code = "import common; print([x for x in common.progress([1, 2], ncols=60, nrows=9)])"
    command = [sys.executable, "-c", code]
    mine, theirs = os.openpty()
    subprocess.run(command, cwd=ROOT, env=os.environ | {"RANK": rank}, stdout=theirs, stderr=theirs, check=True)
    assert ("2/2" in os.read(mine, 9999).decode()) == drawn
    piped = subprocess.run(command, cwd=ROOT, env=os.environ | {"RANK": rank}, capture_output=True, text=True)
    assert piped.stderr == ""


@pytest.mark.parametrize("there, asked, got", [
    (True, "auto", "cuda:1"), (True, "cuda", "cuda:1"), (True, "cuda:3", "cuda:3"), (True, "cpu", "cpu"),
    (False, "auto", "auto")])
def test_every_process_has_a_gpu_of_its_own(monkeypatch, there, asked, got):
    made = []
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made.append, raising=False)     # behind torch's own look at the name
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda backend, timeout: made.append(backend))
    assert parallel.start(asked) == got
    assert made == ([int(got[5:]), "cpu:gloo,cuda:nccl"] if got.startswith("cuda") else ["gloo"])


# ---- how a batch is shared out -------------------------------------------------------------------

@dataclass
class Item:
    name: int
    tokens: int


def shares(monkeypatch, items, budget, world):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    found = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        parts = train.packs(items, budget, lambda part: torch.zeros(1), "cpu")
        found.append([(part.items, part.counts) for part in parts])
    return found


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_item_is_computed_once_in_packs_that_fit_and_all_have_as_many(monkeypatch, world):
    rng = random.Random(world)
    for count in (1, 2, 5, 40, 128):
        items = [Item(k, rng.randint(5, 80)) for k in range(count)]
        for budget in (1, 70, 300, 10**6):
            parts = shares(monkeypatch, items, budget, world)
            assert len({len(part) for part in parts}) == 1, "an equal number, or they would wait for each other"
            counted = []
            for pack, counts in (pack for part in parts for pack in part):
                assert sum(item.tokens for item in pack) <= budget or len(pack) == 1
                counted += pack if counts else []
            assert sorted(counted, key=lambda item: item.name) == items


def test_one_process_packs_as_ever(monkeypatch):
    items = [Item(k, 58) for k in range(7)]
    [mine] = shares(monkeypatch, items, 200, 1)
    assert mine == [(pack, True) for pack in split(items, 200)]
