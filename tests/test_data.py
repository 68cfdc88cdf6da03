"""What the loss sees: the template to the letter, ids that generation sees too, packs that change nothing.

    python -m pytest tests/test_data.py -q          with transformers installed also against its forward pass
"""
import json
import os
import random
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, models
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import kernels
from common import BadInput
from conftest import hf_checkpoint, tiny_checkpoint, write_tokenizer
from data import SYSTEM, Pixels, Tokens, Tree, answer_logps, make_pack, make_tree, split, template, token_logps
from model import generate

PATCHES = 4    # of the tiny checkpoints: 28 px in patches of 14


@pytest.fixture(scope="module", params=("byte", "llama"))
def tiny(request, tmp_path_factory):
    """(model, tokens, pixels) of a tiny checkpoint, once with each kind of tokenizer."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("ckpt") / "tiny", request.param)
    model = checkpoint.load(folder)
    return model, Tokens(folder, model.config), Pixels(model.config)


def turns(*contents):
    return [{"role": ("user", "assistant")[k % 2], "content": c} for k, c in enumerate(contents)]


def record(root, *contents, images=()):
    return {"id": "r", "root": str(root), "images": list(images), "messages": turns(*contents)}


def mixed(root) -> list[tuple[dict, list[str]]]:
    """No, one and two images, in the first, the second and a late turn, of several shapes; answers short and long."""
    yes, no, long = "Yes.", "No", "There are three squares, two blue and one green, and 12 small birds."
    rows = [
        (record(root, "What is 17 plus 25?"), [yes, no]),
        (record(root, "<image>\nWhat color is it?", images=["a.jpg"]), [no, long]),
        (record(root, "Hello.", "Hi there!", "<image>\nAnd this?", images=["b.png"]), [long, yes, no]),
        (record(root, "One.", "Two.", "Three.", "Four.", "Look:\n<image>\n<image>", images=["c.jpg", "d.png"]), [yes, long]),
        (record(root, "<image>\nWhat?", "A dog.", "Are you sure?", images=["d.png"]), [long]),
        (record(root, "<image>\nFirst.", "I see.", "Now <image> compare.", images=["a.jpg", "b.png"]), [no, yes]),
        (record(root, "Is there a dog?"), ["", "a"]),
    ]
    return [(r | {"id": f"r{k}"}, answers) for k, (r, answers) in enumerate(rows)]


def logps_of(model, pixels, trees):
    with torch.no_grad():
        return answer_logps(model, pixels.pack(trees))


# ---- the worked example of data.py -----------------------------------------------------------------------------

def test_the_docstring_s_example_is_what_the_code_does():
    a, b, c, E = 10, 11, 12, 2
    pack = make_pack([Tree("x", [7, 8, 9], [[a, b, E], [c, E]])])
    assert pack.ids.tolist() == [7, 8, 9, a, b, c]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert pack.mask.own.tolist() == [0, 0, 0, 3, 3, 5]
    assert [*zip(pack.mask.lo.tolist(), pack.mask.hi.tolist())] == [(0, 0)] * 3 + [(0, 3)] * 3
    assert pack.rows.tolist() == [2, 3, 4, 2, 5]
    assert pack.targets.tolist() == [a, b, E, c, E]
    assert pack.owner.tolist() == [0, 0, 0, 1, 1]
    assert pack.answers == 2 and pack.pixels is None


def test_a_second_tree_starts_anew_behind_the_first():
    pack = make_pack([Tree("x", [7, 8, 9], [[10, 11, 2], [12, 2]]), Tree("y", [5, 6], [[13, 2]])])
    assert pack.ids.tolist()[6:] == [5, 6, 13]
    assert pack.positions.tolist()[6:] == [0, 1, 2]
    assert pack.mask.own.tolist()[6:] == [6, 6, 8]
    assert [*zip(pack.mask.lo.tolist(), pack.mask.hi.tolist())][6:] == [(0, 0), (0, 0), (6, 8)]
    assert pack.rows.tolist()[5:] == [7, 8] and pack.targets.tolist()[5:] == [13, 2] and pack.owner.tolist()[5:] == [2, 2]


def test_an_answer_that_is_only_its_end_costs_no_row():
    pack = make_pack([Tree("x", [7, 8], [[2], [9, 2]])])
    assert pack.ids.tolist() == [7, 8, 9] and pack.rows.tolist() == [1, 1, 2] and pack.owner.tolist() == [0, 1, 1]


def test_history_is_scored_from_the_row_before_it_and_counts_to_the_first_answer():
    pack = make_pack([Tree("x", [4, 5, 6, 2, 7], [[9, 2], [8, 2]], history=[(2, 4)])])
    assert pack.rows.tolist() == [1, 2, 4, 5, 4, 6] and pack.targets.tolist() == [6, 2, 9, 2, 8, 2]
    assert pack.owner.tolist() == [0, 0, 0, 0, 1, 1]


# ---- the template ----------------------------------------------------------------------------------------------

def test_the_template_is_vicuna_v1_to_the_letter():
    """FastChat's get_prompt with sep " " and sep2 "</s>", written out by hand."""
    assert template(turns("Hi?")) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: Hi? ASSISTANT:")
    assert template(turns("<image>\nHi?", "Hello.", "Why?")) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: <image>\nHi? ASSISTANT: Hello.</s>USER: Why? ASSISTANT:")
    assert template(turns("1", "2", "3", "4", "5")) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
        "and polite answers to the user's questions. USER: 1 ASSISTANT: 2</s>USER: 3 ASSISTANT: 4</s>USER: 5 ASSISTANT:")


