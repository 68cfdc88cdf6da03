"""SFT, rejection sampling and SteerLM: what each learns from a record, and that the gradient is
that of the definition.

    python -m pytest tests/test_rivals.py -q
"""
import json
import re

import pytest
import torch
from conftest import RECORDS, hf_checkpoint, judged, record, rows_of, tiny_checkpoint, turns
from conftest import write_data

import checkpoint
import formats
import rejection
import sft
import steerlm
from common import BadInput
from data import Pixels, Tokens, make_pack, make_tree
from judge.rubric import RUBRIC
from kernels import Mask
from train import Run, shuffled

ALL_FOURS = dict.fromkeys(RUBRIC.attributes, 4)
FORM = {"text": steerlm.FORM, "grades": list("01234"), "target": ALL_FOURS}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("rivals") / "tiny", "byte")


@pytest.fixture(scope="module")
def tokens(ckpt):
    return Tokens(ckpt, checkpoint.read_config(ckpt)[0])


@pytest.fixture
def scored(tmp_path):
    """A file of records as annotate.py leaves them: answers, scores, pictures beside them."""
    return write_data(tmp_path / "data")


def conversations(folder):
    """LLaVA instruction data: one and two turns, with and without a picture."""
    write_data(folder)

    def talk(*said):
        return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(said)]

    pictured = talk("<image>\nWhat is it?", "A circle.", "Sure?", "Yes, 12.")
    plain = talk("Hello.", "Hi there, how are you?")
    one, other = {"conversations": plain}, {"image": "a.png", "conversations": pictured}
    rows = [{"id": f"s{k}"} | (other if k % 2 else one) for k in range(5)]
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


def settings(script, model, file, out, **changes):
    flags = {"ckpt": str(model), "data": str(file), "out": str(out), "device": "cpu", "steps": 2,
             "batch": 8, "lr": 1e-3}
    return script.Settings(**(flags | changes))


# ---- supervised fine-tuning ----------------------------------------------------------------------

def test_the_sft_target_is_golden_else_the_chosen_else_the_best_scored_else_the_only_answer():
    assert sft.target(judged(3, 9) | {"golden": "gold", "pair": [0, 1]}) == "gold"
    assert sft.target(judged(3, 9) | {"golden": "", "pair": [0, 1]}) == "a"
    assert sft.target(judged(3, 9, 9) | {"golden": None}) == "b"
    assert sft.target({"answers": [{"text": "only"}]}) == "only"
    cut = judged(3, 9)
    cut["answers"][1]["finish"] = "length"
    assert sft.target(cut) == "a"
    for answers in ([], [{"text": "a"}, {"text": "b"}], [{"text": "cut", "finish": "length"}]):
        with pytest.raises(BadInput, match="no golden answer"):
            sft.target({"answers": answers})


def test_sft_runs_from_llava_json_scores_earlier_turns_too_and_learns(ckpt, tokens, tmp_path,
                                                                      capsys):
    data, out = conversations(tmp_path / "data"), tmp_path / "out"
    sft.run(settings(sft, ckpt, data, out, steps=12, lr=3e-3))
    rows = rows_of(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert tuple(rows[0]) == ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s")
    assert "5 records, 5 answers to learn\n12 steps of 5, lr 0.003" in capsys.readouterr().out
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]

    records, _ = formats.read(data)
    trees = [tree for r in records for tree in sft.golden_tree(tokens, r, 9999)]
    learned = [tokens.tokenizer.decode(make_pack([tree]).targets.tolist(),
                                       skip_special_tokens=False) for tree in trees]
    assert learned == [" Hi there, how are you?</s>",
                       " A circle.</s> Yes, 12.</s>"] * 2 + [" Hi there, how are you?</s>"]
    assert rows[0]["tokens"] == sum(tree.tokens for tree in trees)

    before, after = (dict(checkpoint.load(folder).named_parameters()) for folder in (ckpt,
                                                                                     out / "model"))
    for name, p in after.items():
        assert torch.equal(before[name], p) == name.startswith("vision_tower."), name


