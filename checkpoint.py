"""Weights in and out: every layout of LLaVA, read strictly, written in one that loads anywhere.

The problem. The same tensor has had many names: `language_model.model.layers.0...` (llava-hf, as on
the hub), `model.language_model.layers.0...` (newer transformers), `model.layers.0...` (original
LLaVA, and every text-only Llama or Vicuna), with the vision tower under
`vision_tower.vision_model.`, `vision_tower.` or in a folder of its own. And the commonest failure
of all is silent: a key the loader did not know, left at its random initialisation.

The trick. (1) `canonical` maps every known name to this code's own, so there is one loader. (2) The
model is built without memory (device "meta") and each tensor goes straight from the memory-mapped
file to its place, device and dtype, so two copies never exist. (3) Strict: a missing, extra,
misshapen or quantized key, or a NaN, is an error that lists them; nothing is guessed and nothing is
left out.

    llava-hf          config.json, *.safetensors (or .bin, read with weights_only), tokenizer.json
    original LLaVA    the same with mm_projector keys; its vision tower lies in a second folder
    Llama, Vicuna     text only
    PEFT's adapter    adapter_config.json and what was trained, added to the base model it names

`save` writes the llava-hf layout that LlavaForConditionalGeneration.from_pretrained loads (a
text-only model goes out as LlamaForCausalLM), whole or not at all.
"""
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Iterator

import torch
from safetensors.torch import load_file, save_file

import parallel
from common import HERE, BadInput, sha, write_whole
from model import Config, Llava, TextConfig, rope_frequencies
from vision import ACTIVATIONS, CLIP_MEAN, CLIP_STD, VisionConfig

EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "added_tokens.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
    "template.json",                                     # how the model wants its prompts
    "steer.json",                                        # how SteerLM's is asked for scores
)
TAKE_TOKENIZER = (
    "no tokenizer.json in {folder}: copy it there from a llava-hf folder of the same model (for "
    "LLaVA-1.5: llava-hf/llava-1.5-7b-hf or -13b-hf; for a text-only Llama: its own folder)"
)


# ---- names ---------------------------------------------------------------------------------------

RENAME = {                                               # in this order
    r"^base_model\.model\.": "",                         # PEFT
    r"\.base_layer\.": ".",
    r"^model\.vision_tower\.vision_tower\.": "vision_tower.",                     # original LLaVA
    r"^model\.mm_projector\.0\.": "multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "multi_modal_projector.linear_2.",
    r"^model\.(language_model|vision_tower|multi_modal_projector)\.": r"\1.",     # transformers 5
    r"^language_model\.model\.": "language_model.",                               # llava-hf
    r"^language_model\.lm_head\.": "lm_head.",
    r"^model\.(embed_tokens|layers|norm)\.": r"language_model.\1.",               # Llama
    r"^vision_tower\.vision_model\.": "vision_tower.",
}
BUFFERS = r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$"     # computed anew
NOT_TOWER = r"^(text_model|text_projection|visual_projection|logit_scale)|" + BUFFERS    # of CLIP


def canonical(key):
    """A checkpoint's name -> ours: model.norm.weight -> language_model.norm.weight"""
    for pattern, to in RENAME.items():
        key = re.sub(pattern, to, key)
    return key


def hub_name(name, text_only):
    """Our name -> llava-hf's (or LlamaForCausalLM's), which every version of transformers reads."""
    if text_only:
        return name.replace("language_model.", "model.")
    name = name.replace("language_model.", "language_model.model.")
    name = name.replace("vision_tower.", "vision_tower.vision_model.")
    return name.replace("lm_head.", "language_model.lm_head.")


# ---- config.json ---------------------------------------------------------------------------------

def read_json(path):
    """A JSON object from a file of a checkpoint's folder. Raises BadInput naming it."""
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(
            f"{path} cannot be read ({error}); --ckpt takes a folder with config.json, weights and "
            "tokenizer.json"
        ) from None


def only(raw, where, remedy="", **known):
    """What a config says under these names, if anything, must be the one value that this code
    computes. Raises BadInput."""
    for name, value in known.items():
        if (raw.get(name) or value) != value:
            raise BadInput(f"{where}: {name} is {raw[name]!r}, only {value!r} is known{remedy}")


def stated(raw, config):
    """What a config.json says about the fields of a config class."""
    return {name: raw[name] for name in config.__annotations__ if raw.get(name) is not None}


