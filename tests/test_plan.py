"""The plan is what the allocator then says; checkpointing and the probe change memory, and nothing else.

    python -m pytest tests/test_plan.py -q            with SLOW=1 also on the model of speed.py
"""
import json
import os
import re

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import speed as bench
import checkpoint
import common
import dpo
import lora
import memory as plan
import sft
import steerlm
from common import BadInput
from conftest import tiny_checkpoint, tiny_model
from data import Tree, answer_logps, make_pack, split
from model import Llava
from test_dpo import align, rows_of, settings, write_data

slow = pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs it")
GIB = 2 ** 30


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("plan") / "tiny", "byte")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


# ---- the plan against the allocator ---------------------------------------------------------------------------------

def trees_of(config, count, prompt, answer):
    """Trees of two answers, a picture in each."""
    patches, image = config.vision.patches, config.image_token
    ids = [5] * 3 + [image] * patches + [6 + k % 90 for k in range(prompt)]
    return [Tree(str(k), ids, [[7] * answer + [2], [8] * (answer // 2) + [2]]) for k in range(count)]


def measured(folder, trees, budget, rank, again, dtype, steps=2):
    """Peak bytes of tensors over two steps of two packs, and the plan for them."""
    model = checkpoint.load(folder, dtype=dtype)
    config, weights = model.config, sum(p.nbytes for p in model.parameters())
    packs = [make_pack(part, torch.zeros(len(part), 3, config.vision.image_size, config.vision.image_size)) for part in list(split(trees, budget))[:2]]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        if rank:
            lora.attach(model, rank, 2 * rank, 0)
        model.language_model.checkpointing = again
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        wide = common.masters(list(named.values()))
        optimizer = common.adamw(dict(zip(named, wide)), 1e-4)
        for _ in range(steps):
            for pack in packs:
                answer_logps(model, pack).sum().backward()
            common.update(optimizer, wide, list(named.values()))
    now = peak = 0
    for event in prof.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    pack = packs[0]
    looked = (sum(c.q_rows.numel() for c in pack.mask.plan[0]), sum(c.k_rows.numel() for c in pack.mask.plan[0]))
    found = plan.needs(config, len(pack.ids), scored=len(pack.rows), images=len(pack.pixels), looked=looked, dtype=dtype, rank=rank, world=1,
                       packs=len(packs), gpu=False, again=again)
    return weights + peak, found


@pytest.mark.parametrize("rank, again, dtype, budget", [
    (0, False, torch.float32, 1024), (0, True, torch.float32, 1024), (8, False, torch.float32, 512), (8, True, torch.float32, 1024),
    (0, False, torch.bfloat16, 512)], ids=str)
def test_the_plan_is_within_a_tenth_of_the_measured_peak_on_the_miniature(one_thread, rank, again, dtype, budget):
    folder = checkpoint.resolve("toy/llava")
    trees = trees_of(checkpoint.read_config(folder)[0], 80, 20, 12)
    peak, found = measured(folder, trees, budget, rank, again, dtype)
    assert sum(found.values()) == pytest.approx(peak, rel=0.1), found


@slow
@pytest.mark.parametrize("rank, again", [(0, False), (0, True), (16, False)])
def test_the_plan_is_within_a_tenth_of_the_measured_peak_on_the_model_of_the_benchmark(one_thread, tmp_path, rank, again):
    folder = bench.write_checkpoint(tmp_path, "small")
    trees = trees_of(checkpoint.read_config(folder)[0], 4, 60, 80)
    peak, found = measured(folder, trees, 1024, rank, again, torch.float32)
    assert sum(found.values()) == pytest.approx(peak, rel=0.1), found


def test_weights_are_counted_as_the_model_counts_them():
    for sizes in ({}, {"tie": True}, {"text_only": True}, {"kv_heads": 4}):
        model = tiny_model(**sizes)
        n = plan.sizes(model.config, 0)
        assert n["all"] == sum(p.numel() for p in model.parameters())
        assert n["trained"] == sum(p.numel() for name, p in model.named_parameters() if not name.startswith("vision_tower."))
        assert n["rest"] + 2 * n["block"] == n["trained"]
        lora.attach(model, 6, 12, 0)
        n = plan.sizes(model.config, 6)
        assert n["all"] == sum(p.numel() for p in model.parameters())
        assert n["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)


def of_7b(**changes):
    about = dict(scored=2700, images=11, looked=None, dtype=torch.bfloat16, rank=0, world=1, packs=2, gpu=True, again=False)
    return plan.needs(bench.config_of("7b"), 8192, **about | changes)


def test_of_7_billion_weights_the_arithmetic_is_the_one_on_paper():
    n, full, lora_, many = plan.sizes(bench.config_of("7b"), 0), of_7b(), of_7b(rank=128), of_7b(world=8)
    assert n["all"] == pytest.approx(7.06e9, rel=0.01) and n["trained"] == pytest.approx(6.76e9, rel=0.01)
    assert full["weights"] == 2 * n["all"] and full["masters"] == full["gradients"] == 4 * n["trained"] and full["optimizer"] == 8 * n["trained"]
    assert many["optimizer"] == full["optimizer"] // 8 and many["masters"] == full["masters"] // 8 and many["activations"] == full["activations"]
    assert 0.05 < lora_["optimizer"] / full["optimizer"] < 0.06 and lora_["masters"] > 0
    assert of_7b(again=True)["activations"] < 0.15 * full["activations"]
    assert 4.5e6 < full["activations"] / 8192 < 8e6, "some megabytes a token"
    assert of_7b(rank=128, world=8) == lora_, "adapters are not cut"
    assert of_7b(dtype=torch.float32)["masters"] == 0


# ---- checkpointing -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes", [{}, {"lora": 4, "lr": 1e-2}, {"dtype": "bfloat16"}], ids=str)
def test_checkpointing_changes_memory_and_not_a_bit_else(ckpt, data, tmp_path, changes):
    models = [align(ckpt, data, tmp_path / how, checkpointing=how, batch=5, **changes) for how in ("on", "off")]
    assert [m.language_model.checkpointing for m in models] == [True, False]
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters()):
        assert torch.equal(p, q), name
    assert [r["loss"] for r in rows_of(tmp_path / "on" / "metrics.jsonl")] == [r["loss"] for r in rows_of(tmp_path / "off" / "metrics.jsonl")]


def test_checkpointing_computes_each_block_again_in_backward_and_only_there(ckpt, data, tmp_path, monkeypatch):
    from model import Block
    calls, real = [], Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, *a: calls.append(torch.is_grad_enabled()) or real(self, *a))
    counts = {}
    for how in ("on", "off"):
        calls.clear()
        align(ckpt, data, tmp_path / how, checkpointing=how, batch=5, steps=1, pack=8192)
        counts[how] = calls.count(True), calls.count(False)
    assert counts["on"][0] == 2 * counts["off"][0] > 0 and counts["on"][1] == counts["off"][1]


def test_the_first_layers_adapters_learn_under_checkpointing_without_a_picture(ckpt, tmp_path):
    """Nothing before them asks for a gradient: the old kind of checkpointing would give them none."""
    from test_dpo import RECORDS
    data = write_data(tmp_path / "data", rows=[RECORDS[1], RECORDS[5]])
    model = align(ckpt, data, tmp_path / "out", checkpointing="on", lora=4, lr=1e-2)
    assert all(layer.lora_B.any() for layer in lora.adapters(model).values())


@pytest.mark.parametrize("free, how, want", [(10 * GIB, "auto", False), (2**20, "auto", True), (2**20, "off", False), (10 * GIB, "on", True)])
def test_auto_asks_the_plan(ckpt, data, tmp_path, monkeypatch, capsys, free, how, want):
    monkeypatch.setattr(plan, "free_bytes", lambda device: free)
    model = align(ckpt, data, tmp_path / "out", checkpointing=how, steps=1)
    said = capsys.readouterr().out
    assert model.language_model.checkpointing == want and f"checkpointing is {'on' if want else 'off'}" in said
    assert ("may not fit: lower --pack" in said) == (free == 2**20)


def test_auto_turns_it_on_where_only_the_plan_with_it_fits(ckpt, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "table", lambda *a, **k: ("", {False: 100, True: 10}))
    for free, want in ((50, True), (105, True), (112, False)):
        monkeypatch.setattr(plan, "free_bytes", lambda device: free)
        model = align(ckpt, data, tmp_path / str(free), checkpointing="auto", steps=1)
        assert model.language_model.checkpointing == want and "may not fit" not in capsys.readouterr().out


def test_what_is_free_counts_what_the_process_has_already():
    before = plan.free_bytes(torch.device("cpu"))
    mine = torch.ones(50_000_000)
    assert plan.free_bytes(torch.device("cpu")) > before - 100e6 and mine.sum() > 0
    with open("/proc/meminfo", encoding="utf8") as f:
        total = int(f.readline().split()[1]) * 1024
    assert GIB / 4 < before < total * 1.1


# ---- said and tried ----------------------------------------------------------------------------------------------------

def test_the_plan_stands_before_the_first_step_and_adds_up(ckpt, data, tmp_path, capsys):
    align(ckpt, data, tmp_path / "out", steps=1)
    said = capsys.readouterr().out
    assert said.index("memory plan") < said.index("step-0 contract")
    rows = {line.split()[0]: line.split()[1:] for line in said[said.index("memory plan"):].splitlines()[2:10]}
    assert list(rows) == ["weights", "masters", "gradients", "optimizer", "activations", "head", "in", "free"]
    assert len({len(line) for line in said.splitlines() if re.match(r"  (weights|head|optimizer) ", line)}) == 1


def test_the_probe_changes_neither_weights_nor_order(ckpt, data, tmp_path, monkeypatch):
    one = align(ckpt, data, tmp_path / "with", batch=2, steps=4)
    monkeypatch.setattr(plan, "begin", lambda *a: None)
    two = align(ckpt, data, tmp_path / "without", batch=2, steps=4)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    a, b = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("with", "without"))
    assert [x["loss"] for x in a] == [x["loss"] for x in b]


def test_the_largest_pack_runs_first_and_twice_where_there_are_two(ckpt, data, tmp_path, monkeypatch):
    seen, real = [], Llava.forward
    monkeypatch.setattr(Llava, "forward", lambda self, ids, *a: seen.append((len(ids), torch.is_grad_enabled())) or real(self, ids, *a))
    for pack, times in ((200, 2), (8192, 1)):
        seen.clear()
        align(ckpt, data, tmp_path / str(pack), pack=pack, batch=5, steps=3)
        trained = [n for n, grad in seen if grad]
        assert trained[:times] == [max(trained)] * times and len(trained) % 3 == times % 3
    align(ckpt, data, tmp_path / "small", batch=1, steps=1, pack=8192)


@pytest.mark.parametrize("script", [dpo, sft])
def test_out_of_memory_comes_before_step_1_and_says_which_flag_to_turn(ckpt, data, tmp_path, monkeypatch, script):
    def none_left(*a):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")
    monkeypatch.setattr(plan, "token_logps", none_left)
    run = lambda **changes: script.run(script.Settings(**vars(settings(ckpt, data, tmp_path / "out", pack=500)) | changes) if script is dpo else
                                       script.Settings(ckpt=str(ckpt), data=str(data), out=str(tmp_path / "out"), device="cpu", pack=500, **changes))
    with pytest.raises(BadInput, match="out of memory with packs of 500 tokens; lower --pack, set --checkpointing on, train adapters"):
        run()
    with pytest.raises(BadInput, match="lower --pack, or start more processes"):
        run(checkpointing="on", lora=4)
    assert not (tmp_path / "out" / "metrics.jsonl").exists() or not rows_of(tmp_path / "out" / "metrics.jsonl")


def test_other_errors_keep_their_names(ckpt, data):
    with pytest.raises(RuntimeError, match="shapes"):
        with plan.room(dpo.Settings()):
            raise RuntimeError("shapes do not match")
    with pytest.raises(BadInput, match="out of memory"):
        with plan.room(dpo.Settings()):
            raise torch.OutOfMemoryError("CUDA out of memory")


# ---- without weights --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script, size", [(dpo, "7b"), (sft, "13b"), (steerlm, "7b")])
def test_a_dry_run_needs_config_json_alone(tmp_path, capsys, size, script):
    config = bench.config_of(size)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config_json(config, torch.float16)))
    script.run(script.Settings(ckpt=str(tmp_path), dry_run=True))
    said = capsys.readouterr().out
    total = [float(line.split()[2]) for line in said.splitlines() if line.startswith("  in all")]
    full = sum(plan.needs(config, 8192, scored=8192 // 3, images=11, looked=None, dtype=torch.bfloat16, rank=0, world=1, packs=2, gpu=True,
                          again=False).values()) / GIB
    assert len(total) == 2 and total[0] == pytest.approx(full, abs=0.01) and total[1] < total[0] / 2
    assert "for each of 1 process:" in said and "for each of 8 processes:" in said and "bfloat16, packs of 8,192 tokens" in said
    script.run(script.Settings(ckpt=str(tmp_path), dry_run=True, lora=128, pack=4096))
    assert "packs of 4,096 tokens" in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_dry_run_on_the_cpu_plans_for_it(ckpt, capsys):
    dpo.run(dpo.Settings(ckpt=str(ckpt), dry_run=True, device="cpu"))
    said = capsys.readouterr().out
    assert "float32, packs of 1,024 tokens" in said and "free" in said