def test_replay_is_a_seeded_share_of_the_second_file_and_nothing_twice_before_all_were_drawn():
    first, second = list("abcdef"), list(range(4))
    third = sft.mixed(first, second, 1 / 3, seed=0)
    assert third[:6] == first and len(third) == 9 and len(set(third)) == 9
    half = sft.mixed(first, second, 0.5, seed=0)
    assert set(half[6:10]) == set(second) and len(half) == 12, "two of the four come again"
    assert sft.mixed(first, second, 1 / 3, seed=0) == third != sft.mixed(first, second, 1 / 3, seed=1)


def test_sft_replays_a_second_file(ckpt, tmp_path, capsys):
    data = conversations(tmp_path / "data")
    text = tmp_path / "text.jsonl"
    rows = [{"id": f"t{k}", "messages": turns(f"What is {k}?", f"It is {k}.")} for k in range(9)]
    text.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"id": "bad"}]))
    given = {"data": (str(data), str(text)), "share": 0.5, "steps": 4, "batch": 4, "save_every": 2}
    sft.run(settings(sft, ckpt, "", tmp_path / "out", **given))
    assert re.search(r"replay: 5 of 10 conversations, \d\d% of the scored tokens, are from", capsys.readouterr().out)
    assert rows_of(tmp_path / "out/replay/rejects.jsonl")[0]["id"] == "bad"
    assert rows_of(tmp_path / "out/rejects.jsonl") == [], "each file's rejects have their own list"

    alone = settings(sft, ckpt, data, tmp_path / "alone", steps=4, batch=4)
    sft.run(alone)
    one, both = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("alone", "out"))
    assert [row["tokens"] for row in one] != [row["tokens"] for row in both]


@pytest.mark.parametrize("changes", [{"share": 0.5}, {"data": ("a", "b")}, {"data": ("a", "b", "c")},
                                     {"data": ("a", "b"), "share": 1.0}])
def test_two_files_and_a_share_go_together(ckpt, tmp_path, changes):
    with pytest.raises(BadInput, match="--data A B and --share go together"):
        sft.run(settings(sft, ckpt, "a", tmp_path / "out", **changes))


def test_epochs_become_steps_over_the_answers_there_are(ckpt, tmp_path):
    """Five records and the paper's batch of 128: three epochs are three steps, not one."""
    sft.run(settings(sft, ckpt, conversations(tmp_path / "data"), tmp_path / "out", steps=-1,
                     epochs=3, batch=128, clip=0.0))
    assert len(rows_of(tmp_path / "out" / "metrics.jsonl")) == 3


# ---- rejection sampling --------------------------------------------------------------------------

def test_the_best_whole_answer_is_the_arg_max_of_S():
    assert rejection.best(judged(3, 12, 9)) == 1 and rejection.best(judged(0)) == 0
    assert rejection.best(judged(9, 12), least=12) == 1
    record = judged(12, 8)
    record["answers"][0]["finish"] = "length"
    assert rejection.best(record) == 1


def test_ties_are_drawn_with_a_seed_of_the_records_own():
    many = [judged(5, 9, 9, 9, id=str(k)) for k in range(300)]
    drawn = [rejection.best(one) for one in many]
    assert all(70 < drawn.count(k) < 130 for k in (1, 2, 3))
    assert drawn == [rejection.best(one) for one in many]
    assert drawn != [rejection.best(one, seed=1) for one in many]


@pytest.mark.parametrize("record, least, why", [
    (judged(), 0, "no whole answer with scores"),
    (judged(9, 11), 12, "its best answer has S = 11, less than --least 12"),
    ({"id": "x", "answers": [{"text": "a"}]}, 0, "no whole answer")])
