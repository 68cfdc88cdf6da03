"""Adapters: where they stand, what they change, what they leave alone, and that PEFT agrees.

    python -m pytest tests/test_lora.py -q    with peft and transformers installed also between them
"""
import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import checkpoint
import dpo
import formats
import lora
import sft
from common import BadInput
from conftest import RECORDS, hf_checkpoint, rows_of, tiny_checkpoint, tiny_model, write_data
from data import Pixels, Tokens, make_tree
from test_checkpoint import write_original
from model import answer_logps


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("lora") / "tiny", "byte")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("lora") / "data")


def flags(ckpt, data, out, **changes):
    return dict(ckpt=str(ckpt), data=str(data), out=str(out), device="cpu", steps=6, batch=4, lr=1e-2, lora=4) | changes


@pytest.fixture(scope="module")
def run(ckpt, data, tmp_path_factory):
    """(folder, model in memory) of a DPO run with adapters."""
    out = tmp_path_factory.mktemp("lora") / "run"
    return out, dpo.align(dpo.Settings(**flags(ckpt, data, out)))


def adapters(model):
    return {name for name, layer in model.named_modules() if isinstance(layer, lora.Adapted)}


def trees_of(folder, config, data):
    tokens = Tokens(folder, config)
    return [make_tree(tokens, r, [a["text"] for a in r["answers"]]) for r in formats.read(data)[0]]


def logps(model, folder, data):
    pixels = Pixels(model.config)
    with torch.no_grad():
        return torch.cat([answer_logps(model, pixels.pack([tree])) for tree in trees_of(folder, model.config, data)])


# ---- where they stand ----------------------------------------------------------------------------

@pytest.mark.parametrize("text_only", [False, True])
def test_adapters_stand_at_every_linear_layer_of_the_language_model_and_nowhere_else(text_only):
    model = tiny_model(text_only=text_only)
    lora.attach(model, 4, 8, 0)
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
             "mlp.down_proj")
    assert adapters(model) == {f"language_model.layers.{k}.{name}" for k in range(2) for name in names}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    projector = {n for n, _ in model.named_parameters() if n.startswith("multi_modal_projector.")}
    assert {n for n in trained if "lora_" not in n} == projector and bool(projector) != text_only
    assert len([n for n in trained if "lora_" in n]) == 28


def test_at_step_0_nothing_has_changed_and_the_seed_decides_A():
    models = [tiny_model(), tiny_model(), tiny_model()]
    for model, seed in zip(models, (0, 0, 1)):
        lora.attach(model, 4, 8, seed)
    layer, same, other = (model.language_model.layers[1].self_attn.q_proj for model in models)
    x = torch.randn(5, 64)
    assert torch.equal(layer(x), tiny_model().language_model.layers[1].self_attn.q_proj(x))
    assert layer.lora_A.abs().max() <= 1 / 8 and layer.lora_A.std() > 0.05 and not layer.lora_B.any()
    assert torch.equal(layer.lora_A, same.lora_A) and not torch.equal(layer.lora_A, other.lora_A)
    assert not torch.equal(layer.lora_A, models[0].language_model.layers[0].self_attn.q_proj.lora_A)


def test_in_16_bits_adapters_are_fp32_and_multiplied_in_16():
    model = tiny_model().bfloat16()
    lora.attach(model, 4, 12, 0)
    layer = model.language_model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    with torch.no_grad():
        layer.lora_B.normal_()
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    wanted = x @ layer.weight.T + 3 * (x @ layer.lora_A.bfloat16().T @ layer.lora_B.bfloat16().T)
    assert torch.equal(layer(x), wanted)
    layer(x).float().sum().backward()
    assert layer.weight.grad is None and layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


# ---- what a run changes --------------------------------------------------------------------------

