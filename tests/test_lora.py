"""Adapters: where they stand, what they change, what they leave alone, and that PEFT agrees.

    python -m pytest tests/test_lora.py -q             with peft and transformers installed also in both directions between them
"""
import json
import math
import os
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import dpo
import lora
import rejection
import sft
import steerlm
from common import BadInput
from conftest import hf_checkpoint, tiny_checkpoint, tiny_model
from data import Pixels, Tokens, answer_logps, make_tree
from test_dpo import RECORDS, rows_of, write_data


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("lora") / "tiny", "byte")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("lora") / "data")


def flags(ckpt, data, out, **changes):
    return dict(ckpt=str(ckpt), data=str(data), out=str(out), device="cpu", steps=6, batch=4, lr=1e-2, lora=4, alpha=8) | changes


@pytest.fixture(scope="module")
def run(ckpt, data, tmp_path_factory):
    """(folder, model in memory) of a DPO run with adapters."""
    out = tmp_path_factory.mktemp("lora") / "run"
    out.mkdir()
    return out, dpo.align(dpo.Settings(**flags(ckpt, data, out)), out)


def logps(model, folder, data, records=None):
    import formats as reading
    tokens, pixels = Tokens(folder, model.config), Pixels(model.config)
    trees = [make_tree(tokens, r, [a["text"] for a in r["answers"]]) for r in records or reading.read(data)[0]]
    with torch.no_grad():
        return torch.cat([answer_logps(model, pixels.pack([t])) for t in trees])


# ---- where they stand ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text_only", [False, True])
def test_adapters_stand_at_every_linear_layer_of_the_language_model_and_nowhere_else(text_only):
    model = tiny_model(text_only=text_only)
    lora.attach(model, 4, 8, 0)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    assert set(lora.adapters(model)) == {f"language_model.layers.{k}.{name}" for k in range(2) for name in names}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n in trained if "lora_" not in n} == ({n for n, _ in model.named_parameters() if n.startswith("multi_modal_projector.")})
    assert len([n for n in trained if "lora_" in n]) == 28 and bool(text_only) == (not any("projector" in n for n in trained))


def test_a_linear_layer_without_an_adapter_is_noticed():
    model = tiny_model()
    model.language_model.layers[0].mlp.extra = torch.nn.Linear(64, 64)
    with pytest.raises(AssertionError, match="missing at .*mlp.extra"):
        lora.attach(model, 4, 8, 0)


def test_at_step_0_nothing_has_changed_and_the_seed_decides_A():
    model, plain = tiny_model(), tiny_model()
    lora.attach(model, 4, 8, 0)
    x = torch.randn(5, 64)
    layer = model.language_model.layers[1].self_attn.q_proj
    assert torch.equal(layer(x), plain.language_model.layers[1].self_attn.q_proj(x))
    assert layer.lora_A.abs().max() <= 1 / 8 and layer.lora_A.std() > 0.05 and not layer.lora_B.any()
    same, other = tiny_model(), tiny_model()
    lora.attach(same, 4, 8, 0)
    lora.attach(other, 4, 8, 1)
    assert torch.equal(layer.lora_A, same.language_model.layers[1].self_attn.q_proj.lora_A)
    assert not torch.equal(layer.lora_A, other.language_model.layers[1].self_attn.q_proj.lora_A)
    assert not torch.equal(layer.lora_A, model.language_model.layers[0].self_attn.q_proj.lora_A)


def test_an_adapted_layer_computes_its_formula():
    model = tiny_model()
    lora.attach(model, 4, 10, 0)
    layer, x = model.language_model.layers[0].mlp.down_proj, torch.randn(3, 96)
    torch.nn.init.normal_(layer.lora_B)
    torch.testing.assert_close(layer(x), x @ (layer.weight + 2.5 * layer.lora_B @ layer.lora_A).T, atol=1e-4, rtol=1e-4)


# ---- what a run changes -----------------------------------------------------------------------------------------------

def test_only_adapters_and_projector_move(ckpt, run):
    before, after = dict(checkpoint.load(ckpt).named_parameters()), dict(run[1].named_parameters())
    for name, p in before.items():
        assert torch.equal(p, after[name]) == (not name.startswith("multi_modal_projector.")), name
    assert all(after[name].any() for name in after if name.endswith("lora_B")), "layer 0 included"


def test_the_contract_holds_and_the_run_learns(run):
    rows = rows_of(run[0] / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-1]["loss"] < rows[0]["loss"] - 0.05


