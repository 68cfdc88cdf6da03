"""Tiny doubles for all tests: tokenizers, pictures and checkpoints that a test can build in a
blink.

    python -m pytest tests -q                      everything; what needs transformers skips itself
    without it
    python -m pytest tests/test_kernels.py -q      one file

Nothing here is mocked: the tokenizers are real tokenizer.json files, trained on the lines below;
the checkpoints have the layouts of the hub and random weights. `tiny_checkpoint` writes with this
repository's own code, so that most tests run without transformers; `hf_checkpoint` lets
transformers write, for the tests that compare with it. No network, no downloads, the same bytes
every time.
"""
import json
import multiprocessing
import os
import socket
import sys
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")          # before torch is loaded; common.py says why
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))      # to models this small a second thread is a burden

LINES = """A chat between a curious user and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the user's questions.
USER: What color is the circle on the left? ASSISTANT: The circle on the left is red.
USER: How many squares are in the picture? ASSISTANT: There are three squares, two blue and one green.
USER: Is there a dog in the image? ASSISTANT: No, there is no dog; I see a cat and 12 small birds.
USER: Describe the picture in one sentence. ASSISTANT: A man is riding a bicycle down a quiet street.
USER: Write a short poem about the sea. ASSISTANT: The sea is wide, the sea is deep,
it sings the little ships to sleep.
USER: What is 17 plus 25? ASSISTANT: 17 plus 25 is 42, because 7 and 5 make 12, and 10, 20 and 12 make 42.
USER: Which answer is better, and why? ASSISTANT: The first, since it is correct, coherent and helpful.
Preference alignment on a few thousand judged questions repairs what instruction tuning has damaged.
Le café coûte 3 €, Grüße aus Köln, and 1,000.50 in brackets (or not): "quoted", 'single', a/b, x_y, 50%!""".split("\n")

SPECIAL = ["<unk>", "<s>", "</s>"]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """To draw metrics.png takes ten times as long as the tiny run itself; the test that looks at it
    draws it."""
    if "train" in sys.modules:
        monkeypatch.setattr(sys.modules["train"], "draw_metrics", lambda out: None)


# ---- processes -----------------------------------------------------------------------------------

@pytest.fixture
def one_thread():
    """Sums are cut by threads, so what is compared bit by bit with a process of its own runs in
    one, too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


CLEAN = multiprocessing.get_context("forkserver")
CLEAN.set_forkserver_preload(["torch._dynamo", "matplotlib.pyplot", "pytest", "requests",
                              "tokenizers", "PIL.Image"])


@contextmanager
def process(work: Callable[[], object], log: str | Path = os.devnull):
    """work() in a process of its own, in one thread -> the Process. What it says goes to `log`,
    what it raises last; behind the block it is gone.

    It is forked from a process that has only imported things: a fork of this one, whose threads may
    hold locks, can hang. So work travels by name: a function of a module, or a partial of one. The
    environment goes with it, monkeypatches do not.
    """
    child = CLEAN.Process(target=of_its_own, args=(work, str(log), dict(os.environ)))
    child.start()
    try:
        yield child
    finally:
        child.kill()
        child.join()


def of_its_own(work, log: str, environ: dict):
    os.environ.clear()
    os.environ.update(environ)
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "a", buffering=1)
    work()


def ended(child) -> int:
    """Wait for it -> its exit code, -9 where it was killed."""
    child.join()
    return child.exitcode


def meet(world: int, work: Callable[[], object], log: str | Path) -> bool:
    """work() in so many processes, which find torchrun's variables -> did all end well? One that
    fails ends the others."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    with ExitStack() as stack:
        left = [stack.enter_context(process(partial(one_of, world, rank, port, work),
                                            log)) for rank in range(world)]
        while left:
            wait([child.sentinel for child in left])
            if any(ended(child) for child in left if not child.is_alive()):
                return False
            left = [child for child in left if child.is_alive()]
    return True


def one_of(world: int, rank: int, port: str, work):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    work()


# ---- tokenizers ----------------------------------------------------------------------------------