def test_only_adapters_and_projector_move_and_the_run_learns(ckpt, run):
    before, after = dict(checkpoint.load(ckpt).named_parameters()), dict(run[1].named_parameters())
    for name, p in before.items():
        assert torch.equal(p, after[name]) == (not name.startswith("multi_modal_projector.")), name
    assert all(after[name].any() for name in after if name.endswith("lora_B")), "layer 0 included"
    rows = rows_of(run[0] / "metrics.jsonl")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and rows[-1]["loss"] < rows[0]["loss"] - 0.05


def test_small_steps_add_up_in_a_16_bit_model(ckpt, data, tmp_path):
    out = tmp_path / "out"
    dpo.run(dpo.Settings(**flags(ckpt, data, out, dtype="bfloat16", steps=4, lr=1e-5)))
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for n, t in tensors.items() if "lora_" in n} == {torch.float32}
    assert all(0 < t.abs().max() < 1e-4 for n, t in tensors.items() if "lora_B" in n)
    assert checkpoint.load(out / "adapter", dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("script, rank, lr, projector_lr", [
    (dpo, 0, 5e-7, 0), (dpo, 4, 5e-5, 2e-5), (sft, 0, 2e-5, 0), (sft, 4, 4e-4, 2e-5)])
def test_a_rate_that_is_not_given_is_that_for_what_is_trained(ckpt, data, tmp_path, script, rank, lr, projector_lr):
    script.run(script.Settings(**flags(ckpt, data, tmp_path / "out", steps=0, lora=rank, lr=0.0)))
    used = json.loads((tmp_path / "out" / "config.json").read_text())["settings"]
    assert (used["lr"], used["projector_lr"]) == (lr, projector_lr)


def test_the_projector_trains_at_its_own_rate(ckpt, data, tmp_path):
    """The first step of Adam is the rate, whatever the gradient: it can be read off the weights."""
    before = checkpoint.load(ckpt).multi_modal_projector.linear_1.weight
    for lr, projector_lr, want in ((1e-3, 2e-4, 2e-4), (1e-3, 0.0, 1e-3)):
        changes = {"steps": 1, "lr": lr, "projector_lr": projector_lr}
        model = dpo.align(dpo.Settings(**flags(ckpt, data, tmp_path / str(projector_lr), **changes)))
        moved = (model.multi_modal_projector.linear_1.weight - before).abs().max().item()
        assert moved == pytest.approx(want, rel=1e-2)
        assert model.language_model.layers[0].mlp.up_proj.lora_B.abs().max().item() == pytest.approx(lr, rel=1e-2)


def test_after_many_steps_the_cached_reference_is_still_that_of_the_start(run, ckpt, data):
    """Recomputed from the checkpoint, it equals the cached one to the bit; the policy by then does not."""
    cached = [r["logps"] for r in rows_of(run[0] / "reference.jsonl")]
    fresh = checkpoint.load(ckpt)
    trees, pixels = trees_of(ckpt, fresh.config, data), Pixels(fresh.config)
    assert dpo.reference_logps(fresh, trees, pixels, dpo.Settings(pack=1024)) == cached
    now = dpo.reference_logps(run[1], trees, pixels, dpo.Settings(pack=1024))
    assert max(abs(a - b) for x, y in zip(now, cached) for a, b in zip(x, y)) > 1


def test_an_adapter_on_an_adapter_and_alpha_without_rank_are_refused(run, ckpt, data, tmp_path):
    for script in (dpo, sft):
        for folder, changes, why in ((ckpt, {"lora": -1}, "--lora -1"), (ckpt, {"lora": 0, "alpha": 8.0}, "give --lora"),
                                     (run[0] / "adapter", {}, "PEFT loads none on top of another")):
            with pytest.raises(BadInput, match=why):
                script.run(script.Settings(**flags(folder, data, tmp_path / "out", **changes)))


# ---- in and out ----------------------------------------------------------------------------------

def test_an_adapter_is_a_checkpoint_like_any_other(run, ckpt, data):
    out, model = run
    assert sorted(p.name for p in (out / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "preprocessor_config.json", "processor_config.json",
        "template.json", "tokenizer.json"]
    assert not (out / "model").exists() and not (out / "state").exists()
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8) and config["base_model_name_or_path"] == str(ckpt.resolve())
    again = checkpoint.load(out / "adapter")
    assert set(dict(again.named_parameters())) == set(dict(checkpoint.load(ckpt).named_parameters()))
    torch.testing.assert_close(logps(again, out / "adapter", data), logps(model, ckpt, data), atol=2e-4, rtol=0)
    assert checkpoint.stamp(out / "adapter") != checkpoint.stamp(ckpt)


def test_a_merged_model_is_base_and_adapter_together(run, ckpt, data, tmp_path, capsys):
    out = tmp_path / "model"
    lora.run(lora.Settings(ckpt=str(run[0] / "adapter"), out=str(out)))
    assert str(out) in capsys.readouterr().out
    merged, added = checkpoint.load(out), checkpoint.load(run[0] / "adapter")
    for (name, p), (_, q) in zip(merged.named_parameters(), added.named_parameters()):
        assert torch.equal(p, q), name
    torch.testing.assert_close(logps(merged, out, data), logps(run[1], ckpt, data), atol=2e-4, rtol=0)
    assert (out / "template.json").read_bytes() == (run[0] / "adapter" / "template.json").read_bytes()
    assert not adapters(merged) and (out / "tokenizer.json").read_bytes() == (ckpt / "tokenizer.json").read_bytes()
    for folder, where, why in ((ckpt, tmp_path / "new", "is no adapter"), (run[0] / "adapter", out, "is there already")):
        with pytest.raises(BadInput, match=why):
            lora.run(lora.Settings(ckpt=str(folder), out=str(where)))


def test_a_merged_model_is_as_precise_as_its_base(run, ckpt, tmp_path):
    base = checkpoint.save(checkpoint.load(ckpt, dtype=torch.bfloat16), tmp_path / "base", ckpt)
    adapter = shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    change(adapter / "adapter_config.json", base_model_name_or_path=str(base))
    lora.run(lora.Settings(ckpt=str(adapter), out=str(tmp_path / "model")))
    assert {t.dtype for t in load_file(tmp_path / "model/model.safetensors").values()} == {torch.bfloat16}


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_further_training_starts_from_both_together_and_takes_the_base_models_tokenizer(run, ckpt, data, tmp_path):
    adapter = shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    (adapter / "tokenizer.json").unlink()                                        # PEFT writes none
    dpo.run(dpo.Settings(**flags(adapter, data, tmp_path / "out", lora=0, steps=1, lr=1e-4)))
    [row] = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(math.log(2), abs=1e-5), "the reference is base and adapter together"
    assert (tmp_path / "out/model/tokenizer.json").read_bytes() == (ckpt / "tokenizer.json").read_bytes()


UP = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"
OURS_A = "language_model.layers.0.mlp.up_proj.lora_A.weight"
OURS_B = OURS_A.replace("lora_A", "lora_B")
FITS_NONE = "these fit no weight of the base model, with r = 4: "


@pytest.mark.parametrize("spoil, why", [
    (lambda t, c: t.pop(UP.replace("lora_A", "lora_B")), FITS_NONE + OURS_A),
    (lambda t, c: t.pop(UP), FITS_NONE + OURS_B),
    (lambda t, c: t.update({"base_model.model.model.nothing.lora_A.weight": torch.zeros(4, 4)}),
     FITS_NONE + "model.nothing.lora_A"),
    (lambda t, c: t.update({UP: t[UP][:, :-1].contiguous()}), f"{FITS_NONE}{OURS_A}, {OURS_B}"),
    (lambda t, c: t.update({UP: t[UP][:-1]}), f"{FITS_NONE}{OURS_A}, {OURS_B}"),
    (lambda t, c: t.update({UP: t[UP] * torch.nan}), "layers.0.mlp.up_proj.weight: not finite"),
    (lambda t, c: t.update({UP.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(1)}), "lora_magnitude_vector"),
    (lambda t, c: t.update({"base_model.model.model.multi_modal_projector.linear_1.bias": torch.ones(3)}),
     "linear_1.bias: misshapen: (3,)"),
    (lambda t, c: t.clear(), "the adapter is empty"),
    (lambda t, c: c.update(use_dora=True), "use_dora is True, only False is known; merge it with PEFT first"),
    (lambda t, c: c.update(bias="all"), "bias is 'all'"),
    (lambda t, c: c.update(rank_pattern={"q_proj": 8}), "rank_pattern"),
    (lambda t, c: c.pop("r"), "r is missing, but must be a positive whole number"),
    (lambda t, c: c.update(r="4"), "r is '4', but must be"), (lambda t, c: c.update(r=0), "r is 0, but must be"),
    (lambda t, c: c.update(lora_alpha="8"), "lora_alpha is '8', but must be a number"),
    (lambda t, c: c.update(lora_alpha=None), "lora_alpha is null"),
    (lambda t, c: c.update(use_rslora="yes"), "use_rslora is 'yes', but must be true or false"),
    *((lambda t, c, way=way: c.update(init_lora_weights=way), f"init_lora_weights {way!r} changed the base model; merge it")
      for way in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "of tomorrow", ["pissa"])),
    (lambda t, c: c.update(loftq_config={"loftq_bits": 4}), "loftq_config is {'loftq_bits': 4}"),
    (lambda t, c: c.update(alora_invocation_tokens=[1]), "alora_invocation_tokens"),
    (lambda t, c: c.update(base_model_name_or_path=["x"]), "base_model_name_or_path is ['x'], but must be a text"),
    (lambda t, c: c.update(r=10 ** 400), "r is 1000"), (lambda t, c: c.update(lora_alpha=math.nan), "lora_alpha is nan"),
    (lambda t, c: c.update(base_model_name_or_path="somebody/gone"), "its base_model somebody/gone was looked for in")])
