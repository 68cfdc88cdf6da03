"""Every layout LLaVA is found in, read to the last bit; every flaw said aloud; what is saved loads everywhere.

    python -m pytest tests/test_checkpoint.py -q

The layouts are written by hand here (names and config.json as on the hub), from one tiny random model; loading any of
them must give back that model's weights, bit by bit. transformers, where installed, writes and reads them as well.
"""
import json
import math
import os
import re
import shutil

import pytest
import torch
from conftest import ROOT, hf_checkpoint, tiny_checkpoint, tiny_model
from safetensors.torch import load_file, save_file

import checkpoint
import lora
from checkpoint import load, save
from common import BadInput
from data import Tokens
from kernels import Mask
from generate import generate

VOCAB, IMG = 64, 4


# ---- layouts, by hand ----------------------------------------------------------------------------

def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def rename(weights: dict, *rules: tuple[str, str]) -> dict:
    """Each name goes through the first rule whose pattern it begins with."""
    def new(name):
        return next((re.sub("^" + old, to, name) for old, to in rules if re.match(old, name)), name)
    return {new(name): value for name, value in weights.items()}


HUB = [("lm_head", "language_model.lm_head"), ("language_model", "language_model.model"),
       ("vision_tower", "vision_tower.vision_model")]
NEW = [("language_model", "model.language_model"), ("vision_tower", "model.vision_tower.vision_model"),
       ("multi_modal_projector", "model.multi_modal_projector")]
NEWER = [(old, to.removesuffix(".vision_model")) for old, to in NEW]
LLAMA = [("language_model", "model"), ("multi_modal_projector.linear_1", "model.mm_projector.0"),
         ("multi_modal_projector.linear_2", "model.mm_projector.2")]


def text_json(c, **more) -> dict:
    return {"vocab_size": c.vocab_size, "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size,
            "num_hidden_layers": c.num_hidden_layers, "num_attention_heads": c.num_attention_heads,
            "num_key_value_heads": c.num_key_value_heads, "head_dim": c.head_dim,
            "rms_norm_eps": c.rms_norm_eps} | more


def vision_json(c) -> dict:
    return {"hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads, "image_size": c.image_size, "patch_size": c.patch_size,
            "model_type": "clip_vision_model", "projection_dim": 768}


def llava_json(c, **more) -> dict:
    """As in llava-hf/llava-1.5-7b-hf."""
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "ignore_index": -100,
            "image_token_index": c.image_token, "projector_hidden_act": "gelu", "tie_word_embeddings": False,
            "text_config": text_json(c.text, model_type="llama"), "vision_config": vision_json(c.vision),
            "vision_feature_layer": -2, "vision_feature_select_strategy": "default"} | more


def original_json(c, **more) -> dict:
    """As in liuhaotian/llava-v1.5-7b."""
    return text_json(c.text, architectures=["LlavaLlamaForCausalLM"], model_type="llava_llama",
                     mm_vision_tower="openai/clip-tiny", mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2,
                     mm_vision_select_feature="patch", mm_use_im_start_end=False) | more


