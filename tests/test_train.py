"""What every loop shares: order and rate, packs made ahead, steps too small for 16 bits, what a run
leaves in its folder.

    python -m pytest tests/test_train.py -q         (test_resume.py: a run that was stopped;
    test_parallel.py: several processes)
"""
import json
import math
import random
import time
from dataclasses import replace
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from conftest import rows_of, tiny_checkpoint, tiny_model, turns, write_data
from PIL import Image
from test_data import ADDED, tokenizer_with

import checkpoint
import dpo
import sft
import train
from common import BadInput
from data import TEMPLATES, Tokens, make_pack, pack_size
from train import Run, Settings, adamw, packs, schedule, shuffled

DRAW = train.draw_metrics      # conftest.py takes it away from every test


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("train") / "tiny", "byte")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def settings(script, model, file, out, **changes):
    flags = {"ckpt": str(model), "data": str(file), "out": str(out), "device": "cpu", "steps": 2,
             "batch": 4, "lr": 1e-3}
    return script.Settings(**(flags | changes))


# ---- order and rate ------------------------------------------------------------------------------

def test_every_pass_of_the_order_holds_every_item_once():
    items = random.Random(0).sample(range(100), 17)
    order = shuffled(items, 3)
    passes = [[next(order) for _ in items] for _ in range(4)]
    assert all(sorted(one) == sorted(items) for one in passes) and len({tuple(one) for one in passes}) == 4
    again, other = (list(islice(shuffled(items, seed), len(items))) for seed in (3, 4))
    assert again == passes[0] != other


def test_the_schedule_is_three_percent_warm_up_then_a_cosine_to_0():
    steps = 200                                             # 6 of warm-up, 194 of cosine
    for step, factor in {0: 1 / 6, 1: 2 / 6, 5: 1.0, 6: 1.0, 103: 0.5,
                         199: 0.5 * (1 + math.cos(math.pi * 193 / 194))}.items():
        assert schedule(step, steps) == pytest.approx(factor, abs=1e-12), step
    values = [schedule(k, steps) for k in range(6, steps)]
    assert values == sorted(values, reverse=True) and 0 < values[-1] < 1e-4
    assert schedule(0, 1) == 1.0 and schedule(0, 2) == 1.0 and schedule(0, 10, warmup=0) == 1.0
    assert [schedule(k, 4, warmup=0.5) for k in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert min(schedule(k, 1000, floor=0.1) for k in range(30, 1000)) == pytest.approx(0.1,
                                                                                       abs=1e-5)


def test_the_projector_has_a_rate_of_its_own_and_vectors_do_not_decay():
    trained = {name: torch.ones(2, 3)[(0,) * (name.endswith("bias"))] for name in
               ("multi_modal_projector.linear_1.weight", "multi_modal_projector.linear_1.bias",
                "lm_head.weight", "norm.bias")}
    for projector_lr, rates in ((2e-5, (2e-5, 2e-5, 1e-3, 1e-3)), (0.0, (1e-3,) * 4)):
        optimizer = adamw(trained, 1e-3, projector_lr, (0.9, 0.95), 0.1)
        found = {}
        for group in optimizer.param_groups:
            assert group["betas"] == (0.9, 0.95)
            found |= {id(p): (group["peak"], group["weight_decay"]) for p in group["params"]}
        decays = (0.1, 0.0, 0.1, 0.0)
        assert [found[id(p)] for p in trained.values()] == list(zip(rates, decays))


def test_a_step_s_rate_is_each_group_s_peak_times_the_schedule(ckpt, data, tmp_path, monkeypatch):
    seen, real = [], torch.optim.AdamW.step

    def step(self, *a):
        seen.append({(group["peak"], group["lr"]) for group in self.param_groups})
        return real(self, *a)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    dpo.run(settings(dpo, ckpt, data, tmp_path / "out", steps=3, projector_lr=5e-4))
    factors = [schedule(k, 3) for k in range(3)]
    assert seen == [{(1e-3, 1e-3 * factor), (5e-4, 5e-4 * factor)} for factor in factors]


# ---- packs ---------------------------------------------------------------------------------------

def test_the_next_pack_is_made_while_this_one_is_computed_with():
    items = [SimpleNamespace(tokens=n) for n in (1, 2, 3)]
    made, used = [], []

    def make(members):
        made.append(members[0].tokens)
        return torch.tensor(members[0].tokens * 10)

    for part in packs(items, 1, make, "cpu"):
        n = part.items[0].tokens
        assert part.pack == n * 10 and part.counts
        deadline = time.monotonic() + 5
        while n < 3 and n + 1 not in made and time.monotonic() < deadline:
            time.sleep(0.001)
        used.append((n, list(made)))
    assert used == [(1, [1, 2]), (2, [1, 2, 3]), (3, [1, 2, 3])] and list(packs([], 1, make, "cpu")) == []

    def fail(members):
        raise BadInput("no such picture")
    with pytest.raises(BadInput, match="no such picture"):
        list(packs(items, 1, fail, "cpu"))


def test_the_pack_fits_the_device_unless_it_is_said():
    assert pack_size(0, torch.device("cpu")) == 1024 and pack_size(0, torch.device("cuda")) == 8192
    assert pack_size(77, torch.device("cpu")) == 77


# ---- small steps ---------------------------------------------------------------------------------

def test_steps_that_16_bits_cannot_show_add_up_and_the_model_is_in_16_bits_again_behind_the_run(
        ckpt, data, tmp_path):
    """A norm's weight of 1 and the paper's rate of 5e-7: the next bf16 number below 1 is 0.996,
    thousands of steps away."""
    model = tiny_model(text_only=True).bfloat16()
    model.dtype = torch.bfloat16
    weight = model.language_model.norm.weight
    weight.data.fill_(1.0)
    run = Run(model, Settings(lr=5e-7), make_pack, steps=5000)
    for step in range(5000):
        weight.grad = torch.ones_like(weight)
        run.optimizer.step()
        if step == 9:
            torch.testing.assert_close(weight.data, torch.full_like(weight, 1 - 10 * 5e-7),
                                       atol=6e-7, rtol=0)
    assert weight.dtype == torch.float32 and weight.bfloat16().unique().tolist() == [0.99609375]

    trained = dpo.align(settings(dpo, ckpt, data, tmp_path / "out", dtype="bfloat16", steps=1))
    assert {p.dtype for p in trained.parameters()} == {torch.bfloat16}
    again = checkpoint.load(tmp_path / "out" / "model", dtype=torch.bfloat16)
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), again.parameters()))