# ---- ids -------------------------------------------------------------------------------------------------------

PIECES = ["the", " ", "  ", "a", "Circle", "0", "17", "1,000.50", "\n", "\n\n", "\t", ".", ":", "'s", "<", ">", "/s", "你好", "数",
          "🙂", "🙂🏽", "é", "ß", "مرحبا", "ASSISTANT:", "USER:", "_", "\u00a0", "\u200b", "-", "(", "image"]


def random_text(rng: random.Random) -> str:
    """No control token in it: formats.py has refused those (three pieces can spell one)."""
    while True:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))
        if "</s>" not in text and "<image>" not in text:
            return text


def test_prompt_and_answer_encoded_apart_are_the_ids_of_both_together(tiny):
    """Random questions and answers, SLOW=1: three thousand: what is trained on is what generation sees."""
    _, tokens, _ = tiny
    rng = random.Random(0)
    for _ in range(3000 if os.environ.get("SLOW") else 500):
        question, answer = random_text(rng), random_text(rng)
        tree = make_tree(tokens, record("/", question), [answer])
        whole = tokens.encode(f"{SYSTEM} USER: {question} ASSISTANT: {answer}</s>")
        assert tree.prompt + tree.answers[0] == whole, (question, answer)
        assert whole.count(tokens.bos or 1) == 1 and whole[0] == 1, "BOS once, in front"
        assert tree.answers[0][-1] == tokens.eos and whole.count(tokens.eos) == 1, "</s> once, at the end"


def test_a_decoded_answer_encodes_to_the_same_ids_again(tiny):
    """What sampling writes to a file is what training reads from it."""
    _, tokens, _ = tiny
    rng = random.Random(1)
    for _ in range(500):
        answer = random_text(rng).strip()
        first = make_tree(tokens, record("/", "Hi?"), [answer]).answers[0]
        text = tokens.decode(first)
        assert text == answer and make_tree(tokens, record("/", "Hi?"), [text]).answers[0] == first


