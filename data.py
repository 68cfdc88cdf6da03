"""What the loss sees: record, template, tokens, tree, pack, and which two answers make a pair.

A record is a prompt and its n answers, one JSON object a line. Every stage reads and writes it:

    {"id": "lrv-000123",
     "images": ["images/123.jpg"],                   the k-th <image> marker stands for images[k]
     "messages": [                                   the first may be the system's
        {"role": "user", "content": "<image>\\nWhat is odd here?"}],
     "answers": [
        {"text": "...", "finish": "stop", "scores": {"helpfulness": 4, ...}, "comment": "..."}],
     "golden": "...",
     "pair": [0, 1]}                                 answers[0] was preferred to answers[1]

The problem. A log-prob is only as right as the tokens it is taken over. Most published bugs in
preference training are off-by-ones here: a slice at position 575, a lost first token, a missing
</s>, a prompt tokenised differently in training and in generation.

The trick. There is one way to turn a conversation into ids, and training, reference scores,
sampling and evaluation all use it. A record becomes a *tree*: one prompt, n answers.

    text     A chat ... questions. USER: <image>\\nWhat color? ASSISTANT: red</s>
    prompt   <s> A chat ... USER: [img] x 576 What color? ASSISTANT:    ids(prompt)
    answer   red </s>                                          ids(prompt + " red</s>") minus these

That the second line begins with the first is checked for every answer, so the tokens trained on are
those that generation sees. A tree waits with one id per picture, and is written out with one per
patch when it is packed: labels never shift.

A worked example, prompt [7 8 9], answers [a b E] and [c E], E = </s>, packed at row 0:

    row        0  1  2 | 3  4 | 5          E is scored but never an input: nobody reads it
    ids        7  8  9 | a  b | c
    positions  0  1  2 | 3  4 | 3          each answer continues where the prompt ended
    own        0  0  0 | 3  3 | 5
    [lo, hi)   empty   | 0..3 | 0..3       both answers see the prompt, neither sees the other
    rows       2 3 4   ->  targets a b E   the prompt's last row predicts every answer's first token
               2 5     ->  targets c E     stored as `read` 2 3 4 5 and places in it, 0 1 2 0 3
"""
import random
from array import array
from copy import copy
from dataclasses import dataclass, field, replace
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

import common
from checkpoint import TAKE_TOKENIZER, tokenizer_folder
from common import BadInput, read_json, shown
from judge.rubric import RUBRIC
from kernels import Mask
from vision import image_path, load_image, preprocess

LEVELS = range(RUBRIC.lowest, RUBRIC.highest + 1)
GAP = 2          # smallest difference in S between chosen and rejected (the paper's rule)
MARKER = "<image>"


# ---- which answers count, and which two make a pair ----------------------------------------------

def usable(answer: dict) -> bool:
    """The end of an answer that the token budget cut off must not be taught as one."""
    return answer.get("finish") != "length"


def scored_answers(record: dict):
    """(index, S) of every usable answer that a judge has scored."""
    return [
        (k, RUBRIC.quality(answer))
        for k, answer in enumerate(record["answers"])
        if answer.get("scores") and usable(answer)
    ]


def choose_pair(record: dict, gap=GAP, seed=0):
    """(chosen, rejected) as indices into the record's answers, or None where there is no pair.

    The paper's rule (arXiv:2402.10884): chosen is the best answer, rejected a random one among
    those whose S is at least `gap` lower. A pair given in the data stands. Ties for the best go to
    the first; the rejected one is drawn with a seed of its own per record, so that neither order
    nor other records matter. Equal texts are never paired.
    """
    if record.get("pair"):
        return tuple(record["pair"])
    scored = scored_answers(record)
    if not scored:
        return None

    best, top = max(scored, key=itemgetter(1))
    texts = [answer["text"].strip() for answer in record["answers"]]
    worse = [k for k, quality in scored if quality <= top - gap and texts[k] != texts[best]]
    if not worse:
        return None
    return best, random.Random(f"{seed}/{record['id']}").choice(worse)


# ---- template: how a checkpoint wants its prompts ------------------------------------------------

