"""From prompts to answers: the cache changes nothing, nor the batch; an answer is its prompt's and
its seed's alone.

    python -m pytest tests/test_generate.py -q
"""
import math

import pytest
import torch
from conftest import record, tiny_checkpoint, tiny_model
from test_model import CONVERSATIONS, IMG, LLAMA3, PICTURE, VOCAB
from test_model import alone, both, close, computing_in_bf16, pictures, text

import checkpoint
import generate as generation
from common import BadInput
from data import Pixels, Tokens, make_tree
from generate import answer_seed, check_room, generate, sample_answers, sample_token, stream

PROMPTS = [ids for ids, _ in CONVERSATIONS.values()]
IMAGES = [pictures(n, seed=k) for k, (_, n) in enumerate(CONVERSATIONS.values())]
NEVER = (-1,)      # an end that no token equals: always the full length


@pytest.fixture(scope="module")
def tiny():
    return tiny_model(VOCAB, IMG)


# ---- whole answers -------------------------------------------------------------------------------

@pytest.mark.parametrize("sizes", [{}, {"kv_heads": 4, "rope": LLAMA3, "tie": True}], ids=str)
def test_greedy_text_is_that_of_transformers(sizes):
    theirs, ours = both(**sizes)
    answers = generate(ours, PROMPTS, IMAGES, n=2, max_new=24)
    for prompt, pixels, (first, second) in zip(PROMPTS, IMAGES, answers):
        inputs = {"input_ids": torch.tensor([prompt]),
                  "attention_mask": torch.ones(1, len(prompt), dtype=torch.long)}
        inputs |= {} if pixels is None else {"pixel_values": pixels}
        out = theirs.generate(**inputs, do_sample=False, max_new_tokens=24, eos_token_id=2,
                              pad_token_id=0)
        expected = out[0, len(prompt):].tolist()
        stopped = 2 in expected
        assert first.ids == second.ids == (expected[:expected.index(2)] if stopped else expected)
        assert first.finish == ("stop" if stopped else "length")


@torch.no_grad()
def test_cached_decoding_equals_the_full_forward_step_by_step(monkeypatch):
    """40 steps, so that the cache has to grow; the logits of every step of every answer of every
    prompt."""
    model = tiny_model(VOCAB, 70)                                # 70: a placeholder that is never drawn
    prompts = [[70 if i == IMG else i for i in ids] for ids in PROMPTS]
    seen, real = [], generation.sample_token
    monkeypatch.setattr(generation, "sample_token", lambda logits,
                        *more: seen.append(logits) or real(logits, *more))
    answers = generate(model, prompts, IMAGES, n=2, max_new=40, temperature=1.0, ends=NEVER)
    steps = torch.stack(seen, 1)                                 # (R*n, max_new, V)
    for k, (row, answer) in enumerate(zip(steps, sum(answers, []))):
        prompt, pixels = prompts[k // 2], IMAGES[k // 2]
        full = alone(model, prompt + answer.ids, pixels) @ model.head.T
        close(row, full[len(prompt) - 1:-1], 1e-4)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"temperature": 0.7, "top_p": 0.9}],
                         ids=str)
def test_an_answer_is_the_same_alone_and_in_any_batch(tiny, sampling):
    """n answers are n runs, R prompts are R runs, in any order."""
    seeds = [[7 * r, 7 * r + 1] for r in range(len(PROMPTS))]

    def run(which, k=slice(None)):
        chosen = [seeds[r][k] for r in which]
        return generate(tiny, [PROMPTS[r] for r in which], [IMAGES[r] for r in which],
                        n=len(chosen[0]), max_new=10,
                        seeds=chosen, **sampling)

    everything = run(range(len(PROMPTS)))
    assert [run([r])[0] for r in range(len(PROMPTS))] == everything
    assert run(range(len(PROMPTS))[::-1]) == everything[::-1]
    assert [group[1:] for group in everything] == run(range(len(PROMPTS)), slice(1, 2))