def test_ids_equal_those_of_transformers_tokenizer_with_the_image_expanded(tiny):
    transformers = pytest.importorskip("transformers")
    _, tokens, _ = tiny
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokens.source))
    rng = random.Random(2)
    for _ in range(300):
        text = template(turns(f"<image>\n{random_text(rng)}", random_text(rng), random_text(rng) + "<image>"))
        ids = theirs(text)["input_ids"]
        assert tokens.encode(text) == [i for t in ids for i in ([t] * PATCHES if t == tokens.image else [t])], text


def test_every_image_becomes_its_patches_worth_of_placeholders(tiny, images_dir):
    _, tokens, _ = tiny
    for row, answers in mixed(images_dir):
        tree = make_tree(tokens, row, answers)
        assert tree.prompt.count(tokens.image) == PATCHES * len(row["images"]) == PATCHES * len(tree.images)
        assert all(tokens.image not in a for a in tree.answers)


def test_two_images_in_a_row_keep_their_order(tiny, images_dir):
    model, tokens, pixels = tiny
    ab = make_tree(tokens, record(images_dir, "<image><image>", images=["a.jpg", "b.png"]), ["Yes."])
    ba = make_tree(tokens, record(images_dir, "<image><image>", images=["b.png", "a.jpg"]), ["Yes."])
    assert ab.prompt == ba.prompt and ab.images == ba.images[::-1]
    assert (logps_of(model, pixels, [ab]) - logps_of(model, pixels, [ba])).abs() > 1e-4
    aa = make_tree(tokens, record(images_dir, "<image><image>", images=["a.jpg", "a.jpg"]), ["Yes."])
    assert (logps_of(model, pixels, [ab]) - logps_of(model, pixels, [aa])).abs() > 1e-4, "the second one counts too"


def test_exactly_one_end_is_scored_per_assistant_turn(tiny):
    _, tokens, _ = tiny
    row = record("/", "One.", "Two.", "Three.", "Four.", "Five.")
    for history, ends in ((False, 2), (True, 4)):
        pack = make_pack([make_tree(tokens, row, ["Six.", "Seven."], history=history)])
        assert pack.targets.tolist().count(tokens.eos) == ends


def test_history_spans_are_the_earlier_assistant_turns(tiny):
    _, tokens, _ = tiny
    rng = random.Random(3)
    for _ in range(200):
        said = [random_text(rng).strip() or "x" for _ in range(2)]
        tree = make_tree(tokens, record("/", "One.", said[0], "2", said[1], "Five."), ["Six."], history=True)
        assert [tokens.decode(tree.prompt[a:b]) for a, b in tree.history] == said
        assert all(tree.prompt[b - 1] == tokens.eos for _, b in tree.history)
    assert make_tree(tokens, record("/", "One.", "Two.", "Three."), ["Four."]).history == []


