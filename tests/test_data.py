"""What the loss sees: the pair rule, templates to the letter, ids that generation sees too, packs
that change nothing.

    python -m pytest tests/test_data.py -q          with transformers installed also against its
    tokenizer and forward pass
"""
import json
import os
import random
import re
import shutil
from array import array
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, hf_checkpoint, judged, record, tiny_checkpoint, turns, write_tokenizer
from tokenizers import Tokenizer, models
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
from common import BadInput
from data import TEMPLATES, Pixels, Tokens, Tree, choose_pair, make_pack, make_tree, split
from kernels import Mask
from model import answer_logps

PATCHES = 4    # of the tiny checkpoints: 28 px in patches of 14
SLOW = bool(os.environ.get("SLOW"))


@pytest.fixture(scope="module", params=("byte", "llama"))
def tiny(request, tmp_path_factory):
    """(model, tokens, pixels) of a tiny checkpoint, once with each kind of tokenizer."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("ckpt") / "tiny", request.param)
    model = checkpoint.load(folder)
    return model, Tokens(folder, model.config), Pixels(model.config)


@pytest.fixture(scope="module")
def byte_config(tmp_path_factory):
    return checkpoint.read_config(tiny_checkpoint(tmp_path_factory.mktemp("byte") / "tiny",
                                                  "byte"))[0]


def mixed(root) -> list[tuple[dict, list[str]]]:
    """No, one and two images, in the first, the second and a late turn, of several shapes; answers
    short and long."""
    yes, no, long = "Yes.", "No", "There are three squares, two blue and one green, and 12 small birds."
    rows = [
        (record(root, "What is 17 plus 25?"), [yes, no]),
        (record(root, "<image>\nWhat color is it?", images=["a.jpg"]), [no, long]),
        (record(root, "Hello.", "Hi there!", "<image>\nAnd this?", images=["b.png"]),
         [long, yes, no]),
        (record(root, "One.", "Two.", "Look:\n<image>\n<image>", images=["c.jpg", "d.png"]),
         [yes, long]),
        (record(root, "<image>\nFirst.", "I see.", "Now <image> compare.",
                images=["a.jpg", "b.png"]), [no, yes]),
        (record(root, "Is there a dog?"), ["", "a"]),
    ]
    return [(row | {"id": f"r{k}"}, answers) for k, (row, answers) in enumerate(rows)]


def mixed_trees(tokens, root) -> list[Tree]:
    return [make_tree(tokens, row, answers) for row, answers in mixed(root)]


@torch.no_grad()
def logps_of(model, pixels, trees) -> torch.Tensor:
    return answer_logps(model, pixels.pack(trees))


# ---- which two answers make a pair ---------------------------------------------------------------

@pytest.mark.parametrize("qualities, gap, pair", [
    ((8, 6), 2, (0, 1)), ((6, 8), 2, (1, 0)), ((8, 7), 2, None), ((7, 7, 7), 2, None),
    ((5,), 2, None), ((), 2, None),
    ((8, 7), 1, (0, 1)), ((8, 6), 3, None),
    ((3, 9, 9), 2, (1, 0)), ((9, 3, 9), 2, (0, 1)),              # ties for the best go to the first
])
def test_the_best_answer_is_paired_with_one_that_is_worse_by_the_gap(qualities, gap, pair):
    assert choose_pair(judged(*qualities), gap) == pair


def test_the_rejected_answer_is_drawn_by_record_and_seed_from_all_that_are_worse_by_the_gap():
    many = [judged(10, 9, 8, 3, 0, id=str(k)) for k in range(100)]
    drawn = [choose_pair(one) for one in many]
    assert set(drawn) == {choose_pair(many[0], seed=k) for k in range(100)} == {(0, 2), (0, 3),
                                                                                (0, 4)}
    assert [choose_pair(one) for one in many[::-1]][::-1] == drawn
    assert [choose_pair(one, seed=1) for one in many] != drawn


def test_quality_is_helpfulness_correctness_and_coherence_alone():
    wordy, good = judged(5, 7)["answers"]
    wordy["scores"] |= {"complexity": 4, "verbosity": 4}
    assert choose_pair({"id": "x", "answers": [wordy, good]}) == (1, 0)


def test_answers_that_take_no_part_in_pairs():
    """Without scores, cut off by the budget, or of the chosen one's own text; but a pair that the
    data gives stands."""
    record = judged(9, 3, 3)
    record["answers"].insert(0, {"text": "unjudged"})
    assert choose_pair(record) in ((1, 2), (1, 3))
    record["answers"][1]["finish"] = "length"
    assert choose_pair(record) is None
    assert choose_pair(judged(9, 3, texts=["a", "a "])) is None
    same = [judged(9, 3, 2, texts=["a", "a", "b"], id=str(k)) for k in range(20)]
    assert {choose_pair(one) for one in same} == {(0, 2)}
    assert choose_pair(judged(2, 9) | {"pair": [0, 1]}) == (0, 1)


# ---- templates -----------------------------------------------------------------------------------

SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. The assistant "
          "gives helpful, detailed, and polite answers to the user's questions.")
TALK = turns("<image>\nHi?", "Hello.", "Why?")
BRIEF = [{"role": "system", "content": "Be brief."}]
# TALK, and the same after a system's sentence: FastChat's get_prompt, the vendors' documentation.
SPELLED = {
    "vicuna_v1": (f"{SYSTEM} USER: <image>\nHi? ASSISTANT: Hello.</s>USER: Why? ASSISTANT:",
                  "Be brief. USER: <image>\nHi? ASSISTANT: Hello.</s>USER: Why? ASSISTANT:"),
    "chatml": ("<|im_start|>user\n<image>\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
               "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
               "<|im_start|>system\nBe brief.<|im_end|>\n"
               "<|im_start|>user\n<image>\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
               "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"),
    "llama_3": ("<|start_header_id|>user<|end_header_id|>\n\n<image>\nHi?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
                "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\n<image>\nHi?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
                "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    "mistral": ("[INST] <image>\nHi?[/INST] Hello.</s>[INST] Why?[/INST]",
                "[INST] Be brief.\n\n<image>\nHi?[/INST] Hello.</s>[INST] Why?[/INST]"),
}
REPLY = {"vicuna_v1": " No.</s>", "chatml": "No.<|im_end|>", "llama_3": "No.<|eot_id|>",
         "mistral": " No.</s>"}
ADDED = {      # tokens of its own that tell a template, and those that end an answer
    "vicuna_v1": ([], ["</s>"]),
    "chatml": (["<|im_start|>", "<|im_end|>", "<|endoftext|>"], ["<|im_end|>", "<|endoftext|>"]),
    "llama_3": (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
                ["<|eot_id|>", "<|end_of_text|>"]),
    "mistral": (["[INST]", "[/INST]"], ["</s>"]),
}


def tokenizer_with(folder, special: list[str], kind="byte"):
    tokenizer = write_tokenizer(folder, kind)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("name", SPELLED)
def test_a_template_is_spelled_to_the_letter(name):
    template = TEMPLATES[name]
    plain, after_system = SPELLED[name]
    assert template.prompt(TALK) == plain
    assert template.prompt(BRIEF + TALK) == after_system
    assert template.reply("No.") == REPLY[name]
    wish = replace(template, ask=" Please.").prompt(TALK)
    assert wish == plain.replace("Why?", "Why? Please."), "the last question alone asks"


# As in the tokenizer_config.json of a ChatML model, of Llama 3 Instruct, of Mistral Instruct v0.3
JINJA = {
    "chatml": "{% for m in messages %}"
              "{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama_3": "{% for m in messages %}"
               "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim"
               " + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
               "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "mistral": "{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
               "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + eos_token }}"
               "{% endif %}{% endfor %}",
}


@pytest.mark.parametrize("name", JINJA)
def test_prompts_and_ids_are_those_of_transformers_chat_templates(tmp_path, byte_config, name):
    transformers = pytest.importorskip("transformers")
    folder = tokenizer_with(tmp_path, ADDED[name][0])
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", chat_template=JINJA[name])
    tokens = Tokens(folder, byte_config)
    for messages in (TALK[:1], TALK, BRIEF + TALK):
        if name == "mistral" and messages[0]["role"] == "system":
            continue
        text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert tokens.template.prompt(messages) == text
        assert tokens.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("name", SPELLED)
def test_a_tokenizer_s_own_tokens_tell_the_template_and_what_ends_an_answer(tmp_path, images_dir,
                                                                            byte_config, name):
    folder = tokenizer_with(tmp_path, ADDED[name][0])
    tokens = Tokens(folder, byte_config)
    assert tokens.template == TEMPLATES[name]
    assert [tokens.tokenizer.id_to_token(end) for end in tokens.ends] == ADDED[name][1]

    # A record with a system message of its own: its tree is the text above, answers and earlier
    # turns end as they should.
    row = record(images_dir, images=["a.jpg"]) | {"messages": BRIEF + TALK}
    tree = make_tree(tokens, row, ["No.", "So."], history=True)
    said = tokens.tokenizer.decode(list(tree.prompt), skip_special_tokens=False)
    assert said == "<s>" + SPELLED[name][1]
    assert [tokens.decode(list(answer)) for answer in tree.answers] == ["No.", "So."]
    assert [tokens.decode(list(tree.prompt[a:b])) for a, b in tree.history] == ["Hello."]
    assert {answer[-1] for answer in tree.answers} == {tokens.ends[0]}


def test_template_overrides_what_the_tokenizer_tells_and_must_fit_it(tmp_path, byte_config):
    folder = tokenizer_with(tmp_path, ADDED["chatml"][0])
    assert Tokens(folder, byte_config, "vicuna_v1").template == TEMPLATES["vicuna_v1"]
    with pytest.raises(BadInput, match="alpaca: choose one of vicuna_v1, chatml, llama_3, mistral"):
        Tokens(folder, byte_config, "alpaca")
    with pytest.raises(BadInput, match="has no <|eot_id|> .* choose another --template"):
        Tokens(folder, byte_config, "llama_3")


def test_template_json_beside_the_tokenizer_is_what_the_model_was_trained_with(tmp_path,
                                                                               byte_config):
    folder = tokenizer_with(tmp_path, ADDED["chatml"][0])
    stored = folder / "template.json"
    stored.write_text(json.dumps({"name": "vicuna_v1", "system": "Be kind."}))
    assert Tokens(folder, byte_config).template == replace(TEMPLATES["vicuna_v1"],
                                                           system="Be kind.")
    own = {"name": "mine", "system": "", "system_form": "", "user": "Q: {content}\nA:",
           "answer": " {content}</s>", "between": "\n",
           "ends": ["</s>", "<|im_end|>"]}
    stored.write_text(json.dumps(own))
    tokens = Tokens(folder, byte_config)
    assert tokens.template.prompt(turns("1", "2", "3")) == "Q: 1\nA: 2</s>\nQ: 3\nA:"
    assert len(tokens.ends) == 2
    assert Tokens(folder, byte_config, "chatml").template == TEMPLATES["chatml"], "--template is stronger"


@pytest.mark.parametrize("damaged", [
    "{", "[]", '{"name": []}', '{"name": "mine"}', '{"name": "vicuna_v1", "colour": "red"}',
    '{"name": "vicuna_v1", "user": 3}',
    '{"name": "vicuna_v1", "ends": [7]}', '{"name": "vicuna_v1", "ends": "</s>"}',
    '{"name": "vicuna_v1", "ends": 7}', '{"name": "vicuna_v1", "ends": {"</s>": 1}}',
    '{"name": "vicuna_v1", "user": "USER: ASSISTANT:"}', '{"name": "vicuna_v1", "answer": "</s>"}',
    '{"name": "vicuna_v1", "system": "<image>"}', '{"name": "vicuna_v1", "ends": ["\\ud800"]}'])
def test_a_damaged_template_json_is_named(tmp_path, byte_config, damaged):
    write_tokenizer(tmp_path, "byte")
    (tmp_path / "template.json").write_text(damaged)
    with pytest.raises(BadInput, match="template.json (is damaged|is no JSON|must hold an object)"):
        Tokens(tmp_path, byte_config)


def beyond(path, word, number):
    """tokenizer.json, that word's id another number."""
    raw = json.loads(path.read_text())
    raw["model"]["vocab"][word] = number
    for token in raw["added_tokens"]:
        if token["content"] == word:
            token["id"] = number
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("text_only", [False, True])
@pytest.mark.parametrize("word", ["red", "</s>", "<unk>"])
def test_words_beyond_the_weights_are_refused_at_the_door(tmp_path, text_only, word):
    """A word that anybody may write, the end of every answer, what stands for unknown words."""
    folder = toy_copy(tmp_path, text_only)
    path = folder / "tokenizer.json"
    config, _ = checkpoint.read_config(folder)
    Tokens(folder, config)
    beyond(path, word, config.text.vocab_size)
    said = rf"{re.escape(str(path))}: '{word}' has id {config.text.vocab_size}, but config.json says vocab_size"
    with pytest.raises(BadInput, match=said):
        Tokens(folder, config)


