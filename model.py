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

The model takes tensors only: tokenizer, template and image files live in data.py.

Legend: T tokens in a pack, D model width, H query heads, G key/value heads, K head width, V vocabulary,
R records, n answers per record.
Previous: vision.py (pixels to vectors).  Next: lora.py (a thin correction of each matrix).
"""
import math
from dataclasses import dataclass, field
from typing import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
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
    wide = x.float()
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def turns(positions: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) positions -> (T, 1, K) cosines and signed sines for `rotate`, one for all heads, fp32 whatever the model is."""
    angle = positions[:, None, None].float() * freq                          # (T, 1, K/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


# ---- the blocks; module names are the checkpoints' names ----------------------------------------------------

FEW = 64    # rows

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]    # (layer, q, k, v) -> what each token gathered


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()                                                     # the mean of squares wants fp32
        squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square()
        return self.weight * (wide * (squares / x.shape[-1] + self.eps).rsqrt()).to(x.dtype)


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T. In generation x is one token per answer, a few rows, and a CPU's library shares the rows of the *first*
    matrix among its threads: so there the weight comes first."""
    if torch.is_grad_enabled() or len(x) > FEW:
        return F.linear(x, weight)
    return (weight @ x.T).T.contiguous()


class Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


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
        q, k, v = (proj(x).view(len(x), -1, self.K) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)                      # (T, H, K), (T, G, K)
        return self.o_proj(pick(attend(layer, q, k, v).flatten(1), read))    # (T, H, K) -> (T, D)


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
        self.self_attn, self.mlp = Attention(c), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend, read: Tensor | None = None) -> Tensor:
        x = pick(x, read) + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend, read)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.checkpointing = False         # keep only each block's input for backward, and compute the block again (memory.py)

    def forward(self, x: Tensor, positions: Tensor, attend: Attend, read: Tensor | None = None) -> Tensor:
        """Embeddings (T, D) at positions (T,) -> final hidden states (T, D), normed, ready for the head. `read` (M,) names the
        tokens whose states are wanted, each once: of all others the last block computes keys and values only -> (M, D)."""
        freq = rope_frequencies(self.config.rope, self.config.head_dim, x.device)
        cos, sin = turns(positions, freq)
        for layer, block in enumerate(self.layers):
            again = self.checkpointing and torch.is_grad_enabled()
            inputs = x, cos, sin, layer, attend, read if layer == len(self.layers) - 1 else None
            x = checkpoint(block, *inputs, use_reentrant=False) if again else block(*inputs)
        return self.norm(x)


class Projector(nn.Module):
    def __init__(self, vision_size: int, text_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(x)))


class Llava(nn.Module):
    """Vision tower, projector and Llama; or just the Llama where config.vision is None."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
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

    def embed(self, ids: Tensor, pixels: Tensor | None = None) -> Tensor:
        """Token ids (T,) and the pictures their placeholders stand for, in order -> (T, D). `pixels` are (N, 3, S, S), or what
        the tower made of them, (N, P, D)."""
        is_image = ids == self.config.image_token
        x = self.language_model.embed_tokens(ids.masked_fill(is_image, 0))
        need, have = int(is_image.sum()), 0 if pixels is None else len(pixels) * self.config.vision.patches
        if need != have:
            raise ValueError(f"{need} image placeholders in the ids, but the pictures given fill {have}")
        if have:
            seen = self.vision_tower(pixels.to(x.dtype)) if pixels.ndim == 4 else pixels.to(x.dtype)
            x = x.masked_scatter(is_image[:, None], self.multi_modal_projector(seen))        # (N, P, D) -> (T, D)
        return x

    def forward(self, ids: Tensor, positions: Tensor, mask: Mask, pixels: Tensor | None = None,
                read: Tensor | None = None) -> Tensor:
        """A pack -> its final hidden states (T, D), or those of the tokens `read` (M, D). Log-probs: data.token_logps."""
        attend = lambda layer, q, k, v: kernels.attention(q, k, v, mask)
        return self.language_model(self.embed(ids, pixels), positions, attend, read)


# ---- generation ----------------------------------------------------------------------------------------------