def test_an_adapter_that_does_not_fit_is_refused_and_named(run, tmp_path, spoil, why):
    folder = shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    spoil(tensors, config)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=re.escape(why)) as problem:
        checkpoint.load(folder)
    assert str(folder) in str(problem.value)


@pytest.mark.parametrize("way", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_an_adapter_that_began_beside_its_base_is_read(run, tmp_path, way):
    folder = shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    change(folder / "adapter_config.json", init_lora_weights=way)
    assert checkpoint.digest(checkpoint.load(folder)) == checkpoint.digest(checkpoint.load(run[0] / "adapter"))


def test_an_adapter_of_an_adapter_is_refused_even_in_a_circle(run, ckpt, tmp_path):
    a, b = (shutil.copytree(run[0] / "adapter", tmp_path / name) for name in "ab")
    for here, there in ((a, b), (b, a)):
        shutil.copy(ckpt / "config.json", here)
        change(here / "adapter_config.json", base_model_name_or_path=str(there))
    for look in (checkpoint.load, checkpoint.stamp):
        with pytest.raises(BadInput, match="put it in one of them, a whole one"):
            look(a)


def test_an_adapter_on_quantized_weights_is_refused(run, ckpt, tmp_path):
    folder = shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    base = shutil.copytree(ckpt, tmp_path / "base")
    change(folder / "adapter_config.json", base_model_name_or_path=str(base))
    weights = load_file(base / "model.safetensors")
    save_file({name: w.to(torch.int8) if "up_proj" in name else w for name, w in weights.items()}, base / "model.safetensors")
    with pytest.raises(BadInput, match="these fit no weight .*up_proj"):
        checkpoint.load(folder)


def text_part(llava, folder):
    """The Vicuna that an original LLaVA was made of."""
    folder.mkdir()
    config = json.loads((llava / "config.json").read_text())
    config = {name: value for name, value in config.items() if not name.startswith("mm_")} | {"model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: value for name, value in checkpoint.tensors(llava) if not name.startswith("model.mm_projector") and "vision_tower" not in name}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("on", ["llava", "vicuna"])
def test_llava_s_own_lora_folder_is_read_with_its_projector(tmp_path, kind, on):
    """config.json, adapters in either kind of file and non_lora_trainables.bin, on an original LLaVA, or, as on the hub, on a Vicuna."""
    llava = base = write_original(tmp_path / "llava", tiny_model(), tmp_path / "llava/vision_tower")
    plain = checkpoint.load(llava)
    if on == "vicuna":
        base = text_part(llava, tmp_path / "vicuna")
    q = "layers.1.self_attn.q_proj"
    A, B = torch.randn(3, 64), torch.randn(128, 3)
    halves = {f"base_model.model.model.{q}.lora_A.weight": A, f"base_model.model.model.{q}.lora_B.weight": B}
    ours = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias", "2.weight": "linear_2.weight", "2.bias": "linear_2.bias"}
    trained = {name: torch.randn_like(plain.multi_modal_projector.get_parameter(place)) for name, place in ours.items()}

    folder = tmp_path / "llava-lora"
    folder.mkdir()
    shutil.copy(llava / "config.json", folder)
    change(folder / "config.json", mm_vision_tower=str(llava / "vision_tower"))
    about = {"peft_type": "LORA", "base_model_name_or_path": str(base), "r": 3, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(about))
    (torch.save if kind == "bin" else save_file)(halves, folder / f"adapter_model.{kind}")
    projector = {f"base_model.model.model.mm_projector.{name}": value for name, value in trained.items()}
    torch.save(projector, folder / "non_lora_trainables.bin")

    assert checkpoint.base_folder(folder) == base, "an adapter, though it has a config.json"
    model = checkpoint.load(folder)
    for name, place in ours.items():
        assert torch.equal(model.multi_modal_projector.get_parameter(place), trained[name])
    for (name, p), (_, before) in zip(model.named_parameters(), plain.named_parameters()):
        if f"language_model.{q}" in name:
            torch.testing.assert_close(p, before + 2 * B @ A)
        elif "projector" not in name:
            assert torch.equal(p, before), name


def test_what_llava_s_own_training_leaves_is_read_whole(run, ckpt, tmp_path):
    """Adapters in a .bin, the projector in non_lora_trainables.bin, beside a config.json."""
    folder = tmp_path / "llava-lora"
    folder.mkdir()
    for name in ("adapter_config.json", "preprocessor_config.json"):
        shutil.copy(run[0] / "adapter" / name, folder)
    shutil.copy(ckpt / "config.json", folder)
    tensors = load_file(run[0] / "adapter" / "adapter_model.safetensors")
    projector = {}
    for key in [key for key in tensors if "projector" in key]:
        old = key.replace("multi_modal_projector.linear_1", "mm_projector.0")
        projector[old.replace("multi_modal_projector.linear_2", "mm_projector.2")] = tensors.pop(key)
    torch.save(tensors, folder / "adapter_model.bin")
    torch.save(projector, folder / "non_lora_trainables.bin")
    theirs, ours = checkpoint.load(folder), checkpoint.load(run[0] / "adapter")
    assert len(projector) == 4 and checkpoint.digest(theirs) == checkpoint.digest(ours)
    change(folder / "adapter_config.json", base_model_name_or_path="")
    with pytest.raises(BadInput, match="its base_model . was looked for in"):    # and it is not its own
        checkpoint.load(folder)


def test_an_adapter_finds_its_base_model_beside_it(run, ckpt, tmp_path):
    folder = shutil.copytree(run[0] / "adapter", tmp_path / "adapter")
    change(folder / "adapter_config.json", base_model_name_or_path="someone/tiny")
    base = shutil.copytree(ckpt, tmp_path / "tiny")
    assert torch.equal(checkpoint.load(folder).head, checkpoint.load(run[0] / "adapter").head)
    before = checkpoint.stamp(folder)
    weights = load_file(base / "model.safetensors")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    assert checkpoint.stamp(folder) != before, "another base is another model"


# ---- PEFT ----------------------------------------------------------------------------------------

def theirs_logits(model, tree, pixels):
    ids = torch.tensor([tree.ids() + list(tree.answers[0][:-1])])
    with torch.no_grad():
        return model.eval()(input_ids=ids, pixel_values=pixels(tree.images), attention_mask=torch.ones_like(ids)).logits[0]


def our_logits(model, tree, pixels):
    pack = pixels.pack([tree])
    with torch.no_grad():
        return model(pack.ids, pack.positions, pack.mask, pack.pixels) @ model.head.T


def first_answers(folder, config, data):
    tokens = Tokens(folder, config)
    return [make_tree(tokens, r, [r["answers"][0]["text"]]) for r in formats.read(data)[0]]


def test_peft_loads_our_adapter_onto_transformers_llava_and_gives_our_logits(data, tmp_path):
    peft = pytest.importorskip("peft")
    folder, base = hf_checkpoint(tmp_path / "hf", "byte")
    out = tmp_path / "out"
    model = dpo.align(dpo.Settings(**flags(folder, data, out)))
    theirs = peft.PeftModel.from_pretrained(base, out / "adapter")
    adapted = {n for n, m in theirs.named_modules() if hasattr(m, "lora_A") and not n.endswith("lora_A")}
    assert len(adapted) == 14 and not any("vision_tower" in n for n in adapted)
    pixels = Pixels(model.config)
    for tree in first_answers(folder, model.config, data):
        torch.testing.assert_close(theirs_logits(theirs, tree, pixels), our_logits(model, tree, pixels), atol=1e-3, rtol=1e-3)
    merged = theirs.merge_and_unload()
    ours = checkpoint.load(out / "adapter")
    torch.testing.assert_close(merged.model.language_model.layers[1].mlp.up_proj.weight,
                               ours.language_model.layers[1].mlp.up_proj.weight)
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
    for tree in first_answers(tmp_path / "adapter", ours.config, data):
        want = theirs_logits(theirs, tree, pixels)
        torch.testing.assert_close(our_logits(ours, tree, pixels), want, atol=2e-3, rtol=1e-3)
        assert (our_logits(plain, tree, pixels) - want).abs().max() > 0.1


def test_an_adapter_that_began_as_pissa_is_read_once_peft_has_converted_it(data, tmp_path):
    peft = pytest.importorskip("peft")
    folder, base = hf_checkpoint(tmp_path / "hf", "byte")
    base.config._name_or_path = base.name_or_path = str(folder)
    targets = r".*language_model.*\.(q_proj|down_proj)"
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, init_lora_weights="pissa"))
    theirs.peft_config["default"].init_lora_weights = True            # as PEFT's own example does
    theirs.save_pretrained(tmp_path / "start")
    theirs.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_B" in name:
                p.mul_(1.5)
    theirs.save_pretrained(tmp_path / "raw")
    with pytest.raises(BadInput, match="init_lora_weights 'pissa' changed the base model; merge it with PEFT first"):
        checkpoint.load(tmp_path / "raw")
    theirs.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    ours = checkpoint.load(tmp_path / "adapter")
    tree, pixels = first_answers(folder, ours.config, data)[0], Pixels(ours.config)
    torch.testing.assert_close(our_logits(ours, tree, pixels), theirs_logits(theirs, tree, pixels), atol=2e-3, rtol=1e-3)


def test_peft_loads_a_text_only_adapter(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    folder = tiny_checkpoint(tmp_path / "text", "byte", text_only=True)
    data = write_data(tmp_path / "data", rows=[RECORDS[k] for k in (1, 5)])
    out = tmp_path / "out"
    model = dpo.align(dpo.Settings(**flags(folder, data, out)))
    theirs = peft.PeftModel.from_pretrained(transformers.LlamaForCausalLM.from_pretrained(folder), out / "adapter").eval()
    tree = first_answers(folder, model.config, data)[0]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([tree.ids() + list(tree.answers[0][:-1])])).logits[0]
    torch.testing.assert_close(logits, our_logits(model, tree, Pixels(model.config)), atol=1e-3, rtol=1e-3)