def test_control_tokens_that_no_prompt_has_may_lie_beyond_the_weights(tmp_path):
    folder = toy_copy(tmp_path, text_only=True)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config, _ = checkpoint.read_config(folder)
    assert tokenizer.token_to_id("[PAD]") >= config.text.vocab_size
    assert Tokens(folder, config).encode("red")


def toy_copy(tmp_path, text_only):
    return shutil.copytree(ROOT / ("toy/vicuna" if text_only else "toy/llava"), tmp_path / "toy")


def test_a_damaged_tokenizer_is_named_even_where_its_library_panics(tmp_path, byte_config):
    write_tokenizer(tmp_path, "byte")
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(raw))
    with pytest.raises(BadInput, match="tokenizer.json: cannot be read"):
        Tokens(tmp_path, byte_config)


def test_tokenizer_config_says_true_or_false(tmp_path, byte_config):
    write_tokenizer(tmp_path, "byte")
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": "no"}')
    with pytest.raises(BadInput, match="tokenizer_config.json: add_bos_token is 'no', but must be true or false"):
        Tokens(tmp_path, byte_config)


# ---- ids -----------------------------------------------------------------------------------------

PIECES = ["the", " ", "  ", "a", "Circle", "0", "17", "1,000.50", "\n", "\n\n", "\t", ".", ":",
          "'s", "<", ">", "/s", "你好", "数",
          "🙂", "🙂🏽", "é", "ß", "مرحبا", "ASSISTANT:", "USER:", "_", "\u00a0", "\u200b", "-", "(",
          "image"]


