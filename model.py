"""A Llama that reads pictures: blocks, projector, splice, and the log-probs every loss stands on.

The problem. Let a language model answer questions about an image. LLaVA's answer (arXiv:2304.08485,
2310.03744) is the simplest that works: map the vision tower's patch vectors into the language
model's embedding space with a two-layer MLP and put them where the text says <image>:

    x = embed(ids);   x[ids == image_token] = projector(vit(pixels));   hidden = llama(x)

The data side (data.py) has already written one placeholder id per patch, so the splice is one line,
positions and labels need no correction, and any number of images may stand anywhere.

The language model is Llama's (arXiv:2302.13971): RMSNorm, rotary positions, grouped-query
attention, SwiGLU.

    x = x + attention(norm(x));   x = x + W_down(silu(W_gate norm(x)) * W_up norm(x))

The trick. All tokens live in one packed row (T, D): prompts and answers of many records, no
padding. A block never learns what kind of attention it runs: it calls `attend(layer, q, k, v)`. In
training that is kernels.attention under the pack's mask; in generation (generate.py) it also files
keys and values away.

Weights and precision. `model.dtype` is what the model computes in. A weight that trains is kept in
fp32, for in 16 bits the next number after 1 is 0.004 away, and a step of 5e-7 would be lost; it is
cast where it is multiplied. Where weight and dtype agree, as always in fp32, the cast is nothing.

The model takes tensors only: tokenizer, template and image files live in data.py.

Legend: T tokens in a pack, D model width, H query heads, G key/value heads, K head width, V
vocabulary.
"""
import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from vision import ViT, VisionConfig


@dataclass
class TextConfig:
    """Llama sizes; the defaults are transformers' (a config.json states only what differs)."""
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
    bos_token_id: object = 1               # these two are carried along: one id, several or none
    eos_token_id: object = 2
    rope: dict = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})


@dataclass
class Config:
    text: TextConfig
    vision: VisionConfig | None = None     # None: a text-only Llama
    image_token: int = -1                  # the placeholder's id, also beyond the vocabulary; -1: none


# ---- rotary positions ----------------------------------------------------------------------------