@pytest.mark.parametrize("script, rank, lr, projector_lr", [(dpo, 0, 5e-7, 0), (dpo, 4, 5e-5, 2e-5), (sft, 0, 2e-5, 0), (sft, 4, 4e-4, 2e-5),
                                                            (rejection, 4, 4e-4, 2e-5), (steerlm, 4, 4e-4, 2e-5)])
def test_a_rate_that_is_not_given_is_that_for_what_is_trained(ckpt, data, tmp_path, capsys, script, rank, lr, projector_lr):
    """And the first step of Adam moves the projector by it."""
    out = tmp_path / "out"
    script.run(script.Settings(**flags(ckpt, data, out, steps=1) | {"lora": rank, "alpha": 0, "lr": 0.0, "merge": rank > 0}))
    used = json.loads((out / "config.json").read_text())["settings"]
    assert (used["lr"], used["projector_lr"]) == (lr, projector_lr) and rows_of(out / "metrics.jsonl")[0]["lr"] == lr
    assert f"lr {lr}{f', projector {projector_lr}' * (rank > 0)}, cpu" in capsys.readouterr().out
    before, after = (dict(checkpoint.load(x).named_parameters())["multi_modal_projector.linear_1.weight"] for x in (ckpt, out / "model"))
    assert (after - before).abs().max().item() == pytest.approx(projector_lr or lr, rel=0.02)


def test_the_projector_trains_at_its_own_rate(ckpt, data, tmp_path, monkeypatch):
    """The first step of Adam is the rate, whatever the gradient: it can be read off the weights."""
    before = dict(checkpoint.load(ckpt).named_parameters())
    for lr, projector_lr, want in ((1e-3, 2e-4, 2e-4), (1e-3, 0.0, 1e-3)):
        out = tmp_path / str(projector_lr)
        out.mkdir()
        model = dpo.align(dpo.Settings(**flags(ckpt, data, out, steps=1, lr=lr, projector_lr=projector_lr)), out)
        moved = (model.multi_modal_projector.linear_1.weight - before["multi_modal_projector.linear_1.weight"]).abs()
        assert moved.max().item() == pytest.approx(want, rel=1e-2)
        assert model.language_model.layers[0].mlp.up_proj.lora_B.abs().max().item() == pytest.approx(lr, rel=1e-2)
    out = tmp_path / "sft"
    sft.run(sft.Settings(**flags(ckpt, data, out, steps=1, lr=1e-3, projector_lr=3e-4, merge=True)))
    after = dict(checkpoint.load(out / "model").named_parameters())
    moved = (after["multi_modal_projector.linear_1.weight"] - before["multi_modal_projector.linear_1.weight"]).abs()
    assert moved.max().item() == pytest.approx(3e-4, rel=1e-2)


def test_after_many_steps_the_reference_of_every_pair_is_still_that_of_the_start(ckpt, data, tmp_path):
    """Recomputed from the checkpoint, it equals the cached one to the bit; the policy by then does not."""
    out = tmp_path / "out"
    out.mkdir()
    model = dpo.align(dpo.Settings(**flags(ckpt, data, out, steps=50 if os.environ.get("SLOW") else 15, batch=5)), out)
    cached = [r["logps"] for r in rows_of(out / "reference.jsonl")]
    import formats as records
    fresh = checkpoint.load(ckpt)
    tokens, pixels = Tokens(ckpt, fresh.config), Pixels(fresh.config)
    trees = [make_tree(tokens, r, [a["text"] for a in r["answers"]]) for r in records.read(data)[0]]
    assert list(dpo.reference_logps(fresh, trees, pixels, 1024)) == cached
    assert max(abs(a - b) for x, y in zip(dpo.reference_logps(model, trees, pixels, 1024), cached) for a, b in zip(x, y)) > 1
    (out / "adapter").rename(out / "done")
    dpo.align(dpo.Settings(**flags(ckpt, data, out, steps=0)), out)          # neither refused as stale, nor computed again
    assert [r["logps"] for r in rows_of(out / "reference.jsonl")] == cached


# ---- in and out ---------------------------------------------------------------------------------------------------------