def random_text(rng: random.Random) -> str:
    """No control token in it: three pieces can spell one."""
    while True:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 8)))
        if "</s>" not in text and "<image>" not in text:
            return text


def test_training_sees_the_ids_that_generation_sees_and_a_sampled_answer_reads_back(tiny):
    """Random questions and answers: prompt and answer apart are the ids of both together, <s> once
    in front, </s> once behind."""
    _, tokens, _ = tiny
    rng = random.Random(0)
    for _ in range(3000 if SLOW else 200):
        question, answer = random_text(rng), random_text(rng).strip()
        tree = make_tree(tokens, record("/", question), [answer])
        whole = tokens.encode(f"{SYSTEM} USER: {question} ASSISTANT: {answer}</s>")
        assert tree.ids() + list(tree.answers[0]) == whole, (question, answer)
        assert whole[0] == 1 and whole.count(1) == 1
        assert whole[-1] == tokens.ends[0] == 2 and whole.count(2) == 1
        assert tokens.decode(list(tree.answers[0])) == answer, "what sampling writes is what training reads"


def test_ids_equal_those_of_transformers_tokenizer(tiny):
    transformers = pytest.importorskip("transformers")
    _, tokens, _ = tiny
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokens.source))
    rng = random.Random(2)
    for _ in range(2000 if SLOW else 100):
        row = record("/", f"<image>\n{random_text(rng)}", random_text(rng),
                     random_text(rng) + "<image>", images=["a", "b"])
        ids = theirs(tokens.template.prompt(row["messages"]))["input_ids"]
        expanded = []
        for token in ids:
            expanded += [token] * (PATCHES if token == tokens.image else 1)
        assert make_tree(tokens, row, []).ids() == expanded