@cache
def tokenizer_text(kind: str) -> str:
    """The text of a tokenizer.json: "byte" (GPT-2 / Llama 3 style) or "llama" (SentencePiece style,
    as LLaVA-1.5's)."""
    if kind == "byte":
        tok = Tokenizer(models.BPE())
        tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tok.decoder = decoders.ByteLevel()
        special = SPECIAL + ["<pad>", "<image>"]
        tok.train_from_iterator(LINES, trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    else:
        tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                               normalizers.Replace(" ", "▁")])
        tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                         decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
        words = [word for line in LINES if line.isascii() for word in line.split()]
        tok.train_from_iterator(words, trainers.BpeTrainer(
            vocab_size=500, special_tokens=SPECIAL + [f"<0x{i:02X}>" for i in range(256)],
            show_progress=False))
        # the trainer marks the byte tokens as special, which would hide them from decode; in
        # Llama's file they are not
        raw = json.loads(tok.to_str())
        raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] in SPECIAL]
        tok = Tokenizer.from_str(json.dumps(raw))
        tok.add_special_tokens(["<image>", "<pad>"])         # the next free ids, as llava-hf has them
    tok.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B",
                                                       special_tokens=[("<s>", 1)])
    return tok.to_str(pretty=True)


def write_tokenizer(folder, kind: str) -> Tokenizer:
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "tokenizer.json").write_text(tokenizer_text(kind), encoding="utf8")
    return Tokenizer.from_str(tokenizer_text(kind))


@pytest.fixture(scope="session")
def bpe_dir(tmp_path_factory):
    """A folder with a byte-level tokenizer.json: <unk> 0, <s> 1, </s> 2, <pad> 3, <image> 4."""
    folder = tmp_path_factory.mktemp("bpe")
    write_tokenizer(folder, "byte")
    return folder


@pytest.fixture(scope="session")
def llama_tok_dir(tmp_path_factory):
    """A folder with a Llama-style tokenizer.json: <unk> 0, <s> 1, </s> 2, 256 bytes, merges, then
    <image>, <pad>."""
    folder = tmp_path_factory.mktemp("llama_tok")
    write_tokenizer(folder, "llama")
    return folder


# ---- pictures ------------------------------------------------------------------------------------

