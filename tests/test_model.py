"""One model, many ways to run it, one answer: transformers' logits, whatever is packed, shared or
kept in which precision.

    python -m pytest tests/test_model.py -q

Random weights and hand-made ids (IMG stands for one image patch). What is compared with
transformers skips itself where it is not installed; the equivalences below (shared prefix, packing)
need only this repository.
"""
import itertools

import pytest
import torch
from conftest import hf_model, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from checkpoint import canonical
from kernels import Mask
from model import Linear, rope_frequencies

IMG, PATCHES, VOCAB = 4, 4, 64
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}


def text(n: int, seed: int) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (n,), generator=g).tolist()


def pictures(n: int, seed: int = 0, size: int = 28):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) if n else None


PICTURE = [IMG] * PATCHES
CONVERSATIONS = {                       # ids, number of images
    "no image": ([1] + text(17, 0), 0),
    "image within the first turn": ([1] + text(5, 2) + PICTURE + text(4, 3), 1),
    "image in the second turn": ([1] + text(6, 4) + [2] + text(3, 5) + PICTURE + text(8, 6), 1),
    "image at the very end": ([1] + text(30, 7) + PICTURE, 1),
    "two images side by side": ([1] + PICTURE * 2 + text(6, 8), 2),
    "two images in two turns": ([1] + PICTURE + text(6, 9) + [2] + text(2, 10) + PICTURE + text(5, 11), 2),
}


def pack(trees: list[tuple[list[int], list[list[int]]]]):
    """[(prompt, [answer, ...]), ...] -> ids, positions, mask: the layout of kernels/attention.py,
    written out plainly."""
    ids, positions, lo, hi, own = [], [], [], [], []
    for prompt, answers in trees:
        start, end = len(ids), len(ids) + len(prompt)
        for k, segment in enumerate([prompt, *answers]):
            own += [len(ids)] * len(segment)
            lo += [start if k else 0] * len(segment)
            hi += [end if k else 0] * len(segment)
            positions += [i + (len(prompt) if k else 0) for i in range(len(segment))]
            ids += segment
    mask = Mask(torch.tensor(lo), torch.tensor(hi), torch.tensor(own))
    return torch.tensor(ids), torch.tensor(positions), mask


def alone(model, ids: list[int], pixels=None):
    """Hidden states (T, D) of one plain sequence."""
    return model(*pack([(ids, [])]), pixels)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def computing_in_bf16(model, weights: torch.dtype = torch.bfloat16):
    """The same model with weights rounded to bf16; they are kept as `weights`."""
    model.bfloat16()
    model.dtype = torch.bfloat16
    for name, p in model.named_parameters():
        if not name.startswith("vision_tower."):
            p.data = p.data.to(weights)
    return model


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(VOCAB, IMG)


# ---- transformers says the same ------------------------------------------------------------------

def both(**sizes):
    """transformers' model and ours with the same random weights."""
    theirs = hf_model(**{"vocab": VOCAB, "image_token": IMG} | sizes)
    ours = tiny_model(**{"vocab": VOCAB, "image_token": IMG} | sizes, seed=1)
    weights = {canonical(name): p for name, p in theirs.named_parameters()}
    if sizes.get("tie"):
        weights["lm_head.weight"] = weights["language_model.embed_tokens.weight"]
    ours.load_state_dict(weights)
    return theirs, ours


@pytest.mark.parametrize("sizes", [
    {},
    {"kv_heads": 4, "rope": LINEAR, "layers": 5},
    {"kv_heads": 1, "tie": True, "rope": LLAMA3},
    {"head_dim": 128, "hidden": 32, "image_size": 56},
    {"vocab": 32064, "image_token": 32000, "hidden": 32, "layers": 1},
], ids=str)
@torch.no_grad()
def test_logits_are_those_of_transformers(sizes):
    """Every conversation in one packed row of ours, against each alone in transformers."""
    theirs, ours = both(**sizes)
    size = sizes.get("image_size", 28)
    patch = [sizes.get("image_token", IMG)] * (size // 28) ** 2          # a larger picture has more of them
    conversations = []
    for k, (ids, n) in enumerate(CONVERSATIONS.values()):
        written = []
        for token in ids:
            written += patch if token == IMG else [token]
        conversations.append((written, pictures(n, seed=k, size=size)))
    shown = torch.cat([pixels for _, pixels in conversations if pixels is not None])
    hidden = ours(*pack([(ids, []) for ids, _ in conversations]), shown)
    logits = (hidden @ ours.head.T).split([len(ids) for ids, _ in conversations])
    for (ids, pixels), got in zip(conversations, logits):
        close(got, theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0], 1e-4)


def test_rotary_frequencies_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    for rope in ({"rope_type": "default", "rope_theta": 10000.0}, LLAMA3, LINEAR):
        config = transformers.LlamaConfig(
            hidden_size=512, num_attention_heads=4, rope_parameters=rope,
            max_position_embeddings=64)
        expected = LlamaRotaryEmbedding(config).inv_freq
        torch.testing.assert_close(rope_frequencies(rope, 128), expected, rtol=1e-6, atol=0)


