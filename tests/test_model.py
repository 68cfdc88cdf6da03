"""One model, many ways to run it, one answer: transformers' logits and text, whatever is packed, shared or cached.

    python -m pytest tests/test_model.py -q

Random weights and hand-made ids (IMG stands for one image patch). What is compared with transformers skips itself
where it is not installed; the equivalences below (shared prefix, packing, cache, batch) need only this repository.
"""
import itertools
import math

import pytest
import torch
from conftest import hf_model, tiny_model
from torch.utils.flop_counter import FlopCounterMode

import model as model_file
from checkpoint import canonical
from kernels import Mask, logps
from model import generate, rope_frequencies, sample_token

IMG, PATCHES, VOCAB = 4, 4, 64
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}


def text(n: int, seed: int) -> list[int]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCAB, (n,), generator=g).tolist()


def pictures(n: int, seed: int = 0, size: int = 28):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) if n else None


PICTURE = [IMG] * PATCHES
CONVERSATIONS = {                       # ids, number of images
    "no image": ([1] + text(17, 0), 0),
    "image first": ([1] + PICTURE + text(9, 1), 1),
    "image within the first turn": ([1] + text(5, 2) + PICTURE + text(4, 3), 1),
    "image in the second turn": ([1] + text(6, 4) + [2] + text(3, 5) + PICTURE + text(8, 6), 1),
    "image at the very end": ([1] + text(30, 7) + PICTURE, 1),
    "two images side by side": ([1] + PICTURE * 2 + text(6, 8), 2),
    "two images in two turns": ([1] + PICTURE + text(6, 9) + [2] + text(2, 10) + PICTURE + text(5, 11), 2),
}


def pack(trees: list[tuple[list[int], list[list[int]]]]):
    """[(prompt, [answer, ...]), ...] -> ids, positions, mask: the layout of kernels/attention.py, written out plainly."""
    ids, positions, lo, hi, own = [], [], [], [], []
    for prompt, answers in trees:
        start, end = len(ids), len(ids) + len(prompt)
        for k, segment in enumerate([prompt, *answers]):
            own += [len(ids)] * len(segment)
            lo += [start if k else 0] * len(segment)
            hi += [end if k else 0] * len(segment)
            positions += [i + (len(prompt) if k else 0) for i in range(len(segment))]
            ids += segment
    tensor = lambda x: torch.tensor(x, dtype=torch.long)
    return tensor(ids), tensor(positions), Mask(tensor(lo), tensor(hi), tensor(own))


def alone(model, ids: list[int], pixels=None):
    """Hidden states (T, D) of one plain sequence."""
    return model(*pack([(ids, [])]), pixels)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(VOCAB, IMG)


# ---- transformers says the same ----------------------------------------------------------------------------------

def pair(**sizes):
    """transformers' model and ours with the same random weights."""
    theirs = hf_model(**{"vocab": VOCAB, "image_token": IMG} | sizes)
    ours = tiny_model(**{"vocab": VOCAB, "image_token": IMG} | sizes, seed=1)
    weights = {canonical(name): p for name, p in theirs.named_parameters()}
    if sizes.get("tie"):
        weights["lm_head.weight"] = weights["language_model.embed_tokens.weight"]
    ours.load_state_dict(weights)
    return theirs, ours