@pytest.mark.parametrize("n", [1, 3])
def test_finished_answers_leave_the_batch_and_change_nothing(tiny, monkeypatch, n):
    """Some tokens end an answer, by turns early and late: rows and cache shrink, and the texts are
    those of a batch in which nobody ends, cut at these tokens."""
    free = generate(tiny, PROMPTS, IMAGES, n=n, max_new=40, temperature=1.0, ends=NEVER)
    ends = {answer.ids[2 + 5 * k] for k, answers in enumerate(free) for answer in answers[:1]}
    records, rows = [], []
    keep = generation.Cache.keep

    def watched(cache, going):
        rows.append(len(going))
        keep(cache, going)
        records.append(cache.R)

    monkeypatch.setattr(generation.Cache, "keep", watched)
    how = {"n": n, "max_new": 40, "temperature": 1.0, "ends": tuple(ends)}
    shrunk = generate(tiny, PROMPTS, IMAGES, **how)
    expected = [[generation.until(answer.ids, ends).ids for answer in answers] for answers in free]
    assert [[answer.ids for answer in answers] for answers in shrunk] == expected
    assert records == sorted(records, reverse=True) and 1 <= records[-1] < len(PROMPTS)
    assert rows[0] == n * len(PROMPTS) and rows == sorted(rows, reverse=True)
    longest = [max(len(ids) for ids in answers) for answers in expected]
    assert n == 1 or sum(rows) < n * sum(longest), "answers leave one by one, not with their record's last"
    tokens = list(stream(tiny, PROMPTS, IMAGES, **how))
    assert all(len(step) == n * len(PROMPTS) for step in tokens)


def test_an_answer_s_seed_decides_its_text(tiny):
    def run(*seeds, max_new=12, **more):
        found, = generate(tiny, PROMPTS[:1], IMAGES[:1], n=len(seeds) or 3, max_new=max_new,
                          temperature=1.0, ends=NEVER,
                          **({"seeds": [list(seeds)]} if seeds else {}))
        return [answer.ids for answer in found]

    a, b, c, again = run(1, 2, 3, 1)
    assert a == again and len({tuple(ids) for ids in (a, b, c)}) == 3
    assert run(3, 1) == [c, a]
    unseeded = run()
    assert unseeded == run() and len(set(map(tuple, unseeded))) == 3, "they differ, and come again"
    for budget in (1, 7):
        assert run(1, max_new=budget)[0] == a[:budget], "a longer budget goes on with the text"


def test_an_answer_ends_with_stop_or_length_at_any_of_several_ends(tiny):
    """Any token may play </s>: the text up to the first end is the same, the other answers go
    on."""
    free = sum(generate(tiny, PROMPTS, IMAGES, n=2, max_new=20, temperature=1.0, ends=NEVER), [])
    assert all(len(answer.ids) == 20 and answer.finish == "length" for answer in free)
    one, other = free[0].ids[6], free[3].ids[4]
    for ends in ((one,), (other,), (one, other), (other, one)):
        ended = sum(generate(tiny, PROMPTS, IMAGES, n=2, max_new=20, temperature=1.0, ends=ends),
                    [])
        for before, after in zip(free, ended):
            places = [before.ids.index(end) for end in ends if end in before.ids]
            cut = min(places, default=None)
            assert after.ids == before.ids[:cut] and after.finish == ("length" if cut is None else "stop")
        assert {answer.finish for answer in ended} == {"stop", "length"}


def test_a_stream_says_the_first_end_from_an_answer_s_end_on_and_stops_when_all_have_ended(tiny):
    free = [ids.tolist() for ids in stream(tiny, PROMPTS[:1], IMAGES[:1], n=2, max_new=12,
                                           temperature=1.0, ends=NEVER)]
    both = [list(ids) for ids in zip(*free)]
    unsaid = min(set(range(VOCAB)) - {*both[0], *both[1]})
    ends = (unsaid, both[0][1], both[1][5])
    lengths = [min(ids.index(end) for end in ends if end in ids) + 1 for ids in both]
    assert lengths[0] != lengths[1]
    said = stream(tiny, PROMPTS[:1], IMAGES[:1], n=2, max_new=12, temperature=1.0, ends=ends)
    for ids, free, length in zip(zip(*(token.tolist() for token in said)), both, lengths):
        assert list(ids) == free[:length] + [unsaid] * (max(lengths) - length)


def test_an_end_at_the_last_step_of_the_budget_is_a_stop(tiny):
    free = generate(tiny, PROMPTS[:1], IMAGES[:1], max_new=4, ends=NEVER)[0][0].ids
    k = free.index(free[-1])
    answer, = generate(tiny, PROMPTS[:1], IMAGES[:1], max_new=k + 1, ends=free[-1:])[0]
    assert (answer.ids, answer.finish) == (free[:k], "stop")


