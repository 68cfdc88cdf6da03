"""Fail at the door: whatever is wrong with what a user gives, one message says which file, which record, what to do.

    python -m pytest tests/test_door.py -q

Most cases call a script's own `main` in this process, as the command line would; a few start the real thing.
"""
import dataclasses
import fcntl
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import annotate
import common
import dpo
import evaluate
import sft
import story
from benchmarks.harness import slug
from conftest import ROOT, picture, tiny_checkpoint
from test_formats import write_bomb


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("door") / "tiny", "byte")


@pytest.fixture
def folder(tmp_path):
    """A data folder with a good picture and every bad one."""
    root = tmp_path / "data"
    root.mkdir()
    picture(20, 10).save(root / "good.png")
    picture(200, 150).save(root / "whole.jpg")
    data = (root / "whole.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(data[:len(data) // 2])
    write_bomb(root / "bomb.png")
    picture(8, 8).save(tmp_path / "secret.png")
    return root


def pair(id, image="good.png", chosen="The circle is red.", rejected="No."):
    return {"id": id, "image": image, "question": "What color is it?", "chosen": chosen, "rejected": rejected}


BAD = {                                                                  # id: (record, what is said of it)
    "missing-image": (pair("missing-image", "absent.jpg"), "absent.jpg: No such file"),
    "truncated": (pair("truncated", "cut.jpg"), "cut.jpg: cannot be decoded"),
    "bomb": (pair("bomb", "bomb.png"), "bomb.png: cannot be decoded (10000 x 10000 pixels"),
    "outside": (pair("outside", "../secret.png"), "image ../secret.png leads outside"),
    "same": (pair("same", rejected="The circle is red. "), "chosen and rejected are the same text"),
    "too-long": (pair("too-long", rejected="no dog " * 200), "more than --max_length 400, or than the model has room for; shorten it"),
    "no-shape": ({"id": "no-shape", "topic": "?"}, "none of the known shapes"),
    "control": (pair("control", chosen="red</s>"), "answer 0 contains </s>"),
    "marker": (pair("marker", rejected="<image>"), "answer 1 contains <image>"),
}


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" if isinstance(r, dict) else r + "\n" for r in rows))
    return path


@pytest.fixture
def door(monkeypatch, capsys, ckpt, tmp_path):
    """door(script, flag=value, ...) -> (exit code, everything said); a script that raises anything else fails the test."""
    def knock(script, *argv, settings=None, **values):
        values = {"ckpt": ckpt, "out": tmp_path / "out", "device": "cpu", "steps": 1} | values
        argv = [*argv, *(f"--{k}={v}" for k, v in values.items() if v is not None)]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, argv)])
        capsys.readouterr()
        code = 0
        try:
            common.main(settings or script.Settings, script.run)
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr()
        if isinstance(code, str):                                        # the interpreter prints it and exits with 1
            assert code.startswith(f"{script.__name__}.py: ") and len(code) > 30
            return 1, said.out + said.err + code
        return code, said.out + said.err
    return knock


# ---- data ----------------------------------------------------------------------------------------

