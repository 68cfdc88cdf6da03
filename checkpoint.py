"""Weights in and out: every layout LLaVA is found in, read strictly, written in the one that loads everywhere.

The problem. The same tensor has had many names: `language_model.model.layers.0...` (llava-hf, as on the hub),
`model.language_model.layers.0...` (newer transformers), `model.layers.0...` (original LLaVA, and every text-only
Llama or Vicuna), with the vision tower under `vision_tower.vision_model.`, `vision_tower.` or in a folder of its
own. And the commonest failure of all is silent: a key the loader did not know, left at its random initialisation.

The trick. (1) `canonical` maps every known name to this code's own, so there is one loader. (2) The model is
built without memory (device "meta") and each tensor goes straight from the memory-mapped file to its place,
device and dtype, so two copies never exist. (3) Strict: a missing, extra, misshapen or quantized key, or a NaN, is an
error that lists them; nothing is guessed and nothing is left out.

    llava-hf          config.json, *.safetensors (or .bin, read with weights_only), tokenizer.json
    original LLaVA    the same with mm_projector keys; its vision tower lies in a second folder (see read_config)
    Llama / Vicuna    text only

`save` writes the llava-hf layout that LlavaForConditionalGeneration.from_pretrained loads (a text-only
model goes out as LlamaForCausalLM), whole or not at all.

Previous: parallel.py.  Next: formats.py (one record, and every file people already have).
"""
import hashlib
import json
import os
import pickle
import re
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Callable, Iterable, Iterator

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import parallel
from common import HERE, BadInput, sha, write_whole
from model import Config, Llava, TextConfig
from vision import ACTIVATIONS, CLIP_MEAN, CLIP_STD, VisionConfig

SHARD_BYTES = 5 << 30
EMBEDDING, HEAD = "language_model.embed_tokens.weight", "lm_head.weight"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
                   "added_tokens.json", "generation_config.json", "chat_template.jinja", "chat_template.json",
                   "template.json",                         # how the model wants its prompts
                   "steer.json")                           # what a SteerLM model was trained to be asked for
TAKE_TOKENIZER = ("no tokenizer.json in {folder}: copy it there from a llava-hf folder of the same model (for LLaVA-1.5: "
                  "llava-hf/llava-1.5-7b-hf or -13b-hf; for a text-only Llama: its own transformers folder)")


# ---- names --------------------------------------------------------------------------------------------------

