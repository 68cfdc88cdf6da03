"""The shipped miniature can do what it is said to do, is built reproducibly, and its story runs from end to end.

    python -m pytest tests/test_toy.py -q
"""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import checkpoint
import common
import story
from data import Pixels, Tokens, make_tree
from kernels import Mask
from model import answer_logps
from toy import build, items, tasks, world

ROOT = Path(__file__).resolve().parent.parent


def shipped(name):
    model = checkpoint.load(name)
    return model, Tokens(checkpoint.resolve(name), model.config)


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    """Both shipped models on a few test items."""
    pictures = tmp_path_factory.mktemp("pictures")
    rows = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(items, "ITEMS", {"text": 55, "exist": 60, "attribute": 60, "describe": 10, "choice": 10})
        for name in ("toy/llava", "toy/vicuna"):
            found, _ = items.measure(*shipped(name), pictures, name)
            rows[name] = {column: score["mean"] for column, score in found.items()}
    return rows


def test_llava_mini_sees(scores):
    assert scores["toy/llava"]["exist"] >= 0.85 and scores["toy/llava"]["attribute"] >= 0.85


def test_vicuna_mini_reads_and_visual_tuning_cost_it_style_and_some_content(scores):
    before, after = scores["toy/vicuna"], scores["toy/llava"]
    assert before["text"] >= 9 and before["terse"] < 0.2
    assert after["text"] < before["text"] - 1 and after["terse"] > before["terse"] + 0.3
    assert after["core"] <= before["core"]


def test_llava_mini_looks_at_the_picture(tmp_path):
    """The same question about two pictures: the log-prob of an answer must change with the picture."""
    model, tokens = shipped("toy/llava")
    pixels = Pixels(model.config)
    records = tasks.draw(tasks.items("exist", 2, "test"), tmp_path)
    logps = []
    for record in records:
        tree = make_tree(tokens, record | {"messages": records[0]["messages"]}, ["yes"])
        logps.append(answer_logps(model, pixels.pack([tree])).item())
    assert abs(logps[0] - logps[1]) > 1e-3


def test_the_vocabulary_covers_the_world_and_decoding_undoes_encoding():
    _, tokens = shipped("toy/llava")
    rng, unknown = random.Random(9), tokens.tokenizer.token_to_id("<unk>")
    for record in [tasks.text_conversation(rng) for _ in range(300)] + tasks.preference_prompts(300, 1):
        assert unknown not in tokens.encode(tokens.template.prompt(record["messages"]))
        assert tokens.decode(tokens.tokenizer.encode(record["golden"]).ids) == record["golden"]


def test_the_vision_tower_is_trained_on_no_scene_of_a_benchmark():
    rng = random.Random(0)
    scenes = [scene for _ in range(100) for scene in build.pair_of_scenes(rng)]
    assert all(world.split_of(world.caption(scene)) == "train" for scene in scenes)


def test_the_two_checkpoints_stay_under_ten_megabytes():
    files = [f for name in ("llava", "vicuna") for f in (ROOT / "toy" / name).iterdir()]
    assert sum(f.stat().st_size for f in files) < 10e6


@pytest.mark.skipif(not os.environ.get("SLOW"), reason="half a minute; SLOW=1 runs it")
def test_building_twice_gives_the_same_bytes(tmp_path):
    """All four stages, a few steps each."""
    for name in ("one", "two"):
        done = subprocess.run([sys.executable, "-m", "toy.build", "--scale", "0.002", "--replay", "0.33", "--out", tmp_path / name],
                              capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    files = sorted(f.relative_to(tmp_path / "one") for f in (tmp_path / "one").rglob("*") if f.is_file())
    assert Path("vicuna/model.safetensors") in files and Path("llava/model.safetensors") in files
    assert (tmp_path / "one/replayed/model.safetensors").read_bytes() != (tmp_path / "one/llava/model.safetensors").read_bytes()
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in files)


def test_the_story_runs_from_sampling_to_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(items, "ITEMS", dict.fromkeys(items.ITEMS, 5))
    story.run(story.Settings(out=str(tmp_path / "run"), prompts=60, epochs=1, batch=4, holdout=0.2, device="cpu"))
    text = capsys.readouterr().out
    assert "step-0 contract holds: loss 0.693147" in text and "LLaVA-mini + DPO" in text
    rows = common.read_jsonl(tmp_path / "run" / "records.jsonl")
    assert len(rows) == 60 and all(len(r["answers"]) == 4 and r["answers"][0]["scores"] for r in rows)
    first = common.read_jsonl(tmp_path / "run" / "metrics.jsonl")[0]
    assert abs(first["loss"] - 0.6931472) < 1e-6 and abs(first["margin"]) < 1e-6
    saved = json.loads((tmp_path / "run" / "scores.json").read_text())["scores"]
    assert set(saved) == {"Vicuna-mini", "LLaVA-mini", "LLaVA-mini + DPO"}


def test_the_story_is_told_once_and_about_the_miniature(tmp_path, monkeypatch):
    monkeypatch.setattr(items, "measure", lambda *args: pytest.fail("refused before anything is measured"))
    (tmp_path / "model").mkdir()
    with pytest.raises(common.BadInput, match="already holds a trained model"):
        story.run(story.Settings(out=str(tmp_path)))
    with pytest.raises(common.BadInput, match="is the miniature's"):
        story.run(story.Settings(data="prefs.jsonl"))


@pytest.mark.parametrize("name", ["toy/llava", "toy/vicuna"])
def test_transformers_loads_the_miniature_and_agrees(name):
    transformers = pytest.importorskip("transformers")
    kind = transformers.LlavaForConditionalGeneration if name == "toy/llava" else transformers.LlamaForCausalLM
    theirs, info = kind.from_pretrained(ROOT / name, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, tokens = shipped(name)
    record = {"id": "x", "root": "/", "images": [], "messages": [{"role": "user", "content": "is there a circle ?"}]}
    pixels = None
    if name == "toy/llava":
        record |= {"images": ["x.png"], "messages": [{"role": "user", "content": "<image>\nis there a circle ?"}]}
        pixels = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor(make_tree(tokens, record, []).ids())
    zero = torch.zeros_like(ids)
    with torch.no_grad():
        mine = ours(ids, torch.arange(len(ids)), Mask(zero, zero, zero), pixels) @ ours.head.T
        extra = {"pixel_values": pixels} if name == "toy/llava" else {}
        his = theirs(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **extra).logits[0]
    assert (mine - his).abs().max() < 1e-4
