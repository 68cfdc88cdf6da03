"""Two and three processes do what one does: the same losses, the same weights, and nobody waits for ever.

    python -m pytest tests/test_parallel.py -q          gloo on the CPU; SLOW=1 for all runs, and for torchrun
"""
import json
import os
import random
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import dpo
import parallel
import sft
import steerlm
from conftest import ROOT, meet, tiny_checkpoint
from data import Tree, share, split
from test_dpo import RECORDS, rows_of, write_data

CASES = {                                                     # what differs from the flags below
    "full": ("dpo", {}), "lora": ("dpo", {"lora": 4, "lr": 1e-3, "projector_lr": 1e-4}),
    "checkpointing": ("dpo", {"checkpointing": "on", "steps": 2}), "tied": ("dpo", {"ckpt": "tied", "steps": 2}),
    "text only": ("dpo", {"ckpt": "text", "data": "text.jsonl", "steps": 2}),
    "one pair a step": ("dpo", {"batch": 1, "steps": 6}),     # some without a picture, all but one process without work
    "one pair a step, lora": ("dpo", {"batch": 1, "steps": 6, "lora": 4}),
    "held out": ("dpo", {"holdout": 0.4, "steps": 2}), "sft": ("sft", {"batch": 4, "pack": 100}),
    "sft, lora": ("sft", {"batch": 4, "pack": 100, "lora": 4, "merge": True}), "steerlm": ("steerlm", {"batch": 7, "steps": 2}),
    "bfloat16": ("dpo", {"dtype": "bfloat16", "steps": 2, "lr": 1e-3})}
SCRIPTS = {"dpo": dpo, "sft": sft, "steerlm": steerlm}
SLOW = bool(os.environ.get("SLOW"))
QUICK = {2: ("full", "lora", "one pair a step", "sft", "held out"), 3: ("full", "one pair a step, lora")}
RUNS = {world: [n for n in CASES if SLOW or n in QUICK[world]] for world in QUICK}
RUNS = {1: [n for n in CASES if n in RUNS[2] + RUNS[3]]} | RUNS
STOPS = ("full", "lora") if SLOW else ("full",)
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


def flags(place, out, ckpt="tiny", data="data.jsonl", **changes):
    return dict(ckpt=str(place / ckpt), data=str(place / "data" / data), out=str(out), device="cpu", steps=3, batch=5, pack=150,
                lr=1e-4, save_every=0) | changes


@pytest.fixture(scope="module")
def worlds(place):
    """The folder of all runs: number of processes / name. Two processes also stop, and go on."""
    def case(world, name, script, changes, **how):
        return {"script": script, "settings": flags(place, place / str(world) / name, **changes), **how}
    jobs = {world: [case(world, name, *CASES[name]) for name in names] for world, names in RUNS.items()}
    jobs[2] += [case(2, f"stopped {name}", "dpo", CASES[name][1] | {"resume": resume}, stop=not resume)
                for name in STOPS for resume in (False, True)]
    for world, mine in jobs.items():
        assert meet(world, partial(part_of, mine), place / "log.txt"), (place / "log.txt").read_text()[-6000:]
    return place


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


def part_of(cases: list[dict]) -> None:
    """One process's part: the runs one after the other."""
    for case in cases:
        undo = stop_process_1_in_step_2() if case.get("stop") else lambda: None
        code, script = 0, SCRIPTS[case["script"]]
        try:
            script.run(script.Settings(**case["settings"]))
        except SystemExit as end:
            code = end.code
        undo()
        Path(case["settings"]["out"], f"exit-{parallel.rank()}").write_text(str(code))
    if parallel.world() > 1:
        torch.distributed.destroy_process_group()


def weights(folder: Path) -> dict:
    files = sorted(folder.glob("model/*.safetensors")) or sorted(folder.glob("adapter/*.safetensors"))
    return {k: v for f in files for k, v in load_file(f).items()}