def test_bos_is_added_where_only_tokenizer_config_asks_for_it(tmp_path, tiny):
    """LLaVA folders whose tokenizer.json has no post-processor; where it has one, <s> must not come twice."""
    model, tokens, _ = tiny
    tokens.tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    assert Tokens(tmp_path, model.config).encode("Hi")[:2].count(1) == 1
    raw = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw | {"post_processor": None}))
    assert Tokens(tmp_path, model.config).encode("Hi") == tokens.encode("Hi")
    (tmp_path / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(BadInput, match="tokenizer_config.json"):
        Tokens(tmp_path, model.config)


# ---- what is refused -------------------------------------------------------------------------------------------

def test_what_is_too_long_is_refused_with_both_lengths_and_never_cut(tiny, images_dir):
    _, tokens, _ = tiny
    row = record(images_dir, "<image>\nWhat?", images=["a.jpg"])
    tree = make_tree(tokens, row, ["Yes.", "Not at all, my friend."])
    prompt, longest = len(tree.prompt), max(map(len, tree.answers))
    same = make_tree(tokens, row, ["Yes.", "Not at all, my friend."], max_length=prompt + longest)
    assert (same.prompt, same.answers) == (tree.prompt, tree.answers)
    with pytest.raises(BadInput) as error:
        make_tree(tokens, row, ["Yes.", "Not at all, my friend."], max_length=prompt + longest - 1)
    for fact in (f"is {prompt + longest} tokens", f"prompt {prompt}", f"answer {longest}", f"--max_length {prompt + longest - 1}"):
        assert fact in str(error.value)


def test_a_text_only_checkpoint_refuses_records_with_images(tmp_path, images_dir):
    folder = tiny_checkpoint(tmp_path / "text", "byte", text_only=True)
    tokens = Tokens(folder, checkpoint.read_config(folder)[0])
    assert make_tree(tokens, record(images_dir, "Hi?"), ["Yes."]).images == []
    with pytest.raises(BadInput, match="text-only"):
        make_tree(tokens, record(images_dir, "<image>\nHi?", images=["a.jpg"]), ["Yes."])


def test_a_tokenizer_that_would_merge_prompt_and_answer_is_refused(tmp_path, tiny):
    """One merge across the seam, and training would see another last prompt token than generation does."""
    model, tokens, _ = tiny
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<image>", ":", " ", ": "])}
    odd = Tokenizer(models.BPE(vocab, [(":", " ")], unk_token="<unk>"))
    odd.add_special_tokens(["<s>", "</s>", "<image>"])
    odd.save(str(tmp_path / "tokenizer.json"))
    config = replace(model.config, image_token=4)
    with pytest.raises(BadInput, match="merges the prompt's end"):
        make_tree(Tokens(tmp_path, config), record("/", "Hi?"), ["Yes."])


@pytest.mark.parametrize("spoil, why", [
    (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer.json in"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "cannot be read"),
    (lambda folder: (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace("</s>", "</t>")), "has no </s>"),
    (lambda folder: (folder / "tokenizer.json").write_text(
        (folder / "tokenizer.json").read_text().replace("<image>", "<picture>")), "<image> is None, but config.json says 4")])
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tiny, spoil, why):
    model, _, _ = tiny
    write_tokenizer(tmp_path, "byte")
    Tokens(tmp_path, replace(model.config, image_token=4))
    spoil(tmp_path)
    with pytest.raises(BadInput, match=why):
        Tokens(tmp_path, replace(model.config, image_token=4))


# ---- packs -----------------------------------------------------------------------------------------------------

def test_packs_keep_the_order_and_the_budget():
    rng = random.Random(4)
    for _ in range(200):
        trees = [Tree(str(k), [1] * rng.randint(1, 30), [[5] * rng.randint(1, 9) for _ in range(rng.randint(1, 4))])
                 for k in range(rng.randint(0, 25))]
        budget = rng.choice((1, 20, 64, 1000))
        packs = list(split(trees, budget))
        assert [t for pack in packs for t in pack] == trees and all(packs)
        for pack in packs:
            assert len(pack) == 1 or sum(t.tokens for t in pack) <= budget
            assert len(make_pack(pack).ids) == sum(t.tokens for t in pack), "a tree's cost is what it adds to the row"
        for one, two in zip(packs, packs[1:]):
            assert sum(t.tokens for t in one + two[:1]) > budget, "no pack ends while there is room"


def test_only_answer_tokens_are_scored(tiny, images_dir):
    """Nothing of the prompt is a target, on either side of a pair: the system sentence, the user, the image."""
    _, tokens, _ = tiny
    trees = [make_tree(tokens, r, a) for r, a in mixed(images_dir)]
    pack = make_pack(trees)
    answers = [a for t in trees for a in t.answers]
    assert pack.answers == len(answers)
    for k, answer in enumerate(answers):
        assert pack.targets[pack.owner == k].tolist() == answer
    starts = [len(make_pack(trees[:k]).ids) for k in range(len(trees))]
    last = {s + len(t.prompt) - 1 for s, t in zip(starts, trees)}
    prompt_rows = {r for s, t in zip(starts, trees) for r in range(s, s + len(t.prompt))}
    assert set(pack.rows.tolist()) & prompt_rows == last, "of a prompt only its last row predicts anything"


def test_other_targets_than_an_answer_s_own_cannot_move_its_log_prob(tiny, images_dir):
    model, tokens, pixels = tiny
    pack = pixels.pack([make_tree(tokens, r, a) for r, a in mixed(images_dir)])
    with torch.no_grad():
        before = answer_logps(model, pack)
        pack.targets[pack.owner != 3] = 7
        after = answer_logps(model, pack)
    assert after[3] == before[3] and (after - before).abs().max() > 0.1


def test_no_sum_is_left_to_a_gpu_s_order(tiny, images_dir):
    """torch.use_deterministic_algorithms lists what adds in any order there; a resumed run promises the same bits."""
    model, tokens, pixels = tiny
    pack, found = pixels.pack([make_tree(tokens, r, a) for r, a in mixed(images_dir)]), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found.add(op.overloadpacket.__name__)
            return op(*args, **kwargs or {})
    with torch.no_grad(), Watch():
        answer_logps(model, pack)
    assert "embedding" in found and not found & {"index_add", "index_add_", "scatter_add", "scatter_add_", "scatter_reduce"}


# ---- log-probs: packed, alone, by hand, by transformers --------------------------------------------------------

def test_packed_is_alone_is_one_answer_at_a_time(tiny, images_dir):
    model, tokens, pixels = tiny
    trees = [make_tree(tokens, r, a) for r, a in mixed(images_dir)]
    packed = logps_of(model, pixels, trees)
    alone = torch.cat([logps_of(model, pixels, [t]) for t in trees])
    one = torch.cat([logps_of(model, pixels, [replace(t, answers=[a])]) for t in trees for a in t.answers])
    some = torch.cat([logps_of(model, pixels, part) for part in split(trees, 200)])
    order = list(range(len(trees)))[::-1]
    turned = logps_of(model, pixels, [trees[k] for k in order])
    turned = torch.cat([part for part in turned.split([len(trees[k].answers) for k in order])][::-1])
    assert packed.dtype == torch.float32 and (packed < 0).all()
    for other in (alone, one, some, turned):
        torch.testing.assert_close(packed, other, atol=1e-4, rtol=0)


def test_gradients_are_those_of_one_answer_at_a_time(tiny, images_dir):
    model, tokens, pixels = tiny
    trees = [make_tree(tokens, r, a) for r, a in mixed(images_dir)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, sum(len(t.answers) for t in trees))
    packed = torch.autograd.grad((answer_logps(model, pixels.pack(trees)) * weights).sum(), parameters)
    ones = [replace(t, answers=[a]) for t in trees for a in t.answers]
    apart = torch.autograd.grad(sum(w * answer_logps(model, pixels.pack([t]))[0] for t, w in zip(ones, weights)), parameters)
    for p, a, b in zip(parameters, packed, apart):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item() + 1e-7, rtol=1e-3)


