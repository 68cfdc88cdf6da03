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
text-only model goes out as LlamaForCausalLM), whole or not at all. `mix` averages two:

    python checkpoint.py --mix runs/dpo/model vicuna-7b-v1.5 --alpha 0.5 --out runs/mix
"""
import hashlib
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Iterator

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import parallel
from common import HERE, BadInput, field, main, read_json, sha, shown, write_json
from model import Config, Llava, TextConfig
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

KIND_OF = {
    int: "a positive whole number", float: "a positive number", bool: "true or false",
    str: "a text", dict: "an object", object: "anything",
}
MOST = {"num_hidden_layers": 1000, "max_position_embeddings": 2 ** 63}     # of all others 2 ** 19
ROPE = {                                                 # what each kind of RoPE has to state
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def only(raw, where, remedy="", **known):
    """What a config says under these names, if anything, must be the one value that this code
    computes. Raises BadInput."""
    for name, value in known.items():
        if (raw.get(name) or value) != value:
            raise BadInput(f"{where}: {name} is {raw[name]!r:.60}, only {value!r} is known{remedy}")


def stated(raw, config, where):
    """What a config.json says about the fields of a config class, each of its type. A size that no
    model has is refused before anything is built of it."""
    found = {}
    for name, kind in config.__annotations__.items():
        value = field(raw, name, KIND_OF[kind], where, None)
        if kind is int and (value or 0) > MOST.get(name, 2 ** 19):
            raise BadInput(f"{where}: {name} is {value:.0e}, more than any model has")
        if value is not None:
            found[name] = value
    return found


def rope_config(raw, where):
    """TextConfig's `rope`. Raises BadInput where it is of another kind, or lacks a number."""
    # transformers 5 says rope_parameters, older ones rope_theta and rope_scaling with a "type"
    rope = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope = field(raw, name, "an object", where, {}) or rope
    old = rope.pop("type", None)
    kind = rope.setdefault("rope_type", old or "default")
    rope.setdefault("rope_theta", field(raw, "rope_theta", "a positive number", where, 10000.0))

    if kind not in list(ROPE):
        raise BadInput(f"{where}: rope_type {kind!r:.60} is not known, only {', '.join(ROPE)}")
    for number in ("rope_theta", *ROPE[kind]):
        field(rope, number, "a positive number", where)
    return rope


