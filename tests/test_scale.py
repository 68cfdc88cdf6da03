"""Any number of records: what waits in memory of each is its tokens, and little else.

    python -m pytest tests/test_scale.py -q
"""
import os
import gc
import json
import tracemalloc

import pytest

import dpo
import formats
import sft
from conftest import tiny_checkpoint


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("scale") / "tiny", "byte")


def write_pairs(folder, count):
    """Pairs without pictures, as text."""
    folder.mkdir(exist_ok=True)
    path = folder / "data.jsonl"
    with open(path, "w") as file:
        for k in range(count):
            question = {"role": "user", "content": f"What is {k} and {k}?"}
            answers = [{"text": f"{2 * k} it is."}, {"text": "no"}]
            record = {"id": f"r{k}", "messages": [question], "answers": answers, "pair": [0, 1]}
            file.write(json.dumps(record) + "\n")
    return path


def test_lines_are_read_one_after_another_and_pictures_a_few_records_ahead(tmp_path, monkeypatch):
    path = write_pairs(tmp_path, 50)
    with open(path, "ab") as file:
        file.write(path.read_bytes().splitlines(keepends=True)[0])
    looked, real = [], formats.check_images
    monkeypatch.setattr(formats, "AT_ONCE", 16)
    monkeypatch.setattr(formats, "check_images", lambda record, *a: looked.append(record["id"]) or real(record, *a))

    found = formats.stream(path)
    first = next(found)[0]
    assert len(looked) == 16
    names = [first] + [name for name, _ in found]
    assert names == [f"r{k}" for k in range(50)] + ["r0#2"], "in order, and what came long ago is still known"


def peak(script, ckpt, folder, count) -> int:
    """Bytes of Python's own objects at a run's worst moment; tensors are not among them."""
    data = write_pairs(folder / str(count), count)
    settings = script.Settings(ckpt=str(ckpt), data=str(data), out=str(folder / f"out-{count}"),
                               device="cpu", batch=4, steps=1)
    gc.collect()
    tracemalloc.start()
    script.run(settings)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("script", [dpo, pytest.param(sft, marks=pytest.mark.skipif(not os.environ.get("SLOW"), reason="SLOW=1 runs it"))])
def test_a_record_more_is_some_hundred_bytes_more(ckpt, tmp_path, monkeypatch, script):
    """As lists of integers its 60 tokens alone would be two kilobytes, and its text as much again."""
    monkeypatch.setattr(formats, "AT_ONCE", 16)
    peak(script, ckpt, tmp_path, 20)                     # what is made once
    few, many = peak(script, ckpt, tmp_path, 50), peak(script, ckpt, tmp_path, 150)
    assert many - few < 100 * 1600, f"{(many - few) / 100:.0f} bytes for each record more"