def text_config(raw, where="config.json"):
    only(raw, where, hidden_act="silu", attention_bias=False, mlp_bias=False)
    sizes = stated(raw, TextConfig)
    heads = sizes.get("num_attention_heads", 32)
    sizes.setdefault("num_key_value_heads", heads)
    sizes.setdefault("head_dim", sizes.get("hidden_size", 4096) // heads)

    # transformers 5 says rope_parameters, older ones rope_theta and rope_scaling with a "type"
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    kind = rope.pop("type", None) or "default"
    rope.setdefault("rope_type", kind)
    rope.setdefault("rope_theta", raw.get("rope_theta") or 10000.0)
    rope_frequencies(rope, sizes["head_dim"])            # fails where it lacks something
    return TextConfig(**sizes, rope=rope)


def vision_config(raw, layer, where):
    only(raw, where, model_type="clip_vision_model")
    config = VisionConfig(**stated(raw, VisionConfig), feature_layer=layer)
    n = config.num_hidden_layers
    if layer not in range(-n - 1, n + 1):
        raise BadInput(f"{where}: vision_feature_layer {layer} is not one of {n} layers")
    if config.hidden_act not in ACTIVATIONS:
        raise BadInput(f"{where}: vision hidden_act {config.hidden_act!r} is not known")
    return config


def llava_hf(raw, where):
    only(raw, where, model_type="llava", projector_hidden_act="gelu",
         vision_feature_select_strategy="default")
    only(raw["text_config"], where, model_type="llama")
    text = text_config(raw["text_config"], where)
    text.tie_word_embeddings = bool(raw.get("tie_word_embeddings") or text.tie_word_embeddings)
    vision = vision_config(raw["vision_config"], raw.get("vision_feature_layer", -2), where)
    return Config(text, vision, raw.get("image_token_index", 32000))


def original_llava(raw, where):
    only({"mm_projector_type": "linear"} | raw, where, mm_projector_type="mlp2x_gelu",
         mm_vision_select_feature="patch", mm_use_im_start_end=False)
    tower = beside(where.parent, "vision_tower", raw["mm_vision_tower"])
    clip = read_json(tower / "config.json")
    layer = raw.get("mm_vision_select_layer", -2)
    vision = vision_config(clip.get("vision_config", clip), layer, tower / "config.json")

    text = text_config(raw, where)
    image_token = text.vocab_size
    text.vocab_size += 2                                 # <image> and <pad>, as llava-hf has them
    return Config(text, vision, image_token), tower


def read_config(folder: Path) -> tuple[Config, Path | None]:
    """config.json -> (Config, the second folder that holds the vision tower or None). An adapter
    has its base model's. Raises BadInput."""
    folder = base_folder(folder) or folder
    where = folder / "config.json"
    raw = read_json(where)
    try:
        if "text_config" in raw:
            return llava_hf(raw, where), None
        if "mm_vision_tower" in raw:
            return original_llava(raw, where)
        if raw.get("model_type") == "llama":
            return Config(text_config(raw, where), None, image_token=-1), None
    except BadInput:
        raise
    except Exception as error:                           # half a config, or words for numbers
        raise BadInput(f"{where} cannot be used ({error!r}); is it whole?") from None
    raise BadInput(f"{where}: model_type {raw.get('model_type')!r} is neither LLaVA nor Llama")


# ---- folders -------------------------------------------------------------------------------------

def resolve(ckpt: str) -> Path:
    """--ckpt names a folder; toy/llava and toy/vicuna are found beside this file, too."""
    for folder in (Path(ckpt), HERE / ckpt):
        for name in ("model", "adapter"):
            if (folder / "metrics.jsonl").exists() and (folder / name).is_dir():
                raise BadInput(f"--ckpt {ckpt} is a run's folder; its model is {folder / name}")
        if folder.is_dir():
            return folder
    raise BadInput(f"--ckpt {ckpt}: no such folder. A model of the hub has to be there first: "
                   f"hf download {ckpt} --local-dir {Path(ckpt).name}")


def beside(folder, what, name):
    """The folder of another model that this one cannot do without. Raises BadInput."""
    name = Path(str(name))
    places = [folder / what, name, folder / name, folder.parent / name.name]
    for place in places:
        if place != folder and (place / "config.json").is_file():
            return place
    tried = ", ".join(map(str, places))
    raise BadInput(f"{folder}: its {what} {name} was looked for in {tried}; put it in one of them")


def base_folder(folder: Path) -> Path | None:
    """The model that an adapter is a correction of; None where `folder` is no adapter."""
    config = folder / "adapter_config.json"
    if config.is_file():
        return beside(folder, "base_model", read_json(config).get("base_model_name_or_path"))


def tokenizer_folder(folder):
    """Where its tokenizer lies: an adapter's may be its base model's, for PEFT does not copy it."""
    return folder if (folder / "tokenizer.json").is_file() else base_folder(folder) or folder


def weight_files(folder):
    """safetensors first; .bin only where there are none. An index says which files count."""
    for pattern in ("*.safetensors", "*model*.bin"):
        for index in folder.glob(f"{pattern}.index.json"):
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict):
                raise BadInput(f"{index} is damaged: it has no weight_map")
            return [folder / name for name in sorted(set(weight_map.values()))]
        found = sorted(folder.glob(pattern))
        if found:
            projector = folder.glob("non_lora_trainables.bin")           # LLaVA's, beside adapters
            return [*found, *projector]
    raise BadInput(f"{folder}: no *.safetensors and no *model*.bin")