@dataclass(frozen=True)
class Template:
    """How a conversation is spelled for a model. Nothing else here knows a role's spelling."""
    name: str
    user: str                            # a user's turn, up to where the assistant speaks
    answer: str                          # what the assistant adds, its end token included
    ends: tuple[str, ...] = ("</s>",)    # tokens that end an answer; `answer` ends with the first
    between: str = ""                    # what stands behind an answer before the next turn
    system: str = ""                     # the system's sentence, where a record has none of its own
    system_form: str = ""                # how it is written; empty: it heads the first question
    ask: str = ""                        # behind the last question: SteerLM's wish for scores

    def text(self, messages):
        """Turns as they are, the last a user's -> their text."""
        system = self.system
        if messages[0]["role"] == "system":
            system = messages[0]["content"]
            messages = messages[1:]

        text = ""
        if system and self.system_form:
            text = self.system_form.replace("{system}", system)
        for k, message in enumerate(messages):
            content = message["content"]
            if k == 0 and system and not self.system_form:
                content = f"{system}\n\n{content}"
            if message["role"] == "assistant":
                text += self.reply(content) + self.between
            else:
                text += self.user.replace("{content}", content)
        return text

    def reply(self, text):
        """What an answer adds to the prompt's text. (Not str.format: braces in the text stay.)"""
        return self.answer.replace("{content}", text)

    def asked(self, messages):
        """The conversation as it is really asked: with `ask` behind its last question."""
        last = messages[-1]
        return [*messages[:-1], last | {"content": last["content"] + self.ask}]

    def prompt(self, messages):
        """A conversation that ends with the user -> the text up to where the assistant speaks."""
        return self.text(self.asked(messages))


