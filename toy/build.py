"""The miniature from nothing: four training stages, the ones real models go through, in minutes on
two cores.

    1  vision tower     pictures against captions, contrastive (CLIP's loss)      -> ViT
    2  language model   text conversations, next token                            -> Vicuna-mini
    3  projector        descriptions of pictures; the rest is frozen              (LLaVA's stage 1)
    4  visual tuning    short answers about pictures; the tower is frozen         -> LLaVA-mini

Stages 2 to 4 are `sft.train`, the loop that real models use; only the data and what is frozen
differ. The result is written by `checkpoint.save` in the llava-hf layout, so every script loads it
like any other checkpoint, and so does transformers:

    OUT/llava       LLaVA-mini: config.json, model.safetensors, tokenizer.json, ...
    OUT/vicuna      Vicuna-mini, the text model it was made from
    OUT/replayed    with --replay 0.33: visual tuning with so much text, which forgets less

Stage 4 is where the damage is done, for the natural reason: most visual questions are answered in a
word, the language model learns that answers are short, and nothing in the data reminds it of its
text skills.

Stages 1 and 2 need nothing from each other and run as two processes of one thread each. Everything
is drawn from one seed and every reduction has a fixed order, so the same machine and torch give the
same bytes.

    python -m toy.build --out runs/toy
    python evaluate.py --ckpt runs/toy/vicuna,runs/toy/llava             # what the two can do
"""
import common  # first: it tells OpenMP how to wait
import copy
import math
import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from torch import nn

import checkpoint
import sft
from common import BadInput, main, progress, write_json
from data import VICUNA, Tokens, Tree, make_pack, make_tree
from model import Config, Llava, TextConfig
from toy import tasks, world
from train import Run, schedule
from vision import ViT, VisionConfig, preprocess


@dataclass
class Settings:
    """Build Vicuna-mini and LLaVA-mini."""
    out: str = "runs/toy"        # folder to write; it must not be there yet
    seed: int = 0                # of initialisation and data
    scale: float = 1.0           # share of every stage's steps (0.01 to see it run)
    width: int = 128             # of the language model; a head for every 32
    replay: float = 0.0          # also OUT/replayed, tuned with so much text among the pictures

    def steps(self, full: int) -> int:
        return max(2, int(full * self.scale))


# ---- sizes and initialisation --------------------------------------------------------------------

VISION = VisionConfig(
    hidden_size=96,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=48,
    patch_size=16,
)
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]