# ---- one row, many sequences (test_data.py: the same for log-probs and gradients) ----------------

PROMPT, ANSWERS = [1] + text(4, 20) + PICTURE + text(6, 21), [text(5, 22), text(1, 23),
                                                              text(9, 24), []]
TREES = [(PROMPT, ANSWERS), ([1] + text(3, 25), [text(2, 26), text(7, 27)]),
         ([1] + PICTURE * 2 + text(2, 28), [text(4, 29)])]


@torch.no_grad()
def test_a_shared_prompt_equals_separate_sequences(tiny):
    pixels = pictures(1)
    together = tiny(*pack([(PROMPT, ANSWERS)]), pixels)
    at = len(PROMPT)
    for answer in ANSWERS:
        separate = alone(tiny, PROMPT + answer, pixels)
        close(together[:len(PROMPT)], separate[:len(PROMPT)])
        close(together[at:at + len(answer)], separate[len(PROMPT):])
        at += len(answer)


@torch.no_grad()
def test_a_pack_equals_its_trees_one_by_one_in_any_order(tiny):
    parts = pictures(3).split((1, 0, 2))
    single = [tiny(*pack([tree]), part if len(part) else None) for tree, part in zip(TREES, parts)]
    for order in itertools.permutations(range(3)):
        together = tiny(*pack([TREES[k] for k in order]), torch.cat([parts[k] for k in order]))
        close(together, torch.cat([single[k] for k in order]))


@torch.no_grad()
def test_nothing_looks_ahead_or_sideways(tiny):
    """Change one token of answer 1: what stands before it, answer 2 and the next tree stay as they
    were."""
    ids, positions, mask = pack(TREES[:2])
    before = tiny(ids, positions, mask, pictures(1))
    at = len(PROMPT) + 2
    changed = ids.clone()
    changed[at] = ids[at] % (VOCAB - 6) + 6
    moved = (tiny(changed, positions, mask, pictures(1)) - before).abs().amax(-1) > 1e-6
    assert moved.nonzero()[:, 0].tolist() == list(range(at, len(PROMPT) + len(ANSWERS[0])))


@torch.no_grad()
def test_the_picture_matters_and_each_goes_to_its_own_place(tiny):
    ids = [1] + text(3, 1) + PICTURE + text(3, 2) + PICTURE + text(3, 3)
    a, b = pictures(2)
    ab, ba, aa = (alone(tiny, ids, torch.stack(shown)) for shown in ((a, b), (b, a), (a, a)))
    assert (ab[-1] - ba[-1]).abs().max() > 1e-2 < (ab[-1] - aa[-1]).abs().max()
    close(ab[:4 + PATCHES], aa[:4 + PATCHES])                    # up to the second picture they are the same
    assert (ab[4] - ba[4]).abs().max() > 1e-2


def test_what_is_never_used_has_no_gradient_and_everything_else_has_one():
    model = tiny_model(VOCAB, IMG)
    hidden = model(*pack(TREES), pictures(3))
    (hidden @ model.head.T).log_softmax(-1)[:, 7].sum().backward()
    for name, p in model.named_parameters():
        if "encoder.layers.2" in name or "post_layernorm" in name:
            assert p.grad is None, f"{name} lies beyond the feature layer"
        elif name.endswith("k_proj.bias"):
            assert p.grad.abs().max() < 1e-3                     # softmax does not see a shift of all keys
        else:
            assert p.grad.norm() > 0, name


def test_image_placeholders_and_pictures_must_match(tiny):
    ids = [1] + PICTURE + text(3, 0)
    cut_inside = ids[:-4]
    for shown, pixels in ((ids, None), (ids, pictures(2)), (cut_inside, pictures(1))):
        with pytest.raises(ValueError, match="placeholders"):
            alone(tiny, shown, pixels)


@torch.no_grad()
def test_an_image_token_outside_the_vocabulary_is_no_embedding_row():
    outside, inside = tiny_model(VOCAB, 70), tiny_model(VOCAB, IMG)
    ids = [1] + PICTURE + text(4, 0)
    close(alone(outside, [70 if i == IMG else i for i in ids], pictures(1)),
          alone(inside, ids, pictures(1)), 0)


@torch.no_grad()
def test_a_text_only_llama_reads_packs():
    llama = tiny_model(VOCAB, text_only=True)
    assert not any(name.startswith(("vision", "multi_modal")) for name,
                   _ in llama.named_parameters())
    prompt, answer = [1] + text(6, 0), text(5, 1)
    close(llama(*pack([(prompt, [text(3, 2), answer])]))[-5:], alone(llama, prompt + answer)[-5:])


# ---- precision -----------------------------------------------------------------------------------

