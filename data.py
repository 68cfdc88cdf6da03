"""What the loss sees: template, tokens, labels, trees, packs.

The problem. A log-prob is only as right as the tokens it is taken over. Most published bugs in preference
training are off-by-ones here: a slice at position 575, a lost first token, a missing </s>, a prompt tokenised
differently in training and in generation.

The trick: there is one way to turn a conversation into ids, and training, reference scores, sampling and
evaluation all call it. A record becomes a *tree*: one prompt, n answers.

    text     A chat ... questions. USER: <image>\\nWhat color? ASSISTANT: red</s>
    prompt   <s> A chat ... USER: [img] x 576 What color? ASSISTANT:           ids(prompt), image expanded at once
    answer   red </s>                                                          ids(prompt + " red</s>") minus ids(prompt)

That the second line begins with the first is checked for every answer, so the tokens trained on are those that
generation sees. Labels live in this expanded index space from the start; nothing is ever shifted by image size.

A worked example, prompt [7 8 9], answers [a b E] and [c E], E = </s>, packed at row 0:

    row        0  1  2 | 3  4 | 5          E is scored but never an input: nobody reads what follows it
    ids        7  8  9 | a  b | c
    positions  0  1  2 | 3  4 | 3          each answer continues where the prompt ended
    own        0  0  0 | 3  3 | 5
    [lo, hi)   empty   | 0..3 | 0..3       both answers see the prompt, neither sees the other
    rows       2 3 4   ->  targets a b E   the prompt's last row predicts the first token of every answer
               2 5     ->  targets c E

Template: vicuna_v1, exactly (FastChat `get_prompt`, LLaVA `conv_vicuna_v1`).
Previous: formats.py.  Next: memory.py (what a step will need).
"""
import bisect
import hashlib
import os
from array import array
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Callable, Iterator

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

import kernels
import parallel
import formats as records
from checkpoint import TAKE_TOKENIZER, read_config, read_json, tokenizer_folder
from common import BadInput, OnDisk, sha
from kernels import Mask
from model import Config, Llava
from formats import ATTRIBUTES, image_path
from vision import load_image, preprocess

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


# ---- text -----------------------------------------------------------------------------------------------------

def template(messages: list[dict]) -> str:
    """A conversation ending with the user -> the prompt, up to and including the last "ASSISTANT:"."""
    text = SYSTEM + " "
    for m in messages:
        text += f" {m['content']}</s>" if m["role"] == "assistant" else f"USER: {m['content']} ASSISTANT:"
    return text


def steered(messages: list[dict], form: dict, scores: dict) -> list[dict]:
    """The conversation with its last question asking for these scores, in the words of `form` (steerlm.py)."""
    words = {name: form["grades"][scores[name]] for name in ATTRIBUTES}
    return messages[:-1] + [messages[-1] | {"content": messages[-1]["content"] + form["text"].format(**words)}]


def target_scores(text: str) -> dict[str, int]:
    """"4 4 4 4 0" -> the five scores to ask for. Raises BadInput where it is not that."""
    values = text.split()
    if len(values) != 5 or not set(values) <= set("01234"):
        raise BadInput(f"--target {text}: five numbers from 0 to 4, for {', '.join(ATTRIBUTES)}")
    return dict(zip(ATTRIBUTES, map(int, values)))