def text_config(raw, where="config.json"):
    only(raw, where, hidden_act="silu", attention_bias=False, mlp_bias=False)
    sizes = stated(raw, TextConfig, where)
    heads = sizes.get("num_attention_heads", 32)
    sizes.setdefault("num_key_value_heads", heads)
    sizes.setdefault("head_dim", sizes.get("hidden_size", 4096) // heads)
    config = TextConfig(**sizes | {"rope": rope_config(raw, where)})
    if config.hidden_size % heads or heads % config.num_key_value_heads or config.head_dim % 2:
        raise BadInput(
            f"{where}: hidden_size {config.hidden_size} must be a multiple of num_attention_heads "
            f"{heads}, that of num_key_value_heads {config.num_key_value_heads}, and head_dim "
            f"{config.head_dim} even"
        )
    return config


def vision_config(raw, layer, where):
    only(raw, where, model_type="clip_vision_model")
    config = VisionConfig(**stated(raw, VisionConfig, where) | {"feature_layer": layer})
    if config.hidden_size % config.num_attention_heads or config.image_size % config.patch_size:
        raise BadInput(
            f"{where}: hidden_size {config.hidden_size} must be a multiple of num_attention_heads "
            f"{config.num_attention_heads}, image_size {config.image_size} of patch_size "
            f"{config.patch_size}"
        )
    n = config.num_hidden_layers
    if layer not in range(-n - 1, n + 1):
        raise BadInput(f"{where}: vision_feature_layer {layer} is not one of {n} layers")
    if config.hidden_act not in ACTIVATIONS:
        raise BadInput(f"{where}: vision hidden_act {config.hidden_act!r:.60} is not known")
    return config


def llava_hf(raw, where):
    only(raw, where, model_type="llava", projector_hidden_act="gelu",
         vision_feature_select_strategy="default")
    text = field(raw, "text_config", "an object", where)
    only(text, where, model_type="llama")
    text = text_config(text, f"{where}: text_config")
    tied = field(raw, "tie_word_embeddings", "true or false", where, False)
    text.tie_word_embeddings = tied or text.tie_word_embeddings
    layer = field(raw, "vision_feature_layer", "a whole number", where, -2)
    vision = field(raw, "vision_config", "an object", where)
    vision = vision_config(vision, layer, f"{where}: vision_config")
    return Config(text, vision, field(raw, "image_token_index", "a whole number", where, 32000))


def original_llava(raw, where):
    only({"mm_projector_type": "linear"} | raw, where, mm_projector_type="mlp2x_gelu",
         mm_vision_select_feature="patch", mm_use_im_start_end=False)
    name = field(raw, "mm_vision_tower", "a text", where)
    tower = beside(where.parent, "vision_tower", name)
    about = tower / "config.json"
    clip = read_json(about)
    clip = field(clip, "vision_config", "an object", about, clip)
    layer = field(raw, "mm_vision_select_layer", "a whole number", where, -2)
    vision = vision_config(clip, layer, about)

    text = text_config(raw, where)
    image_token = text.vocab_size
    text.vocab_size += 2                                 # <image> and <pad>, as llava-hf has them
    return Config(text, vision, image_token), tower


def read_config(folder: Path) -> tuple[Config, Path | None]:
    """config.json -> (Config, the second folder that holds the vision tower or None). An adapter
    has its base model's; but LLaVA's own training makes a LLaVA of a Vicuna, and says so in a
    config.json beside the adapter. Raises BadInput."""
    where = folder / "config.json"
    base = base_folder(folder)
    if base and not (where.is_file() and "mm_vision_tower" in read_json(where)):
        where = base / "config.json"
    raw = read_json(where, remedy="; --ckpt takes a folder with config.json, weights and "
                                  "tokenizer.json")
    if "text_config" in raw:
        return llava_hf(raw, where), None
    if "mm_vision_tower" in raw:
        return original_llava(raw, where)
    if raw.get("model_type") == "llama":
        return Config(text_config(raw, where)), None
    raise BadInput(f"{where}: model_type {raw.get('model_type')!r:.60} is neither LLaVA nor Llama")


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
    """The folder of another whole model that this one cannot do without. Raises BadInput."""
    name = Path(name)
    places = [folder / what, name, folder / name, folder.parent / name.name]
    for place in places:
        adapter = os.path.isfile(place / "adapter_config.json")
        if place != folder and os.path.isfile(place / "config.json") and not adapter:
            return place
    tried = ", ".join(map(str, places))
    sought = shown(f"{name} was looked for in {tried}", 600)
    raise BadInput(f"{folder}: its {what} {sought}; put it in one of them, a whole one (lora.py "
                   "makes one of an adapter)")


def base_folder(folder: Path) -> Path | None:
    """The model that an adapter is a correction of; None where `folder` is no adapter."""
    config = folder / "adapter_config.json"
    if config.is_file():
        name = field(read_json(config), "base_model_name_or_path", "a text", config)
        return beside(folder, "base_model", name)


def tokenizer_folder(folder):
    """Where its tokenizer lies: an adapter's may be its base model's, for PEFT does not copy it."""
    return folder if (folder / "tokenizer.json").is_file() else base_folder(folder) or folder


def weight_files(folder):
    """safetensors first; .bin only where there are none. An index says which files count."""
    for pattern in ("*.safetensors", "*model*.bin"):
        for index in folder.glob(f"{pattern}.index.json"):
            weight_map = field(read_json(index), "weight_map", "an object", index)
            names = sorted({str(name) for name in weight_map.values()})
            for name in names:
                if Path(name).name != name or not os.path.isfile(folder / name):
                    raise BadInput(f"{index}: weight_map names {shown(name)}, no file beside it")
            return [folder / name for name in names]
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
        for key, value in found:
            if getattr(value, "layout", None) is not torch.strided or value.is_meta:
                raise BadInput(f"{path}: {key!r:.60} is no plain tensor, but {type(value).__name__}")
            yield str(key), value


def weights(folder):
    """(a checkpoint's name, ours, tensor) of every weight, tower included, adapter added."""
    base = base_folder(folder)
    _, tower = read_config(folder)
    named = whole_weights(base or folder, tower)
    return corrected(named, folder) if base else named


def whole_weights(folder, tower):
    """The same of a folder that is no adapter, and a second one with its tower, or None."""
    carried = False
    for key, value in tensors(folder):
        if re.search(BUFFERS, key):
            continue
        name = canonical(key)
        if tower and name in (EMBEDDING, HEAD) and value.dim():
            value = torch.cat([value, value[:1], value[:1]])     # <image>, <pad>: rare as <unk>
        carried = carried or name.startswith("vision_tower.")
        yield key, name, value

    # a LLaVA that trained its tower carries it, others do not
    if tower and not carried:
        for key, value in tensors(tower):
            if not re.search(NOT_TOWER, key):
                yield key, "vision_tower." + key.removeprefix("vision_model."), value


# What init_lora_weights may say (PEFT's `LoraLayer.update_layer`): of PiSSA, OLoRA, CorDA, LoftQ and
# LoRA-GA, B A is no correction of the base model, but of what they left of it.
KEEP_THE_BASE = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
MERGE = "; merge it with PEFT first"


def corrected(named, folder):
    """Weights of a base model with PEFT's adapter in `folder` added: W + scale B A, in fp32; a
    weight that it holds whole (the projector's) takes the place of the base model's."""
    where = folder / "adapter_config.json"
    config = read_json(where)
    only(config, where, MERGE, peft_type="LORA", use_dora=False, bias="none", fan_in_fan_out=False,
         rank_pattern={}, alpha_pattern={}, loftq_config={}, layer_replication=None,
         alora_invocation_tokens=None)
    start = config.get("init_lora_weights")
    if start not in KEEP_THE_BASE:
        raise BadInput(f"{where}: init_lora_weights {start!r:.60} changed the base model{MERGE}")
    rank = field(config, "r", "a positive whole number", where)
    alpha = field(config, "lora_alpha", "a number", where)
    rooted = field(config, "use_rslora", "true or false", where, False)

    adapter = {canonical(key): value for key, value in tensors(folder)}
    if not adapter:
        raise BadInput(f"{folder}: the adapter is empty")
    for key, name, value in named:
        value = adapter.pop(name, value)
        layer = name.removesuffix(".weight")
        halves = [f"{layer}.lora_B.weight", f"{layer}.lora_A.weight"]
        shapes = [adapter[half].shape for half in halves if half in adapter]
        if value.itemsize > 1 and shapes == [(*value.shape[:1], rank), (rank, *value.shape[1:])]:
            b, a = (adapter.pop(half).float() for half in halves)
            value = value.float().addmm(b, a, alpha=alpha / (rank ** 0.5 if rooted else rank))
        yield key, name, value
    for name in [name for name in adapter if name.startswith("multi_modal_projector.")]:
        yield name, name, adapter.pop(name)              # the base model is a Vicuna, and has none
    if adapter:
        names = shown(", ".join(sorted(adapter)), 1000)
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
            flaws.append(f"{shown(key, 200)}: {problem}")
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
            write_json(aside / name, document)
        try:
            save_file(tensors, aside / file, metadata={"format": "pt"})
        except SafetensorError as error:                 # a full disk, to this library
            raise OSError(f"{aside / file}: {error}") from None
        plain = aside / next(iter(documents))            # the library writes for its owner alone
        shutil.copymode(plain, aside / file)
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


# ---- between two models --------------------------------------------------------------------------

@torch.no_grad()
def mix(a: str, b: str, alpha: float, out: Path) -> Path:
    """Language models averaged, (1 - alpha) A + alpha B in fp32; tower, projector and tokenizer are
    A's. (arXiv:2203.05482; after visual tuning arXiv:2410.16730.) Raises BadInput where A's
    language model has other shapes than B's."""
    source = resolve(a)
    _, stored = next(tensors(base_folder(source) or source))
    model = load(a, dtype=torch.float32)
    others = dict(load(b, dtype=torch.float32).named_parameters())
    for name, p in model.named_parameters():
        if name.startswith(("language_model.", "lm_head.")):
            if name not in others or others[name].shape != p.shape:
                raise BadInput(f"--mix {a} {b}: {name} is not of one shape in both")
            p.lerp_(others[name], alpha)
    model.dtype = stored.dtype
    return save(model, out, source)


@dataclass
class Settings:
    """Average the language models of two checkpoints."""
    mix: tuple = ()              # two of them, A and B; tower and projector are A's
    alpha: float = 0.5           # B's share: 0 is A, 1 has B's language model
    out: str = "runs/mix"        # where the model goes; it must not be there yet


def run(s: Settings):
    if len(s.mix) != 2 or not 0 <= s.alpha <= 1:
        raise BadInput("--mix A B: two checkpoint folders, and --alpha from 0 to 1")
    if Path(s.out).exists():
        raise BadInput(f"--out {s.out} is there already; choose another")
    print(f"model: {mix(*s.mix, s.alpha, Path(s.out))}")


if __name__ == "__main__":
    main(Settings, run)