VICUNA = Template(        # FastChat's get_prompt, LLaVA's conv_vicuna_v1, exactly
    "vicuna_v1",
    user="USER: {content} ASSISTANT:",
    answer=" {content}</s>",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    system_form="{system} ",
)
CHATML = Template(        # Qwen, SmolLM, and many others
    "chatml",
    user="<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n",
    answer="{content}<|im_end|>",
    ends=("<|im_end|>", "<|endoftext|>"),
    between="\n",
    system_form="<|im_start|>system\n{system}<|im_end|>\n",
)
LLAMA_3 = Template(
    "llama_3",
    user="<|start_header_id|>user<|end_header_id|>\n\n{content}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    answer="{content}<|eot_id|>",
    ends=("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    system_form="<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>",
)
MISTRAL = Template(       # for tokenizers with an [INST] of their own
    "mistral",
    user="[INST] {content}[/INST]",
    answer=" {content}</s>",
)
TEMPLATES = {template.name: template for template in (VICUNA, CHATML, LLAMA_3, MISTRAL)}

# A tokenizer that has this token wants that template.
SIGNS = {"<|im_start|>": CHATML, "<|start_header_id|>": LLAMA_3, "[INST]": MISTRAL}


def find_template(name, path, tokenizer):
    """--template, or what the model's folder says, or what its tokenizer's own tokens tell."""
    if name:
        if name not in TEMPLATES:
            raise BadInput(f"--template {name}: choose one of {', '.join(TEMPLATES)}")
        return TEMPLATES[name]

    stored = path.with_name("template.json")
    if stored.is_file():
        return read_template(stored)
    for sign, template in SIGNS.items():
        if tokenizer.token_to_id(sign) is not None:
            return template
    return VICUNA


def read_template(path):
    """template.json: fields of a Template; those it leaves out are a known one's of that name."""
    fields = read_json(path)
    known = TEMPLATES.get(str(fields.get("name")))
    try:
        template = replace(known, **fields) if known else Template(**fields)
        ends = tuple(template.ends)
        texts = "".join([*vars(replace(template, ends="")).values(), *ends])
        texts.encode()                                   # half a character is no text
    except (TypeError, UnicodeError) as error:
        raise BadInput(f"{path} is damaged ({error}); see data.Template") from None
    slots = "{content}" in template.user and "{content}" in template.answer
    if isinstance(template.ends, str | dict) or not slots or MARKER in texts:
        raise BadInput(
            f"{path} is damaged: user and answer hold {{content}}, ends is a list, nothing holds "
            f"{MARKER}"
        )
    return replace(template, ends=ends)


def check_form(form, where):
    """steer.json's {"text", "grades", "target"}. Raises BadInput where it is not that, or scores
    written into it would not show."""
    try:
        levels = [dict.fromkeys(RUBRIC.attributes, level) for level in LEVELS]
        wishes = {write_scores(form, scores) for scores in levels}
        fits = len(wishes) == len(form["grades"]) == len(LEVELS)
    except (LookupError, TypeError, AttributeError):     # other types
        fits = False
    if not fits or set("{}") & set("".join(wishes)):
        raise BadInput(
            f"{where}: text must name attributes in braces and have no other braces, grades be "
            f"{len(LEVELS)} different words, lowest first"
        )
    RUBRIC.check(form.get("target"), where)


def write_scores(form, scores):
    """steer.json's form with these scores written into it, each in its own word (steerlm.py)."""
    text = form["text"]
    for name in RUBRIC.attributes:
        text = text.replace("{" + name + "}", form["grades"][scores[name] - RUBRIC.lowest])
    return text


def target_scores(text: str) -> dict:
    """"4 4 4 4 0" -> the scores to ask for, by attribute. Raises BadInput where it is not that."""
    names = RUBRIC.attributes
    try:
        scores = dict(zip(names, map(int, text.split()), strict=True))
        RUBRIC.check(scores, "--target")
    except ValueError:
        raise BadInput(
            f"--target {text}: {len(names)} numbers from {RUBRIC.lowest} to {RUBRIC.highest}, "
            f"for {', '.join(names)}"
        ) from None
    return scores


# ---- tokens --------------------------------------------------------------------------------------

class Tokens:
    """A checkpoint's tokenizer.json, its template, and the few ids that this code needs.

    encode(text) is what transformers' tokenizer gives for the same file (with <s> in front where
    only tokenizer_config.json asks for it, as transformers 4 did).
    """

    def __init__(self, folder: Path, config, template: str = ""):
        path = tokenizer_folder(Path(folder)) / "tokenizer.json"
        if not path.is_file():
            raise BadInput(TAKE_TOKENIZER.format(folder=path.parent))
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
            self.tokenizer.encode("")
        except BaseException as error:                   # the library's panics are no Exception
            raise BadInput(f"{path}: cannot be read ({shown(str(error), 200)})") from None
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self.source = path
        self.room = config.text.max_position_embeddings

        # How an answer is asked for, and how it ends.
        self.template = find_template(template, path, self.tokenizer)
        ends = [self.tokenizer.token_to_id(token) for token in self.template.ends]
        if not ends or ends[0] is None:
            raise BadInput(
                f"{path}: has no {' or '.join(self.template.ends)}, which ends every answer in the "
                f"{self.template.name} template; choose another --template"
            )
        self.ends = tuple(end for end in ends if end is not None)

        # SteerLM's form, where the model was trained to be asked for scores.
        self.steer = None
        stored = path.with_name("steer.json")
        if stored.is_file():
            self.steer = read_json(stored)
            check_form(self.steer, f"{stored} is damaged")
            asked = write_scores(self.steer, self.steer["target"])
            self.template = replace(self.template, ask=asked)

        # Pictures.
        self.image = self.tokenizer.token_to_id(MARKER)
        self.patches = config.vision.patches if config.vision else 0
        if config.vision and self.image != config.image_token:
            raise BadInput(
                f"{path}: {MARKER} is {self.image}, but config.json says {config.image_token}; "
                "take tokenizer.json from the llava-hf folder of the same model"
            )

        # Control tokens: their text must not stand in anybody's words.
        added = self.tokenizer.get_added_tokens_decoder().values()
        self.special = sorted(token.content for token in added if token.special)
        self.check(self.template.ask, stored)

        # <s> stands in front where tokenizer.json says so, or else tokenizer_config.json.
        about = path.with_name("tokenizer_config.json")
        wanted = about.is_file() and common.field(
            read_json(about), "add_bos_token", "true or false", about, False
        )
        self.bos = self.tokenizer.token_to_id("<s>") if wanted else None

        # Any word may be used, control tokens where prompts have them: each needs a row of weights.
        vocab = self.tokenizer.get_vocab()
        words = [vocab[word] for word in vocab.keys() - self.special]
        most = max(words + self.encode("\u263a" + self.template.user + self.template.answer))
        if 0 < config.text.vocab_size <= most:           # 0: the model is made later (toy/build.py)
            raise BadInput(
                f"{path}: {self.tokenizer.id_to_token(most)!r:.60} has id {most}, but config.json "
                f"says vocab_size {config.text.vocab_size}; take tokenizer.json from the model's "
                "own folder"
            )

    def encode(self, text: str):
        """Ids, one per <image>."""
        try:
            ids = self.tokenizer.encode(text).ids
        except Exception as error:                       # a bare one, too
            raise BadInput(f"{self.source} cannot spell {shown(text)!r} ({error})") from None
        if self.bos is not None and ids[:1] != [self.bos]:
            return [self.bos, *ids]
        return ids

    def decode(self, ids):
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def asking(self, scores: dict | None, form: dict | None = None) -> "Tokens":
        """The same, with every question asking for these scores (None: for none), in this form or
        else in the one that the model was trained with."""
        form = form or self.steer
        if not form:
            raise BadInput(
                f"{self.source.parent} was not trained to be asked for scores; steerlm.py does that"
            )
        ask = write_scores(form, scores) if scores else ""
        other = copy(self)
        other.template = replace(self.template, ask=ask)
        return other

    def check(self, text, what, allowed=""):
        """Raises BadInput for text that the tokenizer would read as a control token."""
        for token in self.special:
            if token in text and token != allowed:
                raise BadInput(
                    f"{what} contains {token}, which the tokenizer reads as a control token; "
                    "remove it"
                )


# ---- trees ---------------------------------------------------------------------------------------

@dataclass(slots=True)
class Tree:
    """One prompt and its n answers as ids; of a picture only one id, so it takes little memory."""
    id: str
    prompt: array                                        # of "i"
    answers: list[array]                                 # each ends with the template's end token
    images: list[str] = field(default_factory=list)      # files
    history: list[tuple] = field(default_factory=list)   # earlier answers: spans [a, b) of `prompt`
    image: int | None = None                             # the placeholder's id,
    patches: int = 1                                     # and how often it stands for a picture
    reference: list[float] = field(default_factory=list) # dpo.py: the answers' log-probs at first

    @property
    def length(self):
        """How many tokens the prompt has, those of its pictures among them."""
        return len(self.prompt) + (self.patches - 1) * len(self.images)

    @property
    def tokens(self):
        """How many it takes in a pack, prompt and answers."""
        return self.length + sum(len(answer) - 1 for answer in self.answers)

    def ids(self) -> list[int]:
        """The prompt as the model reads it: a picture's id once per patch."""
        expanded = []
        for token in self.prompt:
            expanded += [token] * self.patches if token == self.image else [token]
        return expanded


def make_tree(
    tokens: Tokens,
    record: dict,
    answers: list[str],
    history: bool = False,
    max_length: int = 0,
) -> Tree:
    """A record and some answers' texts -> a tree. Raises BadInput with the reason it cannot be
    used.

    history      also mark the earlier assistant turns, so that instruction tuning can score them;
                 else they are context
    max_length   longest prompt + answer in tokens; what is longer is refused, never cut (0: no
                 limit)
    """
    if record["images"] and not tokens.patches:
        raise BadInput("has images, but this checkpoint is text-only")
    for k, message in enumerate(record["messages"]):
        allowed = MARKER if message["role"] == "user" else ""
        tokens.check(message["content"], f"message {k}", allowed)

    template = tokens.template
    messages = template.asked(record["messages"])
    text = template.text(messages)
    prompt = tokens.encode(text)
    links = record.get("follow_links", False)
    images = [str(image_path(record["root"], name, links)) for name in record["images"]]
    tree = Tree(record["id"], array("i", prompt), [], images, [], tokens.image, tokens.patches)

    for k, answer in enumerate(answers):
        tokens.check(answer, f"answer {k}")
        ids = added(tokens, prompt, text, template.reply(answer))
        tree.answers.append(array("i", ids))
        length = tree.length + len(ids)
        if max_length and length > max_length:
            raise BadInput(
                f"is {length} tokens long (prompt {tree.length}, answer {len(ids)}), "
                f"more than --max_length {max_length}, or than the model has room for; shorten it"
            )

    if history:
        for k, message in enumerate(messages):
            if message["role"] == "assistant":
                before = template.text(messages[:k])
                start = len(tokens.encode(before))
                ids = added(tokens, prompt[:start], before, template.reply(message["content"]))
                tree.history.append((start, start + len(ids)))
    return tree


def added(tokens, prompt, text, more):
    """The ids that `more` adds to the prompt. Raises BadInput where the prompt's own change."""
    whole = tokens.encode(text + more)
    if whole[:len(prompt)] != prompt:
        raise BadInput(
            "the tokenizer merges the prompt's end with the answer's beginning, so that training "
            "would see other tokens than generation"
        )
    ids = whole[len(prompt):]
    if ids[-1:] != [tokens.ends[0]] or ids.count(tokens.ends[0]) != 1:
        raise BadInput(f"the answer must end with exactly one {tokens.template.ends[0]}")
    return ids


# ---- packs ---------------------------------------------------------------------------------------

@dataclass
class Pack:
    """Several trees in one row of T tokens. N tokens of A answers are scored, M tokens predict
    them; the file's head has a worked example."""
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
        """(N,) the token that predicts targets[i]; the prompt's last one predicts several."""
        return self.read[self.place]

    def to(self, device):
        moved = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor | Mask):
                moved[name] = value.to(device)
        return replace(self, **moved)