def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture with both smooth and sharp places: a colour gradient, a disc, some noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    red, green = 255 * x / max(1, width - 1), 255 * y / max(1, height - 1)
    blue = np.where((x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2,
                    230, 20)
    noise = rng.integers(-20, 21, (height, width, 3))
    return Image.fromarray((np.stack([red, green, blue], -1) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="session")
def images_dir(tmp_path_factory):
    """A folder with a.jpg (wide), b.png (tall), c.jpg (square) and d.png (a thin strip), all
    different."""
    folder = tmp_path_factory.mktemp("images")
    sizes = {"a.jpg": (40, 30), "b.png": (30, 50), "c.jpg": (33, 33), "d.png": (100, 7)}
    for seed, (name, size) in enumerate(sizes.items()):
        picture(*size, seed=seed).save(folder / name)
    return folder


# ---- records -------------------------------------------------------------------------------------

def scores(quality: int) -> dict:
    """Five scores whose quality S is this, from 0 to 12."""
    helpfulness = min(4, quality)
    correctness = min(4, max(0, quality - 4))
    return {"helpfulness": helpfulness, "correctness": correctness,
            "coherence": quality - helpfulness - correctness,
            "complexity": 1, "verbosity": 2}


def turns(*contents):
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k,
            content in enumerate(contents)]


# question, pictures, (answer, quality); the fourth's answers are too close to make a pair
RECORDS = [
    ("<image>\nWhat color is it?", ["a.png"], [("The circle is red.", 10), ("No.", 3), ("Blue", 5), ("It is red.", 9)]),
    ("What is 17 plus 25?", [], [("41", 2), ("17 plus 25 is 42.", 12)]),
    ("<image>\n<image>\nCompare.", ["a.png", "b.png"],
     [("They are the same.", 4), ("One is wide, one is tall.", 8)]),
    ("Is there a dog?", [], [("Yes.", 6), ("No, there is no dog.", 7)]),
    ("<image>\nHow many?", ["b.png"], [("Three.", 11), ("12 small birds, or 50 of them.", 5), ("2", 0)]),
    ("Write a poem.", [], [("The sea is wide, the sea is deep.", 9), ("no", 1)]),
]


def write_data(folder, name="data.jsonl", rows=RECORDS):
    """A file of scored records with their pictures beside it; returns its Path."""
    folder.mkdir(exist_ok=True)
    picture(40, 30, seed=0).save(folder / "a.png")
    picture(20, 40, seed=1).save(folder / "b.png")
    records = []
    for k, (question, images, answers) in enumerate(rows):
        judged = [{"text": text, "scores": scores(quality)} for text, quality in answers]
        records.append({"id": f"r{k}", "images": images, "messages": turns(question),
                        "answers": judged})
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / name


def record(root, *contents, images=(), id="r") -> dict:
    """A usable record without answers, as formats.py hands it on."""
    return {"id": id, "root": str(root), "images": list(images), "messages": turns(*contents)}


def judged(*qualities, texts="abcdefgh", id="r") -> dict:
    """A record whose answers have these qualities S, 0 to 12."""
    answers = [{"text": text, "scores": scores(quality)} for text, quality in zip(texts, qualities)]
    return record(".", "What?", id=id) | {"answers": answers}


def rows_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- checkpoints ---------------------------------------------------------------------------------

@torch.no_grad()
def randomize(module, seed: int):
    """Weights that make every path matter: matrices of order 1/sqrt(fan in), norms around 1, biases
    not zero."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if "norm" in name and name.endswith("weight"):
            p.copy_(1 + 0.2 * noise)
        elif p.ndim == 1:
            p.copy_(0.2 * noise)
        elif "embed_tokens" in name or "position_embedding" in name:
            p.copy_(0.5 * noise)
        elif "lm_head" in name:
            p.copy_(0.4 * noise)
        else:
            p.copy_(noise * (p[0].numel() ** -0.5))
    return module


def tiny_config(vocab: int, image_token: int, *, image_size=28, patch=14, tie=False, kv_heads=2,
                head_dim=32, layers=2,
                heads=4, hidden=64, rope=None, text_only=False):
    from model import Config, TextConfig
    from vision import VisionConfig
    text = TextConfig(vocab_size=vocab, hidden_size=hidden, intermediate_size=96,
                      num_hidden_layers=layers,
                      num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
                      rms_norm_eps=1e-5, tie_word_embeddings=tie)
    if rope:
        text.rope = rope
    vision = VisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                          num_attention_heads=2,
                          image_size=image_size, patch_size=patch)
    return Config(text, None if text_only else vision, -1 if text_only else image_token)


def tiny_model(vocab: int = 64, image_token: int = 4, seed: int = 0, **sizes):
    """A random Llava (ours) in evaluation mode; sizes as in tiny_config."""
    from model import Llava
    return randomize(Llava(tiny_config(vocab, image_token, **sizes)), seed).eval()


def tiny_checkpoint(folder, tokenizer: str = "byte", image_size: int = 28, patch: int = 14,
                    tie: bool = False,
                    kv_heads: int = 2, head_dim: int = 32, layers: int = 2,
                    vocab: int | None = None, seed: int = 0,
                    **sizes) -> Path:
    """Write a llava-hf folder (config, weights, tokenizer.json) with this repository's code;
    returns its Path.

    The tokenizer is "byte" or "llama"; the vocabulary defaults to its size, rounded up to a
    multiple of 64.
    """
    import checkpoint
    folder = Path(folder)
    source = folder.with_name(folder.name + ".tokenizer")
    tok = write_tokenizer(source, tokenizer)
    vocab = vocab or -(-tok.get_vocab_size() // 64) * 64
    model = tiny_model(vocab, tok.token_to_id("<image>"), seed, image_size=image_size, patch=patch,
                       tie=tie,
                       kv_heads=kv_heads, head_dim=head_dim, layers=layers, **sizes)
    return checkpoint.save(model, folder, source)


def hf_model(vocab: int = 64, image_token: int = 4, seed: int = 0, *, image_size=28, patch=14,
             tie=False, kv_heads=2,
             head_dim=32, layers=2, heads=4, hidden=64, rope=None):
    """transformers' LlavaForConditionalGeneration of the same sizes as `tiny_model`, random, in
    evaluation mode."""
    transformers = pytest.importorskip("transformers")
    text = transformers.LlamaConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=96, num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, rms_norm_eps=1e-5,
        tie_word_embeddings=tie, bos_token_id=1,
        eos_token_id=2, rope_parameters=rope or {"rope_type": "default", "rope_theta": 10000.0})
    vision = transformers.CLIPVisionConfig(hidden_size=32, intermediate_size=48,
                                           num_hidden_layers=3,
                                           num_attention_heads=2, image_size=image_size,
                                           patch_size=patch)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text,
                                      image_token_index=image_token,
                                      image_seq_length=(image_size // patch) ** 2,
                                      tie_word_embeddings=tie)
    return randomize(transformers.LlavaForConditionalGeneration(config), seed).eval()


def hf_checkpoint(folder, tokenizer: str = "byte", vocab: int | None = None, seed: int = 0,
                  max_shard_size="5GB", **sizes):
    """Let transformers write a checkpoint with tokenizer.json beside it; returns (folder, its
    model)."""
    folder = Path(folder)
    tok = write_tokenizer(folder, tokenizer)
    vocab = vocab or -(-tok.get_vocab_size() // 64) * 64
    model = hf_model(vocab, tok.token_to_id("<image>"), seed, **sizes)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder, model