@pytest.mark.parametrize("world, name", [(world, name) for world in QUICK for name in RUNS[world] if name != "bfloat16"])
def test_losses_and_weights_are_those_of_one_process(worlds, world, name):
    one, many = worlds / "1" / name, worlds / str(world) / name
    a, b = rows_of(one / "metrics.jsonl"), rows_of(many / "metrics.jsonl")
    assert [r["step"] for r in a] == [r["step"] for r in b] and list(a[0]) == list(b[0])
    close = 3e-6 if "one pair" in name else 1e-6             # the norm that clips is summed in another order, the
    # weights behind it differ in their last bits, and there is no mean over pairs to even that out
    for x, y in zip(a, b):
        assert x["loss"] == pytest.approx(y["loss"], abs=close, rel=1e-6), x["step"]
        for key in x.keys() - {"pairs_per_s", "tokens_per_s"}:
            assert x[key] == pytest.approx(y[key], rel=1e-4, abs=2e-6), (x["step"], key)
    want, got = weights(one), weights(many)
    assert set(want) == set(got)
    start = weights_of_start(worlds, name)
    assert max((want[k] - start[k]).abs().max() for k in want if k in start) > 5e-5, "something was learned at all"
    for key in want:
        torch.testing.assert_close(got[key], want[key], atol=1e-5, rtol=0, msg=key)


def weights_of_start(place, name):
    path = place / CASES[name][1].get("ckpt", "tiny")
    plain = load_file(path / "model.safetensors")
    if (place / "1" / name / "adapter").exists() and not (place / "1" / name / "model").exists():
        found = load_file(place / "1" / name / "adapter" / "adapter_model.safetensors")
        return {k: torch.zeros_like(v) for k, v in found.items() if "lora_B" in k}
    return plain


@slow
@pytest.mark.parametrize("world", [2, 3])
def test_16_bit_weights_train_through_sharded_masters(worlds, world):
    """Not to the last digits, which 16 bits do not have; but the same steps in nearly all weights, which only masters allow."""
    want, got, start = weights(worlds / "1" / "bfloat16"), weights(worlds / str(world) / "bfloat16"), load_file(worlds / "tiny" / "model.safetensors")
    key = "language_model.model.layers.0.mlp.up_proj.weight"
    moved = (got[key].float() - start[key].bfloat16().float())
    assert (moved != 0).float().mean() > 0.3 and (got[key] == want[key]).float().mean() > 0.9
    a, b = (rows_of(worlds / str(w) / "bfloat16" / "metrics.jsonl") for w in (1, world))
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], abs=0.05)


@pytest.mark.parametrize("world", [2, 3])
def test_the_reference_is_the_same_and_written_once(worlds, world):
    for name in {"full", "lora", "tied"} & set(RUNS[world]):
        one, many = (rows_of(worlds / str(w) / name / "reference.jsonl") for w in (1, world))
        assert one == many, "the same packs give the same bits"
    if "held out" not in RUNS[world]:
        return
    a, b = (json.loads((worlds / str(w) / "held out" / "heldout.json").read_text())["after"] for w in (1, world))
    assert a["pairs"] == b["pairs"] and a["margin"] == pytest.approx(b["margin"], rel=1e-4, abs=2e-6) and a["accuracy"] == b["accuracy"]


@pytest.mark.parametrize("name", STOPS)
def test_sigterm_to_one_of_them_stops_all_and_they_go_on_to_the_same_bits(worlds, name):
    out, whole = worlds / "2" / f"stopped {name}", worlds / "2" / name
    assert not (out / "state").exists() and [r["step"] for r in rows_of(out / "metrics.jsonl")] == [1, 2, 3]
    want, got = weights(whole), weights(out)
    assert want and all(torch.equal(want[k], got[k]) for k in want)
    assert [r["loss"] for r in rows_of(out / "metrics.jsonl")] == [r["loss"] for r in rows_of(whole / "metrics.jsonl")]