def test_an_adapter_is_a_checkpoint_like_any_other(run, ckpt, data):
    out, model = run
    assert sorted(p.name for p in (out / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "processor_config.json", "tokenizer.json"]
    assert not (out / "model").exists() and not (out / "state").exists()
    again = checkpoint.load(out / "adapter")
    assert set(dict(again.named_parameters())) == set(dict(checkpoint.load(ckpt).named_parameters()))
    torch.testing.assert_close(logps(again, out / "adapter", data), logps(model, ckpt, data), atol=2e-4, rtol=0)
    assert checkpoint.stamp(out / "adapter") != checkpoint.stamp(ckpt)


def test_merged_equals_unmerged(ckpt, data, tmp_path):
    before = logps(checkpoint.load(ckpt), ckpt, data)
    for changes in ({"merge": True}, {}):
        out = tmp_path / str(len(changes))
        out.mkdir()
        model = dpo.align(dpo.Settings(**flags(ckpt, data, out, **changes)), out)
        values = [logps(model, ckpt, data)] + [logps(checkpoint.load(out / name), out / name, data) for name in ("adapter", "model")
                                               if (out / name).exists()]
        assert len(values) == 2 + len(changes) and (values[0] - before).abs().max() > 1
        for value in values[1:]:
            torch.testing.assert_close(value, values[0], atol=2e-4, rtol=0)
    assert not lora.adapters(checkpoint.load(out / "adapter"))


def test_further_training_starts_from_the_merged_model(run, data, tmp_path):
    out = tmp_path / "out"
    dpo.run(dpo.Settings(**flags(run[0] / "adapter", data, out, lora=0, alpha=0, steps=1, lr=1e-4)))
    [row] = rows_of(out / "metrics.jsonl")
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5), "the reference is base and adapter together"
    with pytest.raises(BadInput, match="is an adapter, and PEFT loads none on top of another"):
        dpo.run(dpo.Settings(**flags(run[0] / "adapter", data, tmp_path / "more")))


@pytest.mark.parametrize("spoil, why", [
    (lambda t, c: t.pop(next(iter(k for k in t if "lora_B" in k))), "misshapen  language_model.layers.0"),
    (lambda t, c: t.update({"base_model.model.model.nothing.lora_A.weight": torch.zeros(4, 4)}), "extra      base_model.model.model.nothing"),
    (lambda t, c: t.update({k: v[:, :-1].contiguous() for k, v in t.items() if k.endswith("0.mlp.up_proj.lora_A.weight")}), "misshapen"),
    (lambda t, c: t.update({k: v[:-1] for k, v in t.items() if k.endswith("0.mlp.up_proj.lora_A.weight")}), "misshapen"),
    (lambda t, c: t.update({k: v * torch.nan for k, v in t.items() if k.endswith("0.mlp.up_proj.lora_A.weight")}), "not finite"),
    (lambda t, c: t.update({"base_model.model.model.language_model.layers.0.mlp.up_proj.lora_magnitude_vector": torch.ones(1)}), "extra"),
    (lambda t, c: c.update(use_dora=True), "use_dora is True, and only False is known here; merge it with PEFT first"), (lambda t, c: c.update(bias="all"), "bias is 'all'"),
    (lambda t, c: c.update(rank_pattern={"q_proj": 8}), "rank_pattern"), (lambda t, c: c.pop("r"), "r is None"),
    (lambda t, c: t.clear(), "it is empty"),
    (lambda t, c: c.update(base_model_name_or_path="somebody/gone"), "its base model somebody/gone was looked for in")])
def test_an_adapter_that_does_not_fit_is_refused_and_named(run, tmp_path, spoil, why):
    folder = shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    tensors, config = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=re.escape(why)):
        checkpoint.load(folder)


def test_an_adapter_finds_its_base_model_beside_it(run, ckpt, tmp_path):
    folder = shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(ckpt.resolve())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "someone/tiny"}))
    shutil.copytree(ckpt, tmp_path / "tiny")
    assert torch.equal(checkpoint.load(folder).head, checkpoint.load(run[0] / "adapter").head)
    before = checkpoint.stamp(folder)
    os.utime(tmp_path / "tiny" / "model.safetensors", (0, 0))
    assert checkpoint.stamp(folder) != before, "another base is another model"


@pytest.mark.parametrize("changes, why", [({"lora": -1}, "must not be negative"), ({"lora": 0}, "give --lora"),
                                          ({"lora": 0, "alpha": 0, "merge": True}, "give --lora"), ({"projector_lr": -1.0}, "not be negative")])
def test_flags_that_contradict_each_other_are_refused(ckpt, data, tmp_path, changes, why):
    for script in (dpo, sft):
        with pytest.raises(BadInput, match=why):
            script.run(script.Settings(**flags(ckpt, data, tmp_path / "out", **changes)))


def test_what_is_tuned_from_an_adapter_without_a_tokenizer_has_its_base_models(ckpt, data, tmp_path):
    dpo.run(dpo.Settings(**flags(ckpt, data, tmp_path / "out", steps=1)))
    (tmp_path / "out" / "adapter" / "tokenizer.json").unlink()                   # PEFT writes none
    sft.run(sft.Settings(**flags(tmp_path / "out" / "adapter", data, tmp_path / "next", steps=0, lora=0, alpha=0)))
    assert (tmp_path / "next" / "model" / "tokenizer.json").read_bytes() == (ckpt / "tokenizer.json").read_bytes()