def test_one_answer_never_sees_another_nor_another_tree(tiny, images_dir):
    """Change answer 0 of every tree: every other answer keeps its log-prob to the last bits."""
    model, tokens, pixels = tiny
    rows = [(r, a) for r, a in mixed(images_dir) if len(a) > 1]
    before = logps_of(model, pixels, [make_tree(tokens, r, a) for r, a in rows])
    after = logps_of(model, pixels, [make_tree(tokens, r, ["something else entirely 42", *a[1:]]) for r, a in rows])
    first = torch.tensor([k == 0 for _, a in rows for k in range(len(a))])
    assert ((after - before).abs()[first] > 1e-2).all()
    torch.testing.assert_close(after[~first], before[~first], atol=1e-4, rtol=0)


def test_another_picture_gives_another_log_prob(tiny, images_dir):
    model, tokens, pixels = tiny
    for name in ("b.png", "c.jpg", "d.png"):
        one, other = (logps_of(model, pixels, [make_tree(tokens, record(images_dir, "<image>\nWhat?", images=[x]), ["A dog."])])
                      for x in ("a.jpg", name))
        assert (one - other).abs() > 1e-4, name


def test_crop_and_pad_give_different_pixels_of_a_wide_picture(tiny, images_dir):
    model, _, pixels = tiny
    crop = Pixels(model.config, crop=True)
    paths = [images_dir / "d.png"]
    assert pixels(paths).shape == crop(paths).shape == (1, 3, 28, 28)
    assert (pixels(paths) - crop(paths)).abs().max() > 0.1
    assert pixels([]) is None