class Tokens:
    """A checkpoint's tokenizer.json with the few ids this code needs, and the image expansion.

    encode(text) is what transformers' tokenizer gives for the same file, <image> repeated once per patch (and <s> in
    front where only tokenizer_config.json asks for it, as transformers 4 did).
    """

    def __init__(self, folder: Path, config: Config):
        folder = tokenizer_folder(Path(folder))
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise BadInput(TAKE_TOKENIZER.format(folder=folder))
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises a bare Exception
            raise BadInput(f"{path}: cannot be read ({error})") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.eos = self.tokenizer.token_to_id("</s>")
        if self.eos is None:
            raise BadInput(f"{path}: has no </s>, which ends every answer in the vicuna_v1 template")
        self.image = self.tokenizer.token_to_id("<image>")
        self.patches, self.room = config.vision.patches if config.vision else 0, config.text.max_position_embeddings
        if config.vision and self.image != config.image_token:
            raise BadInput(f"{path}: <image> is {self.image}, but config.json says {config.image_token}; "
                           "take tokenizer.json from the llava-hf folder of the same model")
        about, steer = path.with_name("tokenizer_config.json"), path.with_name("steer.json")
        wanted = about.is_file() and read_json(about).get("add_bos_token")   # where tokenizer.json does not add <s> itself
        self.bos = self.tokenizer.token_to_id("<s>") if wanted else None
        self.steer = read_json(steer) if steer.is_file() else None           # written by steerlm.py: what to ask of every answer
        if self.steer is not None and not {"text", "grades", "target"} <= self.steer.keys():
            raise BadInput(f"{steer} is damaged: it lacks text, grades or target; steerlm.py writes it")
        self.source = path

    def encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text).ids
        if self.bos is not None and ids[:1] != [self.bos]:
            ids = [self.bos] + ids
        if self.image is None:
            return ids
        return [i for t in ids for i in ([t] * self.patches if t == self.image else [t])]

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


# ---- trees ------------------------------------------------------------------------------------------------------

@dataclass
class Tree:
    """One prompt and its n answers as ids; `history` are spans [a, b) of earlier assistant turns in the prompt."""
    id: str
    prompt: list[int]
    answers: list[list[int]]                      # each ends with </s>
    images: list[Path] = field(default_factory=list)
    history: list[tuple[int, int]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """What it costs in a pack."""
        return len(self.prompt) + sum(len(a) - 1 for a in self.answers)


def make_tree(tokens: Tokens, record: dict, answers: list[str], history: bool = False, max_length: int = 0) -> Tree:
    """A record and some answers' texts -> a tree. Raises BadInput with the reason it cannot be used.

    history      also mark the earlier assistant turns, so that instruction tuning can score them
    max_length   longest prompt + answer in tokens; what is longer is refused, never cut (0: no limit)
    """
    messages = steered(record["messages"], tokens.steer, tokens.steer["target"]) if tokens.steer else record["messages"]
    if record["images"] and not tokens.patches:
        raise BadInput("has images, but this checkpoint is text-only")
    text = template(messages)
    prompt = tokens.encode(text)
    tree = Tree(record["id"], prompt, [], [image_path(record["root"], name) for name in record["images"]])
    for answer in answers:
        tree.answers.append(after(tokens, prompt, text, f" {answer}</s>"))
        length = len(prompt) + len(tree.answers[-1])
        if max_length and length > max_length:
            raise BadInput(f"is {length} tokens long (prompt {len(prompt)}, answer {len(tree.answers[-1])}), more than "
                           f"--max_length {max_length}; shorten it or raise the limit")
    if history:
        for k, m in enumerate(messages):
            if m["role"] == "assistant":
                before = template(messages[:k])
                start = len(tokens.encode(before))
                tree.history.append((start, start + len(after(tokens, prompt[:start], before, f" {m['content']}</s>"))))
    return tree


def after(tokens: Tokens, prompt: list[int], text: str, more: str) -> list[int]:
    """The ids that `more` adds to the prompt; the prompt's own must not change, or generation would see others."""
    whole = tokens.encode(text + more)
    if whole[:len(prompt)] != prompt:
        raise BadInput("the tokenizer merges the prompt's end with the answer's beginning, so that training would see "
                       "other tokens than generation")
    ids = whole[len(prompt):]
    if ids[-1:] != [tokens.eos] or ids.count(tokens.eos) != 1:
        raise BadInput("the answer must end with exactly one </s>")
    return ids


# ---- packs ------------------------------------------------------------------------------------------------------

@dataclass
class Pack:
    """Several trees in one row of T tokens. N of A answers are scored, M tokens predict them; the head has a worked example."""
    ids: Tensor          # (T,)
    positions: Tensor    # (T,)
    mask: Mask           # three (T,) vectors
    read: Tensor         # (M,) the tokens whose hidden states predict something, in order
    place: Tensor        # (N,) which of them predicts targets[i]
    targets: Tensor      # (N,)
    owner: Tensor        # (N,) which of the pack's A answers it belongs to
    answers: int         # A; a tree's history counts to its first answer
    pixels: Tensor | None

    @property
    def rows(self) -> Tensor:
        """(N,) the token that predicts targets[i]; the prompt's last comes once for every answer."""
        return self.read[self.place]

    def to(self, device) -> "Pack":
        return replace(self, **{name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor | Mask)})


