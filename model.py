"""A Llama that reads pictures: blocks, projector, splice, KV cache, generate.

The problem. Let a language model answer questions about an image. LLaVA's answer (arXiv:2304.08485,
2310.03744) is the simplest that works: map the vision tower's patch vectors into the language model's
embedding space with a two-layer MLP and put them where the text says <image>:

    x = embed(ids);   x[ids == image_token] = projector(vit(pixels));   hidden = llama(x)

The data side (data.py) has already written one placeholder id per patch, so the splice is one line, positions
and labels need no correction, and any number of images may stand anywhere.

The language model is Llama's (arXiv:2302.13971): RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    x = x + attention(norm(x));   x = x + W_down(silu(W_gate norm(x)) * W_up norm(x))

The trick. All tokens live in one packed row (T, D): prompts and answers of many records, no padding. A block
never learns what kind of attention it runs: it calls `attend(layer, q, k, v)`. In training that is
kernels.attention under the pack's mask; in generation it also files keys and values away, and then decodes one
token per answer against them. The prompt's keys and values are computed and stored once for all its answers.

Weights and precision. `model.dtype` is what the model computes in. A weight that trains is kept in fp32, for in 16 bits the
next number after 1 is 0.004 away, and a step of 5e-7 would be lost; it is cast where it is multiplied. Where weight and
dtype agree, as always in fp32, the cast is nothing.

The model takes tensors only: tokenizer, template and image files live in data.py.

Legend: T tokens in a pack, D model width, H query heads, G key/value heads, K head width, V vocabulary,
R records, n answers per record.
"""
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from common import BadInput, sha
from kernels import Mask
from vision import ViT, VisionConfig


@dataclass
class TextConfig:
    """Llama sizes; the defaults are transformers' LlamaConfig (a config.json states only what differs)."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    bos_token_id: int = 1
    eos_token_id: int = 2
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})


@dataclass
class Config:
    text: TextConfig
    vision: VisionConfig | None = None     # None: a text-only Llama
    image_token: int = 32000               # the placeholder's id; it may lie outside the vocabulary


# ---- rotary positions --------------------------------------------------------------------------------------

def rope_frequencies(rope: dict, head_dim: int, device=None) -> Tensor:
    """(K/2,) fp32 angular frequencies; plain RoPE (arXiv:2104.09864), position interpolation, or Llama 3's.

    Llama 3: wavelengths longer than the old context are stretched by `factor`, short ones kept, and the band
    between is interpolated (source: transformers `_compute_llama3_parameters`).
    """
    freq = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return freq
    if kind == "linear":
        return freq / rope["factor"]
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)      # over the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)                            # 1 = short wave, untouched
        return freq * (keep + (1 - keep) / rope["factor"])
    raise ValueError(f"rope_type {kind!r} is not supported; known: default, linear, llama3")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) by its token's angle, in fp32. x (T, heads, K), cos and sin (T, 1, K) from `turns`."""
    exact = x.float()
    other_half = exact.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(exact * cos, other_half, sin).to(x.dtype)


def turns(positions: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) positions -> (T, 1, K) cosines and signed sines for `rotate`, one for all heads, fp32 whatever the model is."""
    angle = positions[:, None, None].float() * freq                          # (T, 1, K/2)
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


# ---- the blocks; module names are the checkpoints' names ----------------------------------------------------

FEW = 64    # rows

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]    # (layer, q, k, v) -> what each token gathered


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        exact = x.float()                                                    # the mean of squares wants fp32
        squares = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square()
        normed = exact * (squares / x.shape[-1] + self.eps).rsqrt()
        return self.weight.to(x.dtype) * normed.to(x.dtype)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in x's precision. In generation x is one token per answer, a few rows, and a CPU's library shares the
    rows of the *first* matrix among its threads: so there the weight comes first."""
    weight = weight.to(x.dtype)
    if torch.is_grad_enabled() or len(x) > FEW:
        return F.linear(x, weight)
    return (weight @ x.T).T.contiguous()


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