@torch.no_grad()
def test_rotary_angles_stay_fp32_in_a_bf16_model(monkeypatch):
    """bf16 has no 2047: it would round to 2048, and every odd position beyond 256 would be lost."""
    seen, real = [], model_file.rotate
    monkeypatch.setattr(model_file, "rotate", lambda x, cos,
                        sin: seen.append((cos, sin)) or real(x, cos, sin))
    half = computing_in_bf16(tiny_model(VOCAB, IMG))
    ids, _, mask = pack([(text(3, 0), [])])
    positions = torch.tensor([2045, 2046, 2047])
    assert half(ids, positions, mask).dtype == torch.bfloat16
    freq = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    for cos, sin in seen:
        assert cos.dtype == sin.dtype == torch.float32
        angle = positions[:, None, None] * freq
        torch.testing.assert_close(cos.double(), torch.cat([angle.cos(), angle.cos()], -1),
                                   atol=1e-3, rtol=0)
        torch.testing.assert_close(sin.double(), torch.cat([-angle.sin(), angle.sin()], -1),
                                   atol=1e-3, rtol=0)
    assert len(seen) == 4                                        # queries and keys of two layers


@torch.no_grad()
def test_only_the_distance_between_tokens_matters(tiny):
    ids, positions, mask = pack([(text(12, 0), [])])
    close(tiny(ids, positions + 2000, mask), tiny(ids, positions, mask), 2e-3)
    assert (tiny(ids, positions * 2, mask) - tiny(ids, positions, mask)).abs().max() > 0.05


@torch.no_grad()
def test_bf16_stays_near_fp32(tiny):
    half = computing_in_bf16(tiny_model(VOCAB, IMG))
    ids, pixels = CONVERSATIONS["image in the second turn"][0], pictures(1)
    narrow, wide = alone(half, ids, pixels), alone(tiny, ids, pixels)
    assert narrow.dtype == torch.bfloat16 and 0 < (narrow.float() - wide).norm() / wide.norm() < 0.05


@pytest.mark.parametrize("tie", [False, True])
def test_weights_kept_in_fp32_compute_the_bits_that_16_bit_weights_compute(tie):
    """Forward and backward: what is multiplied is the same 16-bit weight, and gradients arrive in
    the weight's own precision."""
    found = []
    for kept in (torch.bfloat16, torch.float32):
        model = computing_in_bf16(tiny_model(VOCAB, IMG, tie=tie), kept)
        hidden = model(*pack(TREES), pictures(3))
        loss = (hidden @ model.head.to(hidden.dtype).T).float().log_softmax(-1)[:, 7].sum()
        loss.backward()
        found.append((hidden, {n: p.grad for n, p in model.named_parameters() if "vision" not in n}))
    (narrow, small), (wide, large) = found
    assert wide.dtype == torch.bfloat16 and torch.equal(narrow, wide)
    for name, gradient in large.items():
        assert gradient.dtype == torch.float32, name
        if name.endswith("embed_tokens.weight"):         # ids that come again are added up in fp32
            assert (gradient - small[name]).norm() < 1e-2 * gradient.norm()
        else:
            assert torch.equal(gradient, small[name].float()), name


def test_gradients_of_weights_kept_in_fp32_add_up_in_fp32_over_packs():
    """256 + 1 is 256 in bf16; 1 x 256 plus 64 x 1 must be 320."""
    layer = Linear(2, 3)
    for size in (256.0, *[1.0] * 64):
        layer(torch.full((1, 2), size, dtype=torch.bfloat16)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((3, 2), 320.0))


def test_the_last_block_computes_what_is_read_and_the_numbers_are_the_same():
    model = tiny_model(VOCAB, IMG)
    ids, positions, mask = pack([(text(12, 0), [text(4, 1), text(3, 2)]),
                                 (text(9, 3), [text(5, 4)])])
    read = torch.tensor([11, 12, 14, 27, 30])
    parameters = [p for name, p in model.named_parameters() if name.startswith("language_model.")]
    results = []
    for again in (False, True):
        model.language_model.checkpointing = again
        for hidden in (lambda: model(ids, positions, mask)[read],
                       lambda: model(ids, positions, mask, read=read)):
            with FlopCounterMode(display=False) as work:
                out = hidden()
                gradients = torch.autograd.grad(out.square().sum(), parameters)
            results.append((work.get_total_flops(), out, *gradients))
    for flops, *numbers in results[1:]:
        for a, b in zip(numbers, results[0][1:], strict=True):
            close(a, b, 1e-5)
    c, unread = model.config.text, len(ids) - len(read)
    spared = 2 * unread * c.hidden_size * (c.num_attention_heads * c.head_dim + 3 * c.intermediate_size)
    assert results[0][0] - results[1][0] == 3 * spared, "forward, and both sides of backward"
    assert results[2][0] - results[3][0] > 3 * spared, "and most of forward once more"
