"""From a prompt to n answers: KV cache, decoding, sampling.

The problem. Preference data wants several answers to each prompt, and for LLaVA-1.5 the prompt is
576 image tokens and a question: most of the work, and the same for all of its answers.

The trick. The prompt's keys and values are computed and stored once per record, not once per
answer. Prompts of many records go through the model as one packed row without padding (`prefill`);
then every step decodes one token per answer against its record's prompt and its own past
(`Cache.decode`, kernels.decode).

An answer depends on its prompt and its own seed, not on what else is in the batch: a row's draw is
the inverse of its cumulative distribution at the row's own random number. So a run that was stopped
goes on with the same answers.

Legend: R records, n answers per record, A answers still in the batch, T tokens in a row, D model
width, H query heads, G key/value heads, K head width, V vocabulary.
"""
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from common import BadInput, sha
from data import Tree, make_pack
from model import product


# ---- one token -----------------------------------------------------------------------------------

def sample_token(logits: Tensor, temperature, top_p, u: Tensor) -> Tensor:
    """One token per row of logits (B, V). `u` (B,) are the rows' own uniform numbers in [0, 1).

    temperature 0 takes the best token; otherwise the inverse of the cumulative distribution at u,
    so that a row's draw depends on nothing but its logits and its own random numbers. top_p keeps
    the smallest set of most likely tokens whose mass reaches it (arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)                               # (B, V)
    if top_p < 1:
        top, order = probs.sort(dim=-1, descending=True, stable=True)
        before = top.cumsum(-1) - top
        top = top.masked_fill(before >= top_p, 0)                            # enough without it
        probs = torch.zeros_like(probs).scatter(-1, order, top)
    cdf = probs.cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


# ---- decoding ------------------------------------------------------------------------------------

LEAVE = 3 / 4    # share of records still at work, at which the cache is copied without the others


@torch.no_grad()
def stream(
    model,
    prompts,
    pixels,
    *,
    n=1,
    max_new=1024,
    temperature=0.0,
    top_p=1.0,
    seeds=None,
    ends=(2,),
) -> Iterator[Tensor]:
    """n answers to each of R prompts: per step one token of each, (R*n,).

    prompts   R lists of ids, placeholders expanded
    pixels    R times (images, 3, S, S) or None
    seeds     (R, n) ints, an answer's own: its text depends on prompt and seed, not on what else is
              in the batch (up to floating-point rounding of batched matrix products)
    ends      the tokens that end an answer; the first is repeated behind it
    """
    R = len(prompts)
    seeds = seeds or [list(range(n)) for _ in range(R)]
    uniform = []                                                             # per answer
    for seed in sum(seeds, []):
        uniform.append(torch.rand(max_new, generator=torch.Generator().manual_seed(seed)))
    uniform = torch.stack(uniform).to(model.device)                          # (R * n, max_new)
    ending = torch.tensor(ends, device=model.device)

    cache, hidden = prefill(model, prompts, pixels, n)
    hidden = hidden.repeat_interleave(n, 0)                                  # (A, D), A = R * n now
    lengths = cache.prompt_len.repeat_interleave(n)                          # (A,) of their prompts
    who = torch.arange(R * n, device=model.device)                           # (A,) whose rows these are
    said = torch.full((R * n,), ends[0], device=model.device)
    for step in range(max_new):
        logits = product(hidden, model.head).float()                         # (A, V)
        token = sample_token(logits, temperature, top_p, uniform[who, step])
        said[who] = token
        yield said.clone()

        # Answers that have ended leave the batch.
        going = ~torch.isin(token, ending)
        if step == max_new - 1 or not going.any():
            return
        said[who[~going]] = ends[0]
        who = who[going]
        token = token[going]
        lengths = lengths[going]
        cache.keep(going)
        hidden = model.language_model(model.embed_text(token), lengths + step, cache.decode)


@dataclass
class Answer:
    ids: list[int]        # without the token that ended it
    finish: str           # "stop" where the model ended it, "length" where the budget did


def generate(model, prompts, pixels, *, n=1, ends=(2,), **how):
    """n whole answers to each of R prompts; arguments as for `stream`."""
    said = list(stream(model, prompts, pixels, n=n, ends=ends, **how))
    said = torch.stack(said, 1).view(len(prompts), n, -1)                    # (R, n, steps)
    return [[until(ids, ends) for ids in answers] for answers in said.tolist()]


def until(ids, ends):
    for k, token in enumerate(ids):
        if token in ends:
            return Answer(ids[:k], "stop")
    return Answer(ids, "length")


# ---- the cache -----------------------------------------------------------------------------------

class Cache:
    """Keys and values of R ragged prompts, stored once each, and of their R x n growing answers.

    A of the answers are still at work: `place` (A,) says which of the R x n they are."""

    def __init__(self, prompt_len, n, device):
        self.R = len(prompt_len)
        self.n = n
        self.prompt_len = torch.tensor(prompt_len, device=device)            # (R,)
        self.place = torch.arange(self.R * n, device=device)                 # (A,)
        self.prompt = []                                                     # per layer: k, v
        self.own = []                                                        # the answers' own
        self.filled = []                                                     # their tokens

        # Which rows of the pack are whose; a shorter prompt's last row is repeated.
        at = torch.arange(max(prompt_len), device=device)
        starts = self.prompt_len.cumsum(0) - self.prompt_len
        self.rows = starts[:, None] + at.clamp(max=self.prompt_len[:, None] - 1)     # (R, P)

    def keep_prompt(self, k, v):
        """The next layer's k and v, (T, G, K); and room for 32 tokens of each answer."""
        keys = k[self.rows].transpose(1, 2).contiguous()                     # (R, G, P, K)
        values = v[self.rows].transpose(1, 2).contiguous()
        room = k.new_zeros(self.R, k.shape[1], self.n, 32, k.shape[2])       # (R, G, n, 32, K)
        self.prompt.append([keys, values])
        self.own.append([room, room.clone()])
        self.filled.append(0)

    def keep(self, going):
        """Go on with the answers where `going` (A,) is true. The store is copied, without records
        of which none is left, where there are enough of those."""
        self.place = self.place[going]
        left = torch.zeros(self.R, dtype=torch.bool, device=going.device)
        left[self.place // self.n] = True
        if left.sum() > LEAVE * self.R:
            return
        number = left.cumsum(0) - 1                                          # of those that are left
        self.place = number[self.place // self.n] * self.n + self.place % self.n
        self.prompt_len = self.prompt_len[left]
        self.R = len(self.prompt_len)
        self.prompt = [[x[left] for x in pair] for pair in self.prompt]
        self.own = [[x[left] for x in pair] for pair in self.own]

    def on_grid(self, x):
        """(A, ...) -> (R, n, ...), zeros for answers that have ended."""
        grid = x.new_zeros(self.R * self.n, *x.shape[1:])
        grid[self.place] = x
        return grid.view(self.R, self.n, *x.shape[1:])

    def decode(self, layer, q, k, v):
        """The `attend` of one new token per answer: file its k and v away, look at what it sees."""
        used = self.filled[layer]
        if used == self.own[layer][0].shape[3]:                              # full: double the room
            self.own[layer] = [torch.cat([x, torch.zeros_like(x)], 3) for x in self.own[layer]]
        for store, x in zip(self.own[layer], (k, v)):
            store[:, :, :, used] = self.on_grid(x).transpose(1, 2)           # (R, G, n, K)
        self.filled[layer] = used + 1

        q = self.on_grid(q)                                                  # (R, n, H, K)
        gathered = kernels.decode(q, self.prompt[layer], self.own[layer], self.prompt_len, used + 1)
        return gathered.flatten(0, 1)[self.place]                            # (A, H, K)


def prefill(model, prompts, pixels, n):
    """One packed pass over all prompts -> their Cache, each one's last hidden state (R, D)."""
    device = model.device
    pack = make_pack([Tree("", prompt, []) for prompt in prompts]).to(device)
    shown = [images for images in pixels if images is not None]
    x = model.embed(pack.ids, torch.cat(shown).to(device) if shown else None)
    lengths = [len(prompt) for prompt in prompts]
    cache = Cache(lengths, n, device)

    def attend(layer, q, k, v):
        cache.keep_prompt(k, v)
        return kernels.attention(q, k, v, pack.mask)

    last = cache.prompt_len.cumsum(0) - 1                                    # (R,)
    return cache, model.language_model(x, pack.positions, attend, last)      # (R, D)


# ---- sampling: n answers to each record ----------------------------------------------------------

def answer_seed(seed, record_id, k):
    """The k-th answer's own seed: the same whatever stands before or beside it in the file."""
    return int(sha(str(seed), record_id, str(k))[:15], 16)


def sample_answers(
    model,
    tokens,
    pixels,
    trees,
    *,
    n=4,
    temperature=1.0,
    top_p=1.0,
    max_new=1024,
    seed=0,
):
    """n answers {"text", "finish"} to the prompt of each data.Tree; finish is "stop", or "length"
    where max_new cut it off. `tokens` and `pixels` are this model's data.Tokens and data.Pixels."""
    seeds = [[answer_seed(seed, tree.id, k) for k in range(n)] for tree in trees]
    prompts = [tree.ids() for tree in trees]
    pictures = [pixels(tree.images) for tree in trees]
    found = generate(
        model,
        prompts,
        pictures,
        n=n,
        max_new=max_new,
        temperature=temperature,
        top_p=top_p,
        seeds=seeds,
        ends=tokens.ends,
    )

    def described(answer):
        return {"text": tokens.decode(answer.ids), "finish": answer.finish}

    return [[described(answer) for answer in answers] for answers in found]


def check_room(longest: int, room: int):
    """Raises BadInput where prompt and answer may take more positions than a model has."""
    if longest > room:
        raise BadInput(
            f"prompt and answer may take {longest} tokens, more than the model was built for "
            f"({room}); shorten it or lower --max_new"
        )
