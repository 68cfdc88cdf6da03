"""The plan is what the allocator then says; checkpointing and the probe change memory alone.

    python -m pytest tests/test_memory.py -q         with SLOW=1 also on 39 million weights
"""
import gc
import json
import os
import re
from array import array
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import checkpoint
import dpo
import lora
import memory
import sft
import steerlm
from common import BadInput
from conftest import ROOT, rows_of, tiny_checkpoint, tiny_model, write_data
from data import Tree, make_pack, split
from memory import Load, needs
from model import Block, Config, Llava, TextConfig, answer_logps, token_logps
from train import Run, Settings
from vision import VisionConfig

GIB = 2 ** 30
SIZES = {
    "7": TextConfig(vocab_size=32064),
    "13": TextConfig(32064, 5120, 13824, 40, 40, 40),
}
slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs it")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("memory") / "tiny", "byte")


def settings(ckpt, folder, script=dpo, **changes):
    folder.mkdir(exist_ok=True)
    given = {"ckpt": str(ckpt), "data": str(write_data(folder / "data")), "out": str(folder / "out"),
             "device": "cpu", "steps": 2, "batch": 5, "lr": 1e-3}
    return script.Settings(**given | changes)


def config_of(size):
    """LLaVA-1.5's."""
    return Config(SIZES[size], VisionConfig(1024, 4096, 24, 16, 336, 14))


def tree_of(config, prompt, answers):
    images = ["a.png"] * prompt.count(config.image_token)
    answers = [array("i", answer) for answer in answers]
    return Tree("r", array("i", prompt), answers, images, [], config.image_token, config.vision.patches)


