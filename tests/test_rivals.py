"""SFT, rejection sampling and SteerLM: what each learns from a record, and that the gradient is that of the definition.

    python -m pytest tests/test_rivals.py -q
"""
import json
import shutil
from pathlib import Path

import pytest
import torch

import annotate
import checkpoint
import data
from toy import items as miniature
import rejection
import sft
import steerlm
from toy import tasks
from common import BadInput
from conftest import hf_checkpoint, tiny_checkpoint
from data import Pixels, Tokens, make_tree, steered
from formats import ATTRIBUTES

FORM = {"text": steerlm.FORM, "grades": list("01234"), "target": dict.fromkeys(ATTRIBUTES, 4)}


def judged(*S, id="r", texts=None, **more):
    """A record whose answers have these qualities S (0 to 12)."""
    answers = [{"text": (texts or "abcdefgh")[k], "scores": dict(zip(ATTRIBUTES, (min(4, s), min(4, max(0, s - 4)), max(0, s - 8), 1, k % 5)))}
               for k, s in enumerate(S)]
    return {"id": id, "images": [], "messages": [{"role": "user", "content": "What?"}], "answers": answers, "root": "."} | more


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("rivals") / "tiny", "byte")


@pytest.fixture(scope="module")
def annotated(tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated")
    annotate.annotate(annotate.miniature(annotate.Story(out=str(folder), prompts=24)))
    return folder


@pytest.fixture
def scored(annotated, tmp_path):
    """A folder of records as annotate.py leaves them: sampled answers, scores, pictures beside them."""
    return Path(shutil.copytree(annotated, tmp_path / "data")) / "records.jsonl"


# ---- rejection sampling ------------------------------------------------------------------------------------------

def test_the_best_answer_is_the_arg_max_of_S():
    assert rejection.best(judged(3, 12, 9)) == 1 and rejection.best(judged(0)) == 0


def test_ties_are_drawn_with_a_seed_of_the_records_own():
    many = [judged(5, 9, 9, 9, id=str(k)) for k in range(300)]
    drawn = [rejection.best(r) for r in many]
    assert all(70 < drawn.count(k) < 130 for k in (1, 2, 3)) and drawn == [rejection.best(r) for r in many]
    assert drawn != [rejection.best(r, seed=1) for r in many]


@pytest.mark.parametrize("record, least, why", [
    (judged(), 0, "no whole answer with scores"), (judged(9, 11), 12, "its best answer has S = 11, less than --least 12"),
    ({"id": "x", "answers": [{"text": "a"}]}, 0, "no whole answer")])
def test_a_record_without_a_best_answer_is_refused(record, least, why):
    with pytest.raises(BadInput, match=why):
        rejection.best(record, least)


def test_an_answer_that_was_cut_off_is_never_the_best():
    record = judged(12, 8)
    record["answers"][0]["finish"] = "length"
    assert rejection.best(record) == 1


# ---- SteerLM -----------------------------------------------------------------------------------------------------

def test_scores_stand_in_the_question_and_never_in_the_loss(ckpt):
    tokens = Tokens(ckpt, checkpoint.read_config(ckpt)[0])
    one = judged(12, texts=["the circle is red."])
    other = judged(0, texts=["the circle is red."])
    (a,), (b,) = (steerlm.trees_under_scores(tokens, r, FORM, 9999) for r in (one, other))
    assert a.prompt != b.prompt and a.answers == b.answers, "flipping the scores changes the prompt and nothing that is scored"
    plain = make_tree(tokens, one, ["the circle is red."])
    assert data.make_pack([a]).targets.tolist() == data.make_pack([plain]).targets.tolist() == plain.answers[0]
    assert "helpfulness 4, correctness 4, coherence 4" in tokens.tokenizer.decode(a.prompt)
    assert "helpfulness 0, correctness 0, coherence 0" in tokens.tokenizer.decode(b.prompt)


def test_every_answer_is_learned_under_its_own_scores(ckpt):
    tokens = Tokens(ckpt, checkpoint.read_config(ckpt)[0])
    record = judged(12, 3, 7, texts=["good", "bad", "cut"])
    record["answers"][2]["finish"] = "length"
    trees = steerlm.trees_under_scores(tokens, record, FORM, 9999)
    assert len(trees) == 2
    for tree, answer in zip(trees, record["answers"]):
        asked = steered(record["messages"], FORM, answer["scores"])
        assert tree.prompt == tokens.encode(data.template(asked)) and tree.answers == make_tree(tokens, record, [answer["text"]]).answers
    with pytest.raises(BadInput, match="no whole answer with scores"):
        steerlm.trees_under_scores(tokens, {"answers": [{"text": "a"}]}, FORM, 9999)


def test_training_and_use_see_the_same_bytes(ckpt, tmp_path):
    """The prompt of a perfect answer in training is the prompt that the trained model's folder asks with."""
    model = checkpoint.load(ckpt)
    folder = checkpoint.save(model, tmp_path / "steered", ckpt, more={"steer.json": FORM})
    before, after = Tokens(ckpt, model.config), Tokens(folder, model.config)
    record = judged(12)
    record["answers"][0]["scores"] = dict.fromkeys(ATTRIBUTES, 4)
    trained, = steerlm.trees_under_scores(before, record, FORM, 9999)
    assert make_tree(after, record, []).prompt == trained.prompt != make_tree(before, record, []).prompt
    again = checkpoint.save(model, tmp_path / "again", folder)
    assert json.loads((again / "steer.json").read_text()) == FORM, "what is trained on from there keeps it"


def test_only_the_last_question_asks_for_scores(ckpt):
    talk = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Two?"}]
    asked = steered(talk, FORM, dict.fromkeys(ATTRIBUTES, 1))
    assert asked[:2] == talk[:2] and asked[2]["content"].startswith("Two?\nAnswer with helpfulness 1,") and talk[2]["content"] == "Two?"


@pytest.mark.parametrize("flags, why", [
    ({"grades": "0 1 2 3"}, "five different words"), ({"grades": "0 1 2 3 3"}, "five different words"), ({"target": "4 4 4 4"}, "five numbers"),
    ({"target": "4 4 4 4 5"}, "five numbers"), ({"form": "{helpfulnes}"}, "cannot be filled in"), ({"form": "be good"}, "does not say the scores"),
    ({"form": "{"}, "cannot be filled in")])
def test_a_form_that_cannot_work_is_refused(flags, why):
    with pytest.raises(BadInput, match=why):
        steerlm.steer_form(steerlm.Settings(**flags))


def test_grades_that_the_tokenizer_does_not_know_are_refused(tmp_path):
    with pytest.raises(BadInput, match="does not tell the grades 0 1 2 3 4 apart; choose other --grades"):
        steerlm.run(steerlm.Settings(ckpt="toy/llava", data="x", out=str(tmp_path / "out"), steps=1))


def test_evaluation_asks_for_the_scores_and_says_so(tmp_path, capsys, monkeypatch):
    form = {"text": "\nanswer with {helpfulness} {correctness} {coherence} {complexity} {verbosity} .",
            "grades": ["no", "one", "two", "three", "four"], "target": dict.fromkeys(ATTRIBUTES, 4)}
    folder = checkpoint.save(checkpoint.load("toy/llava"), tmp_path / "steered", checkpoint.resolve("toy/llava"), more={"steer.json": form})
    seen = []
    monkeypatch.setattr(miniature, "measure", lambda model, tokens, *a: seen.append(tokens.tokenizer.decode(
        make_tree(tokens, tasks.items("text", 1)[0] | {"root": ""}, []).prompt)) or ({}, []))
    miniature.score_checkpoint(folder, "it", tmp_path, "cpu", torch.float32)
    miniature.score_checkpoint(folder, "it", tmp_path, "cpu", torch.float32, target="4 4 4 4 0")
    assert "every question asks for helpfulness 4" in capsys.readouterr().err
    assert "answer with four four four four four ." in seen[0] and "answer with four four four four no ." in seen[1]


# ---- the loss ----------------------------------------------------------------------------------------------------

def gradients(model, trees, pixels, pack, monkeypatch):
    """What one step of sft.train hands to the optimizer, the batch cut into packs of `pack` tokens."""
    kept = []
    monkeypatch.setattr(sft, "update", lambda optimizer, masters, parameters: kept.extend(p.grad.clone() for p in parameters))
    model.zero_grad()
    sft.train(model, iter(trees), pixels.pack, steps=1, batch=len(trees), lr=0.1, clip=0.0, pack=pack)
    return kept


@pytest.mark.parametrize("method", ["sft", "rejection", "steerlm"])
def test_gradients_are_those_of_one_record_at_a_time_however_the_batch_is_cut(ckpt, scored, tmp_path, method, monkeypatch):
    model = checkpoint.load(ckpt)
    tokens, pixels = Tokens(ckpt, model.config), Pixels(model.config)
    items, _ = annotate.records.read(scored)
    trees = {"sft": lambda r: [make_tree(tokens, r, [sft.target(r)], history=True)],
             "rejection": lambda r: [make_tree(tokens, r, [r["answers"][rejection.best(r)]["text"]])],
             "steerlm": lambda r: steerlm.trees_under_scores(tokens, r, FORM, 9999)}[method]
    trees = [tree for r in items for tree in trees(r)][:8]
    model.zero_grad()
    logps = []
    for tree in trees:                                                   # by hand: the whole sequence, plain log_softmax
        ids = torch.tensor(tree.prompt + tree.answers[0])
        pack = data.make_pack([data.Tree("", tree.prompt + tree.answers[0][:-1], [])], pixels(tree.images))
        hidden = model(pack.ids, pack.positions, pack.mask, pack.pixels)
        table = torch.log_softmax(hidden @ model.head.T, -1)             # (T, V)
        start = len(tree.prompt)
        logps += [table[t - 1, ids[t]] for t in range(start, len(ids))]
    (-torch.stack(logps).mean()).backward()
    want = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    for pack in (1, 300, 10**6):                                         # eight packs, a few, one
        for got, expected in zip(gradients(model, trees, pixels, pack, monkeypatch), want, strict=True):
            assert torch.allclose(got, expected, atol=2e-6 + 1e-5 * expected.abs().max().item())


# ---- the scripts -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [sft, rejection, steerlm], ids=lambda m: m.__name__)
def test_each_rival_runs_on_a_transformers_checkpoint_and_its_result_loads_there(script, scored, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder, _ = hf_checkpoint(tmp_path / "hf", "byte")
    script.run(script.Settings(ckpt=str(folder), data=str(scored), out=str(tmp_path / "out"), batch=8, steps=2, lr=1e-3))
    assert "24 records" in capsys.readouterr().out
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out" / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = checkpoint.load(tmp_path / "out" / "model")
    assert torch.equal(model.lm_head.weight, ours.head) and not torch.equal(ours.head, checkpoint.load(folder).head)
    assert (tmp_path / "out" / "model" / "steer.json").exists() == (script is steerlm)


def test_unscored_records_are_counted_and_named(ckpt, scored, tmp_path, capsys):
    rows = [json.loads(line) for line in open(scored)]
    for row in rows[:3]:
        row["answers"] = [{"text": a["text"]} for a in row["answers"]]
    scored.write_text("".join(json.dumps(r) + "\n" for r in rows))
    for script in (rejection, steerlm):
        script.run(script.Settings(ckpt=str(ckpt), data=str(scored), out=str(tmp_path / script.__name__), steps=0))
        rejects = [json.loads(line) for line in open(tmp_path / script.__name__ / "rejects.jsonl")]
        assert [r["id"] for r in rejects] == [r["id"] for r in rows[:3]] and "no whole answer with scores" in rejects[0]["reason"]
        assert "21 records usable, 3 rejected" in capsys.readouterr().out