@pytest.mark.parametrize("sizes", [
    {}, {"kv_heads": 4}, {"kv_heads": 1}, {"tie": True}, {"head_dim": 64}, {"head_dim": 128, "hidden": 32},
    {"vocab": 32064, "image_token": 32000, "hidden": 32}, {"layers": 5},
    {"rope": {"rope_type": "default", "rope_theta": 500.0}},
    {"rope": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, {"rope": LLAMA3},
], ids=str)
@torch.no_grad()
def test_logits_are_those_of_transformers(sizes):
    """Every conversation in one packed row of ours, against each alone in transformers."""
    theirs, ours = pair(**sizes)
    token = sizes.get("image_token", IMG)
    conversations = [([token if i == IMG else i for i in ids], n) for ids, n in CONVERSATIONS.values()]
    images = [pictures(n, seed=k) for k, (_, n) in enumerate(conversations)]
    hidden = ours(*pack([(ids, []) for ids, _ in conversations]), torch.cat([x for x in images if x is not None]))
    logits = (hidden @ ours.head.T).split([len(ids) for ids, _ in conversations])
    for (ids, _), pixels, got in zip(conversations, images, logits):
        expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
        close(got, expected, 1e-4)


@torch.no_grad()
def test_a_larger_picture_with_more_patches_gives_the_same_logits():
    theirs, ours = pair(image_size=56)
    ids, pixels = [1] + text(3, 0) + [IMG] * 16 + text(5, 1), pictures(1, size=56)
    expected = theirs(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0]
    close(alone(ours, ids, pixels) @ ours.head.T, expected, 1e-4)


@pytest.mark.parametrize("sizes", [{}, {"kv_heads": 4, "rope": LLAMA3}, {"tie": True}], ids=str)
def test_greedy_text_is_that_of_transformers(sizes):
    theirs, ours = pair(**sizes)
    prompts = [ids for ids, _ in CONVERSATIONS.values()]
    images = [pictures(n, seed=k) for k, (_, n) in enumerate(CONVERSATIONS.values())]
    answers = generate(ours, prompts, images, n=2, max_new=40)
    for prompt, pixels, (first, second) in zip(prompts, images, answers):
        inputs = {"input_ids": torch.tensor([prompt]), "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        inputs |= {} if pixels is None else {"pixel_values": pixels}
        out = theirs.generate(**inputs, do_sample=False, max_new_tokens=40, eos_token_id=2, pad_token_id=0)
        expected = out[0, len(prompt):].tolist()
        stopped = 2 in expected
        assert first.ids == second.ids == (expected[:expected.index(2)] if stopped else expected)
        assert first.finish == ("stop" if stopped else "length")


@pytest.mark.parametrize("rope", [{"rope_type": "default", "rope_theta": 10000.0}, LLAMA3,
                                  {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}],
                         ids=lambda r: r["rope_type"])
def test_rotary_frequencies_are_those_of_transformers(rope):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    expected = LlamaRotaryEmbedding(transformers.LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=64)).inv_freq
    torch.testing.assert_close(rope_frequencies(rope, 128), expected, rtol=1e-6, atol=0)


def test_an_unknown_rope_is_refused():
    with pytest.raises(ValueError, match="yarn"):
        rope_frequencies({"rope_type": "yarn", "rope_theta": 10000.0}, 32)


# ---- one row, many sequences ---------------------------------------------------------------------------------------

PROMPT, ANSWERS = [1] + text(4, 20) + PICTURE + text(6, 21), [text(5, 22), text(1, 23), text(9, 24), []]
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
    images, counts = pictures(3), (1, 0, 2)
    parts = images.split(counts)
    single = [tiny(*pack([tree]), part if len(part) else None) for tree, part in zip(TREES, parts)]
    for order in itertools.permutations(range(3)):
        together = tiny(*pack([TREES[k] for k in order]), torch.cat([parts[k] for k in order]))
        close(together, torch.cat([single[k] for k in order]))


@torch.no_grad()
def test_nothing_looks_ahead_or_sideways(tiny):
    """Change one token of answer 1: what stands before it, answer 2 and the next tree stay as they were."""
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
    ab, ba, aa = (alone(tiny, ids, torch.stack(x)) for x in ((a, b), (b, a), (a, a)))
    assert (ab[-1] - ba[-1]).abs().max() > 1e-2 < (ab[-1] - aa[-1]).abs().max()
    close(ab[:4 + PATCHES], aa[:4 + PATCHES])                    # up to the second picture they are the same
    assert (ab[4] - ba[4]).abs().max() > 1e-2


def test_gradients_of_every_parameter_equal_those_of_separate_sequences():
    """A weighted sum of log-probs, once from one packed row with shared prompts, once answer by answer."""
    images, counts = pictures(3), (1, 0, 2)
    trees = [(prompt, [answer + [2] for answer in answers]) for prompt, answers in TREES]      # </s> is scored too
    weight = itertools.count(1)
    weights = [[next(weight) * (-1) ** k for k, _ in enumerate(answers)] for _, answers in trees]
    shared, separate = tiny_model(VOCAB, IMG), tiny_model(VOCAB, IMG)

    hidden = shared(*pack([(prompt, [a[:-1] for a in answers]) for prompt, answers in trees]), images)
    rows, targets, factor, at = [], [], [], 0
    for (prompt, answers), tree_weights in zip(trees, weights):
        last = at + len(prompt) - 1
        at += len(prompt)
        for answer, w in zip(answers, tree_weights):
            rows += [last, *range(at, at + len(answer) - 1)]
            targets += answer
            factor += [w] * len(answer)
            at += len(answer) - 1
    one = logps(hidden, shared.head, torch.tensor(rows), torch.tensor(targets))
    (one * torch.tensor(factor)).sum().backward()

    two = []
    for (prompt, answers), tree_weights, pixels in zip(trees, weights, images.split(counts)):
        for answer, w in zip(answers, tree_weights):
            logits = alone(separate, prompt + answer, pixels if len(pixels) else None) @ separate.head.T
            picked = logits.log_softmax(-1)[len(prompt) - 1:-1].gather(1, torch.tensor(answer)[:, None])[:, 0]
            (picked * w).sum().backward()
            two.append(picked.detach())
    close(one.detach(), torch.cat(two))
    for (name, a), b in zip(shared.named_parameters(), separate.parameters()):
        if "encoder.layers.2" in name or "post_layernorm" in name:
            assert a.grad is None and b.grad is None             # beyond the feature layer nothing is used
        elif name.endswith("k_proj.bias"):
            assert a.grad.abs().max() < 1e-3                     # softmax does not see a shift of all keys
        else:
            assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm() > 0, name


def test_image_placeholders_and_pictures_must_match(tiny):
    ids = [1] + PICTURE + text(3, 0)
    for pixels in (None, pictures(2)):
        with pytest.raises(ValueError, match="placeholders"):
            alone(tiny, ids, pixels)
    with pytest.raises(ValueError, match="placeholders"):
        alone(tiny, ids[:-4], pictures(1))                       # a prompt cut inside its picture


def test_each_prompt_must_have_its_own_pictures(tiny):
    """In sum they fit, but the first prompt would read the second one's picture."""
    two, one = [1] + PICTURE * 2 + text(3, 0), [1] + PICTURE + text(3, 1)
    with pytest.raises(ValueError, match="placeholders"):
        generate(tiny, [two, one], [pictures(1), pictures(2)], max_new=1)


@torch.no_grad()
def test_an_image_token_outside_the_vocabulary_is_no_embedding_row():
    outside, inside = tiny_model(VOCAB, 70), tiny_model(VOCAB, IMG)
    ids = [1] + PICTURE + text(4, 0)
    close(alone(outside, [70 if i == IMG else i for i in ids], pictures(1)), alone(inside, ids, pictures(1)), 0)


@torch.no_grad()
def test_a_text_only_llama_reads_packs_and_writes():
    llama = tiny_model(VOCAB, text_only=True)
    assert not any(name.startswith(("vision", "multi_modal")) for name, _ in llama.named_parameters())
    prompt, answer = [1] + text(6, 0), text(5, 1)
    close(llama(*pack([(prompt, [text(3, 2), answer])]))[-5:], alone(llama, prompt + answer)[-5:])
    assert len(generate(llama, [prompt], [None], max_new=4)[0][0].ids) <= 4


# ---- numerics ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_rotary_angles_stay_fp32_in_a_bf16_model(monkeypatch):
    """bf16 has no 2047: it would round to 2048, and every odd position beyond 256 would be lost."""
    seen, real = [], model_file.rotate
    monkeypatch.setattr(model_file, "rotate", lambda x, cos, sin: seen.append((cos, sin)) or real(x, cos, sin))
    half = tiny_model(VOCAB, IMG).bfloat16()
    ids, _, mask = pack([(text(3, 0), [])])
    positions = torch.tensor([2045, 2046, 2047])
    assert half(ids, positions, mask).dtype == torch.bfloat16
    freq = 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)
    for cos, sin in seen:
        assert cos.dtype == sin.dtype == torch.float32
        angle = positions[:, None, None] * freq
        torch.testing.assert_close(cos.double(), torch.cat([angle.cos(), angle.cos()], -1), atol=1e-3, rtol=0)
        torch.testing.assert_close(sin.double(), torch.cat([-angle.sin(), angle.sin()], -1), atol=1e-3, rtol=0)
    assert len(seen) == 4                                        # queries and keys of two layers