def test_a_tree_waits_with_one_id_per_picture_and_is_written_out_with_one_per_patch(tiny,
                                                                                    images_dir):
    _, tokens, _ = tiny
    for (row, _), tree in zip(mixed(images_dir), mixed_trees(tokens, images_dir)):
        pictures = len(row["images"])
        assert tree.images == [str(images_dir / name) for name in row["images"]]
        assert list(tree.prompt).count(tokens.image) == pictures
        assert tree.ids().count(tokens.image) == PATCHES * pictures
        assert tree.length == len(tree.ids()) and tree.tokens == len(make_pack([tree]).ids)


def test_history_spans_are_the_earlier_turns_and_are_scored_beside_the_answers(tiny, images_dir):
    _, tokens, _ = tiny
    rng = random.Random(3)
    for _ in range(30):
        said = [random_text(rng).strip() or "x" for _ in range(2)]
        row = record(images_dir, "<image>\nOne.", said[0], "2 <image>", said[1], "Five.",
                     images=["a.jpg", "b.png"])
        tree = make_tree(tokens, row, ["Six.", "Seven."], history=True)
        assert [tokens.decode(list(tree.prompt[a:b])) for a, b in tree.history] == said
        scored = make_pack([tree]).targets.tolist()
        ends = [k for k, token in enumerate(scored) if token == tokens.ends[0]]
        turns = [scored[a:b] for a, b in zip([0, *(k + 1 for k in ends)], [k + 1 for k in ends])]
        learned = [tokens.decode(turn) for turn in turns]
        assert learned == [*said, "Six.", "Seven."], "each with its own </s>, and nothing else"
    assert make_tree(tokens, row, ["Six."]).history == []