def stamp(folder: Path) -> str:
    """Names a checkpoint by its files' names, sizes and times; 26 GB are not read for it."""
    names = ["config.json", "adapter_config.json", *TOKENIZER_FILES]
    files = [folder / name for name in names if (folder / name).is_file()] + weight_files(folder)
    facts = [f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    base = base_folder(folder)
    return sha(*facts, stamp(base) if base else "")


# ---- in ------------------------------------------------------------------------------------------

def tensors(folder):
    """(name, tensor) of everything in a folder's weight files. They stay on the disk until they are
    looked at: both libraries map the file into memory."""
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                found = load_file(path).items()
            else:
                found = torch.load(path, weights_only=True, mmap=True, map_location="cpu").items()
        except Exception as error:                       # a torn or foreign file raises many types
            raise BadInput(
                f"{path}: cannot be read ({error!r:.200}); download it again, best as safetensors"
            ) from None
        yield from found


def weights(folder):
    """(a checkpoint's name, ours, tensor) of every weight, tower included, adapter added."""
    base = base_folder(folder)
    if base:
        yield from corrected(weights(base), folder)
        return
    _, tower = read_config(folder)
    carried = False
    for key, value in tensors(folder):
        if re.search(BUFFERS, key):
            continue
        name = canonical(key)
        if tower and name in (EMBEDDING, HEAD):          # <image> and <pad>, improbable as <unk>
            value = torch.cat([value, value[:1].expand(2, -1)])
        carried = carried or name.startswith("vision_tower.")
        yield key, name, value

    # a LLaVA that trained its tower carries it, others do not
    if tower and not carried:
        for key, value in tensors(tower):
            if not re.search(NOT_TOWER, key):
                yield key, "vision_tower." + key.removeprefix("vision_model."), value


def corrected(named, folder):
    """Weights of a base model with PEFT's adapter in `folder` added: W + scale B A, in fp32; a
    weight that it holds whole (the projector's) takes the place of the base model's."""
    where = folder / "adapter_config.json"
    config = read_json(where)
    only(config, where, "; merge it with PEFT first", peft_type="LORA", use_dora=False, bias="none",
         fan_in_fan_out=False, rank_pattern={}, alpha_pattern={})
    try:
        rank = config["r"]
        scale = config["lora_alpha"] / (rank ** 0.5 if config.get("use_rslora") else rank)
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise BadInput(f"{where}: r and lora_alpha are not two numbers ({error!r})") from None

    adapter = {canonical(key): value for key, value in tensors(folder)}
    if not adapter:
        raise BadInput(f"{folder}: the adapter is empty")
    for key, name, value in named:
        value = adapter.pop(name, value)
        layer = name.removesuffix(".weight")
        halves = [f"{layer}.lora_B.weight", f"{layer}.lora_A.weight"]
        shapes = [adapter[half].shape for half in halves if half in adapter]
        if shapes == [(*value.shape[:1], rank), (rank, *value.shape[1:])]:
            b, a = (adapter.pop(half).float() for half in halves)
            value = value.float().addmm(b, a, alpha=scale)
        yield key, name, value
    if adapter:
        names = ", ".join(sorted(adapter)[:20])
        raise BadInput(f"{folder}: these fit no weight of the base model, with r = {rank}: {names}")


def flaw(name, value, places, found):
    """Why a tensor cannot become the weight `name`; None where it can."""
    if name not in places:
        return "extra"
    if name in found:
        return "twice: an old file beside the new ones?"
    shape = places[name].shape
    if value.shape != shape:
        return f"misshapen: {tuple(value.shape)}, not {tuple(shape)}"
    if not value.is_floating_point() or value.itemsize < 2:
        return f"quantized: {value.dtype}; take the checkpoint that it was made from"
    if not value.isfinite().all():
        return "not finite: it holds NaN or infinity"


def load(ckpt: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Llava:
    """A checkpoint folder -> the model, in evaluation mode, its vision tower frozen; an adapter is
    loaded with its base model, and added to it.

    Raises BadInput listing every key that is missing, extra, twice or misshapen, and every tensor
    with a NaN or infinity.
    """
    folder = resolve(str(ckpt))
    config, _ = read_config(folder)
    with torch.device("meta"):
        model = Llava(config)
    places = dict(model.named_parameters())
    tied = config.text.tie_word_embeddings
    if tied:
        places[HEAD] = places[EMBEDDING]                 # it may be stored all the same

    found, flaws = {}, []
    for key, name, value in weights(folder):
        problem = flaw(name, value, places, found)
        if problem:
            flaws.append(f"{key}: {problem}")
        found[name] = None if problem else value.to(device=device, dtype=dtype)
    if tied:
        found.setdefault(HEAD, found.get(EMBEDDING))
    flaws += [f"{name}: missing" for name in places if name not in found]
    if tied and not flaws and not torch.equal(found[HEAD], found[EMBEDDING]):
        flaws.append(f"{HEAD}: not {EMBEDDING}, but config.json says tie_word_embeddings")
    if flaws:
        listed = "\n  ".join(flaws[:20])
        raise BadInput(f"{folder}: weights do not fit config.json, flaws: {len(flaws)}\n  {listed}")

    model.load_state_dict(found, assign=True)
    if tied:
        model.lm_head.weight = model.language_model.embed_tokens.weight
    if config.vision:
        model.vision_tower.requires_grad_(False)
    model.dtype = dtype
    return model.eval()


def digest(model: Llava) -> str:
    """Names the weights a model holds, by their content."""
    found = hashlib.sha256(repr(model.config).encode())  # a rope_theta counts as a weight
    for name, p in model.named_parameters():
        found.update(name.encode())
        found.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


# ---- out -----------------------------------------------------------------------------------------

def config_json(config, dtype):
    """Our Config -> config.json, as transformers 4 wrote it and 5 reads it."""
    text = asdict(config.text) | {"model_type": "llama", "hidden_act": "silu"}
    rope = text.pop("rope")
    text["rope_theta"] = rope.pop("rope_theta")
    text["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    torch_dtype = str(dtype).removeprefix("torch.")
    if config.vision is None:
        return text | {"architectures": ["LlamaForCausalLM"], "torch_dtype": torch_dtype}
    vision = asdict(config.vision)
    layer = vision.pop("feature_layer")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "torch_dtype": torch_dtype,
        "text_config": text,
        "vision_config": vision | {"model_type": "clip_vision_model", "num_channels": 3},
        "image_token_index": config.image_token,
        "image_seq_length": config.vision.patches,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.text.tie_word_embeddings,
    }


def processor_json(config):
    """The files that make transformers' processor see what we saw: pad to a square, then resize."""
    if config.vision is None:
        return {}
    size = config.vision.image_size
    image = {
        "image_processor_type": "LlavaImageProcessor",
        "do_pad": True,
        "size": {"height": size, "width": size},
        "do_center_crop": False,
        "resample": 3,                                   # bicubic
        "image_mean": CLIP_MEAN,
        "image_std": CLIP_STD,
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": "default",     # without CLIP's class token,
        "num_additional_image_tokens": 1,                # which is this one
    }
    return {"preprocessor_config.json": image, "processor_config.json": processor}


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes `folder`'s place whole: a kill at any moment loses neither
    old nor new."""
    aside, old = Path(f"{folder}.part"), Path(f"{folder}.old")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def write_folder(folder, file, tensors, documents, source):
    """Weights, JSON documents by name and copies of a tokenizer's files, whole or not at all."""
    source = tokenizer_folder(source)
    with whole_folder(folder) as aside:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, aside / name)
        for name, document in documents.items():
            write_whole(aside / name, json.dumps(document, indent=1) + "\n")
        save_file(tensors, aside / file, metadata={"format": "pt"})
        shutil.copymode(aside / name, aside / file)      # from the library: for its owner alone
        with open(aside / file, "rb+") as f:
            os.fsync(f.fileno())


def save(model: Llava, folder: str | Path, tokenizer_from: str | Path, more=None) -> Path:
    """Write `folder` whole or not at all: weights in llava-hf names and model.dtype, configs,
    tokenizer files copied along. `more` are JSON files by name. Where weights are kept in shards,
    every process calls it; process 0 writes."""
    folder, config = Path(folder), model.config
    tensors = {}
    for name, p in model.named_parameters():
        value = parallel.whole(p.detach()).to(model.dtype)
        if parallel.rank() == 0:
            tensors[hub_name(name, config.vision is None)] = value.cpu().contiguous()
    if tensors:
        documents = {"config.json": config_json(config, model.dtype)}
        documents |= processor_json(config) | (more or {})
        write_folder(folder, "model.safetensors", tensors, documents, Path(tokenizer_from))
    return folder