@torch.no_grad()
def test_only_the_distance_between_tokens_matters(tiny):
    ids, positions, mask = pack([(text(12, 0), [])])
    close(tiny(ids, positions + 2000, mask), tiny(ids, positions, mask), 2e-3)
    assert (tiny(ids, positions * 2, mask) - tiny(ids, positions, mask)).abs().max() > 0.05


@torch.no_grad()
def test_bf16_stays_near_fp32(tiny):
    half = tiny_model(VOCAB, IMG).bfloat16()
    ids, pixels = CONVERSATIONS["image in the second turn"][0], pictures(1)
    narrow, wide = alone(half, ids, pixels).float(), alone(tiny, ids, pixels)
    assert 0 < (narrow - wide).norm() / wide.norm() < 0.05


# ---- generation ------------------------------------------------------------------------------------------------------

PROMPTS = [ids for ids, _ in CONVERSATIONS.values()]
IMAGES = [pictures(n, seed=k) for k, (_, n) in enumerate(CONVERSATIONS.values())]
NEVER = -1                                                       # an eos that no token equals: always the full length


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_step_by_step(monkeypatch):
    """40 steps, so that the cache has to grow; the logits of every step of every answer of every prompt."""
    model, prompts = tiny_model(VOCAB, 70), [[70 if i == IMG else i for i in ids] for ids in PROMPTS]   # 70: never drawn
    seen, real = [], model_file.sample_token
    monkeypatch.setattr(model_file, "sample_token", lambda logits, *more: seen.append(logits) or real(logits, *more))
    answers = generate(model, prompts, IMAGES, n=2, max_new=40, temperature=1.0, eos=NEVER)
    steps = torch.stack(seen, 1)                                 # (R*n, max_new, V)
    for k, (row, answer) in enumerate(zip(steps, (a for group in answers for a in group))):
        prompt, pixels = prompts[k // 2], IMAGES[k // 2]
        full = alone(model, prompt + answer.ids, pixels) @ model.head.T
        close(row, full[len(prompt) - 1:-1], 1e-4)


SAMPLING = [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_n_answers_are_n_runs(tiny, sampling):
    seeds = [[100 * r + k for k in range(3)] for r in range(len(PROMPTS))]
    together = generate(tiny, PROMPTS, IMAGES, n=3, max_new=12, seeds=seeds, **sampling)
    for k in range(3):
        single = generate(tiny, PROMPTS, IMAGES, n=1, max_new=12, seeds=[[row[k]] for row in seeds], **sampling)
        assert [group[k] for group in together] == [group[0] for group in single]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_the_rest_of_the_batch_changes_no_text(tiny, sampling):
    seeds = [[7 * r, 7 * r + 1] for r in range(len(PROMPTS))]
    run = lambda which: generate(tiny, [PROMPTS[r] for r in which], [IMAGES[r] for r in which], n=2, max_new=12,
                                 seeds=[seeds[r] for r in which], **sampling)
    everything = run(range(len(PROMPTS)))
    assert [run([r])[0] for r in range(len(PROMPTS))] == everything
    assert run(range(len(PROMPTS))[::-1]) == everything[::-1]


def test_an_answers_seed_decides_its_text(tiny):
    run = lambda seeds: [a.ids for a in generate(tiny, PROMPTS[:1], IMAGES[:1], n=len(seeds), max_new=12, temperature=1.0,
                                                 seeds=[seeds], eos=NEVER)[0]]
    a, b, c, again = run([1, 2, 3, 1])
    assert a == again and len({tuple(x) for x in (a, b, c)}) == 3
    assert run([3, 1]) == [c, a]


def test_without_seeds_the_n_answers_differ_and_repeat_from_run_to_run(tiny):
    run = lambda: generate(tiny, PROMPTS[:2], IMAGES[:2], n=3, max_new=12, temperature=1.0, eos=NEVER)
    first = run()
    assert len({tuple(a.ids) for a in first[0]}) == 3 and first == run()


def test_a_longer_budget_continues_the_same_text(tiny):
    run = lambda budget: generate(tiny, PROMPTS[:2], IMAGES[:2], max_new=budget, temperature=1.0, eos=NEVER)[0][0].ids
    whole = run(40)
    assert [run(n) for n in (0, 1, 7, 33)] == [whole[:n] for n in (0, 1, 7, 33)]


def test_an_answer_ends_with_stop_or_length(tiny):
    """Any token may play </s>: the text up to its first occurrence is the same, the other answers go on."""
    free = generate(tiny, PROMPTS, IMAGES, n=2, max_new=20, temperature=1.0, eos=NEVER)
    assert all(len(a.ids) == 20 and a.finish == "length" for group in free for a in group)
    eos = free[0][0].ids[6]
    ended = generate(tiny, PROMPTS, IMAGES, n=2, max_new=20, temperature=1.0, eos=eos)
    finishes = set()
    for before, after in zip(sum(free, []), sum(ended, [])):
        cut = before.ids.index(eos) if eos in before.ids else None
        assert after.ids == before.ids[:cut]
        assert after.finish == ("length" if cut is None else "stop")
        finishes.add((after.finish, len(after.ids)))
    assert len(finishes) > 3 and {"stop", "length"} == {finish for finish, _ in finishes}


def test_an_end_at_the_last_step_of_the_budget_is_a_stop(tiny):
    free = generate(tiny, PROMPTS[:1], IMAGES[:1], max_new=4, eos=NEVER)[0][0].ids
    k = free.index(free[-1])
    answer, = generate(tiny, PROMPTS[:1], IMAGES[:1], max_new=k + 1, eos=free[-1])[0]
    assert (answer.ids, answer.finish) == (free[:k], "stop")


def test_generation_leaves_no_graph_and_no_trace(tiny):
    before = [p.clone() for p in tiny.parameters()]
    state = torch.random.get_rng_state()
    generate(tiny, PROMPTS[:2], IMAGES[:2], max_new=3, temperature=1.0)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(tiny.parameters(), before))
    assert torch.equal(state, torch.random.get_rng_state())      # the global generator is not touched


@pytest.mark.parametrize("sampling", [{"temperature": -1.0}, {"temperature": 1.0, "top_p": 0.0},
                                      {"temperature": 1.0, "top_p": 1.5}], ids=str)
def test_impossible_sampling_settings_are_refused(tiny, sampling):
    with pytest.raises(ValueError, match="temperature|top_p"):
        generate(tiny, PROMPTS[:1], IMAGES[:1], max_new=1, **sampling)


# ---- one token ---------------------------------------------------------------------------------------------------------

P = [0.05, 0.4, 0.15, 0.3, 0.1]
LOGITS = torch.tensor(P).log() + 3.0                             # shift changes nothing


def draws(temperature: float, top_p: float, n: int = 4000) -> torch.Tensor:
    """Relative frequency of each token over an even grid of uniform numbers."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    token = sample_token(LOGITS.expand(n, -1), temperature, top_p, u)
    return torch.bincount(token, minlength=len(P)) / n


def test_temperature_0_takes_the_best_token():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample_token(logits, 0.0, 0.5, torch.rand(50)), logits.argmax(-1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_by_their_probability(temperature):
    expected = torch.tensor(P) ** (1 / temperature)
    close(draws(temperature, 1.0), expected / expected.sum(), 1e-3)


@pytest.mark.parametrize("top_p, kept", [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.71, [1, 2, 3]),
                                         (0.86, [1, 2, 3, 4]), (0.96, [0, 1, 2, 3, 4])])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    expected = torch.tensor([p if k in kept else 0.0 for k, p in enumerate(P)])
    close(draws(1.0, top_p), expected / expected.sum(), 1e-3)


def test_top_p_looks_at_the_tempered_distribution():
    tempered = torch.tensor(P) ** 2 / sum(p * p for p in P)      # 0.4 -> 0.56, 0.3 -> 0.32
    assert tempered[1] > 0.5 and draws(0.5, 0.5)[1] == 1.0 and draws(1.0, 0.5)[1] < 1.0


@pytest.mark.parametrize("u", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(u):
    """The first and last ids have no mass under top_p; rounding at the ends must not revive them."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 40, generator=g)
    logits[:, [0, -1]] = -20.0
    token = sample_token(logits, 1.0, 0.9, torch.full((300,), u, dtype=torch.float64))
    assert ((token > 0) & (token < 39)).all()


def test_the_last_block_computes_what_is_read_and_the_numbers_are_the_same():
    model = tiny_model(VOCAB, IMG)
    ids, positions, mask = pack([(text(12, 0), [text(4, 1), text(3, 2)]), (text(9, 3), [text(5, 4)])])
    read = torch.tensor([11, 12, 14, 27, 30])
    parameters = [p for name, p in model.named_parameters() if "vision" not in name and "projector" not in name and "lm_head" not in name]
    results = []
    for again in (False, True):
        model.language_model.checkpointing = again
        for hidden in (lambda: model(ids, positions, mask)[read], lambda: model(ids, positions, mask, read=read)):
            with FlopCounterMode(display=False) as work:
                out = hidden()
                grads = torch.autograd.grad(out.square().sum(), parameters)
            results.append((work.get_total_flops(), out, *grads))
    for flops, *numbers in results[1:]:
        for a, b in zip(numbers, results[0][1:], strict=True):
            close(a, b, 1e-5)
    c, unread = model.config.text, len(ids) - len(read)
    spared = 2 * unread * c.hidden_size * (c.num_attention_heads * c.head_dim + 3 * c.intermediate_size)
    assert results[0][0] - results[1][0] == 3 * spared, "forward, and both sides of backward"
    assert results[2][0] - results[3][0] > 3 * spared, "and most of forward once more"