def test_without_alpha_adapters_count_twice(ckpt, data, tmp_path):
    dpo.run(dpo.Settings(**flags(ckpt, data, tmp_path / "out", steps=1, alpha=0)))
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8


def test_in_16_bits_adapters_train_through_fp32_masters(ckpt, data, tmp_path):
    out = tmp_path / "out"
    dpo.run(dpo.Settings(**flags(ckpt, data, out, dtype="bfloat16", steps=8, lr=1e-3)))
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16} and all(t.any() for n, t in tensors.items() if "lora_B" in n)


# ---- PEFT -----------------------------------------------------------------------------------------------------------------

def theirs_logits(model, tree, pixels):
    ids = torch.tensor([tree.prompt + tree.answers[0]])
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels(tree.images), attention_mask=torch.ones_like(ids)).logits[0]


def our_logits(model, tree, pixels):
    from data import Tree
    pack = pixels.pack([Tree("", tree.prompt + tree.answers[0], [], tree.images)])
    with torch.no_grad():
        return model(pack.ids, pack.positions, pack.mask, pack.pixels) @ model.head.T


def trees_of(folder, config, data):
    import formats as records
    tokens = Tokens(folder, config)
    return [make_tree(tokens, r, [r["answers"][0]["text"]]) for r in records.read(data)[0]]


def test_peft_loads_our_adapter_onto_transformers_llava_and_gives_our_logits(data, tmp_path):
    peft = pytest.importorskip("peft")
    folder, base = hf_checkpoint(tmp_path / "hf", "byte")
    out = tmp_path / "out"
    out.mkdir()
    model = dpo.align(dpo.Settings(**flags(folder, data, out)), out)
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter")
    adapted = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A") and not n.endswith("lora_A")}
    assert len(adapted) == 14 and not any("vision_tower" in n for n in adapted)
    pixels = Pixels(model.config)
    for tree in trees_of(folder, model.config, data):
        torch.testing.assert_close(theirs_logits(theirs, tree, pixels), our_logits(model, tree, pixels), atol=1e-3, rtol=1e-3)
    merged = theirs.merge_and_unload()
    ours = checkpoint.load(out / "adapter")
    torch.testing.assert_close(merged.model.language_model.layers[1].mlp.up_proj.weight, ours.language_model.layers[1].mlp.up_proj.weight)
    torch.testing.assert_close(merged.model.multi_modal_projector.linear_2.bias, ours.multi_modal_projector.linear_2.bias)


@pytest.mark.parametrize("targets, more", [
    (r".*language_model.*\.(q_proj|v_proj|down_proj)", {}),
    (["q_proj", "v_proj"], {"modules_to_save": ["multi_modal_projector"]}),              # by name: the vision tower's, too
    (["up_proj", "lm_head"], {"use_rslora": True})], ids=["language model", "by name, with projector", "rslora and head"])
def test_an_adapter_made_by_peft_loads_here_and_gives_their_logits(data, tmp_path, targets, more):
    peft = pytest.importorskip("peft")
    folder, base = hf_checkpoint(tmp_path / "hf", "byte")
    base.config._name_or_path = base.name_or_path = str(folder)
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, **more))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "adapter")
    ours, plain = checkpoint.load(tmp_path / "adapter"), checkpoint.load(folder)
    pixels = Pixels(ours.config)
    for tree in trees_of(tmp_path / "adapter", ours.config, data):
        want = theirs_logits(theirs, tree, pixels)
        torch.testing.assert_close(our_logits(ours, tree, pixels), want, atol=2e-3, rtol=1e-3)
        assert (our_logits(plain, tree, pixels) - want).abs().max() > 0.1


def test_peft_loads_a_text_only_adapter(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = tiny_checkpoint(tmp_path / "text", "byte", text_only=True)
    data = write_data(tmp_path / "data", rows=[RECORDS[k] for k in (1, 5)])
    out = tmp_path / "out"
    out.mkdir()
    model = dpo.align(dpo.Settings(**flags(folder, data, out)), out)
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(folder), out / "adapter").eval()
    tree = trees_of(folder, model.config, data)[0]
    ids = torch.tensor([tree.prompt + tree.answers[0]])
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=ids).logits[0], our_logits(model, tree, Pixels(model.config)), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("change", ({"r": "4"}, {"r": 0}, {"lora_alpha": "8"}, {"lora_alpha": None}), ids=str)
def test_a_rank_that_is_no_number_is_refused(change):
    with pytest.raises(BadInput, match="not two numbers"):
        checkpoint.scale_of({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | change, "adapter_config.json")