class Biased(nn.Linear):
    """With a bias, as the projector's layers have one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def pick(x: Tensor, rows: Tensor | None) -> Tensor:
    return x if rows is None else x.index_select(0, rows)


class Attention(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.K = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * self.K)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * self.K)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * self.K)
        self.o_proj = Linear(c.num_attention_heads * self.K, c.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend, read: Tensor | None) -> Tensor:
        q = self.q_proj(x).view(len(x), -1, self.K)                          # (T, H, K)
        k = self.k_proj(x).view(len(x), -1, self.K)                          # (T, G, K)
        v = self.v_proj(x).view(len(x), -1, self.K)                          # (T, G, K)
        gathered = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(pick(gathered.flatten(1), read))                  # (T, H, K) -> (T, D)


class MLP(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        layer: int,
        attend: Attend,
        read: Tensor | None = None,
    ) -> Tensor:
        x = pick(x, read) + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend, read)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.checkpointing = False         # keep only each block's input for backward, and compute the block again

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, read: Tensor | None = None) -> Tensor:
        """Embeddings (T, D) at positions (T,) -> final hidden states (T, D), normed, ready for the head.

        `read` (M,) names the tokens whose states are wanted, each once: of all others the last block computes keys
        and values only -> (M, D).
        """
        freq = rope_frequencies(self.config.rope, self.config.head_dim, x.device)
        cos, sin = turns(positions, freq)
        for layer, block in enumerate(self.layers):
            wanted = read if block is self.layers[-1] else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, layer, attend, wanted, use_reentrant=False)
            else:
                x = block(x, cos, sin, layer, attend, wanted)
        return self.norm(x)


class Projector(nn.Module):
    def __init__(self, vision_size: int, text_size: int):
        super().__init__()
        self.linear_1 = Biased(vision_size, text_size)
        self.linear_2 = Biased(text_size, text_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Llava(nn.Module):
    """Vision tower, projector and Llama; or just the Llama where config.vision is None."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.dtype = torch.float32         # what it computes in; checkpoint.load sets it
        self.language_model = Llama(config.text)
        if config.vision:
            self.vision_tower = ViT(config.vision)
            self.multi_modal_projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        self.lm_head = Linear(config.text.hidden_size, config.text.vocab_size)
        if config.text.tie_word_embeddings:
            self.lm_head.weight = self.language_model.embed_tokens.weight

    @property
    def head(self) -> Tensor:
        return self.lm_head.weight                                           # (V, D)

    @property
    def device(self) -> torch.device:
        return self.head.device

    def embed_text(self, ids: Tensor) -> Tensor:                             # (T,) -> (T, D)
        return self.language_model.embed_tokens(ids).to(self.dtype)

    def embed(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Token ids (T,) and the pictures (N, 3, S, S) their placeholders stand for, in order -> (T, D)."""
        is_image = ids == self.config.image_token
        x = self.embed_text(ids.masked_fill(is_image, 0))
        need = int(is_image.sum())
        have = 0 if pixels is None else len(pixels) * self.config.vision.patches
        if need != have:
            raise ValueError(f"{need} image placeholders in the ids, but the pictures given fill {have}")
        if have:
            seen = self.multi_modal_projector(self.vision_tower(pixels.to(self.dtype)))      # (N, P, D)
            x = x.masked_scatter(is_image[:, None], seen)                    # (T, D)
        return x

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Mask,
        pixels: Tensor | None = None,
        read: Tensor | None = None,
    ) -> Tensor:
        """A pack -> its final hidden states (T, D), or those of the tokens `read` (M, D)."""
        def attend(layer, q, k, v):
            return kernels.attention(q, k, v, mask)

        return self.language_model(self.embed(ids, pixels), positions, attend, read)


# ---- log-probs: what every loss and every score here is made of --------------------------------------------------

def token_logps(model: Llava, pack) -> Tensor:
    """log p of every scored token of a data.Pack, (N,) fp32 nats."""
    hidden = model(pack.ids, pack.positions, pack.mask, pack.pixels, pack.read)              # (M, D)
    return kernels.logps(hidden, model.head.to(hidden.dtype), pack.place, pack.targets)


def answer_logps(model: Llava, pack) -> Tensor:
    """sum log p(answer | prompt) of every answer of a data.Pack, (A,) fp32 nats."""
    logps = token_logps(model, pack)
    sums = torch.zeros(pack.answers, dtype=logps.dtype, device=logps.device)
    # index_put, for a GPU's index_add adds in any order, and no run would give the same bits twice.
    return sums.index_put((pack.owner,), logps, accumulate=True)


# ---- generation ----------------------------------------------------------------------------------------------

def sample_token(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> Tensor:
    """One token per row of logits (B, V). `u` (B,) are the rows' own uniform numbers in [0, 1).

    temperature 0 takes the best token; otherwise the inverse of the cumulative distribution at u, so that a
    row's draw depends on nothing but its logits and its own random numbers. top_p keeps the smallest set of
    most likely tokens whose mass reaches it (arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)                               # (B, V)
    if top_p < 1:
        top, order = probs.sort(dim=-1, descending=True, stable=True)
        before = top.cumsum(-1) - top
        top = top.masked_fill(before >= top_p, 0)                            # what stands before it suffices already
        probs = torch.zeros_like(probs).scatter(-1, order, top)
    cdf = probs.cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def stream(
    model: Llava,
    prompts: list[list[int]],
    pixels: list[Tensor | None],
    *,
    n: int = 1,
    max_new: int = 1024,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: list[list[int]] | None = None,
    ends: tuple[int, ...] = (2,),
) -> Iterator[Tensor]:
    """n answers to each of R prompts, one token (R*n,) of each per step; ends[0] from an answer's end on.

    prompts   R lists of ids, placeholders expanded    pixels   R times (images, 3, S, S) or None
    seeds     (R, n) ints, an answer's own; the text of an answer depends on its prompt and its seed, not on what
              else is in the batch (up to floating-point rounding of batched matrix products)
    ends      the tokens that end an answer
    The prompt is computed once for its n answers.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must not be negative, and top_p {top_p} must lie in (0, 1]")
    R = len(prompts)
    seeds = seeds or [list(range(n)) for _ in range(R)]
    uniform = []
    for seed in (seed for row in seeds for seed in row):
        uniform.append(torch.rand(max_new, generator=torch.Generator().manual_seed(seed)))
    uniform = torch.stack(uniform).to(model.device)                          # (R*n, max_new)
    ending = torch.tensor(ends, device=model.device)

    cache, hidden = prefill(model, prompts, pixels, n)
    hidden = hidden.repeat_interleave(n, 0)                                  # (R*n, D): the last prompt token's
    length = cache.prompt_len.repeat_interleave(n)                           # (R*n,) the next token's position
    active = torch.ones(R * n, dtype=torch.bool, device=model.device)
    for step in range(max_new):
        logits = product(hidden, model.head).float()                         # (R*n, V)
        token = sample_token(logits, temperature, top_p, uniform[:, step])
        token = token.masked_fill(~active, ends[0])
        yield token

        active = active & ~torch.isin(token, ending)
        if step == max_new - 1 or not active.any():
            return
        hidden = model.language_model(model.embed_text(token), length + step, cache.decode)


@dataclass
class Answer:
    ids: list[int]        # without the token that ended it
    finish: str           # "stop" where the model ended it, "length" where the budget did


def generate(
    model: Llava,
    prompts: list[list[int]],
    pixels: list[Tensor | None],
    *,
    n: int = 1,
    ends: tuple[int, ...] = (2,),
    **how,
) -> list[list[Answer]]:
    """n whole answers to each of R prompts; arguments as for `stream`."""
    said = [[] for _ in range(len(prompts) * n)]
    for token in stream(model, prompts, pixels, n=n, ends=ends, **how):
        for ids, one in zip(said, token.tolist()):
            ids.append(one)
    answers = [until(ids, ends) for ids in said]
    return [answers[r * n:(r + 1) * n] for r in range(len(prompts))]


def until(ids: list[int], ends: tuple[int, ...]) -> Answer:
    for k, token in enumerate(ids):
        if token in ends:
            return Answer(ids[:k], "stop")
    return Answer(ids, "length")


class Cache:
    """Keys and values of R ragged prompts, stored once each, and of their R x n growing answers."""

    def __init__(self, layers: int, prompt_len: list[int], n: int, device):
        self.R = len(prompt_len)
        self.n = n
        self.prompt_len = torch.tensor(prompt_len, device=device)            # (R,)
        self.prompt = [None] * layers                                        # (keys, values) of each layer
        self.own = [None] * layers
        self.filled = [0] * layers
        at = torch.arange(max(prompt_len), device=device)
        starts = self.prompt_len.cumsum(0) - self.prompt_len
        self.rows = starts[:, None] + at.clamp(max=self.prompt_len[:, None] - 1)             # (R, P) into the pack

    def keep_prompt(self, layer: int, k: Tensor, v: Tensor) -> None:
        keys = k[self.rows].transpose(1, 2).contiguous()                     # (T, G, K) -> (R, G, P, K)
        values = v[self.rows].transpose(1, 2).contiguous()
        self.prompt[layer] = keys, values

    def decode(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The `attend` of one new token per answer: file its k and v away, then look at everything it may see."""
        used = self.filled[layer]
        new = [x.view(self.R, self.n, 1, *x.shape[1:]).permute(0, 3, 1, 2, 4) for x in (k, v)]   # (R, G, n, 1, K)
        if self.own[layer] is None:
            self.own[layer] = [x.new_zeros(*x.shape[:3], 32, x.shape[-1]) for x in new]
        elif used == self.own[layer][0].shape[3]:                            # full: double the room
            self.own[layer] = [torch.cat([x, torch.zeros_like(x)], 3) for x in self.own[layer]]
        for store, x in zip(self.own[layer], new):
            store[:, :, :, used:used + 1] = x
        self.filled[layer] = used + 1

        q = q.view(self.R, self.n, *q.shape[1:])                             # (R, n, H, K)
        gathered = kernels.decode(q, self.prompt[layer], self.own[layer], self.prompt_len, used + 1)
        return gathered.flatten(0, 1)                                        # (R*n, H, K)


def prefill(model: Llava, prompts: list[list[int]], pixels: list[Tensor | None], n: int) -> tuple[Cache, Tensor]:
    """One packed pass over all prompts -> their cache and the hidden state (R, D) of each one's last token."""
    for prompt, images in zip(prompts, pixels, strict=True):                 # embed only sees their sum
        need = prompt.count(model.config.image_token)
        have = 0 if images is None else len(images) * model.config.vision.patches
        if need != have:
            raise ValueError(f"a prompt has {need} image placeholders, but the pictures given for it fill {have}")

    device = model.device
    lengths = [len(prompt) for prompt in prompts]
    size = torch.tensor(lengths)
    last = (size.cumsum(0) - 1).to(device)                                   # (R,)
    own = (size.cumsum(0) - size).repeat_interleave(size)                    # (T,) where my prompt starts
    positions = (torch.arange(len(own)) - own).to(device)
    mask = Mask(torch.zeros_like(own), torch.zeros_like(own), own).to(device)
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=device)
    shown = [images for images in pixels if images is not None]
    x = model.embed(ids, torch.cat(shown).to(device) if shown else None)
    cache = Cache(len(model.language_model.layers), lengths, n, device)

    def attend(layer, q, k, v):
        cache.keep_prompt(layer, k, v)
        return kernels.attention(q, k, v, mask)

    return cache, model.language_model(x, positions, attend, last)           # (R, D)