def trees_of(config, count, words, answer):
    """Trees with a picture and two answers each."""
    prompt = [5, config.image_token] + [6 + k % 90 for k in range(words)]
    answers = [[7] * answer + [2], [8] * (answer // 2) + [2]]
    return [tree_of(config, prompt, answers) for _ in range(count)]


# ---- the plan against the allocator --------------------------------------------------------------

def measured(model, count, words, answer, budget, rank, again, dtype):
    """Peak bytes of tensors over two steps of two packs and more, and the plan for them."""
    model.to(dtype).dtype = dtype
    model.language_model.checkpointing = again
    if rank:
        lora.attach(model, rank, 2 * rank, 0)
    for p in model.parameters():
        if p.requires_grad:
            p.data = p.data.float()
    weights = sum(p.nbytes for p in model.parameters())
    size = model.config.vision.image_size

    def pack_of(trees):
        return make_pack(trees, torch.zeros(len(trees), 3, size, size))

    trees = trees_of(model.config, count, words, answer)
    pack = pack_of(next(split(trees, budget)))
    # What an earlier profile counted in and left in a cycle would be counted out of this one.
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run = Run(model, Settings(pack=budget, batch=count), pack_of, steps=2)
        for _, batch in run.steps(2 * trees):
            for part in run.packs(batch):
                logps = token_logps(model, part.pack)
                run.backward(-logps.mean())
                run.record(loss=-logps)
            run.update()

    now = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    load = Load(len(pack.ids), len(pack.read), len(pack.pixels))
    return weights + peak, needs(model.config, load, dtype, rank, gpu=False, checkpointing=again)


@pytest.mark.parametrize("rank, again, dtype", [
    (0, False, torch.float32), (0, True, torch.float32), (8, False, torch.float32),
    (8, True, torch.float32), (0, False, torch.bfloat16), (0, True, torch.bfloat16)], ids=str)
def test_the_plan_is_within_a_tenth_of_the_measured_peak(one_thread, rank, again, dtype):
    model = checkpoint.load("toy/llava")
    peak, found = measured(model, 40, 20, 12, 1024, rank, again, dtype)
    assert sum(found.values()) == pytest.approx(peak, rel=0.1), found


@slow
@pytest.mark.parametrize("rank, again, dtype", [
    (0, False, torch.float32), (0, True, torch.float32), (16, False, torch.float32),
    (0, False, torch.bfloat16)], ids=str)
def test_so_it_is_on_a_larger_model(one_thread, rank, again, dtype):
    text = TextConfig(8000, 512, 1408, 8, 8, 8, 64)
    model = Llava(Config(text, VisionConfig(256, 1024, 6, 4, 336, 14), 4))
    model.vision_tower.requires_grad_(False)
    peak, found = measured(model, 4, 60, 80, 1024, rank, again, dtype)
    assert sum(found.values()) == pytest.approx(peak, rel=0.1), found


def test_weights_are_counted_as_the_model_counts_them():
    for sizes in ({}, {"tie": True}, {"text_only": True}, {"kv_heads": 4}):
        model = tiny_model(**sizes)
        frozen = [p for name, p in model.named_parameters() if name.startswith("vision_tower.")]
        n = memory.count(model.config, 0)
        assert n.frozen == sum(p.numel() for p in frozen)
        every = sum(p.numel() for p in model.parameters())
        assert n.trained == every - n.frozen == n.rest + 2 * n.block

        lora.attach(model, 6, 12, 0)
        n = memory.count(model.config, 6)
        assert n.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert n.trained + n.frozen == sum(p.numel() for p in model.parameters()) and n.trained == n.rest + 2 * n.block


def test_of_7_billion_weights_the_arithmetic_is_the_one_on_paper():
    config, load = config_of("7"), Load(8192, 2700, 11)
    n = memory.count(config, 0)
    full = needs(config, load, torch.bfloat16)
    again = needs(config, load, torch.bfloat16, checkpointing=True)
    many = needs(config, load, torch.bfloat16, world=8)
    adapters = needs(config, load, torch.bfloat16, rank=128)

    assert n.trained == pytest.approx(6.76e9, rel=0.01)
    assert n.frozen == pytest.approx(0.30e9, rel=0.02)
    assert full["weights"] == 4 * n.trained + 2 * n.frozen and full["copies"] == 2 * n.trained
    assert full["gradients"] == 4 * n.trained and full["optimizer"] == 8 * n.trained
    assert needs(config, load, torch.float32)["copies"] == 0

    assert 4.5e6 < full["activations"] / 8192 < 8e6, "some megabytes a token"
    assert again["activations"] < 0.15 * full["activations"]
    assert again["copies"] == 2 * (n.block + n.rest)
    assert many["optimizer"] == full["optimizer"] // 8
    assert many["activations"] == full["activations"]
    assert adapters["optimizer"] < 0.06 * full["optimizer"]
    assert adapters == needs(config, load, torch.bfloat16, rank=128, world=8), "they are not cut"


# ---- checkpointing -------------------------------------------------------------------------------

@pytest.mark.parametrize("rank, dtype", [(0, torch.float32), (4, torch.float32), (4, torch.bfloat16)])
def test_checkpointing_computes_blocks_again_and_changes_no_bit(ckpt, monkeypatch, rank, dtype):
    """One of the packs has no picture: nothing ahead of the blocks asks for a gradient then, and
    the old kind of checkpointing would give the first block's adapters none."""
    calls, real = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: calls.append(self) or real(self, *a))
    model = checkpoint.load(ckpt, dtype=dtype)
    if rank:
        lora.attach(model, rank, 8, 0)
        for name, p in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.ones_(p)                   # else A has no gradient
    pictured = make_pack(trees_of(model.config, 2, 9, 6), torch.ones(2, 3, 28, 28))
    plain = make_pack([tree_of(model.config, [5, 6, 7, 8], [[9, 10, 2], [11, 2]])])

    found = {}
    for again in (False, True):
        model.language_model.checkpointing = again
        calls.clear()
        for pack in (pictured, plain):
            answer_logps(model, pack).sum().backward()
        with torch.no_grad():
            answer_logps(model, plain)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found[again] = len(calls), {name: p.grad for name, p in trained.items()}
        model.zero_grad(set_to_none=True)

    assert found[False][0] == 6 and found[True][0] == 10, "2 blocks, 3 passes; 2 of them backward"
    for name, gradient in found[False][1].items():
        assert gradient.any() and torch.equal(gradient, found[True][1][name]), name


def test_the_flag_reaches_the_model(ckpt, tmp_path):
    for again in (True, False):
        model = dpo.align(settings(ckpt, tmp_path / str(again), steps=1, checkpointing=again))
        assert model.language_model.checkpointing == again


# ---- said and tried ------------------------------------------------------------------------------

def test_the_plan_says_whether_to_set_checkpointing(monkeypatch):
    config, load = tiny_model().config, Load(500, 100, 3)
    about = load, torch.float32
    plain, again = (sum(needs(config, *about, gpu=False, checkpointing=c).values()) for c in (0, 1))

    def advice(free, **flags):
        monkeypatch.setattr(memory, "free_bytes", lambda device: int(free / memory.ROOM))
        said = memory.plan(config, Settings(**flags), load, torch.device("cpu"), torch.float32, 1)
        return said.splitlines()[-1].split("cpu: ")[1]

    assert advice(plain + 9) == "fits" == advice(again + 9, checkpointing=True)
    assert advice(plain - 9) == advice(again + 9) == "does not fit plainly; set --checkpointing"
    assert advice(again - 9).startswith("may not fit: lower --pack, ")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert "free" not in memory.plan(config, Settings(), load, torch.device("cuda"), torch.float32, 1)


def test_the_probe_runs_the_largest_pack_twice_and_leaves_nothing_behind(ckpt, monkeypatch, capsys):
    model = checkpoint.load(ckpt)
    trees = [tree_of(model.config, [5] * size, [[6, 2], [7, 7, 2]]) for size in (9, 40, 12, 30)]
    before = {name: p.clone() for name, p in model.named_parameters()}
    random_state = torch.get_rng_state()
    ran, real = [], Llava.forward
    monkeypatch.setattr(Llava, "forward", lambda self, ids, *a: ran.append(len(ids)) or real(self, ids, *a))

    memory.begin(model, Settings(pack=50, batch=3), trees, make_pack)
    assert ran == [43, 43], "the largest pack; a second time upon the gradients of the first"
    ran.clear()
    memory.begin(model, Settings(pack=500, batch=3), trees, make_pack)
    assert ran == [43 + 33 + 15], "one pack a step: nothing is there when it comes"

    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:9]]
    assert [row[0] for row in rows] == [*needs(model.config, Load(1, 1, 0), torch.float32), "in"]
    for column in (-2, -1):
        assert sum(float(row[column]) for row in rows[:-1]) == pytest.approx(float(rows[-1][column]), abs=0.04)