def test_a_frozen_weight_stays_in_16_bits_and_out_of_the_optimizer():
    model = tiny_model().bfloat16()
    model.dtype = torch.bfloat16
    for name, p in model.named_parameters():
        p.requires_grad_(not name.startswith("vision_tower."))
    run = Run(model, Settings(lr=1e-3), make_pack, steps=1)
    for name, p in model.named_parameters():
        frozen = name.startswith("vision_tower.")
        assert p.dtype == (torch.bfloat16 if frozen else torch.float32)
        assert (name in run.trained) != frozen
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(run.trained)


# ---- at the door ---------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, why", [
    ({"lora": -1}, "--lora"), ({"clip": math.nan}, "--clip"), ({"data": ""}, "--data is needed"),
    ({"ckpt": "nowhere"}, "--ckpt nowhere"),
    ({"alpha": 8.0}, "--alpha is about adapters"), ({"dtype": "float16"}, "--dtype float16"),
    ({"template": "alpaca"}, "--template alpaca")])
def test_what_cannot_work_is_refused_before_anything_is_computed(ckpt, data, tmp_path, changes,
                                                                 why):
    with pytest.raises(BadInput, match=why):
        sft.run(settings(sft, ckpt, data, tmp_path / "out", **changes))
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(ckpt, data, tmp_path):
    with pytest.raises(BadInput, match=r"step \d+: loss .*lower --lr"):
        dpo.run(settings(dpo, ckpt, data, tmp_path / "out", steps=9, lr=1e30, clip=0.0))
    assert not (tmp_path / "out" / "model").exists()


# ---- what a run leaves ---------------------------------------------------------------------------