def rope_frequencies(rope: dict, head_dim: int, device=None) -> Tensor:
    """(K/2,) fp32 angular frequencies: plain RoPE (arXiv:2104.09864), interpolated, or Llama 3's.

    Llama 3: wavelengths longer than the old context are stretched by `factor`, short ones kept, and
    the band between is interpolated (source: transformers `_compute_llama3_parameters`).
    checkpoint.py refuses every other kind, and one that lacks a number.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    freq = rope["rope_theta"] ** (-pairs / head_dim)
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return freq
    if kind == "linear":
        return freq / rope["factor"]

    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    rounds = rope["original_max_position_embeddings"] * freq / (2 * math.pi)
    keep = ((rounds - low) / (high - low)).clamp(0, 1)                        # 1: a short wave
    return freq * (keep + (1 - keep) / rope["factor"])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K/2]) of x (T, heads, K) by its token's angle, in fp32."""
    exact = x.float()
    other_half = exact.roll(x.shape[-1] // 2, -1)
    return torch.addcmul(exact * cos, other_half, sin).to(x.dtype)


def turns(positions: Tensor, freq: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) positions -> (T, 1, K) cosines and signed sines for `rotate`, in fp32."""
    angle = positions[:, None, None].float() * freq                          # (T, 1, K/2)
    cos = angle.cos()
    sin = angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


# ---- the blocks; module names are the checkpoints' names -----------------------------------------

# x (T, D) tokens; cos and sin (T, 1, K) from `turns`; attend(layer, q, k, v) -> what each token
# gathered (T, H, K); read (M,) the tokens whose states are wanted, or None for all.


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        exact = x.float()                                                    # for the squares' mean
        squares = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square()
        normed = exact * (squares / x.shape[-1] + self.eps).rsqrt()
        return self.weight.to(x.dtype) * normed.to(x.dtype)


FEW = 64    # rows


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T in x's precision. In generation x has a few rows, one token per answer, and a
    CPU's library shares the *first* matrix's rows among its threads: there the weight is first."""
    weight = weight.to(x.dtype)
    if torch.is_grad_enabled() or len(x) > FEW:
        return F.linear(x, weight)
    return (weight @ x.T).T.contiguous()


class Linear(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x):
        return product(x, self.weight)


class Biased(nn.Linear):
    """With a bias, as the projector's layers have one."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def pick(x, rows):
    return x if rows is None else x.index_select(0, rows)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.K = c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * self.K)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * self.K)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * self.K)
        self.o_proj = Linear(c.num_attention_heads * self.K, c.hidden_size)

    def forward(self, x, cos, sin, layer, attend, read):
        q = self.q_proj(x).view(len(x), -1, self.K)                          # (T, H, K)
        k = self.k_proj(x).view(len(x), -1, self.K)                          # (T, G, K)
        v = self.v_proj(x).view(len(x), -1, self.K)                          # (T, G, K)
        gathered = attend(layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        return self.o_proj(pick(gathered.flatten(1), read))                  # (T, H, K) -> (T, D)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = Attention(c)
        self.mlp = MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin, layer, attend, read=None):
        x = pick(x, read) + self.self_attn(self.input_layernorm(x), cos, sin, layer, attend, read)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    def __init__(self, c: TextConfig):
        super().__init__()
        self.config = c
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.checkpointing = False         # keep a block's input only, and compute it again

    def forward(self, x, positions, attend, read=None):
        """Embeddings (T, D) at positions (T,) -> hidden states (T, D), ready for the head.

        `read` (M,) names the tokens whose states are wanted, each once: of all others the last
        block computes keys and values only -> (M, D).
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
    def __init__(self, vision_size, text_size):
        super().__init__()
        self.linear_1 = Biased(vision_size, text_size)
        self.linear_2 = Biased(text_size, text_size)

    def forward(self, x):
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
            self.multi_modal_projector = Projector(
                config.vision.hidden_size,
                config.text.hidden_size,
            )
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
        """Token ids (T,), pictures (N, 3, S, S) for their placeholders, in order -> (T, D)."""
        is_image = ids == self.config.image_token
        x = self.embed_text(ids.masked_fill(is_image, 0))
        need = int(is_image.sum())
        have = 0 if pixels is None else len(pixels) * self.config.vision.patches
        if need != have:
            raise ValueError(f"{need} image placeholders in the ids, but the pictures fill {have}")
        if have:
            patches = self.vision_tower(pixels.to(self.dtype))
            seen = self.multi_modal_projector(patches)                       # (N, P, D)
            x = x.masked_scatter(is_image[:, None], seen)                    # (T, D)
        return x

    def forward(self, ids, positions, mask, pixels=None, read=None):
        """A pack -> its final hidden states (T, D), or those of the tokens `read` (M, D)."""
        def attend(layer, q, k, v):
            return kernels.attention(q, k, v, mask)

        return self.language_model(self.embed(ids, pixels), positions, attend, read)


# ---- log-probs: what every loss and every score here is made of ----------------------------------

def token_logps(model: Llava, pack) -> Tensor:
    """log p of every scored token of a data.Pack, (N,) fp32 nats."""
    hidden = model(pack.ids, pack.positions, pack.mask, pack.pixels, pack.read)      # (M, D)
    return kernels.logps(hidden, model.head.to(hidden.dtype), pack.place, pack.targets)


def summed(logps, pack) -> Tensor:
    """(N,), one for each scored token of a data.Pack -> (A,), their sum for each answer."""
    sums = logps.new_zeros(pack.answers)
    # index_put, for a GPU's index_add adds in any order, and no run would give the same bits twice.
    return sums.index_put((pack.owner,), logps, accumulate=True)


def answer_logps(model: Llava, pack) -> Tensor:
    """sum log p(answer | prompt) of every answer of a data.Pack, (A,) fp32 nats."""
    return summed(token_logps(model, pack), pack)