def write(folder, config: dict, weights: dict, shards: int = 1, kind: str = "safetensors"):
    """A checkpoint folder in `shards` files, with an index where there are several."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = "model" if kind == "safetensors" else "pytorch_model"
    put = save_file if kind == "safetensors" else torch.save
    (folder / "config.json").write_text(json.dumps(config))
    names = [f"{stem}-{k + 1:05d}-of-{shards:05d}.{kind}" for k in range(shards)] if shards > 1 else [f"{stem}.{kind}"]
    parts = [dict(list(weights.items())[k::shards]) for k in range(shards)]
    for name, part in zip(names, parts):
        put({k: v.contiguous() for k, v in part.items()}, folder / name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": {key: name for name, part in zip(names, parts) for key in part}}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(VOCAB, IMG)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def split_tower(weights: dict) -> tuple[dict, dict]:
    """(the language model and projector, the tower without its prefix)."""
    return ({k: v for k, v in weights.items() if not k.startswith("vision_tower.")},
            {k.removeprefix("vision_tower."): v for k, v in weights.items() if k.startswith("vision_tower.")})


# ---- every layout --------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [HUB, NEW, NEWER], ids=["hub", "4.52", "5"])
def test_llava_hf_is_read_under_all_its_names(tmp_path, tiny, names):
    for kind, shards in (("safetensors", 1), ("safetensors", 3), ("bin", 1), ("bin", 3)):
        folder = tmp_path / f"{kind}-{shards}"
        write(folder, llava_json(tiny.config), rename(weights_of(tiny), *names), shards, kind)
        model = load(folder)
        assert same(weights_of(model), weights_of(tiny)) and model.config == tiny.config


def test_buffers_of_old_versions_are_passed_over(tmp_path, tiny):
    weights = rename(weights_of(tiny), *HUB)
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    assert same(weights_of(load(write(tmp_path / "x", llava_json(tiny.config), weights))), weights_of(tiny))


def test_a_text_only_llama_is_read(tmp_path):
    llama = tiny_model(VOCAB, text_only=True)
    config = text_json(llama.config.text, model_type="llama", architectures=["LlamaForCausalLM"])
    model = load(write(tmp_path / "x", config, rename(weights_of(llama), *LLAMA)))
    assert same(weights_of(model), weights_of(llama)) and model.config.vision is None


def write_original(folder, model, tower_at=None, carries_tower=False, whole_clip=False, kind="bin"):
    """The original layout: <folder>, and its tower in `tower_at` (weights only where it does not carry them itself)."""
    weights = weights_of(model)
    rest, tower = split_tower(weights)
    inside = rename(weights, ("vision_tower", "model.vision_tower.vision_tower.vision_model"), *LLAMA)
    write(folder, original_json(model.config), inside if carries_tower else rename(rest, *LLAMA), 2, kind)
    if tower_at:
        config, tower = vision_json(model.config.vision), {"vision_model." + k: v for k, v in tower.items()}
        if whole_clip:
            config = {"model_type": "clip", "vision_config": config, "text_config": {"hidden_size": 8}}
            tower |= {"text_model.embeddings.position_ids": torch.arange(7)[None], "logit_scale": torch.tensor(2.0),
                      "text_model.final_layer_norm.weight": torch.ones(8), "text_projection.weight": torch.ones(3, 3),
                      "vision_model.embeddings.position_ids": torch.arange(5)[None],
                      "visual_projection.weight": torch.ones(3, 3)}
        write(tower_at, config, tower, 1, kind)
    return folder


def assert_original(model, tiny):
    """The weights of `tiny`, and two more rows for <image> and <pad>."""
    got, expected = weights_of(model), weights_of(tiny)
    for name in ("language_model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(got[name][VOCAB:], expected[name][:1].expand(2, -1))     # copies of <unk>'s
        got[name] = got[name][:VOCAB]
    assert same(got, expected)
    assert model.config.image_token == VOCAB and model.config.text.vocab_size == VOCAB + 2


@pytest.mark.parametrize("place, whole_clip", [
    ("vision_tower", False), ("../clip-tiny", True), ("openai/clip-tiny", True)])
def test_original_llava_finds_its_tower(tmp_path, tiny, place, whole_clip):
    folder = tmp_path / "llava"
    assert_original(load(write_original(folder, tiny, folder / place, whole_clip=whole_clip)), tiny)


def test_original_llava_without_a_tower_says_where_it_looked(tmp_path, tiny):
    with pytest.raises(BadInput, match=r"openai/clip-tiny was looked for in .*vision_tower.*clip-tiny"):
        load(write_original(tmp_path / "llava", tiny))


def test_a_tower_carried_inside_wins_over_the_one_beside_it(tmp_path, tiny):
    """A LLaVA that has trained its tower carries it; CLIP's own, beside it, must not overwrite it."""
    folder = tmp_path / "llava"
    write_original(folder, tiny_model(VOCAB, IMG, seed=9), folder / "vision_tower")
    assert_original(load(write_original(folder, tiny, carries_tower=True)), tiny)


def test_a_tower_carried_inside_needs_only_the_config_beside_it(tmp_path, tiny):
    folder = write_original(tmp_path / "llava", tiny, carries_tower=True)
    (folder / "vision_tower").mkdir()
    (folder / "vision_tower/config.json").write_text(json.dumps(vision_json(tiny.config.vision)))
    assert_original(load(folder), tiny)


@torch.no_grad()
def test_original_llava_computes_the_same_and_goes_out_as_llava_hf(tmp_path, tiny):
    model = load(write_original(tmp_path / "llava", tiny, tmp_path / "clip-tiny"))
    ids = torch.tensor([1, *[IMG] * 4, 9, 30, 7])
    logits = run(tiny, ids)
    now = run(model, ids.masked_fill(ids == IMG, VOCAB))
    torch.testing.assert_close(now[:, :VOCAB], logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(now[:, VOCAB], logits[:, 0], atol=1e-5, rtol=1e-5)    # as improbable as <unk>
    again = load(save(model, tmp_path / "out", tmp_path))
    assert same(weights_of(again), weights_of(model)) and again.config == model.config


def run(model, ids, pixels=None):
    """Logits (T, V) of one plain sequence, with one fixed picture where it has placeholders."""
    z = torch.zeros_like(ids)
    if (ids == model.config.image_token).any():
        pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(5)).to(model.head.dtype)
    return model(ids, torch.arange(len(ids)), Mask(z, z, z), pixels) @ model.head.T