def test_bos_is_added_where_only_tokenizer_config_asks_for_it(tmp_path, tiny):
    """LLaVA folders whose tokenizer.json has no post-processor; where it has one, <s> must not come
    twice."""
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


# ---- what is refused -----------------------------------------------------------------------------

def test_what_is_too_long_is_refused_with_both_lengths_and_never_cut(tiny, images_dir):
    _, tokens, _ = tiny
    row, answers = record(images_dir, "<image>\nWhat?", images=["a.jpg"]), ["Yes.", "Not at all, my friend."]
    tree = make_tree(tokens, row, answers)
    prompt, longest = len(tree.ids()), max(map(len, tree.answers))
    assert make_tree(tokens, row, answers, max_length=prompt + longest) == tree
    with pytest.raises(BadInput) as error:
        make_tree(tokens, row, answers, max_length=prompt + longest - 1)
    for fact in (f"is {prompt + longest} tokens", f"prompt {prompt}", f"answer {longest}",
                 f"--max_length {prompt + longest - 1}"):
        assert fact in str(error.value)


@pytest.mark.parametrize("token", ["</s>", "<s>", "<unk>", "<|im_end|>", "<image>"])
def test_text_that_the_tokenizer_reads_as_a_control_token_is_refused(tmp_path, images_dir,
                                                                     byte_config, token):
    """In an answer, in an earlier turn of either side; only the user's <image> stands for
    something."""
    tokens = Tokens(tokenizer_with(tmp_path, ["<|im_end|>"]), byte_config)
    with pytest.raises(BadInput, match="answer 1 contains "):
        make_tree(tokens, record("/", "Hi?"), ["Yes.", f"No{token}!"])
    with pytest.raises(BadInput, match="message 1 contains "):
        make_tree(tokens, record("/", "Hi?", f"So{token}", "Why?"), ["Yes."])
    asked = record(images_dir, f"Hi {token}?", images=["a.jpg"] if token == "<image>" else [])
    if token == "<image>":
        assert make_tree(tokens, asked, ["Yes."]).images
    else:
        with pytest.raises(BadInput, match="message 0 contains .* remove it"):
            make_tree(tokens, asked, ["Yes."])
    if token != "<|im_end|>":
        plain = Tokens(write_tokenizer(tmp_path / "plain", "byte") and tmp_path / "plain",
                       byte_config)
        assert make_tree(plain, record("/", "Hi <|im_end|>?"),
                         ["<|im_end|>"]), "to this tokenizer it is text"