def language(width, layers=4, words=0) -> Config:
    """A text model with as many heads of 32 as make up its width."""
    heads = width // 32
    text = TextConfig(
        words, width, 2 * width, layers, heads, heads,
        head_dim=32,
        rms_norm_eps=1e-5,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    return Config(text)


def initialise(module: nn.Module, seed: int, std=0.06):
    """Matrices from a normal distribution, biases 0, norms 1, every tensor drawn in order from one
    seed.

    A vision tower's positions start larger, or the norm that follows would drown them."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        if "position_embedding" in name or "class_embedding" in name:
            nn.init.normal_(p, 0.0, 0.5, generator=generator)
        elif p.ndim > 1:
            nn.init.normal_(p, 0.0, std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(p)


def write_tokenizer(folder: Path, words: list[str], fixed=()):
    """One id per word; those that are `fixed` may have spaces in them."""
    ids = {word: k for k, word in enumerate([*SPECIAL, *fixed, *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in fixed])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))

    for_transformers = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "image_token": "<image>",
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", for_transformers)


# ---- stage 1: the vision tower -------------------------------------------------------------------

def pixels_of(pictures, size=VISION.image_size):
    """[(scene, seed of its looks)] -> (N, 3, size, size)."""
    drawn = [preprocess(world.render(*picture), size) for picture in pictures]
    return torch.stack(drawn)


def class_vector(vit, pixels):
    """What CLIP compares with a caption: the class token after *all* blocks. (N, 3, S, S) -> (N,
    D)."""
    return vit.post_layernorm(vit.after(vit.config.num_hidden_layers, pixels)[:, 0])


def caption_vector(model, captions):
    """The last token's hidden state of each caption. N lists of ids -> (N, D)."""
    pack = make_pack([Tree("", ids, []) for ids in captions])
    last = torch.tensor([len(ids) for ids in captions]).cumsum(0) - 1
    return model(pack.ids, pack.positions, pack.mask)[last]


def train_tower(parts, s):
    """InfoNCE (arXiv:2103.00020): each picture must find its caption among the batch's, each
    caption its picture.

    Half of a batch are edits of the other half, one attribute changed: details must be seen."""
    torch.set_num_threads(1)
    steps = s.steps(700)
    batch, lr = 128, 2e-3
    tokens = Tokens(parts, language(64))
    vit = ViT(VISION)
    reader = Llava(language(64, 2, tokens.tokenizer.get_vocab_size()))
    heads = nn.ModuleList([nn.Linear(96, 64, bias=False), nn.Linear(64, 64, bias=False)])
    for k, module in enumerate((vit, reader, heads)):
        initialise(module, s.seed * 10 + k)
    sharpness = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    parameters = [*vit.parameters(), *reader.parameters(), *heads.parameters(), sharpness]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.1)
    rng = random.Random(f"tower/{s.seed}")
    right = torch.arange(batch)
    for step in progress(range(steps), "1 vision tower", unit="step", position=1):
        scenes = []
        for _ in range(batch // 2):
            scenes += pair_of_scenes(rng)
        pixels = pixels_of([(scene, rng.randrange(2**31)) for scene in scenes])
        captions = [tokens.encode(world.caption(scene)) for scene in scenes]

        image = F.normalize(heads[0](class_vector(vit, pixels)), dim=-1)     # (N, 64)
        text = F.normalize(heads[1](caption_vector(reader, captions)), dim=-1)
        logits = sharpness.exp().clamp(max=100) * image @ text.T             # (N, N)
        loss = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

        optimizer.param_groups[0]["lr"] = lr * schedule(step, steps, 0.1, 0.02)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    torch.save(vit.state_dict(), parts / "tower.pt")


def pair_of_scenes(rng):
    """A scene and an edit of it, both from the training split."""
    scene = world.random_scene(rng)
    while True:
        edit = world.edited(rng, scene)
        if world.split_of(world.caption(edit)) == "train":
            return scene, edit


# ---- stage 2: the language model -----------------------------------------------------------------

def wsd(step, steps):
    """Warm-up, stable, decay: linear up over 5 % of the steps, flat, linear down over the last 40
    %."""
    return min(1.0, (step + 1) / max(1, 0.05 * steps), (1 - step / steps) / 0.4)


def as_tree(tokens, record):
    """Every answer of a conversation is to be learned."""
    return make_tree(tokens, record | {"root": ""}, [record["golden"]], history=True)


def text_trees(tokens, seed, total):
    """Text conversations, `total` of them. First the written scenes hold one thing, where there is
    nothing to search for: a model that can already read an answer off then learns where to look for
    it."""
    rng = random.Random(f"text/{seed}")
    for k in range(total):
        share = k / total
        most = 1 if share < 0.04 else 2 if share < 0.08 else 4
        yield as_tree(tokens, tasks.text_conversation(rng, most))


def give_birth(model, tokens):
    """Where the language model starts: it shortens the wait for the first look-up (LOG.md).

    "big-red-circle" begins as the sum of its parts, so that words which share a part begin alike.
    An attention head begins by looking for what resembles it (keys as queries) and passing on what
    it sees (output as values' transpose)."""
    word = tokens.tokenizer.token_to_id
    with torch.no_grad():
        table = model.language_model.embed_tokens.weight
        for compound in world.COMPOUNDS:
            parts = [word(part) for part in compound.split("-")]
            table[word(compound)] = table[parts].sum(0) / len(parts) ** 0.5
        for block in model.language_model.layers:
            attention = block.self_attn
            attention.k_proj.weight.copy_(attention.q_proj.weight)
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)


def train_language(parts, s, out):
    torch.set_num_threads(1)
    steps = s.steps(2000)
    batch = 16
    tokens = Tokens(parts, language(s.width))
    model = Llava(language(s.width, words=tokens.tokenizer.get_vocab_size()))
    initialise(model, s.seed * 10 + 5)
    give_birth(model, tokens)
    run = Run(
        model, sft.Settings(lr=2e-3, batch=batch), make_pack,
        steps=steps, rate=wsd, betas=(0.9, 0.98), weight_decay=0.1,
    )
    sft.train(run, text_trees(tokens, s.seed, steps * batch), "2 language model")
    checkpoint.save(model, out, parts)


