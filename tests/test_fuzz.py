"""Whatever stands in a file, the end is a result or a message: no other exception, no hang, every row accounted for.

    python -m pytest tests/test_fuzz.py -q

Every mutation has a seed of its own, which a failure names. A timer turns a hang into a failure.
"""
import json
import random
import shutil
import signal

import pytest

import checkpoint
import evaluate
import formats
from common import BadInput
from conftest import picture, tiny_checkpoint
from data import Tokens
from journal import Journal
from judge.client import Replies
from test_evaluate_scores import STORED

ROWS, CONFIGS, FILES, JOURNALS = 2000, 500, 300, 200
ODD = [None, "", " ", 0, -1, 1.5, True, float("nan"), float("inf"), 10**40, [], {}, [None], [[]], {"a": {}}, "x" * 2000, "\ud800", "\x1b[2J", "<image>",
       "<|im_end|>", "{'a': 1}", "[1, 2", "../../etc/passwd", "data:image/png;base64,AAAA"]


@pytest.fixture(autouse=True)
def no_hang():
    def rings(*_):
        raise TimeoutError("it hangs")
    before = signal.signal(signal.SIGALRM, rings)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def deep(rng):
    found = "x"
    for _ in range(rng.choice((60, 300))):
        found = [found] if rng.random() < 0.5 else {"a": found}
    return found