RENAME = [(re.compile(pattern), to) for pattern, to in [
    (r"^model\.vision_tower\.vision_tower\.", "vision_tower."),                   # original LLaVA that carries its tower
    (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),            # original LLaVA
    (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
    (r"^model\.(language_model|vision_tower|multi_modal_projector)\.", r"\1."),   # transformers from 4.52 on
    (r"^language_model\.model\.", "language_model."),                             # llava-hf as on the hub
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^model\.(embed_tokens|layers|norm)\.", r"language_model.\1."),             # Llama, Vicuna, original LLaVA
    (r"^vision_tower\.vision_model\.", "vision_tower."),
]]
BUFFERS = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")       # stored by old versions, derived here
NOT_TOWER = re.compile(BUFFERS.pattern + r"|^(text_model|text_projection|visual_projection|logit_scale)")   # of a whole CLIP


def canonical(key: str) -> str:
    """A checkpoint's name for a tensor -> ours.  language_model.model.norm.weight -> language_model.norm.weight"""
    for pattern, to in RENAME:
        key = pattern.sub(to, key)
    return key


def hub_name(key: str, text_only: bool) -> str:
    """Our name -> llava-hf's on the hub (or LlamaForCausalLM's), which every version of transformers reads."""
    if key.startswith("vision_tower."):
        return key.replace("vision_tower.", "vision_tower.vision_model.", 1)
    if key.startswith("language_model."):
        return key.replace("language_model.", "model." if text_only else "language_model.model.", 1)
    return key if text_only or not key.startswith("lm_head.") else "language_model." + key


# ---- config.json ----------------------------------------------------------------------------------------------

ROPE = {"default": (), "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def only(raw: dict, where, remedy: str = "", **known) -> None:
    """What a config file says under these names, if anything, must be the one value that this code computes. Raises BadInput."""
    for name, value in known.items():
        if (raw.get(name) or value) != value:
            raise BadInput(f"{where}: {name} is {raw[name]!r}, and only {value!r} is known here{remedy}")


def text_config(raw: dict, where="config.json") -> TextConfig:
    only(raw, where, hidden_act="silu", attention_bias=False, mlp_bias=False)
    c = {k: raw[k] for k in TextConfig.__dataclass_fields__ if raw.get(k) is not None}
    heads = c.get("num_attention_heads", 32)
    c = {"num_key_value_heads": heads, "head_dim": c.get("hidden_size", 4096) // heads} | c
    # transformers 5 says rope_parameters, earlier versions rope_theta and rope_scaling ("type" before "rope_type")
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.get("rope_type") or rope.pop("type", None) or "default"
    rope.setdefault("rope_theta", raw.get("rope_theta") or 10000.0)
    if rope["rope_type"] not in ROPE:
        raise BadInput(f"{where}: rope_type {rope['rope_type']!r}; known: {', '.join(ROPE)}")
    if absent := [name for name in ROPE[rope["rope_type"]] if not isinstance(rope.get(name), (int, float))]:
        raise BadInput(f"{where}: rope_type {rope['rope_type']!r} needs a number as {', '.join(absent)}")
    return TextConfig(**c, rope=rope)


def vision_config(raw: dict, feature_layer: int, where) -> VisionConfig:
    only(raw, where, model_type="clip_vision_model")
    if not isinstance(feature_layer, int):
        raise BadInput(f"{where}: vision_feature_layer {feature_layer} is not one layer")
    c = VisionConfig(**{k: raw[k] for k in VisionConfig.__dataclass_fields__ if raw.get(k) is not None},
                     feature_layer=feature_layer)
    if not -c.num_hidden_layers - 1 <= feature_layer <= c.num_hidden_layers:
        raise BadInput(f"{where}: vision_feature_layer {feature_layer} of {c.num_hidden_layers} layers")
    if c.hidden_act not in ACTIVATIONS:
        raise BadInput(f"{where}: vision hidden_act {c.hidden_act!r}; known: {', '.join(ACTIVATIONS)}")
    return c


def read_config(folder: Path) -> tuple[Config, Path | None]:
    """config.json -> (Config, the second folder that holds the vision tower or None). An adapter has its base model's."""
    if base := base_folder(folder):
        return read_config(base)
    where = folder / "config.json"
    try:
        return config_of(folder, read_json(where), where)
    except (ArithmeticError, AttributeError, KeyError, TypeError) as error:
        raise BadInput(f"{where} is damaged ({error!r}); download it again") from None


def config_of(folder: Path, raw: dict, where: Path) -> tuple[Config, Path | None]:
    if "text_config" in raw:                                                     # llava-hf
        only(raw, where, model_type="llava", vision_feature_select_strategy="default", projector_hidden_act="gelu")
        only(raw["text_config"], where, model_type="llama")
        text = text_config(raw["text_config"], where)
        text.tie_word_embeddings = bool(raw.get("tie_word_embeddings") or text.tie_word_embeddings)
        vision = vision_config(raw["vision_config"], raw.get("vision_feature_layer", -2), where)
        return Config(text, vision, raw.get("image_token_index", raw.get("image_token_id", 32000))), None
    if "mm_vision_tower" in raw:                                                 # original LLaVA
        only({"mm_projector_type": "linear"} | raw, where, mm_projector_type="mlp2x_gelu", mm_vision_select_feature="patch",
             mm_use_im_start_end=False)
        name = raw["mm_vision_tower"]
        tower = first_folder([folder / "vision_tower", folder.parent / Path(name).name, folder / name, Path(name)],
                             f"{folder} is an original LLaVA checkpoint; its vision tower {name}",
                             "put the CLIP folder in one of them")
        clip = read_json(tower / "config.json")
        vision = vision_config(clip.get("vision_config", clip), raw.get("mm_vision_select_layer", -2), tower / "config.json")
        text = text_config(raw, where)
        image_token, text.vocab_size = text.vocab_size, text.vocab_size + 2      # <image> and <pad>, as llava-hf has them
        return Config(text, vision, image_token), tower
    if raw.get("model_type") in ("llama", "vicuna") or "LlamaForCausalLM" in (raw.get("architectures") or []):
        return Config(text_config(raw, where), None, image_token=-1), None
    raise BadInput(f"{where}: model_type {raw.get('model_type')!r} is neither LLaVA nor Llama")


def base_folder(folder: Path) -> Path | None:
    """The model that an adapter is a correction of; None where `folder` is no adapter."""
    if not (folder / "adapter_config.json").is_file():
        return None
    name = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    return first_folder([Path(name), folder.parent / Path(name).name, folder.parent.parent / Path(name).name],
                        f"{folder} is an adapter; its base model {name}",
                        "put it there, or write its folder into adapter_config.json as base_model_name_or_path")


def first_folder(places: list[Path], what: str, remedy: str) -> Path:
    """The first of these that is a model's folder."""
    for place in places:
        if (place / "config.json").is_file():
            return place
    raise BadInput(f"{what} was looked for in {', '.join(map(str, places))}: {remedy}")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf8"))
        if not isinstance(found, dict):
            raise ValueError("it is no JSON object")
        return found
    except FileNotFoundError:
        raise BadInput(f"{path} is missing: --ckpt takes a folder with config.json, weights and tokenizer.json") from None
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read: {error}") from None


# ---- in -------------------------------------------------------------------------------------------------------

def resolve(ckpt: str) -> Path:
    """--ckpt names a folder; 'toy/llava' and 'toy/vicuna' are the miniatures shipped beside this file."""
    folder = HERE / ckpt if ckpt in ("toy/llava", "toy/vicuna") else Path(ckpt)
    if not folder.is_dir():
        hint = "; build it with: python -m toy.build" if folder.is_relative_to(HERE / "toy") else ""
        raise BadInput(f"--ckpt {ckpt}: no such folder{hint}")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """safetensors first; .bin only where there are none."""
    for pattern, index in (("*.safetensors", "model.safetensors.index.json"),
                           ("pytorch_model*.bin", "pytorch_model.bin.index.json")):
        if (folder / index).is_file():
            if not isinstance(parts := read_json(folder / index).get("weight_map"), dict):
                raise BadInput(f"{folder}/{index} is damaged: it has no weight_map")
            names = sorted(set(parts.values()))
            if absent := [n for n in names if not (folder / n).is_file()]:
                raise BadInput(f"{folder}/{index} names files that are missing: {', '.join(absent)}")
            return [folder / n for n in names]
        if found := sorted(folder.glob(pattern)):
            return found
    raise BadInput(f"{folder}: no *.safetensors and no pytorch_model*.bin")


def stamp(folder: Path) -> str:
    """Names a checkpoint by its small files' text and its weight files' sizes and times; 26 GB are not read for it."""
    base = base_folder(folder)
    names = ("config.json", "adapter_config.json", *TOKENIZER_FILES)
    small = [path.read_bytes() for name in names if (path := folder / name).is_file()]
    return sha(*small, *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in weight_files(folder)),
               *([stamp(base)] if base else []))


def tensors(folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, how to read it, before the next is asked for) of every tensor in a folder's files."""
    for path in weight_files(folder):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as f:
                    for key in f.keys():
                        yield key, lambda: f.get_tensor(key)
            else:
                for key, value in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
                    yield key, lambda: value
        except pickle.UnpicklingError:
            raise BadInput(f"{path}: holds more than tensors, so it is not opened; convert it to safetensors where you "
                           "trust it") from None
        except Exception as error:  # a truncated or foreign file raises many types
            raise BadInput(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); download it again") from None


def weights(folder: Path, tower: Path | None) -> Iterator[tuple[str, str, Callable[[], Tensor]]]:
    """(a checkpoint's name, ours, how to read it) of every weight. A LLaVA that trained its tower carries it, others do not."""
    carried = False
    for key, read in tensors(folder):
        if not BUFFERS.search(key):
            yield key, canonical(key), read
            carried |= canonical(key).startswith("vision_tower.")
    for key, read in tensors(tower) if tower and not carried else ():
        if not NOT_TOWER.search(key):
            yield key, "vision_tower." + key.removeprefix("vision_model."), read


def load(ckpt: str | Path, device="cpu", dtype: torch.dtype = torch.float32) -> Llava:
    """A checkpoint folder -> the model, in evaluation mode, its vision tower frozen.

    Raises BadInput listing every missing, extra or misshapen key, and every tensor with a NaN or infinity. An adapter in PEFT's
    layout is loaded with its base model, and added to it.
    """
    folder = resolve(str(ckpt))
    if base := base_folder(folder):
        named = ((key, canonical(plain(key)), read) for key, read in tensors(folder))
        return add_adapter(load(base, device, dtype), read_json(folder / "adapter_config.json"), named, folder)
    config, tower = read_config(folder)
    tied = config.text.tie_word_embeddings
    with torch.device("meta"):
        model = Llava(config)
    places, loaded, wrong = dict(model.named_parameters()), {}, []
    for key, name, read in weights(folder, tower):
        place = places.get(EMBEDDING if tied and name == HEAD else name)         # a tied head may be stored all the same
        if place is None:
            wrong.append(f"extra      {key}")
        elif name in loaded:
            wrong.append(f"twice      {key}: an old file beside the new ones?")
        else:
            value = read()
            if tower and name in (EMBEDDING, HEAD):                  # rows for <image> and <pad>: as improbable as <unk>, id 0
                value = torch.cat([value, value[:1].expand(2, -1)])
            if value.shape != place.shape:
                wrong.append(f"misshapen  {key}: {tuple(value.shape)}, config.json says {tuple(place.shape)}")
            elif not value.is_floating_point() or value.itemsize < 2:
                wrong.append(f"quantized  {key}: {value.dtype}; take the checkpoint that it was made from")
            elif not torch.isfinite(value).all():
                wrong.append(f"not finite {key}: holds NaN or infinity")
            loaded[name] = value.to(device=device, dtype=dtype)
    wrong += [f"missing    {name}" for name in places if name not in loaded]
    head = loaded.pop(HEAD, None) if tied else None
    if head is not None and not torch.equal(head, loaded.get(EMBEDDING, head)):
        wrong.append("lm_head.weight differs from embed_tokens.weight, but config.json says tie_word_embeddings")
    if wrong:
        more = f"\n  ... and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise BadInput(f"{folder}: the weights do not fit config.json:\n  " + "\n  ".join(wrong[:20]) + more)
    model.load_state_dict(loaded, strict=not tied, assign=True)
    if tied:
        model.lm_head.weight = model.language_model.embed_tokens.weight
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("vision_tower."))
    model.dtype = dtype
    return model.eval()


def digest(model: Llava) -> str:
    """Names the weights a model holds, by their content."""
    found = hashlib.sha256(repr(model.config).encode())                  # a rope_theta counts as a weight
    for name, p in model.named_parameters():
        found.update(name.encode())
        found.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


# ---- PEFT's adapters ----------------------------------------------------------------------------------------

def plain(key: str) -> str:
    """PEFT's name for a tensor -> the name of the module it stands in, as a checkpoint would have it."""
    key = re.sub(r"\.(modules_to_save|lora_[AB])\.default\b", r".\1", key.removeprefix("base_model.model."))
    return key.replace(".modules_to_save.", ".").replace(".base_layer.", ".")


@torch.no_grad()
def add_adapter(model: nn.Module, config: dict, named: Iterable[tuple[str, str, Callable]], where) -> nn.Module:
    """W += scale B A for every pair of an adapter; the weights that it holds whole (its projector) take their places. `named` are
    (PEFT's name, our name, how to read it). Raises BadInput listing what does not fit."""
    scale, places, found, wrong = scale_of(config, where), dict(model.named_parameters()), {}, []
    for key, ours, read in named:
        name, _, half = ours.partition(".lora_")
        name, value = name + ".weight" * bool(half), read()
        if name not in places or half not in ("", "A.weight", "B.weight"):
            wrong.append(f"extra      {key}")
        elif not torch.isfinite(value).all():
            wrong.append(f"not finite {key}: holds NaN or infinity")
        else:
            found.setdefault(name, {})[half[:1]] = value
    for name, parts in found.items():
        weight, shapes = places[name], {half: tuple(x.shape) for half, x in parts.items()}
        rank = shapes.get("A", ())[:1]
        right = {"": tuple(weight.shape), "A": (*rank, weight.shape[-1]), "B": (weight.shape[0], *rank)}
        if ("A" in parts) != ("B" in parts) or any(shape != right[half] for half, shape in shapes.items()):
            wrong.append(f"misshapen  {name}: {shapes}, for a weight of {right['']}")
            continue
        if "" in parts:                                                          # first: PEFT may store what it corrects, too
            weight.copy_(parts[""])
        if "A" in parts:
            add(weight, parts["A"], parts["B"], scale)
    if wrong or not found:
        raise BadInput(f"{where}: the adapter does not fit its base model:\n  " + "\n  ".join(wrong[:20] or ["it is empty"]))
    return model


def scale_of(config: dict, where) -> float:
    """adapter_config.json -> what B A is multiplied with. Raises BadInput for what would be computed otherwise."""
    only(config, where, "; merge it with PEFT first", peft_type="LORA", use_dora=False, bias="none", fan_in_fan_out=False,
         rank_pattern={}, alpha_pattern={})
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise BadInput(f"{where}: r is {rank!r} and lora_alpha {alpha!r}, not two numbers")
    return alpha / (rank ** 0.5 if config.get("use_rslora") else rank)


@torch.no_grad()
def add(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """W += scale B A, in fp32, in place."""
    delta = scale * (b.to(weight.device).float() @ a.to(weight.device).float())
    weight.copy_(weight.float() + delta)


# ---- out ------------------------------------------------------------------------------------------------------

def config_json(config: Config, dtype: torch.dtype) -> dict:
    """Our Config -> config.json, readable by transformers 4 (rope_theta, rope_scaling) and 5 (rope_parameters)."""
    t, v = config.text, config.vision
    text = {k: getattr(t, k) for k in TextConfig.__dataclass_fields__ if k != "rope"}
    scaling = None if t.rope["rope_type"] == "default" else {k: x for k, x in t.rope.items() if k != "rope_theta"}
    text |= {"model_type": "llama", "hidden_act": "silu", "rope_theta": t.rope["rope_theta"], "rope_scaling": scaling,
             "rope_parameters": t.rope, "attention_bias": False, "mlp_bias": False}
    name = str(dtype).removeprefix("torch.")
    if v is None:
        return text | {"architectures": ["LlamaForCausalLM"], "torch_dtype": name}
    vision = {k: getattr(v, k) for k in VisionConfig.__dataclass_fields__ if k != "feature_layer"}
    return {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "torch_dtype": name,
            "text_config": text, "vision_config": vision | {"model_type": "clip_vision_model", "num_channels": 3},
            "image_token_index": config.image_token, "image_seq_length": v.patches, "projector_hidden_act": "gelu",
            "vision_feature_layer": v.feature_layer, "vision_feature_select_strategy": "default",
            "multimodal_projector_bias": True, "tie_word_embeddings": t.tie_word_embeddings}


def processor_json(config: Config, crop: bool) -> dict[str, dict]:
    """The files that make transformers' processor see what we saw: pad to square and resize, or resize and crop."""
    if config.vision is None:
        return {}
    size = config.vision.image_size
    image = {"image_processor_type": "LlavaImageProcessor", "do_convert_rgb": True, "do_pad": not crop, "do_resize": True,
             "size": {"shortest_edge": size} if crop else {"height": size, "width": size}, "resample": 3, "do_center_crop": crop,
             "crop_size": {"height": size, "width": size}, "do_rescale": True, "rescale_factor": 1 / 255,
             "do_normalize": True, "image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    processor = {"processor_class": "LlavaProcessor", "patch_size": config.vision.patch_size, "image_token": "<image>",
                 "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return {"preprocessor_config.json": image, "processor_config.json": processor}


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which then takes `folder`'s place whole; a kill at any moment loses neither old nor new."""
    aside, old = (folder.with_name(folder.name + end) for end in (".part", ".old"))
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)


def in_files(named: Iterable[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    """Tensors by name, in parts of at most `most` bytes; one that is larger is a part of its own."""
    part, room = {}, most
    for name, value in named:
        if part and value.nbytes > room:
            yield part
            part, room = {}, most
        part[name] = value
        room -= value.nbytes
    yield part


def write_tensors(part: dict[str, Tensor], path: Path) -> None:
    save_file({name: value.cpu().contiguous() for name, value in part.items()}, path, metadata={"format": "pt"})
    with open(path, "rb+") as f:
        os.fsync(f.fileno())
    path.chmod(0o644)                                              # the library writes files that only their owner may read


def tokenizer_folder(folder: Path) -> Path:
    """Where its tokenizer lies: an adapter's may be its base model's, for PEFT does not copy it."""
    return folder if (folder / "tokenizer.json").is_file() else base_folder(folder) or folder


def write_documents(documents: dict[str, dict], folder: Path, tokenizer_from: Path) -> None:
    tokenizer_from = tokenizer_folder(tokenizer_from)
    for name in TOKENIZER_FILES:
        if (tokenizer_from / name).is_file():
            shutil.copyfile(tokenizer_from / name, folder / name)
    for name, document in documents.items():
        write_whole(folder / name, json.dumps(document, indent=1) + "\n")


def save(model: Llava, folder: str | Path, tokenizer_from: str | Path, crop: bool = False,
         more: dict[str, dict] | None = None) -> Path:
    """Write `folder` whole or not at all: weights in llava-hf names, configs, tokenizer files copied along; `crop` says how
    the model was shown its images, for those who load it elsewhere. `more` are JSON files by name. Where weights are kept in
    shards, every process calls it and process 0 writes, one file's tensors at a time."""
    folder, config, dtype = Path(folder), model.config, getattr(model, "dtype", model.head.dtype)
    named = {hub_name(name, config.vision is None): p.detach() for name, p in model.named_parameters()}
    shards = [*in_files(named.items(), SHARD_BYTES)]
    n = len(shards)
    files = ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    with whole_folder(folder) if parallel.rank() == 0 else nullcontext() as aside:
        for file, shard in zip(files, shards):
            part = {name: parallel.whole(value).to(dtype) for name, value in shard.items()}
            if aside:
                write_tensors(part, aside / file)
        if aside:
            documents = {"config.json": config_json(config, dtype)} | processor_json(config, crop)
            if n > 1:
                documents["model.safetensors.index.json"] = {
                    "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
                    "metadata": {"total_size": sum(x.numel() * dtype.itemsize for x in named.values())}}
            write_documents(documents | (more or {}), aside, Path(tokenizer_from))
    return folder