def sample_token(logits: Tensor, temperature: float, top_p: float, u: Tensor) -> Tensor:
    """One token per row of logits (B, V). `u` (B,) are the rows' own uniform numbers in [0, 1).

    temperature 0 takes the best token; otherwise the inverse of the cumulative distribution at u, so that a
    row's draw depends on nothing but its logits and its own random numbers. top_p keeps the smallest set of
    most likely tokens whose mass reaches it (arXiv:1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    probs = (logits / temperature).softmax(-1)                      # (B, V)
    if top_p < 1:
        top, order = probs.sort(dim=-1, descending=True, stable=True)
        top = top.masked_fill(top.cumsum(-1) - top >= top_p, 0)              # mass before it already suffices
        probs = torch.zeros_like(probs).scatter(-1, order, top)
    cdf = probs.cumsum(-1)
    token = torch.searchsorted(cdf, u[:, None] * cdf[:, -1:], right=True)[:, 0]
    return token.clamp(max=logits.shape[-1] - 1)


@dataclass
class Answer:
    ids: list[int]        # without the end-of-sequence token
    finish: str           # "stop" where the model ended it, "length" where the budget did


@torch.no_grad()
def stream(model: Llava, prompts: list[list[int]], pixels: list[Tensor | None], *, n: int = 1, max_new: int = 1024,
           temperature: float = 0.0, top_p: float = 1.0, seeds: list[list[int]] | None = None,
           eos: int = 2) -> Iterator[Tensor]:
    """n answers to each of R prompts, one token (R*n,) of each per step; `eos` from an answer's end on.

    prompts   R lists of ids, placeholders expanded    pixels   R times (images, 3, S, S) or None
    seeds     (R, n) ints, an answer's own; the text of an answer depends on its prompt and its seed, not on what
              else is in the batch (up to floating-point rounding of batched matrix products)
    The prompt is computed once for its n answers.
    """
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(f"temperature {temperature} must not be negative, and top_p {top_p} must lie in (0, 1]")
    R, device = len(prompts), model.head.device
    seeds = seeds or [[k for k in range(n)] for _ in range(R)]
    uniform = torch.stack([torch.rand(max_new, generator=torch.Generator().manual_seed(s))
                           for row in seeds for s in row]).to(device)        # (R*n, max_new)
    cache, hidden = prefill(model, prompts, pixels, n)
    hidden = hidden.repeat_interleave(n, 0)                                  # (R*n, D): the last prompt token's
    length = cache.prompt_len.repeat_interleave(n)                           # (R*n,) the next token's position
    active = torch.ones(R * n, dtype=torch.bool, device=device)
    for step in range(max_new):
        logits = product(hidden, model.head).float()                         # (R*n, V)
        token = sample_token(logits, temperature, top_p, uniform[:, step])
        token = token.masked_fill(~active, eos)
        yield token
        active = active & (token != eos)
        if not active.any() or step == max_new - 1:
            return
        hidden = model.language_model(model.language_model.embed_tokens(token), length + step, cache.decode)


def generate(model: Llava, prompts: list[list[int]], pixels: list[Tensor | None], *, n: int = 1, eos: int = 2,
             **how) -> list[list[Answer]]:
    """n whole answers to each of R prompts; arguments as for `stream`."""
    steps = list(stream(model, prompts, pixels, n=n, eos=eos, **how))
    out = torch.stack(steps, 1).tolist() if steps else [[] for _ in range(len(prompts) * n)]
    answers = [Answer(ids[:ids.index(eos)], "stop") if eos in ids else Answer(ids, "length") for ids in out]
    return [answers[r * n:(r + 1) * n] for r in range(len(prompts))]


class Cache:
    """Keys and values of R ragged prompts, stored once each, and of their R x n growing answers."""

    def __init__(self, layers: int, prompt_len: list[int], n: int, device):
        self.R, self.n = len(prompt_len), n
        self.prompt_len = torch.tensor(prompt_len, device=device)            # (R,)
        self.prompt, self.own, self.filled = [None] * layers, [None] * layers, [0] * layers
        at = torch.arange(max(prompt_len), device=device)
        starts = self.prompt_len.cumsum(0) - self.prompt_len
        self.rows = (starts[:, None] + at.clamp(max=self.prompt_len[:, None] - 1))           # (R, P) into the pack

    def keep_prompt(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.prompt[layer] = tuple(x[self.rows].transpose(1, 2).contiguous() for x in (k, v))    # (T, G, K) -> (R, G, P, K)

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
        return kernels.decode(q, self.prompt[layer], self.own[layer], self.prompt_len, used + 1).flatten(0, 1)


def prefill(model: Llava, prompts: list[list[int]], pixels: list[Tensor | None], n: int) -> tuple[Cache, Tensor]:
    """One packed pass over all prompts -> their cache and the hidden state (R, D) of each one's last token."""
    device = model.head.device
    lengths = [len(p) for p in prompts]
    size = torch.tensor(lengths)
    own = (size.cumsum(0) - size).repeat_interleave(size)                    # (T,) where my prompt starts
    mask = Mask(torch.zeros_like(own), torch.zeros_like(own), own).to(device)
    ids = torch.tensor([i for p in prompts for i in p], device=device)
    for prompt, x in zip(prompts, pixels, strict=True):                      # embed only sees their sum
        need, have = prompt.count(model.config.image_token), 0 if x is None else len(x) * model.config.vision.patches
        if need != have:
            raise ValueError(f"a prompt has {need} image placeholders, but the pictures given for it fill {have}")
    images = [x for x in pixels if x is not None]
    x = model.embed(ids, torch.cat(images).to(device) if images else None)
    cache = Cache(len(model.language_model.layers), lengths, n, device)

    def attend(layer, q, k, v):
        cache.keep_prompt(layer, k, v)
        return kernels.attention(q, k, v, mask)

    positions = (torch.arange(len(own)) - own).to(device)
    return cache, model.language_model(x, positions, attend, (size.cumsum(0) - 1).to(device))    # (R, D)