def test_a_record_without_a_best_answer_is_refused(record, least, why):
    with pytest.raises(BadInput, match=why):
        rejection.best(record, least)


# ---- SteerLM -------------------------------------------------------------------------------------

ASKED = ("USER: What?\nAnswer with helpfulness {0}, correctness {1}, coherence {2}, complexity {3}, "
         "verbosity {4}. ASSISTANT:")


def test_every_whole_answer_is_learned_under_its_own_scores_and_they_are_never_in_the_loss(tokens):
    record = judged(12, 3, 7, texts=["the circle is red.", "bad", "cut"])
    record["answers"][2]["finish"] = "length"
    trees = steerlm.trees_under_scores(tokens, FORM, record, 9999)
    assert len(trees) == 2
    for tree, answer in zip(trees, record["answers"]):
        text = tokens.tokenizer.decode(list(tree.prompt), skip_special_tokens=False)
        assert text.endswith(ASKED.format(*answer["scores"].values())), "the form, to the byte"
        assert tree.prompt != make_tree(tokens, record, []).prompt
        assert make_pack([tree]).targets.tolist() == list(make_tree(tokens, record,
                                                                    [answer["text"]]).answers[0])
    with pytest.raises(BadInput, match="no whole answer with scores"):
        steerlm.trees_under_scores(tokens, FORM, {"answers": [{"text": "a"}]}, 9999)


def test_only_the_last_question_asks_for_scores(tokens):
    talk = record(".", "One?", "Yes.", "Two?")
    tree = make_tree(tokens.asking(dict.fromkeys(RUBRIC.attributes, 1), FORM), talk, [])
    text = tokens.tokenizer.decode(list(tree.prompt))
    assert "USER: One? ASSISTANT: Yes." in text and "USER: Two?\nAnswer with helpfulness 1," in text
    assert talk == record(".", "One?", "Yes.", "Two?"), "and nobody's record is rewritten"


def test_training_and_use_see_the_same_bytes(ckpt, tokens, tmp_path):
    """The prompt of a perfect answer in training is the prompt that the trained model's folder asks
    with."""
    model = checkpoint.load(ckpt)
    folder = checkpoint.save(model, tmp_path / "steered", ckpt, more={"steer.json": FORM})
    steered = Tokens(folder, model.config)
    record = judged(12)
    record["answers"][0]["scores"] = ALL_FOURS
    trained, = steerlm.trees_under_scores(tokens, FORM, record, 9999)
    plain = make_tree(tokens, record, []).prompt
    assert make_tree(steered, record, []).prompt == trained.prompt != plain
    assert make_tree(steered.asking(ALL_FOURS | {"verbosity": 0}), record,
                     []).prompt != trained.prompt
    assert make_tree(steered.asking(None), record,
                     []).prompt == plain, "asked for nothing it is a model like any other"
    with pytest.raises(BadInput, match="was not trained to be asked for scores"):
        tokens.asking(ALL_FOURS)

    # What is trained on from there keeps it, also by another method.
    again = checkpoint.save(model, tmp_path / "again", folder)
    assert json.loads((again / "steer.json").read_text()) == FORM


def test_steerlm_leaves_a_folder_that_asks_as_it_was_trained_and_can_be_steered_anew(ckpt, scored,
                                                                                     tmp_path):
    steerlm.run(settings(steerlm, ckpt, scored, tmp_path / "one", target="4 4 4 4 0"))
    folder = tmp_path / "one" / "model"
    assert json.loads((folder / "steer.json").read_text()) == FORM | {"target": ALL_FOURS | {"verbosity": 0}}
    config, _ = checkpoint.read_config(folder)
    asked = Tokens(folder, config).template.prompt(turns("What?"))
    assert asked.endswith(ASKED.format(4, 4, 4, 4, 0))

    steerlm.run(settings(steerlm, folder, scored, tmp_path / "two", form=" {helpfulness}!",
                         grades="a b c d e"))
    again = Tokens(tmp_path / "two" / "model", config).template.prompt(turns("What?"))
    assert again.endswith("USER: What? e! ASSISTANT:")
    stored = json.loads((tmp_path / "two" / "model" / "template.json").read_text())
    assert stored["ask"] == "", "what is asked for stands in steer.json alone"