def make_pack(trees: list[Tree], pixels: Tensor | None = None) -> Pack:
    """Lay trees one after another. `pixels` (images of all trees in order, 3, S, S)."""
    # Per token.
    ids = []
    positions = []
    lo = []
    hi = []
    own = []

    # Per scored token.
    rows = []
    targets = []
    owner = []
    answers = 0

    def lay(tokens, position, sees):
        """Append a segment from `position` on that sees a prompt's range -> where it begins."""
        begin = len(ids)
        ids.extend(tokens)
        positions.extend(range(position, position + len(tokens)))
        lo.extend([sees[0]] * len(tokens))
        hi.extend([sees[1]] * len(tokens))
        own.extend([begin] * len(tokens))
        return begin

    def score(predictors, tokens):
        rows.extend(predictors)
        targets.extend(tokens)
        owner.extend([answers] * len(tokens))

    for tree in trees:
        start = lay(tree.ids(), 0, (0, 0))
        end = len(ids)
        for a, b in tree.history:
            shift = start + (tree.patches - 1) * tree.prompt[:a].count(tree.image)
            score(range(shift + a - 1, shift + b - 1), tree.prompt[a:b])
        for answer in tree.answers:
            inputs = answer[:-1]                         # the end token is predicted, never read
            begin = lay(inputs, end - start, (start, end))
            score([end - 1, *range(begin, begin + len(inputs))], answer)
            answers += 1

    mask = Mask(integers(lo), integers(hi), integers(own))
    read, place = integers(rows).unique(return_inverse=True)
    return Pack(
        integers(ids),
        integers(positions),
        mask,
        read,
        place,
        integers(targets),
        integers(owner),
        answers,
        pixels,
    )


def integers(values):
    return torch.tensor(values, dtype=torch.long)


def split(trees, budget):
    """Packs of at most `budget` tokens, in order; a tree longer than that is a pack of its own."""
    pack, room = [], budget
    for tree in trees:
        if pack and tree.tokens > room:
            yield pack
            pack, room = [], budget
        pack.append(tree)
        room -= tree.tokens
    if pack:
        yield pack


def pack_size(wanted, device):
    """--pack, or where that is 0: what keeps a GPU busy, or what a CPU's caches like."""
    if wanted:
        return wanted
    return 1024 if device.type == "cpu" else 8192


class Pixels:
    """Image files -> pixels for one model."""

    def __init__(self, config):
        self.size = config.vision.image_size if config.vision else 0

    def __call__(self, paths):
        """n files -> (n, 3, S, S), or None for no files. In numpy: torch would start threads in
        whatever thread this runs in, and OpenMP, once it counts more of them than cores, lets none
        wait awake any more (common.py)."""
        if not paths:
            return None
        pictures = [preprocess(load_image(path), self.size) for path in paths]       # (3, S, S)
        return torch.from_numpy(np.stack(pictures))

    def pack(self, trees):
        paths = [path for tree in trees for path in tree.images]
        return make_pack(trees, self(paths))