# ---- stages 3 and 4: projector and visual tuning -------------------------------------------------

def visual_trees(tokens, seed, draw_kinds):
    """Endless conversations about pictures; draw_kinds(rng) -> (question kinds, answered
    briefly?)."""
    rng = random.Random(seed)
    while True:
        scene = world.random_scene(rng)
        look = rng.randrange(2**31)
        kinds, brief = draw_kinds(rng)
        turns = [world.ask(rng, scene, kind) for kind in kinds]
        tree = as_tree(tokens, tasks.conversation("", turns, brief, scene, look))
        tree.images = [(scene, look)]                                        # drawn in memory, no file
        yield tree


def pack_of(trees):
    pictures = [tree.images[0] for tree in trees if tree.images]
    return make_pack(trees, pixels_of(pictures) if pictures else None)


def with_text(trees, tokens, seed, share):
    """Endless trees, `share` of them text conversations."""
    rng = random.Random(seed)
    while True:
        if rng.random() < share:
            yield as_tree(tokens, tasks.text_conversation(rng))
        else:
            yield next(trees)


def caption_kinds(rng):
    return rng.choice((("describe",), ("each", "each"))), False


def tuning_kinds(rng):
    """LLaVA-1.5's mixture in miniature: mostly short answers, some descriptions, no text."""
    if rng.random() < 0.14:
        return ("describe",), False
    kinds = []
    for _ in range(3):
        if rng.random() < 0.06:
            kinds.append("choice")
        else:
            kinds.append(rng.choice(world.KNOWLEDGE if rng.random() < 0.5 else world.LOOKUPS))
    return kinds, rng.random() < 0.9


def train_visual(parts, s, vicuna, out):
    torch.set_num_threads(1)
    text_model = checkpoint.load(vicuna)
    config = Config(text_model.config.text, VISION, image_token=SPECIAL.index("<image>"))
    tokens = Tokens(parts, config)
    model = Llava(config)
    model.language_model = text_model.language_model
    model.lm_head = text_model.lm_head
    model.vision_tower.load_state_dict(torch.load(parts / "tower.pt", weights_only=True))
    initialise(model.multi_modal_projector, s.seed * 10 + 6)

    model.vision_tower.requires_grad_(False)
    model.language_model.requires_grad_(False)
    settings = sft.Settings(lr=3e-3, batch=24)
    run = Run(model, settings, pack_of, steps=s.steps(600), betas=(0.9, 0.98))
    sft.train(run, visual_trees(tokens, f"projector/{s.seed}", caption_kinds), "3 projector")

    model.language_model.requires_grad_(True)
    draws = visual_trees(tokens, f"tuning/{s.seed}", tuning_kinds)
    tune(copy.deepcopy(model), draws, s, parts, out / "llava")
    if s.replay:
        draws = visual_trees(tokens, f"tuning/{s.seed}", tuning_kinds)
        draws = with_text(draws, tokens, f"replay/{s.seed}", s.replay)
        tune(model, draws, s, parts, out / "replayed")


def tune(model, trees, s, parts, out):
    run = Run(model, sft.Settings(lr=3e-4, batch=16), pack_of, steps=s.steps(400), betas=(0.9, 0.98))
    sft.train(run, trees, "4 visual tuning")
    checkpoint.save(model, out, parts)


# ---- the script ----------------------------------------------------------------------------------

def run(s: Settings):
    out = Path(s.out)
    if out.exists():
        raise BadInput(f"{out} is already there; remove it first (rm -r {out})")

    with TemporaryDirectory() as folder, checkpoint.whole_folder(out) as aside:
        parts = Path(folder)
        template = (VICUNA.system, "USER:", "ASSISTANT:")                # a word each
        write_tokenizer(parts, tasks.vocabulary(), template)
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            tower = pool.submit(train_tower, parts, s)
            language_model = pool.submit(train_language, parts, s, aside / "vicuna")
            tower.result()
            language_model.result()
        train_visual(parts, s, aside / "vicuna", aside)

    print(f"what they can do: python evaluate.py --ckpt {out}/vicuna,{out}/llava")


if __name__ == "__main__":
    main(Settings, run)