def test_a_model_finds_its_own_greedy_answer_likely(tiny, images_dir):
    """Each greedy token is the model's best guess, so it beats a uniform guess; targets shifted by one would not."""
    model, tokens, pixels = tiny
    uniform = -torch.tensor(float(len(model.head))).log()
    for row, _ in mixed(images_dir)[:3]:
        tree = make_tree(tokens, row, [])
        [[answer]] = generate(model, [tree.prompt], [pixels(tree.images)], max_new=12, eos=tokens.eos)
        tree.answers = [answer.ids + [tokens.eos]]
        pack = pixels.pack([tree])
        with torch.no_grad():
            logps = token_logps(model, pack)
            hidden = model(pack.ids, pack.positions, pack.mask, pack.pixels)
        best = (hidden[pack.rows] @ model.head.T).argmax(-1)
        assert (logps[:-1] > uniform).all() and len(answer.ids) > 0
        assert best[:len(answer.ids)].tolist() == answer.ids


def test_the_log_prob_is_minus_the_cross_entropy_written_by_hand(tiny):
    """Without kernels or packs: full logits, shifted by one, an answer of one token and its end."""
    model, tokens, pixels = tiny
    tree = make_tree(tokens, record("/", "Hi?"), ["a"])
    ids = torch.tensor(tree.prompt + tree.answers[0])
    T, n = len(ids), len(tree.answers[0])
    zero = torch.zeros(T, dtype=torch.long)
    with torch.no_grad():
        logits = model(ids, torch.arange(T), kernels.Mask(zero, zero, zero)) @ model.head.T              # (T, V)
        loss = torch.nn.functional.cross_entropy(logits[-n - 1:-1], ids[-n:], reduction="sum")
    torch.testing.assert_close(logps_of(model, pixels, [tree])[0], -loss, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ("byte", "llama"))
def test_log_probs_equal_a_plain_transformers_forward_of_each_full_text(tmp_path, images_dir, kind):
    """No packing, no shared prefix, no tokenizer of ours: the text of prompt and answer through LlavaForConditionalGeneration."""
    transformers = pytest.importorskip("transformers")
    folder, theirs = hf_checkpoint(tmp_path / "hf", kind)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = checkpoint.load(folder)
    tokens, pixels = Tokens(folder, model.config), Pixels(model.config)
    trees = [make_tree(tokens, r, a) for r, a in mixed(images_dir)]
    ours = logps_of(model, pixels, trees)

    def score(text, start, images):
        ids = torch.tensor([tokenizer(text.replace("<image>", "<image>" * PATCHES))["input_ids"]])
        skip = len(tokenizer(text[:start].replace("<image>", "<image>" * PATCHES))["input_ids"])
        with torch.no_grad():
            logits = theirs(input_ids=ids, pixel_values=pixels(images), attention_mask=torch.ones_like(ids)).logits[0]
        return logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[skip - 1:].sum().item()

    expected = [score(f"{template(r['messages'])} {a}</s>", len(template(r["messages"])), [images_dir / x for x in r["images"]])
                for r, answers in mixed(images_dir) for a in answers]
    torch.testing.assert_close(ours, torch.tensor(expected), atol=1e-3, rtol=0)