def make_pack(trees: list[Tree], pixels: Tensor | None = None) -> Pack:
    """Lay trees one after another. `pixels` (images of all trees in order, 3, S, S)."""
    ids, positions, lo, hi, own, rows, targets, owner = ([] for _ in range(8))
    answers = 0
    for tree in trees:
        start, P = len(ids), len(tree.prompt)
        ids += tree.prompt
        positions += range(P)
        lo += [0] * P
        hi += [0] * P
        own += [start] * P
        for a, b in tree.history:
            rows += range(start + a - 1, start + b - 1)
            targets += tree.prompt[a:b]
            owner += [answers] * (b - a)
        for answer in tree.answers:
            at, inputs = len(ids), answer[:-1]                            # </s> is predicted, never read
            ids += inputs
            positions += range(P, P + len(inputs))
            lo += [start] * len(inputs)
            hi += [start + P] * len(inputs)
            own += [at] * len(inputs)
            rows += [start + P - 1, *range(at, at + len(inputs))]
            targets += answer
            owner += [answers] * len(answer)
            answers += 1
    tensor = lambda x: torch.tensor(x, dtype=torch.long)
    return Pack(tensor(ids), tensor(positions), Mask(tensor(lo), tensor(hi), tensor(own)),
                *tensor(rows).unique(return_inverse=True), tensor(targets), tensor(owner), answers, pixels)


def split(trees: Iterable[Tree], budget: int) -> Iterator[list[Tree]]:
    """Packs of at most `budget` tokens, in order; a tree (or what else has .tokens) longer than that is a pack of its own."""
    pack, room = [], budget
    for tree in trees:
        if pack and tree.tokens > room:
            yield pack
            pack, room = [], budget
        pack.append(tree)
        room -= tree.tokens
    if pack:
        yield pack