@pytest.mark.parametrize("flags, why", [
    ({"grades": "0 1 2 3"}, "5 different words"),
    ({"target": "4 4 4 4"}, "5 numbers"),
    ({"target": "4 4 4 4 5"}, "5 numbers"), ({"target": "4 4 4 4 x"}, "5 numbers"),
    ({"grades": "no one two three three"}, "5 different words"),
    ({"form": "be good"}, "text must name attributes in braces"),
    ({"form": "{helpfulnes}"}, "text must name attributes in braces"),
    ({"form": "{helpfulness} {verbositty}"}, "and have no other braces")])
def test_a_form_that_cannot_work_is_refused(flags, why):
    with pytest.raises(BadInput, match=why):
        steerlm.steer_form(steerlm.Settings(**flags))


@pytest.mark.parametrize("flags", [{}, {"grades": "no one two thrice quarce"}], ids=str)
def test_grades_that_look_alike_to_the_tokenizer_are_refused(tmp_path, flags):
    """The miniature's tokenizer knows no digits."""
    with pytest.raises(BadInput, match="does not tell the scores apart to .*; choose other words"):
        steerlm.run(steerlm.Settings(ckpt="toy/llava", data="x", out=str(tmp_path), **flags))


@pytest.mark.parametrize("damaged", [
    "{", "[]", "{}", {"text": 3}, {"grades": "01234"[:3]}, {"grades": 5}, {"target": {}},
    {"target": [4] * 5}, {"text": "{helpfulness.__class__.__mro__}"}, {"text": "{"}, {"text": "{nope} {helpfulness}"},
    {"text": "{helpfulness} }"}, {"text": "{0}"}, {"text": "{{helpfulness}}"}, {"text": "{helpfulness!r:>9}"},
    {"text": "be good"}, {"grades": ["{", "1", "2", "3", "4"]}, {"grades": [0, 1, 2, 3, 4]}, {"grades": list("01233")},
    {"text": None}, {"target": None},
    {"target": ALL_FOURS | {"verbosity": 9}}, {"target": ALL_FOURS | {"verbosity": "4"}}], ids=str)
def test_a_damaged_steer_json_is_named(ckpt, tokens, tmp_path, damaged):
    folder = tmp_path / "steered"
    checkpoint.save(checkpoint.load(ckpt), folder, ckpt)
    text = damaged if isinstance(damaged, str) else json.dumps(FORM | damaged)
    (folder / "steer.json").write_text(text)
    with pytest.raises(BadInput, match="steer.json (is damaged|is no JSON|must hold an object)"):
        Tokens(folder, checkpoint.read_config(folder)[0])


def test_a_form_with_a_control_token_is_refused(ckpt, tokens, tmp_path):
    folder = checkpoint.save(checkpoint.load(ckpt), tmp_path / "steered", ckpt)
    (folder / "steer.json").write_text(json.dumps(FORM | {"text": FORM["text"] + "</s>"}))
    with pytest.raises(BadInput, match="steer.json contains </s>, which the tokenizer reads as a control token"):
        Tokens(folder, checkpoint.read_config(folder)[0])
    with pytest.raises(BadInput, match="--form contains <image>"):
        steerlm.check_words(tokens, FORM | {"text": "<image>" + FORM["text"]})


# ---- the loss ------------------------------------------------------------------------------------