def test_a_text_only_checkpoint_refuses_records_with_images(tmp_path, images_dir):
    folder = tiny_checkpoint(tmp_path / "text", "byte", text_only=True)
    tokens = Tokens(folder, checkpoint.read_config(folder)[0])
    assert make_tree(tokens, record(images_dir, "Hi?"), ["Yes."]).images == []
    with pytest.raises(BadInput, match="text-only"):
        make_tree(tokens, record(images_dir, "<image>\nHi?", images=["a.jpg"]), ["Yes."])


def test_a_tokenizer_that_would_merge_prompt_and_answer_is_refused(tmp_path, byte_config):
    """One merge across the seam, and training would see another last prompt token than generation
    does."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<image>", ":", " ", ": "])}
    odd = Tokenizer(models.BPE(vocab, [(":", " ")], unk_token="<unk>"))
    odd.add_special_tokens(["<s>", "</s>", "<image>"])
    odd.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match="merges the prompt's end"):
        make_tree(Tokens(tmp_path, byte_config), record("/", "Hi?"), ["Yes."])


@pytest.mark.parametrize("before, after, why", [
    (None, None, "no tokenizer.json in"), (None, "{}", "cannot be read"),
    ("</s>", "</t>", "has no </s>"),
    ("<image>", "<picture>", "<image> is None, but config.json says 4")])
def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, byte_config, before, after, why):
    write_tokenizer(tmp_path, "byte")
    path = tmp_path / "tokenizer.json"
    if before:
        path.write_text(path.read_text().replace(before, after))
    elif after:
        path.write_text(after)
    else:
        path.unlink()
    with pytest.raises(BadInput, match=why):
        Tokens(tmp_path, byte_config)


# ---- packs ---------------------------------------------------------------------------------------

def tree(prompt: list[int], answers: list[list[int]], **more) -> Tree:
    return Tree("x", array("i", prompt), [array("i", answer) for answer in answers], **more)


def test_the_docstring_s_example_is_what_the_code_does_and_a_second_tree_starts_anew():
    a, b, c, E = 10, 11, 12, 2
    pack = make_pack([tree([7, 8, 9], [[a, b, E], [c, E]]), tree([5, 6], [[13, E]])])
    assert pack.ids.tolist() == [7, 8, 9, a, b, c, 5, 6, 13]
    assert pack.positions.tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 2]
    assert pack.mask.own.tolist() == [0, 0, 0, 3, 3, 5, 6, 6, 8]
    assert pack.mask.lo.tolist() == [0, 0, 0, 0, 0, 0, 0, 0, 6]
    assert pack.mask.hi.tolist() == [0, 0, 0, 3, 3, 3, 0, 0, 8]
    assert pack.rows.tolist() == [2, 3, 4, 2, 5, 7, 8]
    assert pack.targets.tolist() == [a, b, E, c, E, 13, E]
    assert pack.owner.tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert pack.answers == 3 and pack.pixels is None


def test_an_answer_that_is_only_its_end_costs_no_row():
    pack = make_pack([tree([7, 8], [[2], [9, 2]])])
    assert pack.ids.tolist() == [7, 8, 9]
    assert pack.rows.tolist() == [1, 1, 2] and pack.owner.tolist() == [0, 1, 1]


def test_history_moves_behind_the_patches_of_the_pictures_before_it_and_counts_to_the_first_answer():
    IMG = 99
    two_turns = tree([4, IMG, 5, 6, 2, IMG, 7], [[9, 2], [8, 2]], history=[(3, 5)],
                     images=["a", "b"], image=IMG, patches=3)
    pack = make_pack([tree([1], [[2]]), two_turns])
    assert pack.ids.tolist() == [1, 4, IMG, IMG, IMG, 5, 6, 2, IMG, IMG, IMG, 7, 9, 8]
    assert pack.rows.tolist() == [0, 5, 6, 11, 12, 11, 13] and pack.targets.tolist() == [2, 6, 2,
                                                                                         9, 2, 8, 2]
    assert pack.owner.tolist() == [0, 1, 1, 1, 1, 2, 2]


def test_packs_keep_the_order_and_the_budget():
    rng = random.Random(4)
    for _ in range(50):
        trees = [tree([1] * rng.randint(1, 30), [[5] * rng.randint(1, 9) for _ in range(rng.randint(1, 4))])
                 for _ in range(rng.randint(0, 25))]
        budget = rng.choice((1, 20, 64, 1000))
        packs = list(split(trees, budget))
        assert [one for pack in packs for one in pack] == trees and all(packs)
        sizes = [sum(one.tokens for one in pack) for pack in packs]
        assert all(size <= budget or len(pack) == 1 for size, pack in zip(sizes, packs))
        assert all(size + after[0].tokens > budget for size,
                   after in zip(sizes, packs[1:])), "no pack ends while there is room"


def test_only_answer_tokens_are_scored(tiny, images_dir):
    """Nothing of the prompt is a target, on either side of a pair: the system sentence, the user,
    the image."""
    _, tokens, _ = tiny
    trees = mixed_trees(tokens, images_dir)
    pack = make_pack(trees)
    answers = [list(answer) for one in trees for answer in one.answers]
    assert [pack.targets[pack.owner == k].tolist() for k in range(pack.answers)] == answers
    starts = [len(make_pack(trees[:k]).ids) for k in range(len(trees))]
    prompts = {row for start, one in zip(starts, trees) for row in range(start, start + one.length)}
    last = {start + one.length - 1 for start, one in zip(starts, trees)}
    assert set(pack.rows.tolist()) & prompts == last, "of a prompt only its last row predicts anything"


# ---- log-probs: packed, alone, by hand, by transformers ------------------------------------------

def test_packed_log_probs_and_gradients_are_those_of_one_plain_sequence_at_a_time(tiny, images_dir):
    """By hand: no shared prompt, no packs, no kernel of ours for the loss; every weight's
    gradient."""
    model, tokens, pixels = tiny
    trees = mixed_trees(tokens, images_dir)
    parameters = [p for p in model.parameters() if p.requires_grad]
    packed = answer_logps(model, pixels.pack(trees))
    weights = torch.linspace(-1, 1, len(packed))
    together = torch.autograd.grad((packed * weights).sum(), parameters)

    alone = []
    for one in trees:
        for answer in one.answers:
            ids = torch.tensor(one.ids() + list(answer))
            zero = torch.zeros_like(ids)
            hidden = model(ids, torch.arange(len(ids)), Mask(zero, zero, zero), pixels(one.images))
            logits = hidden @ model.head.T                               # (T, V)
            told = logits[one.length - 1:-1].log_softmax(-1)
            alone.append(told.gather(1, ids[one.length:, None]).sum())
    alone = torch.stack(alone)
    apart = torch.autograd.grad((alone * weights).sum(), parameters)

    assert packed.dtype == torch.float32 and (packed < 0).all()
    torch.testing.assert_close(packed, alone, atol=1e-4, rtol=0)
    for a, b in zip(together, apart):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item() + 1e-7, rtol=1e-3)


def test_neither_order_nor_the_cut_into_packs_nor_another_answer_matters(tiny, images_dir):
    model, tokens, pixels = tiny
    trees = mixed_trees(tokens, images_dir)
    packed = logps_of(model, pixels, trees)
    parts = torch.cat([logps_of(model, pixels, part) for part in split(trees, 200)])
    turned = logps_of(model, pixels, trees[::-1]).split([len(one.answers) for one in trees[::-1]])
    torch.testing.assert_close(parts, packed, atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cat(turned[::-1]), packed, atol=1e-4, rtol=0)

    # Change answer 0 of every tree: every other answer keeps its log-prob.
    changed = [make_tree(tokens, row, ["something else entirely 42", *answers[1:]]) for row,
               answers in mixed(images_dir)]
    moved = (logps_of(model, pixels, changed) - packed).abs()
    first = torch.tensor([k == 0 for one in trees for k in range(len(one.answers))])
    assert (moved[first] > 1e-2).all() and (moved[~first] < 1e-4).all()


def test_other_targets_than_an_answer_s_own_cannot_move_its_log_prob(tiny, images_dir):
    model, tokens, pixels = tiny
    pack = pixels.pack(mixed_trees(tokens, images_dir))
    with torch.no_grad():
        before = answer_logps(model, pack)
        pack.targets[pack.owner != 3] = 7
        after = answer_logps(model, pack)
    assert after[3] == before[3] and (after - before).abs().max() > 0.1


def test_no_sum_is_left_to_a_gpu_s_order(tiny, images_dir):
    """torch.use_deterministic_algorithms lists what adds in any order there; a resumed run promises
    the same bits."""
    model, tokens, pixels = tiny
    pack, found = pixels.pack(mixed_trees(tokens, images_dir)[:3]), set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found.add(op.overloadpacket.__name__)
            return op(*args, **kwargs or {})

    with torch.no_grad(), Watch():
        answer_logps(model, pack)
    assert "embedding" in found and not found & {"index_add", "index_add_", "scatter_add",
                                                 "scatter_add_", "scatter_reduce"}


def test_the_pictures_are_looked_at_each_in_its_own_place(tiny, images_dir):
    """Swap the pictures of two records, and of two markers: the log-probs of all go elsewhere."""
    model, tokens, pixels = tiny

    def shown(*images):
        rows = [record(images_dir, "<image>" * len(names) + "\nWhat?",
                       images=names) for names in images]
        return logps_of(model, pixels, [make_tree(tokens, row, ["A dog."]) for row in rows])

    one, other = shown(["a.jpg"], ["b.png"])
    assert (one - other).abs() > 1e-3, "two records alike in all but their picture"
    torch.testing.assert_close(shown(["b.png"], ["a.jpg"]), torch.stack([other, one]), atol=1e-4,
                               rtol=0)
    ab, ba, aa = shown(["a.jpg", "b.png"], ["b.png", "a.jpg"], ["a.jpg", "a.jpg"])
    assert (ab - ba).abs() > 1e-4 and (ab - aa).abs() > 1e-4 and (ba - aa).abs() > 1e-4


def test_no_pictures_are_no_pixels(tiny):
    _, _, pixels = tiny
    assert pixels([]) is None


@pytest.mark.parametrize("kind", ("byte", "llama"))
def test_log_probs_equal_a_plain_transformers_forward_of_each_full_text(tmp_path, images_dir, kind):
    """No packing, no shared prefix, no tokenizer of ours: prompt and answer as text through
    LlavaForConditionalGeneration."""
    transformers = pytest.importorskip("transformers")
    folder, theirs = hf_checkpoint(tmp_path / "hf", kind)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    model = checkpoint.load(folder)
    tokens, pixels = Tokens(folder, model.config), Pixels(model.config)
    ours = logps_of(model, pixels, mixed_trees(tokens, images_dir))

    def ids_of(text):
        return tokenizer(text.replace("<image>", "<image>" * PATCHES))["input_ids"]

    expected = []
    for row, answers in mixed(images_dir):
        prompt = tokens.template.prompt(row["messages"])
        skip = len(ids_of(prompt))
        shown = pixels([images_dir / name for name in row["images"]])
        for answer in answers:
            ids = torch.tensor([ids_of(f"{prompt} {answer}</s>")])
            with torch.no_grad():
                logits = theirs(input_ids=ids, pixel_values=shown,
                                attention_mask=torch.ones_like(ids)).logits[0]
            logps = logits.log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])
            expected.append(logps[skip - 1:].sum())
    torch.testing.assert_close(ours, torch.stack(expected), atol=1e-4, rtol=1e-5)