def test_an_unknown_way_of_checkpointing_is_refused(ckpt, data, tmp_path):
    with pytest.raises(BadInput, match="--checkpointing maybe: auto, on or off"):
        align(ckpt, data, tmp_path / "out", checkpointing="maybe")


def test_the_readmes_plan_is_what_the_plan_says(capsys, tmp_path):
    from conftest import ROOT
    readme = (ROOT / "README.md").read_text(encoding="utf8").split("## Real size")[1].split("\n## ")[0]
    (tmp_path / "config.json").write_text(json.dumps(checkpoint.config_json(bench.config_of("7b"), torch.float16)))
    dpo.run(dpo.Settings(ckpt=str(tmp_path), dry_run=True))
    said = capsys.readouterr().out.split("memory plan")[1].splitlines()
    assert all("    " + line in readme for line in said[1:] if line) and len(said) == 9
    rows = re.findall(r"^    (7b|13b) +(.*?), (\d) GPUs? +([\d.]+) +([\d.]+)$", readme, re.M)
    assert len(rows) == 6
    for size, how, world, *shown in rows:
        for again, value in zip((False, True), shown):
            found = plan.needs(bench.config_of(size), 8192, scored=8192 // 3, images=11, looked=None, dtype=torch.bfloat16,
                               rank=128 if "lora" in how else 0, world=int(world), packs=2, gpu=True, again=again)
            assert sum(found.values()) / GIB == pytest.approx(float(value), abs=0.006), (size, how, world)