def torchrun(**settings):
    """dpo.py in two processes that torchrun starts, as the README has it."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--", str(ROOT / "dpo.py"),
                           *(f"--{name}={value}" for name, value in settings.items())], capture_output=True, text=True, timeout=120,
                          cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})


@slow
def test_torchrun_starts_the_very_processes_that_meet_here(worlds):
    done = torchrun(**flags(worlds, worlds / "torchrun"))
    assert done.returncode == 0, done.stderr[-3000:]
    want, got = weights(worlds / "2" / "full"), weights(worlds / "torchrun")
    assert want and all(torch.equal(want[k], got[k]) for k in want)


@slow
def test_a_message_comes_once_and_torchrun_fails(place):
    done = torchrun(data=place / "none.jsonl", out=place / "none", device="cpu")
    assert done.returncode != 0 and (done.stdout + done.stderr).count("dpo.py: --data") == 1, done.stderr[-3000:]


@slow
def test_the_first_process_alone_draws_bars():
    bars = lambda rank: subprocess.run([sys.executable, "-c", "import common, tqdm; [x for x in tqdm.tqdm([1, 2])]"], cwd=ROOT,
                                       env=os.environ | {"RANK": rank}, capture_output=True, text=True).stderr
    assert "2/2" in bars("0") and bars("1") == ""


@pytest.mark.parametrize("there, asked, got", [(True, "auto", "cuda:1"), (True, "cuda", "cuda:1"), (True, "cuda:3", "cuda:3"),
                                               (True, "cpu", "cpu"), (False, "auto", "auto")])
def test_every_process_has_a_gpu_of_its_own(monkeypatch, there, asked, got):
    made = []
    for key, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", made.append, raising=False)     # behind torch's own look at the name
    monkeypatch.setattr(parallel.dist, "init_process_group", lambda kind, timeout: made.append(kind))
    assert parallel.start(asked) == got
    assert made == ([int(got[5:]), "cpu:gloo,cuda:nccl"] if got.startswith("cuda") else ["gloo"])


# ---- how a batch is shared out -------------------------------------------------------------------------------------

def shares(monkeypatch, trees, budget, world):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    out = []
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        out.append(share(trees, budget))
    return out


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_tree_is_computed_once_in_packs_that_fit_and_all_have_as_many(monkeypatch, world):
    rng = random.Random(world)
    for count in (1, 2, 5, 40, 128):
        trees = [Tree(str(k), [0] * rng.randint(5, 60), [[0] * rng.randint(2, 20)]) for k in range(count)]
        for budget in (1, 70, 300, 10**6):
            parts = shares(monkeypatch, trees, budget, world)
            assert len({len(part) for part in parts}) == 1, "an equal number, or they would wait for each other"
            counted = [t for k in range(len(parts[0])) for part in parts for t in part[k][0] * part[k][1]]
            assert [t.id for t in counted] == [t.id for t in trees]
            assert all(sum(t.tokens for t in pack) <= budget or len(pack) == 1 for part in parts for pack, _ in part)
            assert len(parts[0]) <= -(-len(list(split(trees, budget))) // world), "sharing costs no further round"


def test_packs_are_of_nearly_equal_size(monkeypatch):
    rng = random.Random(0)
    trees = [Tree(str(k), [0] * rng.randint(600, 800), [[0] * rng.randint(20, 300)] * 2) for k in range(128)]
    sizes = [sum(t.tokens for t in pack) for part in shares(monkeypatch, trees, 8192, 8) for pack, counts in part if counts]
    assert max(sizes) < 1.15 * sum(sizes) / len(sizes), "12 and a half packs on 8 processes are 16 smaller ones, not 13"


def test_one_process_packs_as_ever(monkeypatch):
    trees = [Tree(str(k), [0] * 50, [[0] * 9]) for k in range(7)]
    [mine] = shares(monkeypatch, trees, 200, 1)
    assert mine == [(part, True) for part in split(trees, 200)]