def test_good_records_are_used_and_every_bad_one_is_reported(door, folder, tmp_path):
    rows = [pair("good-1"), *(record for record, _ in BAD.values()), '{"id": "half', pair("good-2", chosen="Red, I think.")]
    path = write(folder / "prefs.jsonl", rows)
    with open(path, "ab") as f:
        f.write(b'{"id": "caf\xe9"}\n')
    code, said = door(dpo, data=path, max_length=400)
    assert code == 0, said
    assert f"prefs.jsonl: 2 records usable, {len(BAD) + 2} rejected" in said and f"{tmp_path}/out/rejects.jsonl" in said
    rejects = {r["id"]: r["reason"] for r in map(json.loads, (tmp_path / "out" / "rejects.jsonl").read_text().splitlines())}
    assert set(rejects) == {*BAD, "line 11", "line 13"}
    assert "malformed JSON" in rejects["line 11"] and "'utf-8' codec can't decode byte 0xe9" in rejects["line 13"]
    for id, (_, why) in BAD.items():
        assert why in rejects[id], rejects[id]
    total, prompt, answer = map(int, re.match(r"is (\d+) tokens long \(prompt (\d+), answer (\d+)\)", rejects["too-long"]).groups())
    assert total == prompt + answer > 400 > prompt
    assert (tmp_path / "out" / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize("script", (dpo, sft), ids=("dpo", "sft"))
def test_a_file_with_nothing_usable_ends_the_run_and_says_why(door, folder, tmp_path, script):
    for id in ("missing-image", "too-long"):
        record, why = BAD[id]
        if script is sft:                                                # it wants one answer, not two
            record = {"id": id, "image": record["image"], "conversations": [
                {"from": "human", "value": record["question"]}, {"from": "gpt", "value": record["rejected"]}]}
        path = write(folder / "prefs.jsonl", [record])
        code, said = door(script, data=path, max_length=400)
        assert code == 1 and f"{path}: no usable record" in said
        assert f"{id}: " in said and why in said and said.count(why) == 1
        assert not (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "reference.jsonl").exists()


def test_no_usable_pair_is_said_before_any_weight_is_read(door, folder, monkeypatch):
    judged = [{"text": "a", "scores": dict.fromkeys(("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 3)},
              {"text": "b"}]
    path = write(folder / "scored.jsonl", [{"id": "r", "images": [], "messages": [{"role": "user", "content": "Hi?"}],
                                            "answers": judged}])
    monkeypatch.setattr(dpo.checkpoint, "load", lambda *a, **k: pytest.fail("the weights were read"))
    code, said = door(dpo, data=path)
    assert code == 1 and f"{path}: no usable pair among 1 records" in said and "--gap 2" in said
    code, said = door(dpo, data=write(folder / "prefs.jsonl", [pair("a")]), holdout=0.9999)
    assert code == 1 and "no usable pair" in said and "--holdout 0.9999" in said


def test_a_record_without_answers_is_reported(door, folder):
    rows = [{"id": "mute", "images": [], "messages": [{"role": "user", "content": "Hi?"}]}, pair("good")]
    code, said = door(dpo, data=write(folder / "d.jsonl", rows), steps=0)
    assert code == 0 and "mute: has no answers" in said


@pytest.mark.parametrize("script", (dpo, sft), ids=("dpo", "sft"))
def test_data_that_is_not_there_or_not_readable_is_named(door, folder, script):
    (folder / "latin.json").write_bytes(b'[{"id": "\xe9"}]')
    (folder / "broken.json").write_text('[{"id": 1}, {]')
    (folder / "empty.jsonl").write_text("\n\n")
    for name, why in (("absent.jsonl", "No such file"), ("", "Is a directory"), ("latin.json", "malformed JSON array"),
                      ("broken.json", "malformed JSON array"), ("empty.jsonl", "no usable record")):
        code, said = door(script, data=folder / name)
        assert code == 1 and str(folder / name) in said and why in said, said


def test_without_data_a_script_asks_for_it(door, folder):
    code, said = door(sft)
    assert code == 1 and "--data is needed" in said
    code, said = door(dpo)
    assert code == 1 and "--data is needed" in said and "see formats.py" in said
    for values in ({"data": folder / "d.jsonl", "ckpt": None}, {}):      # a tiny checkpoint is not the miniature
        code, said = door(story, **values)
        assert code == 1 and "for dpo.py" in said


def test_records_with_images_need_a_checkpoint_with_eyes(door, folder, tmp_path):
    blind = tiny_checkpoint(tmp_path / "blind", "byte", text_only=True)
    rows = [pair("seen"), {k: v for k, v in pair("heard").items() if k != "image"}]
    code, said = door(dpo, ckpt=blind, data=write(folder / "d.jsonl", rows))
    assert code == 0 and "1 records usable, 1 rejected" in said and "seen: has images, but this checkpoint is text-only" in said


# ---- flags ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("flag, why", [
    (["--bta", "0.1"], "unrecognized arguments: --bta"), (["--dat", "x"], "unrecognized arguments: --dat"),
    (["--steps", "1.5"], "argument --steps: invalid int value: '1.5'"), (["--lr", "fast"], "argument --lr: invalid float"),
    (["--beta"], "argument --beta: expected one argument"), (["prefs.jsonl"], "unrecognized arguments: prefs.jsonl")],
    ids=lambda x: x[0] if isinstance(x, list) else "")
def test_an_unknown_flag_or_a_wrong_type_is_an_error(door, flag, why):
    code, said = door(dpo, *flag)
    assert code == 2 and why in said


@pytest.mark.parametrize("flag, value, why", [
    ("batch", 0, "--batch"), ("epochs", 0, "--epochs"), ("pack", -1, "--pack"), ("lr", -1.0, "--lr"), ("lr", "nan", "--lr"),
    ("lr", "inf", "--lr"), ("projector_lr", "nan", "--projector_lr"), ("warmup", "nan", "--warmup"), ("warmup", -1.0, "--warmup"),
    ("alpha", "inf", "--alpha"), ("seed", -1, "--seed"), ("max_length", -1, "--max_length"),
    ("dtype", "float8", "--dtype float8: choose one of float32"), ("device", "tpu9", "--device tpu9: ")])
def test_a_value_that_makes_no_sense_is_an_error(door, folder, flag, value, why):
    for script in (dpo, sft):
        code, said = door(script, data=write(folder / "d.jsonl", [pair("a")]), **{flag: value})
        assert code == 1 and why in said


@pytest.mark.parametrize("settings", (dpo.Settings, story.Settings, sft.Settings, evaluate.Settings),
                         ids=lambda s: s.__module__)
def test_help_says_of_every_flag_what_it_means_and_its_default(settings, capsys):
    with pytest.raises(SystemExit) as stop:
        common.flags(settings, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for field in dataclasses.fields(settings):
        shown = {bool: "[0|1]", tuple: "PATH [PATH ...]"}.get(field.type, field.type.__name__)
        note = text.split(f"--{field.name} {shown} ")[1].split("(default: ")
        assert len(note[0].strip()) > 5, f"--{field.name} has no comment"
        assert note[1].startswith(repr(field.default)), field.name


def test_bfloat16_on_a_cpu_is_not_silent(capsys):
    for dtype, expected in (("bfloat16", True), ("auto", False)):
        assert common.device_and_dtype("cpu", dtype)[1] == (torch.bfloat16 if expected else torch.float32)
        assert ("--dtype float32 is many times faster" in capsys.readouterr().err) == expected


def test_flags_fill_the_settings():
    s = common.flags(dpo.Settings, ["--lr", "1e-6", "--data", "x y.jsonl", "--steps=-1"])
    assert (s.lr, s.data, s.steps, s.beta) == (1e-6, "x y.jsonl", -1, 0.1)
    assert common.flags(dpo.Settings, []) == dpo.Settings()


# ---- checkpoints ---------------------------------------------------------------------------------

def change(folder, edit):
    path = folder / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def spoil_nan(weights):
    weights["language_model.model.norm.weight"][3] = torch.nan


def config(folder, old, new):
    text = (folder / "config.json").read_text()
    assert old in text
    (folder / "config.json").write_text(text.replace(old, new))


BROKEN = {
    "a missing key": (lambda f: change(f, lambda w: w.pop("language_model.model.norm.weight")),
                      "language_model.norm.weight: missing"),
    "an extra key": (lambda f: change(f, lambda w: w.update(stray=torch.ones(1))), "stray: extra"),
    "a wrong shape": (lambda f: change(f, lambda w: w.update({"language_model.model.norm.weight": torch.ones(65)})),
                      "misshapen: (65,), not (64,)"),
    "a NaN": (lambda f: change(f, spoil_nan), "language_model.model.norm.weight: not finite"),
    "8-bit floats": (lambda f: change(f, lambda w: w.update({k: x.to(torch.float8_e4m3fn) for k, x in w.items()})),
                     "language_model.lm_head.weight: quantized: torch.float8_e4m3fn"),
    "integers": (lambda f: change(f, lambda w: w.update({"language_model.model.norm.weight": torch.ones(64, dtype=torch.int8)})),
                 "language_model.model.norm.weight: quantized: torch.int8"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no *.safetensors and no *model*.bin"),
    "cut weights": (lambda f: os.truncate(f / "model.safetensors", 1000), "model.safetensors: cannot be read"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json in"),
    "a broken tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: cannot be read"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "a broken config": (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[1]"), "config.json must hold an object, and holds [1]"),
    "a config without a tower": (lambda f: config(f, '"vision_config"', '"vision"'),
                                 "config.json: vision_config is missing, but must be an object"),
    "a config with words": (lambda f: config(f, '"hidden_size": 64', '"hidden_size": [64]'), "config.json: text_config: hidden_size is [64], but must be a positive whole number"),
    "half a rope": (lambda f: config(f, '"rope_scaling": null', '"rope_scaling": {"rope_type": "linear"}'),
                    "text_config: factor is missing, but must be a positive number"),
    "no such layer": (lambda f: config(f, '"vision_feature_layer": -2', '"vision_feature_layer": -9'),
                      "vision_feature_layer -9 is not one of 3 layers"),
    "a list as weight_map": (lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": []}'),
                             "index.json: weight_map is [], but must be an object"),
    "a steer.json of nothing": (lambda f: (f / "steer.json").write_text("{}"),
                                "steer.json is damaged: text must name attributes in braces"),
    "a list as index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json must hold an object, and holds []"),
    "another model": (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "is neither LLaVA nor Llama"),
    "another image id": (lambda f: config(f, '"image_token_index": 4', '"image_token_index": 5'), "config.json says 5"),
}


@pytest.mark.parametrize("spoil, why", BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(door, folder, ckpt, tmp_path, spoil, why):
    mine = tmp_path / "mine"
    shutil.copytree(ckpt, mine)
    spoil(mine)
    code, said = door(dpo, ckpt=mine, data=write(folder / "d.jsonl", [pair("a")]))
    assert code == 1 and why in said and str(mine) in said, said
    assert not (tmp_path / "out" / "model").exists()


def test_a_ckpt_that_is_no_folder_is_refused(door, folder):
    for ckpt in (folder / "nowhere", folder / "good.png"):
        code, said = door(dpo, ckpt=ckpt, data=write(folder / "d.jsonl", [pair("a")]))
        assert code == 1 and f"--ckpt {ckpt}: no such folder" in said


# ---- files and machines --------------------------------------------------------------------------

def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep" / "rows.jsonl"
    common.write_jsonl(path, [{"text": "Grüße\u2028 🙂"}, {"n": 1}])
    assert common.read_jsonl(path) == [{"text": "Grüße\u2028 🙂"}, {"n": 1}]

    def power_cut(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", power_cut)
    with pytest.raises(KeyboardInterrupt):
        common.write_jsonl(path, [{"half": True}])
    assert common.read_jsonl(path) == [{"text": "Grüße\u2028 🙂"}, {"n": 1}]


def test_an_interrupted_run_says_so_and_fails(door, folder, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(dpo, "train", interrupt)
    code, said = door(dpo, data=write(folder / "d.jsonl", [pair("a")]))
    assert code == 1 and "interrupted" in said


def test_letters_that_a_terminal_does_not_know_are_no_trouble(monkeypatch):
    said = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["dpo.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(said, "ascii"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf8"))
    common.main(dpo.Settings, lambda s: print(f"Grüße, {input()}", flush=True))
    assert said.getvalue() == b"Gr\\xfc\\xdfe, caf\\ufffd\n"


def test_a_machine_without_git_can_run(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert common.describe_run(dpo.Settings())["commit"] == "unknown"


def test_hashes_tell_where_one_part_ends():
    assert common.sha("ab", "c") != common.sha("a", "bc") != common.sha("abc") and common.sha("a", b"b") == common.sha("a", "b")


# ---- the real thing ------------------------------------------------------------------------------

@pytest.mark.skipif(not os.environ.get("SLOW"), reason="processes of their own; SLOW=1 runs it")
def test_the_command_line_from_another_folder(ckpt, folder, tmp_path):
    """One run that goes well and one that cannot: exit codes 0 and 1, and never a traceback."""
    data = write(folder / "prefs.jsonl", [pair("good-1"), pair("missing-image", "absent.jpg")])
    commands = ([ROOT / "dpo.py", "--ckpt", ckpt, "--data", "data/prefs.jsonl", "--steps", "1", "--device", "cpu"],
                [ROOT / "sft.py", "--ckpt", "nowhere", "--data", data])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([sys.executable, *argv], cwd=tmp_path, **pipes) for argv in commands]
    (said, problem), (nothing, why) = (process.communicate() for process in started)
    good, bad = (process.returncode for process in started)
    assert good == 0 and "Traceback" not in problem, problem
    assert "1 records usable, 1 rejected" in said and "missing-image: " in said and "absent.jpg" in said
    assert "step-0 contract holds" in said and (tmp_path / "runs" / "dpo" / "model" / "config.json").is_file()
    assert bad == 1 and nothing == "" and why.startswith("sft.py: --ckpt nowhere: no such folder. A model of the hub")


# ---- what a mutation showed untested -------------------------------------------------------------

def test_a_switch_is_on_off_or_an_error(capsys):
    on = [common.flags(annotate.Settings, argv).pairs for argv in ([], ["--pairs"], ["--pairs", "1"], ["--pairs", "0"])]
    assert on == [False, True, True, False]
    with pytest.raises(SystemExit):
        common.flags(annotate.Settings, ["--pairs", "yes"])
    assert "--pairs" in capsys.readouterr().err


WRITERS = {"dpo": (dpo, {}), "sft": (sft, {}), "annotate": (annotate, {"n": 2, "max_new": 2, "steps": None}),
           "evaluate": (evaluate, {"bench": "miniature", "steps": None})}


@pytest.mark.parametrize("name", WRITERS)
def test_a_folder_that_another_process_writes_is_refused(door, folder, name, ckpt, tmp_path):
    script, more = WRITERS[name]
    out = tmp_path / "taken"
    here = out / slug(str(ckpt)) if name == "evaluate" else out
    here.mkdir(parents=True)
    row = {"id": "a", "messages": [{"role": "user", "content": "what color is the circle ?"}]} if name == "annotate" else pair("a")
    data = {} if name == "evaluate" else {"data": write(folder / "d.jsonl", [row])}
    with open(here / "lock", "w") as other:                              # another open file is like another process's
        fcntl.flock(other, fcntl.LOCK_EX)
        code, said = door(script, out=out, **data, **more)
    assert code == 1 and f"{here} is being written by another process; wait for it, or choose another --out" in said
    assert {path.name for path in here.iterdir()} <= {"lock", "rejects.jsonl"}