def share(trees: list[Tree], budget: int) -> list[tuple[list[Tree], bool]]:
    """The packs of this process, and whether they count. One process: all of them. Of several each gets as many as the others, of
    as equal size as their order allows; who has one too few computes one for the second time, and does not count it."""
    packs, world = list(split(trees, budget)), parallel.world()
    if world == 1:
        return [(part, True) for part in packs]
    each = -(-len(packs) // world)
    smallest = bisect.bisect_left(range(1, budget), True, key=lambda size: len(list(split(trees, size))) <= each * world)
    packs = list(split(trees, smallest + 1))
    mine = packs[parallel.rank()::world]
    return [(part, True) for part in mine] + [(packs[-1][:1], False)] * (each - len(mine))


class Pixels:
    """Image files -> pixels for one model, cut as it was trained (or cropped)."""

    def __init__(self, config: Config, crop: bool = False):
        self.size = config.vision.image_size if config.vision else 0
        self.crop = crop

    def one(self, path: Path) -> Tensor:                                     # (3, S, S)
        return preprocess(load_image(path), self.size, self.crop)

    def __call__(self, paths: list[Path]) -> Tensor | None:
        """n files -> (n, 3, S, S), or None for no files."""
        return torch.stack([self.one(path) for path in paths]) if paths else None

    def pack(self, trees: list[Tree]) -> Pack:
        return make_pack(trees, self([path for tree in trees for path in tree.images]))


class Features(Pixels):
    """In the place of Pixels: what the frozen tower makes of each image file, computed once and kept in a folder, under a name
    that depends on the file, the tower's weights and the preprocessing."""

    def __init__(self, model: Llava, folder: str | Path, crop: bool = False):
        super().__init__(model.config, crop)
        self.folder, self.tower = Path(folder), model.vision_tower
        self.folder.mkdir(parents=True, exist_ok=True)
        self.about = sha(repr((model.config.vision, crop, model.head.dtype)),
                         *(p.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() for p in self.tower.parameters()))

    @torch.no_grad()
    def one(self, path: Path) -> Tensor:                                     # (P, D)
        kept = self.folder / f"{sha(self.about, path.read_bytes())}.safetensors"
        if not kept.exists():
            weight = self.tower.embeddings.class_embedding
            features = self.tower(super().one(path)[None].to(weight))[0]
            aside = kept.with_suffix(f".{os.getpid()}.part")
            save_file({"features": features.cpu().contiguous()}, aside)
            os.replace(aside, kept)
        return load_file(kept)["features"]


def ahead(make: Callable, parts: Iterable) -> Iterator[tuple]:
    """(part, make(part)) for every part; the next one is made in a thread (images decoded) while this one is computed with."""
    with ThreadPoolExecutor(1) as pool:
        begun = ((part, pool.submit(make, part)) for part in parts)
        for (part, made), _ in pairwise(chain(begun, [None])):               # the next has begun when this one is waited for
            yield part, made.result()


def trees_digest(trees: Iterable[Tree]) -> "hashlib._Hash":
    """Of every token that would be trained on, in order."""
    digest = hashlib.sha256()
    for tree in trees:
        digest.update(repr((tree.id, tree.history, [path.name for path in tree.images])).encode())
        for ids in (tree.prompt, *tree.answers):
            digest.update(array("q", ids).tobytes() + b"|")
    return digest


def pack_size(wanted: int, device: torch.device) -> int:
    """--pack, or where that is 0: what keeps a GPU busy, or what a CPU's caches and a laptop's memory like."""
    return wanted or (1024 if device.type == "cpu" else 8192)


def token_logps(model: Llava, pack: Pack) -> Tensor:
    """log p of every scored token of a pack, (N,) fp32."""
    hidden = model(pack.ids, pack.positions, pack.mask, pack.pixels, pack.read)
    return kernels.logps(hidden, model.head, pack.place, pack.targets)


def answer_logps(model: Llava, pack: Pack) -> Tensor:
    """sum log p(answer | prompt) of every answer of a pack, (A,) fp32 nats. SFT, DPO, the reference scores and the
    tests all come through here."""
    logps = token_logps(model, pack)                                     # index_put: a GPU's index_add adds in any order,
    sums = torch.zeros(pack.answers, dtype=logps.dtype, device=logps.device)     # and no run would give the same bits twice
    return sums.index_put((pack.owner,), logps, accumulate=True)


# ---- from a file to trees --------------------------------------------------------------------------------------

def read_trees(s, folder: Path, out: Path,
               trees_of: Callable[[Tokens, dict, int], list[Tree]]) -> tuple[Tokens, Pixels, OnDisk, OnDisk]:
    """The tokens and pixels of the model in `folder`, the usable records of s.data, and the trees that trees_of(tokens, record,
    longest) makes of each, one behind the other, both on the disk of `out`; what raises BadInput there, or was refused before, is
    reported. Raises BadInput where nothing is left."""
    config, _ = read_config(folder)
    tokens, pixels = Tokens(folder, config), Pixels(config, s.crop)
    items, trees, rejects = OnDisk(out), OnDisk(out), OnDisk(out)
    for name, record in records.stream(s.data, s.image_root, pixels.size):
        try:
            if isinstance(record, BadInput):
                raise record
            for tree in trees_of(tokens, record, s.max_length or tokens.room):
                trees.append(tree)
            items.append(record)
        except BadInput as problem:
            rejects.append({"id": name, "reason": str(problem)})
    records.report(s.data, len(items), rejects, out if parallel.rank() == 0 else None)
    if not items:
        raise BadInput(f"{s.data}: no usable record; the reasons are above and in {out}/rejects.jsonl")
    return tokens, pixels, items, trees