def by_hand(model, trees, pixels):
    """The mean log-prob of all scored tokens: the whole sequence of each answer, plain
    log_softmax."""
    logps = []
    for tree in trees:
        prompt = tree.ids()
        ids = torch.tensor(prompt + list(tree.answers[0]))
        zero = torch.zeros_like(ids)
        hidden = model(ids, torch.arange(len(ids)), Mask(zero, zero, zero), pixels(tree.images))
        table = (hidden @ model.head.T).log_softmax(-1)                      # (T, V)
        shift = len(prompt) - len(tree.prompt)           # the one picture stands before all turns
        spans = [(a + shift, b + shift) for a, b in tree.history] + [(len(prompt), len(ids))]
        for a, b in spans:
            logps += [table[t - 1, ids[t]] for t in range(a, b)]
    return torch.stack(logps).mean()


@pytest.mark.parametrize("method", ["sft", "rejection", "steerlm"])
def test_loss_and_gradients_are_the_mean_over_the_batch_s_scored_tokens_however_it_is_cut(
        ckpt, tokens, tmp_path, method, monkeypatch):
    path = write_data(tmp_path / "data", rows=RECORDS[:2] + RECORDS[3:])
    if method == "sft":
        path = conversations(tmp_path / "data")
    records, _ = formats.read(path)
    trees = {"sft": lambda r: sft.golden_tree(tokens, r, 9999),
             "rejection": lambda r: [make_tree(tokens, r,
                                               [r["answers"][rejection.best(r)]["text"]])],
             "steerlm": lambda r: steerlm.trees_under_scores(tokens, FORM, r,
                                                             9999)}[method]
    trees = [tree for r in records for tree in trees(r)][:8]
    model = checkpoint.load(ckpt)
    pixels = Pixels(model.config)
    loss = -by_hand(model, trees, pixels)
    loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.ones(()))
    for pack in (1, 300, 10**6):                                             # a pack for each, a few, one
        model = checkpoint.load(ckpt)
        run = Run(model, sft.Settings(batch=len(trees), pack=pack), pixels.pack, steps=1)
        found, rows = {}, []
        run.optimizer.step = lambda: found.update({name: p.grad for name,
                                                   p in run.trained.items() if p.grad is not None})
        monkeypatch.setattr(run, "metrics", type("Rows", (), {"write": rows.append, "flush": lambda: None}))
        sft.train(run, shuffled(trees, 0))
        assert json.loads(rows[0])["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert found.keys() == expected.keys()
        for name in found:
            largest = expected[name].abs().max().item()
            torch.testing.assert_close(found[name], expected[name], atol=2e-6 + 1e-5 * largest,
                                       rtol=1e-4, msg=name)


# ---- the scripts ---------------------------------------------------------------------------------

@pytest.mark.parametrize("script", [sft, rejection, steerlm], ids=lambda module: module.__name__)
def test_each_rival_runs_on_a_transformers_checkpoint_and_its_result_loads_there(script, scored,
                                                                                 tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    folder, _ = hf_checkpoint(tmp_path / "hf", "byte")
    script.run(settings(script, folder, scored, tmp_path / "out"))
    assert "6 records" in capsys.readouterr().out
    result = tmp_path / "out" / "model"
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(result, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ours = checkpoint.load(result)
    assert torch.equal(model.lm_head.weight, ours.head)
    assert not torch.equal(ours.head, checkpoint.load(folder).head)
    assert (result / "steer.json").exists() == (script is steerlm)


def test_unscored_records_are_counted_and_named(ckpt, scored, tmp_path, capsys):
    rows = rows_of(scored)
    for row in rows[:3]:
        row["answers"] = [{"text": answer["text"]} for answer in row["answers"]]
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for script in (rejection, steerlm):
        script.run(settings(script, ckpt, scored, tmp_path / script.__name__, steps=0))
        rejects = rows_of(tmp_path / script.__name__ / "rejects.jsonl")
        assert [reject["id"] for reject in rejects] == [row["id"] for row in rows[:3]]
        assert "no whole answer with scores" in rejects[0]["reason"]
        assert "3 records usable, 3 rejected" in capsys.readouterr().out