def mutated(value, rng):
    """One place of a JSON value changed: replaced, removed, renamed, doubled, or hung deep."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        found = dict(value)
        key = rng.choice(list(found))
        how = rng.randrange(6)
        if how == 0:
            del found[key]
        elif how == 1:
            found[rng.choice(("image_path", "img", "rejected_x", "system", "tools", "answer", "text", key + "_2"))] = found.pop(key)
        elif how == 2:
            found[key] = rng.choice(ODD)
        elif how == 3:
            found[key] = json.dumps(found[key], default=str)
        else:
            found[key] = mutated(found[key], rng)
        return found
    if isinstance(value, list) and value and rng.random() < 0.8:
        found = list(value)
        k = rng.randrange(len(found))
        how = rng.randrange(4)
        if how == 0:
            del found[k]
        elif how == 1:
            found.append(found[k])
        else:
            found[k] = mutated(found[k], rng)
        return found
    return deep(rng) if rng.random() < 0.03 else rng.choice(ODD)


def broken(text: str, rng) -> bytes:
    """Now and then a byte is wrong, or the end is gone."""
    data = text.encode("utf8", "surrogatepass")
    how = rng.random()
    if how < 0.05:
        return data[:rng.randrange(len(data) + 1)]
    if how < 0.1:
        k = rng.randrange(len(data))
        return data[:k] + bytes([rng.randrange(256)]) + data[k + 1:]
    return data


SHAPES = [
    {"id": "a", "images": ["a.png"], "messages": [{"role": "user", "content": "<image>\nWhat?"}], "answers": [{"text": "one"}, {"text": "two"}], "pair": [0, 1]},
    {"id": "b", "image": "a.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "This."}]},
    {"image": "a.png", "question": {"from": "human", "value": "What?"}, "chosen": {"from": "gpt", "value": "one"}, "rejected": {"from": "gpt", "value": "two"}},
    {"images": ["a.png"], "prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
     "chosen": [{"role": "assistant", "content": "one"}], "rejected": [{"role": "assistant", "content": "two"}]},
    {"image": {"bytes": "iVBORw0KGgo=", "path": "a.png"}, "text": json.dumps({"question": "What?", "chosen": "one", "rejected": "two"}), "idx": 3},
    {"images": ["a.png"], "messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "one"}], "rejected_response": "two", "system": "Be brief."},
    {"image": "a.png", "conversations": [{"from": "human", "value": "What?"}], "output_1": {"from": "llava", "value": "one"}, "output_2": {"from": "llava", "value": "two"}, "preference": 1},
    {"q_a_pairs": [["What?", "one"], ["And?", "two"]], "image_file": "a.png"},
    {"instruction": "Say it.", "input": "now", "output": "one", "history": [["a", "b"]]},
]


def test_rows(tmp_path):
    picture(20, 10).save(tmp_path / "a.png")
    for seed in range(ROWS // 100):
        lines = []
        for k in range(100):
            rng = random.Random(f"row {seed}/{k}")
            row = rng.choice(SHAPES)
            for _ in range(rng.randrange(1, 4)):
                row = mutated(row, rng)
            lines.append(broken(json.dumps(row), rng).replace(b"\n", b" ").strip() or b"{}")
        path = tmp_path / "d.jsonl"
        path.write_bytes(b"{}\n" + b"\n".join(lines) + b"\n")            # so that the first line never tells another kind of file
        records, rejects = formats.read(path, out=tmp_path / "out")
        assert len(records) + len(rejects) >= 101, seed
        assert all(len(reject["reason"]) < 1200 for reject in rejects), seed
        json.dumps(records, ensure_ascii=False).encode()


DOCUMENTS = ["config.json", "tokenizer.json", "template.json", "steer.json", "adapter_config.json", "model.safetensors.index.json"]


def test_configs(tmp_path):
    good = tiny_checkpoint(tmp_path / "good", "byte")
    (good / "template.json").write_text(json.dumps({"name": "vicuna_v1"}))
    originals = {name: json.loads((good / name).read_text()) for name in DOCUMENTS if (good / name).exists()}
    originals["adapter_config.json"] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(good)}
    originals["model.safetensors.index.json"] = {"weight_map": {"a": "model.safetensors"}}
    originals["steer.json"] = {"form": "helpfulness {helpfulness}", "grades": "0 1 2 3 4", "target": {"helpfulness": 4}}
    for seed in range(CONFIGS):
        rng = random.Random(f"config {seed}")
        folder = tmp_path / "c"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        name = rng.choice([*originals, "config.json", "config.json"])
        document = originals[name]
        for _ in range(rng.randrange(1, 4)):
            document = mutated(document, rng)
        (folder / name).write_bytes(broken(json.dumps(document), rng))
        try:
            config, _ = checkpoint.read_config(folder)
            Tokens(folder, config)
            checkpoint.load(folder)
        except BadInput as problem:
            assert str(problem), seed
        except Exception as problem:
            raise AssertionError(f"seed {seed}, {name}: {problem!r}") from problem


def test_stored_files(tmp_path):
    for seed in range(FILES):
        rng = random.Random(f"stored {seed}")
        name = rng.choice(list(STORED))
        rows = [STORED[name] | {"model": "m"} for _ in range(3)]
        for _ in range(rng.randrange(1, 4)):
            rows = mutated(rows, rng)
        path = tmp_path / rng.choice(("x.json", "x.jsonl"))
        path.write_bytes(broken(json.dumps(rows), rng))
        try:
            found = evaluate.stored_judgments(evaluate.Settings(bench=name, judgments=str(path)), name)
            assert "NaN" not in json.dumps(found), seed
        except BadInput as problem:
            assert str(problem), seed
        except Exception as problem:
            raise AssertionError(f"seed {seed}, {name}: {problem!r}") from problem


def test_journals(tmp_path):
    good = {"key": "k", "id": "a", "final": True, "time": 1.0, "state": "ok", "text": "x", "reason": "", "version": "v", "usage": {"prompt": 3}, "again": False}
    for seed in range(JOURNALS):
        rng = random.Random(f"journal {seed}")
        rows = [good, good | {"key": "l", "final": False}, mutated(good, rng)]
        rng.shuffle(rows)
        path = tmp_path / f"{seed}.jsonl"
        path.write_bytes(b"".join(broken(json.dumps(row), rng) + b"\n" for row in rows))
        for kind in (Replies, Journal):
            try:
                kind(path).close()
            except BadInput as problem:
                assert "is damaged; remove that line" in str(problem), seed
            except Exception as problem:
                raise AssertionError(f"seed {seed}: {problem!r}") from problem