def test_generation_leaves_no_graph_and_no_trace(tiny):
    before = [p.clone() for p in tiny.parameters()]
    state = torch.random.get_rng_state()
    generate(tiny, PROMPTS[:2], IMAGES[:2], max_new=3, temperature=1.0)
    assert all(torch.equal(a, b) and a.grad is None for a, b in zip(tiny.parameters(), before))
    assert torch.equal(state, torch.random.get_rng_state())      # the global generator is not touched


def test_weights_kept_in_fp32_say_what_16_bit_weights_say():
    texts = []
    for kept in (torch.bfloat16, torch.float32):
        model = computing_in_bf16(tiny_model(VOCAB, IMG), kept)
        texts.append(generate(model, PROMPTS, IMAGES, n=2, max_new=8, temperature=1.0))
    assert texts[0] == texts[1]


def test_a_text_only_llama_writes():
    llama = tiny_model(VOCAB, text_only=True)
    answer, = generate(llama, [[1] + text(6, 0)], [None], max_new=4, ends=NEVER)[0]
    assert len(answer.ids) == 4


# ---- answers to records --------------------------------------------------------------------------

def test_a_record_s_answers_depend_on_its_id_and_the_seed_and_are_texts(tmp_path, images_dir):
    folder = tiny_checkpoint(tmp_path / "tiny", "byte")
    model = checkpoint.load(folder)
    tokens, pixels = Tokens(folder, model.config), Pixels(model.config)
    rows = [record(images_dir, "Hi?", id="a"), record(images_dir, "<image>\nWhat?", images=["a.jpg"], id="b")]
    trees = [make_tree(tokens, row, []) for row in rows]

    def sample(some, **more):
        return sample_answers(model, tokens, pixels, some, **{"n": 3, "max_new": 8} | more)

    first, second = sample(trees)
    assert sample(trees[::-1]) == [second, first] and sample(trees[1:]) == [second]
    assert sample(trees, seed=1) != [first, second]
    assert len(first) == 3 and len({answer["text"] for answer in first}) == 3
    assert all(answer.keys() == {"text", "finish"} for answer in first + second)
    assert {answer["finish"] for answer in first} <= {"stop", "length"}
    seeds = {answer_seed(seed, name, k) for seed in (0, 1) for name in ("a", "b") for k in range(3)}
    assert len(seeds) == 12

    greedy, = generate(model, [trees[1].ids()], [pixels(trees[1].images)], max_new=8,
                       ends=tokens.ends)[0]
    text = tokens.decode(greedy.ids)
    assert sample(trees, n=1, temperature=0.0)[1] == [{"text": text, "finish": "length"}]
    tokens.ends = (greedy.ids[3],)                               # as if the template said so
    assert greedy.ids[3] not in greedy.ids[:3]
    text = tokens.decode(greedy.ids[:3])
    assert sample(trees, n=1, temperature=0.0)[1] == [{"text": text, "finish": "stop"}]
    with pytest.raises(BadInput, match="may take 2049 tokens, more than the model was built for .2048."):
        check_room(2049, tokens.room)
    check_room(2048, tokens.room)


# ---- one token -----------------------------------------------------------------------------------

P = [0.05, 0.4, 0.15, 0.3, 0.1]
LOGITS = torch.tensor(P).log() + 3.0                             # a shift changes nothing


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


@pytest.mark.parametrize("top_p, kept", [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]),
                                         (0.71, [1, 2, 3]), (0.86, [1, 2, 3, 4]), (0.96, [0, 1, 2, 3, 4])])
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, kept):
    expected = torch.tensor([p if k in kept else 0.0 for k, p in enumerate(P)])
    close(draws(1.0, top_p), expected / expected.sum(), 1e-3)


def test_top_p_looks_at_the_tempered_distribution():
    tempered = torch.tensor(P) ** 2 / sum(p * p for p in P)      # 0.4 -> 0.56, 0.3 -> 0.32
    assert tempered[1] > 0.5 and draws(0.5, 0.5)[1] == 1.0 and draws(1.0, 0.5)[1] < 1.0


@pytest.mark.parametrize("u", [0.0, math.nextafter(1.0, 0.0)])
def test_the_ends_of_the_unit_interval_draw_possible_tokens(u):
    """The first and last ids have no mass under top_p; rounding at the ends must not revive
    them."""
    logits = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    logits[:, [0, -1]] = -20.0
    token = sample_token(logits, 1.0, 0.9, torch.full((300,), u, dtype=torch.float64))
    assert ((token > 0) & (token < 39)).all()