@pytest.mark.parametrize("script", [dpo, sft])
def test_out_of_memory_comes_ahead_of_step_1_with_the_flags_that_help(ckpt, tmp_path, monkeypatch, capsys, script):
    def none_left(*a):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")
    monkeypatch.setattr(memory, "token_logps", none_left)
    with pytest.raises(BadInput, match="out of memory with packs of 500 tokens; lower --pack, set --checkpointing, train"):
        script.run(settings(ckpt, tmp_path, script, pack=500))
    assert rows_of(tmp_path / "out" / "metrics.jsonl") == [] and "memory plan" in capsys.readouterr().out


def test_other_errors_keep_their_names():
    with pytest.raises(RuntimeError, match="shapes"), memory.room(Settings()):
        raise RuntimeError("shapes do not match")
    with pytest.raises(BadInput, match="out of memory"), memory.room(Settings()):
        raise torch.OutOfMemoryError("CUDA out of memory")


# ---- without weights -----------------------------------------------------------------------------

def write_config(folder):
    config = checkpoint.config_json(config_of("7"), torch.float16)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("script", [dpo, sft, steerlm])
def test_a_dry_run_needs_config_json_alone(tmp_path, capsys, script):
    s = script.Settings(ckpt=write_config(tmp_path), dry_run=True)
    with pytest.raises(SystemExit, match="0"):
        script.run(s)
    said = capsys.readouterr().out
    totals = re.findall(r"in all +([\d.]+) +([\d.]+)", said)
    load = Load(8192, 8192 // 3, 11)
    for world, shown in zip((1, 8), totals, strict=True):
        for again in (False, True):
            found = needs(config_of("7"), load, torch.bfloat16, world=world, checkpointing=again)
            assert sum(found.values()) / GIB == pytest.approx(float(shown[again]), abs=0.01)
    assert "for each of 1 process:" in said and "for each of 8 processes:" in said
    assert "bfloat16, packs of 8,192 tokens" in said

    with pytest.raises(SystemExit, match="0"):
        script.run(replace(s, lora=128, pack=4096, device="cpu"))
    said = capsys.readouterr().out
    assert "float32, packs of 4,096 tokens" in said and "free" not in said and "8 processes" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_the_page_about_real_sizes_shows_what_the_plan_says(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)      # beside a GPU it says what is free there
    page = (ROOT / "docs" / "real_size.md").read_text(encoding="utf8")
    with pytest.raises(SystemExit, match="0"):
        dpo.run(dpo.Settings(ckpt=write_config(tmp_path), dry_run=True))
    said = capsys.readouterr().out.split("memory plan")[1]
    assert all(line in page for line in said.splitlines()[1:])

    rows = re.findall(r"^\| (7|13)B, (full|--lora 128), (\d) GPUs? \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert len(rows) == 6
    for size, how, world, *shown in rows:
        for again in (False, True):
            found = needs(config_of(size), Load(8192, 8192 // 3, 11), torch.bfloat16,
                          rank=128 if "lora" in how else 0, world=int(world), checkpointing=again)
            assert sum(found.values()) / GIB == pytest.approx(float(shown[again]), abs=0.006), (size, how, world)