# ---- configs -------------------------------------------------------------------------------------

def test_defaults_are_those_of_the_hub():
    """llava-1.5-7b-hf's text_config says almost nothing: it is a Llama 7B."""
    c = checkpoint.text_config({"max_position_embeddings": 4096, "model_type": "llama", "rms_norm_eps": 1e-5,
                                "vocab_size": 32064})
    assert (c.hidden_size, c.num_hidden_layers, c.head_dim, c.num_key_value_heads) == (4096, 32, 128, 32)
    assert (c.vocab_size, c.rms_norm_eps, c.rope) == (32064, 1e-5, {"rope_type": "default", "rope_theta": 10000.0})


@pytest.mark.parametrize("raw, rope", [
    ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
    ({"rope_scaling": None}, {"rope_type": "default", "rope_theta": 10000.0}),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}, "rope_theta": 1.0},
     {"rope_type": "default", "rope_theta": 77.0}),
])
def test_rope_is_read_as_every_version_wrote_it(raw, rope):
    assert checkpoint.text_config(raw).rope == rope


@pytest.mark.parametrize("change, said", [
    ({"vision_feature_select_strategy": "full"}, "select_strategy"),
    ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer is \[-2, -5\], but must be a whole number"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act"),
    ({"model_type": "llava_next"}, "llava_next"),
    ({"text_config": {"model_type": "qwen2"}}, "qwen2"),
    ({"text_config": {"model_type": "llama", "hidden_act": "gelu"}}, "hidden_act"),
    ({"text_config": {"model_type": "llama", "attention_bias": True}}, "attention_bias"),
    ({"text_config": {"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 2.0}}}, "yarn"),
    ({"vision_config": {"model_type": "siglip_vision_model"}}, "siglip"),
    ({"vision_config": {"model_type": "clip_vision_model", "hidden_act": "relu"}}, "hidden_act"),
])
def test_a_model_this_code_would_compute_wrongly_is_refused(tmp_path, tiny, change, said):
    folder = write(tmp_path / "x", llava_json(tiny.config) | change, rename(weights_of(tiny), *HUB))
    with pytest.raises(BadInput, match=said):
        load(folder)


LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


@pytest.mark.parametrize("name, value", [
    ("vocab_size", "64"), ("vocab_size", 10 ** 400), ("hidden_size", True), ("hidden_size", []), ("intermediate_size", -1),
    ("num_hidden_layers", 1.5), ("num_hidden_layers", 10 ** 9), ("head_dim", 10 ** 9), ("head_dim", 0),
    ("rms_norm_eps", "x"), ("rms_norm_eps", math.nan), ("rms_norm_eps", math.inf), ("rms_norm_eps", True),
    ("max_position_embeddings", "x"), ("tie_word_embeddings", "yes"), ("rope_theta", -1), ("rope_theta", math.inf),
    ("rope_scaling", "x"), ("rope_scaling", [1]), ("rope_parameters", 7), ("rope_parameters", [])])
def test_a_field_of_another_type_is_named(name, value):
    """Also numbers beyond every model's, before anything is built of them."""
    with pytest.raises(BadInput, match=f"^config.json: {name} is .*, (but must be|more than any model has)"):
        checkpoint.text_config({name: value})


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("rope, name", [
    (LINEAR | {"factor": None}, "factor"), (LINEAR | {"factor": "2"}, "factor"), (LINEAR | {"factor": math.nan}, "factor"),
    (LINEAR | {"factor": True}, "factor"), (LINEAR | {"factor": 10 ** 400}, "factor"), (LINEAR | {"factor": -2.0}, "factor"),
    (LINEAR | {"rope_theta": None}, "rope_theta"), (LINEAR | {"rope_theta": [1]}, "rope_theta"),
    (LINEAR | {"rope_type": ["linear"]}, "rope_type"), (LINEAR | {"rope_type": None}, "rope_type"),
    *((LLAMA3 | {name: None}, name) for name in LLAMA3 if name != "rope_type")], ids=str)
def test_a_number_of_rope_that_is_none_is_named_in_both_spellings(spelling, rope, name):
    with pytest.raises(BadInput, match=f"^config.json: .*{name}"):
        checkpoint.text_config({spelling: rope})


@pytest.mark.parametrize("change", [
    {"hidden_size": 65}, {"num_attention_heads": 6, "num_key_value_heads": 4, "hidden_size": 60}, {"head_dim": 31}], ids=str)
def test_sizes_that_do_not_divide_are_named(change):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    said = "hidden_size .* must be a multiple of num_attention_heads .* num_key_value_heads .*, and head_dim .* even"
    assert checkpoint.text_config(sizes).hidden_size == 64
    with pytest.raises(BadInput, match=said):
        checkpoint.text_config(sizes | change)


@pytest.mark.parametrize("change, said", [
    ({"vision_config": "x"}, "config.json: vision_config is 'x', but must be an object"),
    ({"vision_config": {"patch_size": -1}}, "config.json: vision_config: patch_size is -1, but must be"),
    ({"vision_config": {"image_size": "28"}}, "config.json: vision_config: image_size is '28', but must be"),
    ({"vision_config": {"image_size": 30, "patch_size": 14}}, "image_size 30 of patch_size 14"),
    ({"vision_config": {"hidden_size": 30, "num_attention_heads": 4}}, "hidden_size 30 must be a multiple of num_attention"),
    ({"vision_config": {"hidden_act": []}}, r"hidden_act is \[\], but must be a text"),
    ({"vision_feature_layer": True}, "vision_feature_layer is True, but must be a whole number"),
    ({"image_token_index": 4.0}, "image_token_index is 4.0, but must be a whole number"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, but must be true or false"),
    ({"text_config": None}, "text_config is (missing|null), but must be an object"),
    ({"text_config": {"vocab_size": None, "hidden_size": "64"}}, "config.json: text_config: hidden_size is '64'")])
def test_a_field_of_llava_of_another_type_is_named(tmp_path, tiny, change, said):
    folder = write(tmp_path / "x", llava_json(tiny.config) | change, rename(weights_of(tiny), *HUB))
    with pytest.raises(BadInput, match=said) as problem:
        load(folder)
    assert str(folder / "config.json") in str(problem.value)


def test_what_llama_3_says_about_its_ends_is_carried_along():
    c = checkpoint.text_config({"eos_token_id": [128001, 128009], "bos_token_id": 0, "max_position_embeddings": 10 ** 7})
    assert (c.eos_token_id, c.bos_token_id, c.max_position_embeddings) == ([128001, 128009], 0, 10 ** 7)


def test_the_digest_of_a_model_changes_with_a_bit_of_a_weight_and_with_its_rope(tmp_path, tiny):
    names = {checkpoint.digest(tiny)}
    for change in (lambda m: m.head.data[0, 0].add_(1e-6), lambda m: m.config.text.rope.update(rope_theta=5e5)):
        model = tiny_model(VOCAB, IMG)
        assert checkpoint.digest(model) in names
        change(model)
        names.add(checkpoint.digest(model))
        assert checkpoint.digest(model.bfloat16()) not in names
    assert len(names) == 3


@pytest.mark.parametrize("change, said", [({"mm_projector_type": "linear"}, "mlp2x_gelu"),
                                          ({"mm_vision_select_feature": "cls_patch"}, "cls_patch"),
                                          ({"mm_use_im_start_end": True}, "mm_use_im_start_end")])
def test_an_original_llava_of_another_kind_is_refused(tmp_path, tiny, change, said):
    folder = write_original(tmp_path / "llava", tiny, tmp_path / "clip-tiny")
    (folder / "config.json").write_text(json.dumps(original_json(tiny.config, **change)))
    with pytest.raises(BadInput, match=said):
        load(folder)


def test_neither_llava_nor_llama_is_refused(tmp_path):
    with pytest.raises(BadInput, match="'gpt2' is neither LLaVA nor Llama"):
        load(write(tmp_path / "x", {"model_type": "gpt2", "architectures": None}, {"w": torch.ones(1)}))


# ---- flaws ---------------------------------------------------------------------------------------

def hub_folder(tmp_path, tiny, edit):
    weights = rename(weights_of(tiny), *HUB)
    edit(weights)
    return write(tmp_path / "x", llava_json(tiny.config), weights)


def test_all_flaws_are_listed_in_one_message_each_once(tmp_path, tiny):
    down, norm, q = (f"language_model.model.layers.1.{x}.weight"
                     for x in ("mlp.down_proj", "input_layernorm", "self_attn.q_proj"))

    def edit(w):
        w["language_model.model.layers.7.mlp.up_proj.weight"] = w.pop(down)
        w[q] = w[q][:3]
        w[norm][5] = torch.nan
        w["multi_modal_projector.linear_2.bias"][0] = torch.inf

    with pytest.raises(BadInput) as problem:
        load(hub_folder(tmp_path, tiny, edit))
    first, *lines = [line.strip() for line in str(problem.value).splitlines()]
    assert str(tmp_path / "x") in first and "do not fit config.json, flaws: 5" in first
    assert sorted(lines) == sorted([
        "language_model.layers.1.mlp.down_proj.weight: missing",
        "language_model.model.layers.7.mlp.up_proj.weight: extra",
        f"{q}: misshapen: (3, 64), not (128, 64)",
        f"{norm}: not finite: it holds NaN or infinity",
        "multi_modal_projector.linear_2.bias: not finite: it holds NaN or infinity"])


def test_any_single_missing_tensor_is_an_error(tmp_path, tiny):
    for key in ("language_model.lm_head.weight", "multi_modal_projector.linear_1.bias",
                "vision_tower.vision_model.post_layernorm.bias", "language_model.model.norm.weight"):
        with pytest.raises(BadInput, match=key.split(".")[-2] + r"\.\w+: missing"):
            load(hub_folder(tmp_path, tiny, lambda w: w.pop(key)))


def test_a_long_list_is_cut(tmp_path, tiny):
    with pytest.raises(BadInput, match=r"config.json, flaws: \d\d") as problem:
        load(hub_folder(tmp_path, tiny, lambda w: [w.pop(k) for k in list(w) if "layers" in k]))
    assert len(str(problem.value).splitlines()) == 21


def test_a_tensor_that_is_there_twice_is_an_error(tmp_path, tiny):
    """A stale file beside the right one: which of the two would be loaded is a matter of the alphabet."""
    folder = hub_folder(tmp_path, tiny, lambda w: None)
    save_file({"language_model.model.norm.weight": torch.zeros(64)}, folder / "old.safetensors")
    with pytest.raises(BadInput, match="norm.weight: twice"):
        load(folder)


def test_a_tied_head_that_differs_from_the_embedding_is_an_error(tmp_path):
    model = tiny_model(VOCAB, IMG, tie=True)
    weights = rename(weights_of(model), *HUB)
    config = llava_json(model.config, tie_word_embeddings=True)
    head = weights["language_model.model.embed_tokens.weight"].clone()
    same_head = load(write(tmp_path / "x", config, weights | {"language_model.lm_head.weight": head}))
    assert same(weights_of(same_head), weights_of(model))
    head[3, 3] += 1
    with pytest.raises(BadInput, match="tie_word_embeddings"):
        load(write(tmp_path / "y", config, weights | {"language_model.lm_head.weight": head}))


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_truncated_file_is_named(tmp_path, tiny, kind):
    folder = write(tmp_path / "x", llava_json(tiny.config), rename(weights_of(tiny), *HUB), kind=kind)
    file = next(folder.glob(f"*.{kind}"))
    data = file.read_bytes()
    for size in (0, 4, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:size])
        with pytest.raises(BadInput, match=f"{file.name}: cannot be read"):
            load(folder)


def test_an_absent_shard_is_named(tmp_path, tiny):
    folder = write(tmp_path / "x", llava_json(tiny.config), rename(weights_of(tiny), *HUB), shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(BadInput, match="index.json: weight_map names model-00002-of-00003.safetensors, no file beside it"):
        load(folder)


def test_what_is_not_there_is_said(tmp_path, tiny):
    with pytest.raises(BadInput, match="nowhere: no such folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match="config.json: No such file or directory; --ckpt takes a folder with"):
        load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(llava_json(tiny.config)))
    with pytest.raises(BadInput, match="no .*safetensors and no"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{half")
    with pytest.raises(BadInput, match="config.json is no JSON"):
        load(tmp_path)


def test_a_pickle_that_runs_code_is_refused(tmp_path, tiny):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(llava_json(tiny.config)))
    torch.save({"w": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pytorch_model.bin"):
        load(folder)
    assert not (tmp_path / "owned").exists()
    torch.save(torch.ones(3), folder / "pytorch_model.bin")        # no dictionary at all
    with pytest.raises(BadInput, match="pytorch_model.bin: cannot be read"):
        load(folder)


@pytest.mark.parametrize("value", [3, None, {"w": torch.ones(1)}, torch.ones(2, 2).to_sparse(), torch.ones(2, device="meta")],
                         ids=["a number", "nothing", "a dictionary", "sparse", "without memory"])
def test_a_bin_that_holds_other_things_than_tensors_is_refused(tmp_path, tiny, value):
    folder = write(tmp_path / "x", llava_json(tiny.config), rename(weights_of(tiny), *HUB) )
    (folder / "model.safetensors").unlink()
    torch.save(rename(weights_of(tiny), *HUB) | {"odd": value}, folder / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pytorch_model.bin: 'odd' is no plain tensor"):
        load(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/passwd", "x\x1b[2J", 3, None, [1], "", "..", "a\0b", "gone.bin"],
                         ids=ascii)
def test_an_index_names_files_that_lie_beside_it(tmp_path, tiny, name):
    folder = write(tmp_path / "x", llava_json(tiny.config), rename(weights_of(tiny), *HUB), shards=2)
    write(tmp_path / "other", {}, {"w": torch.ones(1)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": json.loads(index.read_text())["weight_map"] | {"w": name}}))
    with pytest.raises(BadInput, match=r"index.json: weight_map names .*, no file beside it") as problem:
        load(folder)
    assert str(problem.value).isprintable()


def test_safetensors_are_preferred_to_bin(tmp_path, tiny):
    folder = write(tmp_path / "x", llava_json(tiny.config), rename(weights_of(tiny), *HUB))
    write(folder, llava_json(tiny.config), rename(weights_of(tiny_model(VOCAB, IMG, seed=3)), *HUB), kind="bin")
    assert same(weights_of(load(folder)), weights_of(tiny))


def test_the_miniatures_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.resolve("toy/llava") == ROOT / "toy/llava"
    (tmp_path / "toy/llava").mkdir(parents=True)
    assert checkpoint.resolve("toy/llava").resolve() == tmp_path / "toy/llava"
    for nothing in ("toy/none", "nowhere"):
        with pytest.raises(BadInput, match=f"--ckpt {nothing}: no such folder"):
            checkpoint.resolve(nothing)


def test_a_missing_tokenizer_says_where_to_take_it_from(tmp_path, tiny):
    folder = hub_folder(tmp_path, tiny, lambda w: None)
    with pytest.raises(BadInput, match=rf"no tokenizer.json in {folder}: copy it there from .*llava-hf"):
        Tokens(folder, load(folder).config)


# ---- out -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [{}, {"tie": True}, {"kv_heads": 4, "head_dim": 16}, {"text_only": True}], ids=str)
def test_what_is_saved_is_what_was_there_bit_by_bit(tmp_path, sizes):
    folder = tiny_checkpoint(tmp_path / "a", **sizes)
    model = load(folder)
    again = load(save(model, tmp_path / "b", folder))
    assert same(weights_of(again), weights_of(model)) and again.config == model.config
    assert sorted(x.name for x in (tmp_path / "b").iterdir()) == sorted(x.name for x in folder.iterdir())
    for file in folder.iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_saved_names_are_the_hubs(tmp_path, tiny):
    stored = load_file(save(tiny, tmp_path / "x", tmp_path) / "model.safetensors")
    assert same(stored, rename(weights_of(tiny), *HUB))


def test_a_tied_head_stays_tied_and_is_stored_once(tmp_path):
    folder = tiny_checkpoint(tmp_path / "x", tie=True)
    model = load(folder)
    assert model.head is model.language_model.embed_tokens.weight
    assert not any("lm_head" in name for name in load_file(folder / "model.safetensors"))


def test_weights_go_out_in_the_precision_the_model_computes_in(tmp_path, tiny):
    """Those that were trained are fp32 in a bf16 model, and rounded when they are written."""
    folder = hub_folder(tmp_path, tiny, lambda w: None)
    model = load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert same(weights_of(model), {k: v.bfloat16() for k, v in weights_of(tiny).items()})
    trained = model.multi_modal_projector.linear_1.weight
    trained.data = trained.data.float() + 1e-4
    out = save(model, tmp_path / "out", folder)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert {v.dtype for v in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert torch.equal(load(out).multi_modal_projector.linear_1.weight, trained.bfloat16().float())


def test_a_save_that_fails_leaves_the_old_folder_as_it_was(tmp_path, monkeypatch):
    folder = tiny_checkpoint(tmp_path / "x")
    before = {f.name: f.read_bytes() for f in folder.iterdir()}
    model = load(folder)
    with torch.no_grad():
        model.head.add_(1)
    real = checkpoint.write_json

    def disk_full(path, content):
        if path.name == "preprocessor_config.json":
            raise OSError("no space left")
        real(path, content)

    with monkeypatch.context() as m, pytest.raises(OSError):
        m.setattr(checkpoint, "write_json", disk_full)
        save(model, folder, folder)
    assert {f.name: f.read_bytes() for f in folder.iterdir()} == before
    save(model, folder, folder)                                    # over the very folder it was read from
    assert same(weights_of(load(folder)), weights_of(model))
    assert not list(tmp_path.glob("*.part"))


def test_no_file_is_more_open_than_the_umask_says(tmp_path, tiny):
    before = os.umask(0o077)
    try:
        closed = save(tiny, tmp_path / "x", tmp_path)
        os.umask(0o022)
        open_to_read = save(tiny, tmp_path / "y", tmp_path)
    finally:
        os.umask(before)
    for folder, mode in ((closed, 0o600), (open_to_read, 0o644)):
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {mode}


def test_a_kill_while_folders_change_places_loses_neither(tmp_path, tiny, monkeypatch):
    folder = save(tiny, tmp_path / "x", tmp_path)
    real = os.replace

    def power_cut(source, target):
        if str(source).endswith(".part") and os.path.isdir(source):
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        save(tiny_model(VOCAB, IMG, seed=3), folder, tmp_path)
    old, new = load(tmp_path / "x.old"), load(tmp_path / "x.part")
    assert same(weights_of(old), weights_of(tiny)) and same(weights_of(new), weights_of(tiny_model(VOCAB, IMG, seed=3)))
    monkeypatch.undo()
    save(tiny, folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_loaded_model_is_ready_to_train_with_its_tower_frozen(tmp_path):
    model = load(tiny_checkpoint(tmp_path / "x"))
    assert not model.training
    assert {name.split(".")[0]: p.requires_grad for name, p in model.named_parameters()} == {
        "language_model": True, "vision_tower": False, "multi_modal_projector": True, "lm_head": True}


# ---- transformers reads and writes the same ------------------------------------------------------

SIZES = [{}, {"tie": True}, {"kv_heads": 1, "head_dim": 64},
         {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
         {"rope": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 64}}]


def theirs(model, ids):
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(5)).to(model.dtype)
    with torch.no_grad():
        more = {"pixel_values": pixels} if hasattr(model.config, "vision_config") else {}
        return model(input_ids=ids[None], **more).logits[0]


@pytest.mark.parametrize("kind, max_shard_size", [("byte", "5GB"), ("llama", "100KB")])
def test_what_transformers_writes_is_read(tmp_path, kind, max_shard_size):
    pytest.importorskip("transformers")
    folder, model = hf_checkpoint(tmp_path / "x", kind, max_shard_size=max_shard_size)
    ours = load(folder)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (max_shard_size == "100KB")
    ids = torch.tensor([1, *[ours.config.image_token] * 4, 9, 30, 7, 300])
    with torch.no_grad():
        torch.testing.assert_close(run(ours, ids), theirs(model, ids), atol=1e-4, rtol=1e-4)
    assert Tokens(folder, ours.config).image == ours.config.image_token


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_saved_loads_in_transformers_whole(tmp_path, sizes):
    transformers = pytest.importorskip("transformers")
    dtype = torch.float32 if sizes else torch.bfloat16
    ours = tiny_model(VOCAB, IMG, **sizes)
    ours.dtype = dtype
    folder = save(ours, tmp_path / "x", tmp_path)
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == dtype                                   # "torch_dtype" is understood
    ids = torch.tensor([1, *[IMG] * 4, *range(5, 60)])
    with torch.no_grad():
        torch.testing.assert_close(run(load(folder), ids), theirs(model.float(), ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tie", [False, True])
def test_a_text_only_llama_goes_through_transformers_and_back(tmp_path, tie):
    transformers = pytest.importorskip("transformers")
    ours = tiny_model(VOCAB, text_only=True, tie=tie)
    folder = save(ours, tmp_path / "x", tmp_path)
    model, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.save_pretrained(tmp_path / "y")
    again, ids = load(tmp_path / "y"), torch.arange(5, 40)
    assert same(weights_of(again), weights_of(ours))
    with torch.no_grad():
        torch.testing.assert_close(run(again, ids), theirs(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("whole_clip", [False, True], ids=["CLIPVisionModel", "CLIPModel"])
def test_towers_that_transformers_writes_are_found(tmp_path, tiny, whole_clip):
    transformers = pytest.importorskip("transformers")
    vision = transformers.CLIPVisionConfig(**vision_json(tiny.config.vision))
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "vocab_size": 20}
    clip = (transformers.CLIPModel(transformers.CLIPConfig(vision_config=vision.to_dict(), text_config=text))
            if whole_clip else transformers.CLIPVisionModel(vision))
    tower = split_tower(weights_of(tiny))[1]
    places = {name.split("vision_model.")[-1]: p for name, p in clip.named_parameters()}
    with torch.no_grad():
        for name, value in tower.items():
            places[name].copy_(value)
    clip.save_pretrained(tmp_path / "clip-tiny")
    assert_original(load(write_original(tmp_path / "llava", tiny)), tiny)


def test_transformers_processor_sees_what_we_saw(tmp_path, tiny, images_dir):
    transformers = pytest.importorskip("transformers")
    from vision import load_image, preprocess
    processor = transformers.LlavaImageProcessorPil.from_pretrained(save(tiny, tmp_path / "x", tmp_path))
    for file in sorted(images_dir.iterdir()):
        image = load_image(file)
        assert torch.equal(processor(images=image, return_tensors="pt")["pixel_values"][0], preprocess(image, 28))


def test_transformers_generates_the_same_text_from_the_saved_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tiny_checkpoint(tmp_path / "x", "llama")
    ours = load(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder)
    ids = [1, *[ours.config.image_token] * 4, 300, 310, 320]
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    out = model.generate(**inputs, pixel_values=pixels, do_sample=False, max_new_tokens=20, eos_token_id=2, pad_token_id=0)
    out = out[0, len(ids):].tolist()
    answer, = generate(ours, [ids], [pixels], max_new=20)[0]
    assert answer.ids == (out[:out.index(2)] if 2 in out else out)


# ---- between two models -----------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mix_is_the_average_by_hand_and_at_either_end_one_of_the_two(tmp_path, dtype):
    a = tiny_checkpoint(tmp_path / "a", "byte", seed=1)
    b = tiny_checkpoint(tmp_path / "b", "byte", seed=2, text_only=True)
    for folder in (a, b):
        model = checkpoint.load(folder, dtype=dtype)
        checkpoint.save(model, folder, shutil.copytree(folder, f"{folder}.source"))
    weights = {folder: dict(checkpoint.load(folder).named_parameters()) for folder in (a, b)}
    for alpha in (0.0, 0.25, 1.0):
        out = checkpoint.mix(str(a), str(b), alpha, tmp_path / f"mix {alpha}")
        assert next(iter(load_file(out / "model.safetensors").values())).dtype == dtype
        for name, p in checkpoint.load(out).named_parameters():
            expected = weights[a][name]
            if name.startswith(("language_model.", "lm_head.")):
                expected = (1 - alpha) * expected + alpha * weights[b][name]
            torch.testing.assert_close(p, expected.to(dtype).float(), rtol=1e-6 if dtype == torch.float32 else 8e-3, atol=1e-7)
            if alpha in (0.0, 1.0):
                assert torch.equal(p, expected), name


def test_what_transformers_wrote_in_shards_and_an_adapter_are_mixed_and_transformers_loads_the_mix(tmp_path):
    transformers = pytest.importorskip("transformers")
    a, _ = hf_checkpoint(tmp_path / "a", "byte", max_shard_size="100KB", seed=1)
    model = load(a)
    lora.attach(model, 4, 8, 0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(1))
    b = tmp_path / "b"
    lora.save_adapter(model, b, a)
    ids = torch.tensor([1, *[model.config.image_token] * 4, 9, 30, 7, 300])
    for alpha, end in ((0.0, a), (1.0, b)):
        mixed = load(checkpoint.mix(str(a), str(b), alpha, tmp_path / f"{alpha}"))
        assert same(weights_of(mixed), weights_of(load(end))), "to the bit, and so its logits"
    half = checkpoint.mix(str(a), str(b), 0.5, tmp_path / "half")
    hf, info = transformers.LlavaForConditionalGeneration.from_pretrained(half, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        torch.testing.assert_close(run(load(half), ids), theirs(hf, ids), atol=1e-4, rtol=1e-4)


def test_a_mix_of_unlike_models_is_refused(tmp_path):
    a = tiny_checkpoint(tmp_path / "a", "byte")
    b = tiny_checkpoint(tmp_path / "b", "byte", text_only=True, layers=1)
    with pytest.raises(BadInput, match="not of one shape in both"):
        checkpoint.mix(str(a), str(b), 0.5, tmp_path / "out")
    for wrong in (checkpoint.Settings(mix=(str(a),)), checkpoint.Settings(mix=(str(a), str(b)), alpha=1.5)):
        with pytest.raises(BadInput, match="--mix A B"):
            checkpoint.run(wrong)
    with pytest.raises(BadInput, match="is there already"):
        checkpoint.run(checkpoint.Settings(mix=(str(a), str(a)), out=str(a)))