def test_a_run_leaves_its_files_and_a_picture_of_its_metrics_and_is_never_written_over(
        ckpt, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "draw_metrics", DRAW)
    out = tmp_path / "out"
    dpo.run(settings(dpo, ckpt, data, out))
    assert {path.name for path in out.iterdir()} == {"config.json", "lock", "metrics.jsonl", "metrics.png",
                                                     "model", "rejects.jsonl",
                                                     "reference.jsonl",
                                                     "reference.fingerprint.json"}
    drawn = Image.open(out / "metrics.png").convert("L")
    assert min(drawn.size) > 300 and len(drawn.getcolors()) > 10, "axes, letters and lines"
    for script in (sft, dpo):
        with pytest.raises(BadInput, match="already holds a trained model"):
            script.run(settings(script, ckpt, data, out))


def test_a_finished_run_that_is_resumed_says_so_and_ends_well(ckpt, data, tmp_path, capsys):
    dpo.run(settings(dpo, ckpt, data, tmp_path / "out"))
    with pytest.raises(SystemExit) as ended:
        dpo.run(settings(dpo, ckpt, data, tmp_path / "out", resume=True))
    assert ended.value.code == 0 and "is finished already" in capsys.readouterr().out


def test_data_whose_words_the_model_does_not_know_is_remarked_upon(data, tmp_path, capsys):
    dpo.run(settings(dpo, "toy/llava", data, tmp_path / "out", steps=0))
    assert "note: toy/llava does not know" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"dtype": "fp16"}, {"lr": math.nan}])
def test_a_dry_run_refuses_what_a_run_would(ckpt, wrong):
    for script in (sft, dpo):
        with pytest.raises(BadInput, match=f"--{next(iter(wrong))} "):
            script.run(script.Settings(ckpt=str(ckpt), dry_run=True, **wrong))


def test_a_runs_folder_is_no_checkpoint_and_a_name_of_the_hub_says_how_to_get_it(ckpt, data, tmp_path):
    dpo.run(settings(dpo, ckpt, data, tmp_path / "out"))
    with pytest.raises(BadInput, match=f"is a run's folder; its model is {tmp_path}/out/model"):
        checkpoint.resolve(str(tmp_path / "out"))
    with pytest.raises(BadInput, match="hf download llava-hf/x --local-dir x"):
        checkpoint.resolve("llava-hf/x")


def test_a_trained_folder_keeps_the_template_it_was_trained_with(tmp_path):
    """--template against what the tokenizer's tokens tell; the next run, and whoever loads the
    model, ask as it was trained."""
    ckpt = tiny_checkpoint(tmp_path / "tiny", "byte", vocab=448)
    tokenizer_with(ckpt, ADDED["chatml"][0])
    config, _ = checkpoint.read_config(ckpt)
    assert Tokens(ckpt, config).template == TEMPLATES["chatml"]

    data = write_data(tmp_path / "data")
    sft.run(settings(sft, ckpt, data, tmp_path / "own", steps=1))
    assert Tokens(tmp_path / "own" / "model", config).template == TEMPLATES["chatml"]

    sft.run(settings(sft, ckpt, data, tmp_path / "first", steps=1, template="vicuna_v1"))
    first = tmp_path / "first" / "model"
    assert Tokens(first, config).template == TEMPLATES["vicuna_v1"]

    # A sentence of one's own, written into the folder by hand, travels on; the questions that are
    # asked hold it.
    stored = json.loads((first / "template.json").read_text())
    (first / "template.json").write_text(json.dumps(stored | {"system": "Be kind."}))
    dpo.run(settings(dpo, first, data, tmp_path / "second", steps=1))
    second = Tokens(tmp_path / "second" / "model", config).template
    assert second == replace(TEMPLATES["vicuna_v1"], system="Be kind.")
    assert second.prompt(turns("Hi?")) == "Be kind. USER: Hi? ASSISTANT:"
    (first / "template.json").write_text("{")
    with pytest.raises(BadInput, match="template.json is no JSON"):
        dpo.run(settings(dpo, first, data, tmp_path / "third", steps=1))


@pytest.mark.parametrize("script", [sft, dpo], ids=lambda module: module.__name__)
def test_config_json_tells_the_run(ckpt, data, tmp_path, script):
    script.run(settings(script, ckpt, data, tmp_path / "out", steps=1))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["settings"]["lr"] == 1e-3 and config["steps"] == 1
    assert {"command", "commit", "hardware", "python", "torch", "threads"} <= set(config)
    assert len(rows_of(tmp_path / "out" / "metrics.jsonl")) == 1
