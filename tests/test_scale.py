"""Any number of records: they stand on the disk, and memory holds a few of them.

    python -m pytest tests/test_scale.py -q
"""
import gc
import json
import os
import random
import resource
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import pytest

import dpo
import formats as records
import sft
from common import BadInput, OnDisk
from conftest import tiny_checkpoint


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("scale") / "tiny", "byte")


# ---- the sequence ------------------------------------------------------------------------------------------------

def test_what_is_put_on_the_disk_comes_back_in_order_and_is_no_file_that_anyone_sees(tmp_path):
    rng = random.Random(0)
    items = [{"id": k, "x": [rng.random()] * rng.randint(0, 50)} for k in range(200)]
    kept = OnDisk(tmp_path / "run", items)
    assert not list((tmp_path / "run").iterdir()) and len(kept) == 200 and list(kept) == items == list(kept)
    kept.append("last")
    assert kept[-1] == "last" and kept[0] == items[0] and kept[-201] == items[0]
    for k in (201, -202):
        with pytest.raises(IndexError):
            kept[k]
    assert list(OnDisk(tmp_path)) == []


def test_every_look_makes_the_item_anew(tmp_path):
    kept = OnDisk(tmp_path, [[1]])
    kept[0].append(2)
    assert kept[0] == [1]


def test_many_threads_may_look_at_once(tmp_path):
    kept = OnDisk(tmp_path, ([k] * (k % 97) for k in range(2000)))
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(kept.__getitem__, range(2000))) == [[k] * (k % 97) for k in range(2000)]


def test_its_room_is_given_back_with_the_last_reference(tmp_path):
    open_files = lambda: len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    gc.collect()                                                         # what earlier tests left
    before = open_files()
    for _ in range(50):
        OnDisk(tmp_path, [1])
    gc.collect()
    assert open_files() == before


def test_a_full_disk_is_an_error_that_names_the_folder(tmp_path):
    """A limit on the size of files, the operating system's own, stands for the disk's end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        for size in (1000, 60_000):                                      # the last one is cut, or none of it is written
            with pytest.raises(OSError) as error:
                OnDisk(tmp_path, (b"x" * size for _ in range(99)))
            assert error.value.filename == str(tmp_path) and error.value.strerror
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# ---- reading ------------------------------------------------------------------------------------------------------

def lines(folder, count, answers=2, start=0):
    """Pairs without pictures, as text."""
    folder.mkdir(exist_ok=True)
    rows = ({"id": f"r{k}", "messages": [{"role": "user", "content": f"What is {k} and {k}?"}],
             "answers": [{"text": f"{2 * k} it is."}, {"text": "no"}], "pair": [0, 1]} for k in range(start, start + count))
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_lines_are_read_one_after_another_and_pictures_a_few_records_ahead(tmp_path, monkeypatch):
    """The file's end is damaged: who had read it before the first record came would have said so."""
    path, looked, real = lines(tmp_path, 5000), [], records.check_images
    with open(path, "ab") as f:
        f.write(b"\xe9\n")
    monkeypatch.setattr(records, "check_images", lambda record, *a: looked.append(record["id"]) or real(record, *a))
    found = records.stream(path)
    assert next(found)[0] == "r0" and len(looked) == records.AT_ONCE < 5000
    with pytest.raises(BadInput, match="not UTF-8"):
        list(found)
    assert len(looked) < 5000


def test_records_come_in_the_files_order_beyond_what_is_looked_at_at_once(tmp_path, monkeypatch):
    path = lines(tmp_path, 50)
    whole = records.read(path)
    monkeypatch.setattr(records, "AT_ONCE", 7)
    assert records.read(path) == whole and [r["id"] for r in whole[0]] == [f"r{k}" for k in range(50)]


def test_an_id_that_came_thousands_of_records_ago_is_still_known(tmp_path):
    path = lines(tmp_path, 3000)
    with open(path, "a") as f:
        f.write(path.read_text().splitlines()[0] + "\n")
    assert records.read(path)[1] == [{"id": "r0", "reason": "a record with this id came before"}]


# ---- a run ----------------------------------------------------------------------------------------------------------

def peak(script, ckpt, data, out, **changes) -> int:
    """Bytes of Python's own objects at a run's worst moment; tensors are not among them."""
    gc.collect()
    tracemalloc.start()
    script.run(script.Settings(ckpt=str(ckpt), data=str(data), out=str(out), device="cpu", batch=4, steps=2, **changes))
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return most


@pytest.mark.parametrize("script, changes", [(dpo, {"holdout": 0.3}), (sft, {})], ids=["dpo", "sft"])
def test_a_record_more_is_some_bytes_more_whatever_it_holds(ckpt, tmp_path, monkeypatch, script, changes):
    """As lists they would be some kilobytes each. What is left: where each stands in the file, and a hash of its id."""
    monkeypatch.setattr(records, "AT_ONCE", 16)
    monkeypatch.setattr(dpo, "AT_ONCE", 16)
    peak(script, ckpt, lines(tmp_path / "data", 20), tmp_path / "warm", **changes)
    few, many = (peak(script, ckpt, lines(tmp_path / "data", count), tmp_path / str(count), **changes) for count in (100, 400))
    assert many - few < 300 * 150, f"{(many - few) / 300:.0f} bytes for each record more"