# ---- sampling: n answers to each record ----------------------------------------------------------------------------

def answer_seed(seed: int, record_id: str, k: int) -> int:
    """The k-th answer's own seed: the same whatever stands before or beside it in the file."""
    return int(sha(str(seed), record_id, str(k))[:15], 16)


def sample_answers(
    model: Llava,
    tokens,
    pixels,
    trees: list,
    *,
    n: int = 4,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_new: int = 1024,
    seed: int = 0,
) -> list[list[dict]]:
    """n answers {"text", "finish"} to the prompt of each data.Tree; finish is "stop", or "length" where max_new cut it off.
    `tokens` and `pixels` are the data.Tokens and data.Pixels of this model."""
    seeds = [[answer_seed(seed, tree.id, k) for k in range(n)] for tree in trees]
    prompts = [tree.ids() for tree in trees]
    pictures = [pixels(tree.images) for tree in trees]
    found = generate(
        model, prompts, pictures,
        n=n, max_new=max_new, temperature=temperature, top_p=top_p, seeds=seeds, ends=tokens.ends,
    )
    texts = []
    for answers in found:
        texts.append([{"text": tokens.decode(answer.ids), "finish": answer.finish} for answer in answers])
    return texts


def check_room(longest: int, room: int) -> None:
    """Raises BadInput where prompt and answer may take more positions than a model was built for."""
    if longest > room:
        raise BadInput(
            f"prompt and answer may take {longest} tokens, more than the model was built for ({room}); shorten it or "
            "lower --max_new"
        )
