"""What stands beside text benchmarks: how a model talks, and how likely it finds answers that others gave."""
import json
from pathlib import Path

import pytest
import torch

import checkpoint
import evaluate
from benchmarks import likelihood
from benchmarks.harness import Folder, Item, slug
from benchmarks.style import loops, scene_talk, style
from common import BadInput
from conftest import tiny_checkpoint
from data import Pixels, Tokens

ROWS = [{"instruction": "Write a short poem about the sea.", "output": "The sea is wide, the sea is deep."},
        {"instruction": "What is 17 plus 25?", "output": "42."}]


def test_an_answer_loops_where_it_ends_in_a_phrase_four_times_over():
    assert loops("well I see I see I see I see I")
    assert loops("no " * 6) and loops("I see, I see, I see, I see,")
    assert loops("so " + "this is the way we go round " * 5 + "th")
    assert not loops("I see. I see. I do not see.") and not loops("no no no") and not loops("")
    assert not loops("again and again and again and again and again, it ended well in the end")


def test_scene_talk_is_the_miniature_s_and_unasked():
    for text in ("There is a red star.", "I see a big Mars at left.", "It is a big red one", "The circle is blue.", "the star is at the top left"):
        assert scene_talk("What is Mars?", text), text
    for text in ("Mars is the red planet.", "A small red flag?"[:1], "You cross the road at the top of the hill.", "I see what you mean."):
        assert not scene_talk("What is Mars?", text), text
    assert not scene_talk("Is the red star hot?", "The red star is hot.")


def test_style_is_a_mean_over_answers():
    items = [Item(1, ["a", "b"], texts=["one two", "a red star"]), Item(2, ["c"], texts=["no " * 7]), Item(3, ["d"])]
    found = {name: figure["mean"] for name, figure in style(items).items()}
    assert found == {"words": 4, "looping": pytest.approx(1 / 3), "scene talk": pytest.approx(1 / 3)}
    assert style(items)["words"]["ci"] == pytest.approx(1.96 * 2), "two turns of one conversation are one draw"


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data/likelihood").mkdir(parents=True)
    (tmp_path / "data/likelihood/given.json").write_text(json.dumps(ROWS))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("ckpt") / "vicuna", "llama", text_only=True)


def test_nll_is_that_of_one_answer_at_a_time_by_hand(data, ckpt, tmp_path, capsys):
    evaluate.run(evaluate.Settings(ckpt=str(ckpt), bench="likelihood", data_dir=str(data), out=str(tmp_path / "out"), device="cpu", json=True))
    [result] = json.loads(capsys.readouterr().out)[str(ckpt)]
    model = checkpoint.load(ckpt)
    tokens = Tokens(ckpt, model.config)
    lost, count = 0.0, 0
    for row in ROWS:
        text = tokens.template.prompt([{"role": "user", "content": row["instruction"]}])
        prompt = tokens.encode(text)
        ids = torch.tensor(tokens.encode(text + tokens.template.reply(row["output"])))
        x = torch.arange(len(ids))
        from kernels import Mask
        zero = torch.zeros_like(ids)
        with torch.no_grad():
            logits = model(ids, x, Mask(zero, zero, zero)) @ model.head.T
        logps = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[len(prompt) - 1:]
        lost -= logps.sum().item()
        count += len(logps)
    assert result["scores"]["nll"]["mean"] == pytest.approx(lost / count, rel=1e-5)
    assert result["coverage"] == 1 and result["style"] is None
    stored = [json.loads(line) for line in next(Path(tmp_path / "out").rglob("likelihood/*.jsonl")).read_text().splitlines()]
    assert sum(row["tokens"] for row in stored) == count


def test_records_of_two_files_are_two_records(data, tmp_path):
    (data / "likelihood/given.jsonl").write_text(json.dumps({"instruction": "Who?", "output": "A quite different answer."}))
    (data / "likelihood/deep").mkdir()
    (data / "likelihood/deep/given.json").write_text(json.dumps(ROWS))
    ids = [item.id for item in likelihood.items(Folder(data / "likelihood", "", tmp_path))]
    assert len(ids) == len(set(ids)) == 5


def test_what_likelihood_cannot_use_is_said(data, ckpt, tmp_path):
    folder = Folder(data / "likelihood", "", tmp_path)
    (data / "likelihood/given.json").write_text(json.dumps([{"instruction": "What?"}]))
    with pytest.raises(BadInput, match="given-000000 has no golden answer"):
        likelihood.items(folder)
    (data / "likelihood/given.json").write_text(json.dumps([{"instruction": "What?", "output": 5}]))
    with pytest.raises(BadInput, match="given.json: given-000000: "):
        likelihood.items(folder)
    with pytest.raises(BadInput, match="nobody's answers"):
        likelihood.read_answers("x", [])
    with pytest.raises(BadInput, match="not a server"):
        evaluate.run(evaluate.Settings(ckpt="openai:m@http://127.0.0.1:9", bench="likelihood", data_dir=str(data), out=str(tmp_path)))
    model = checkpoint.load(ckpt)
    tokens = Tokens(ckpt, model.config)
    tokens.room = 10
    asked = [Item(1, ["a"], {"id": "1", "messages": [{"role": "user", "content": "What?"}], "images": [], "golden": "This.", "root": ""})]
    [item] = likelihood.measure(model, tokens, Pixels(model.config), asked)
    assert not asked[0].failed, "the caller's items stay as they are"
    assert "more than --max_length 10, or than the model has room for" in item.failed and not item.texts


def test_how_a_model_talks_stands_below_its_table(ckpt, tmp_path, capsys):
    folder = tmp_path / "data/ifeval"
    folder.mkdir(parents=True)
    row = {"key": 1, "prompt": "What is Mars?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (folder / "input_data.jsonl").write_text(json.dumps(row))
    (tmp_path / "said.jsonl").write_text(json.dumps({"prompt": "What is Mars?", "response": "I see a big red Mars."}))
    evaluate.run(evaluate.Settings(bench="ifeval", answers=str(tmp_path / "said.jsonl"), data_dir=str(tmp_path / "data"), out=str(tmp_path / "out")))
    assert "ifeval: 6 words an answer, 0.0% loop, 100.0% speak of a scene" in capsys.readouterr().out


def test_an_answer_that_a_damaged_journal_lacks_is_named(ckpt, tmp_path):
    (tmp_path / "data/ifeval").mkdir(parents=True)
    row = {"key": 1, "prompt": "What is Mars?", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    (tmp_path / "data/ifeval/input_data.jsonl").write_text(json.dumps(row))
    journal = tmp_path / "out" / slug(str(ckpt)) / "answers-journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text('{"key": "a"}\n')
    with pytest.raises(BadInput, match="line 1 is damaged; remove that line"):
        evaluate.run(evaluate.Settings(ckpt=str(ckpt), bench="ifeval", data_dir=str(tmp_path / "data"), out=str(tmp_path / "out"), device="cpu", max_new=2))
