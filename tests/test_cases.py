"""Inputs that real people have: each folder below tests/cases says in expect.json what becomes of its rows.

    python -m pytest tests/test_cases.py -q
    REMEDY_CASES=DIR python -m pytest ...        also the folders below DIR, of the same form

    "want": {id: {"same_as": {images, messages, answers, pair}, "or_refused": a regex}}
"""
import json
import os
import re
import shutil
from pathlib import Path

import PIL
import pytest

import checkpoint
import evaluate
import formats
from common import BadInput
from conftest import picture, tiny_checkpoint
from data import Tokens
from journal import journal_rows
from judge.client import Replies
from vision import load_image

HERE = Path(__file__).parent / "cases"
PLACES = [HERE] + [Path(name) for name in [os.environ.get("REMEDY_CASES", "")] if name]
FOLDERS = {path.parent.name: path.parent for place in PLACES for path in sorted(place.glob("*/expect.json"))}


@pytest.mark.parametrize("name", FOLDERS)
def test_rows_become_what_their_folder_says_or_are_refused_by_name(name, tmp_path):
    folder = Path(shutil.copytree(FOLDERS[name], tmp_path / name))
    expected = json.loads((folder / "expect.json").read_text())
    records, rejects = formats.read(folder / expected["file"], out=tmp_path / "out")
    found = {record["id"]: record for record in records}
    reasons = {reject["id"]: reject["reason"] for reject in rejects}
    assert found or reasons
    for id, reason in reasons.items():
        assert len(reason) < 300 and reason.isprintable(), (id, reason)
    for id, want in (expected["want"] or {}).items():
        if id in found:
            record = found[id]
            texts = [{"text": answer["text"]} for answer in record["answers"]]
            assert want["same_as"] == {"images": record["images"], "messages": record["messages"], "answers": texts, "pair": record["pair"]}, id
        else:
            assert "or_refused" in want and re.search(want["or_refused"], reasons[id], re.I), (id, reasons.get(id))


# ---- cases that a sentence describes -----------------------------------------------------------------------------

COMMANDS = [line for line in (HERE / "evaluate-null-values/commands.txt").read_text().splitlines() if line.startswith("--")]
NAMED = re.compile(r"(row [\w ]+|question \d+|must be one object)")
SCORED = ("pope_fewer", "alp_weighted")                                  # answers are missing, and counted; nothing is wrong


def flags(line):
    words = line.split()
    return {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}


@pytest.mark.parametrize("line", COMMANDS)
def test_null_nan_lists_and_strings_in_stored_files_are_named_or_counted(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE / "evaluate-null-values")
    scored = any(name in line for name in SCORED)
    try:
        evaluate.run(evaluate.Settings(out=str(tmp_path), **flags(line)))
        assert scored
    except BadInput as problem:
        assert scored or NAMED.search(str(problem)), problem
        assert "--retry_failed" not in str(problem), "nobody was asked"
    assert not re.search(r"\bnan\b", capsys.readouterr().out.lower())


ODD = {
    "mt-bench-odd": [("--bench mt_bench --answers one.jsonl --data_dir one", "question 1 has not two turns"),
                     ("--bench mt_bench --answers error.jsonl --data_dir two", "mt_bench 50.0%"),
                     ("--bench mt_bench --judgments pair.jsonl", "row 1: judgment is missing")],
    "mm-vet-odd": [("--bench mm_vet --answers ans.json --data_dir DATA", "v1_1 is null"),
                   ("--bench mm_vet --judgments grade_flat.json --data_dir DATA", "row v1_0: content is missing"),
                   ("--bench mm_vet --judgments grade_none.json --data_dir DATA", "row v1_2: score is")],
    "pope-answers": [("--bench pope --answers own.json --data_dir DATA", "need its name")],
    "hostile": [("--bench mt_bench --judgments stored_judgments/x.json", "row 1: judgment is 5")],
}


@pytest.mark.parametrize("folder, line, why", [(folder, *case) for folder, cases in ODD.items() for case in cases])
def test_odd_benchmark_files_have_a_reason(folder, line, why, tmp_path, monkeypatch):
    monkeypatch.chdir(HERE / folder)
    with pytest.raises(BadInput, match=re.escape(why)):
        evaluate.run(evaluate.Settings(out=str(tmp_path), **flags(line)))


@pytest.mark.parametrize("labels", ["DATA", "CAP"])
def test_pope_labels_and_answers_in_any_case_give_f1(labels, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE / "pope-answers")
    evaluate.run(evaluate.Settings(bench="pope", answers="llava.jsonl", data_dir=labels, out=str(tmp_path)))
    assert re.search(r"F1 +0\.800 +12 +100\.0%", capsys.readouterr().out)


def test_deep_json_is_one_message(tmp_path):
    (tmp_path / "x.json").write_text("[" * 100_000)
    with pytest.raises(BadInput, match="cannot be read as JSON"):
        evaluate.run(evaluate.Settings(bench="mt_bench", judgments=str(tmp_path / "x.json"), out=str(tmp_path)))


def test_one_bad_byte_and_a_deep_field_cost_their_own_record():
    records, rejects = formats.read(copied("one_bad_byte"))
    assert len(records) == 3 and [reject["id"] for reject in rejects] == ["line 3"]
    records, rejects = formats.read(copied("deep_extra_field"))
    assert len(records) == 1 and "nested" in rejects[0]["reason"]


def copied(name):
    """A hostile case's records, less their pictures."""
    return HERE / "hostile" / name / "data.jsonl"


def test_escapes_reach_no_terminal(capsys):
    path = copied("terminal_escapes")
    records, rejects = formats.read(path)
    formats.report(path, len(records), rejects, None)
    assert "\x1b" not in capsys.readouterr().out


def test_who_repeats_an_id_in_messages_is_kept_and_numbered():
    records, rejects = formats.read(HERE / "duplicate-ids-messages/data.jsonl")
    assert rejects == [] and any(record["id"].endswith("#2") for record in records)


def test_odd_answers_have_reasons():
    records, rejects = formats.read(HERE / "answers-odd/data.jsonl")
    assert rejects and all(reject["reason"] for reject in rejects)


UNREADABLE = {"f.tif", "trunc.jpg", "empty.jpg", "html.jpg", "heic.heic"}     # no viewer shows these whole, or nothing says what is white


def test_every_picture_that_a_viewer_shows_is_read_upright_and_in_its_colours():
    folder = HERE / "picture-kinds"
    records, rejects = formats.read(folder / "data.jsonl")
    older = {"ycc.tif"} if int(PIL.__version__.split(".")[0]) < 13 else set()    # Pillow 12.3, Python 3.10's last, cannot
    assert {reject["id"] for reject in rejects} == UNREADABLE | older
    for record in records:
        [name] = record["images"]
        image = load_image(folder / name)
        assert image.mode == "RGB"
        if name.startswith("exif"):
            turned = name in ("exif6.jpg", "exif_orient_two.jpg") or image.size != (60, 40)
            assert image.size == ((40, 60) if turned else (60, 40)), name


@pytest.mark.parametrize("name", ["steer_attribute", "steer_brace", "steer_unknown"])
def test_a_steer_json_of_another_form_is_damaged(name, tmp_path):
    folder = tiny_checkpoint(tmp_path / "tiny", "byte")
    shutil.copy(HERE / "hostile" / name / "steer.json", folder / "steer.json")
    with pytest.raises(BadInput, match="steer.json"):
        Tokens(folder, checkpoint.read_config(folder)[0])


def test_a_journal_row_without_its_fields_is_named():
    with pytest.raises(BadInput, match="line 1 is damaged; remove that line"):
        list(journal_rows(HERE / "hostile/journal_row_without_fields/journal.jsonl", Replies.fields))


def test_a_data_file_that_is_a_link_and_a_snapshot_of_links(tmp_path):
    """Links do not survive every way to copy a folder, so they are made here."""
    row = {"id": "a", "image": "images/a.jpg", "question": "What?", "chosen": "a b", "rejected": "c"}
    shared, proj, blobs, snapshot = (tmp_path / name for name in ("shared", "proj", "blobs", "snapshots/abc"))
    for folder in (shared, proj / "images", blobs, snapshot / "images"):
        folder.mkdir(parents=True)
    (shared / "prefs.jsonl").write_text(json.dumps(row))
    picture(20, 10).save(proj / "images/a.jpg")
    (proj / "prefs.jsonl").symlink_to("../shared/prefs.jsonl")
    assert formats.read(proj / "prefs.jsonl")[1] == []

    shutil.copy(shared / "prefs.jsonl", blobs / "data")
    shutil.copy(proj / "images/a.jpg", blobs / "1f0e")
    (snapshot / "data.jsonl").symlink_to("../../blobs/data")
    (snapshot / "images/a.jpg").symlink_to("../../../blobs/1f0e")
    [reject] = formats.read(snapshot / "data.jsonl")[1]
    assert "--follow_links" in reject["reason"]
    assert formats.read(snapshot / "data.jsonl", follow_links=True)[1] == []


def test_embedded_pictures_have_one_short_reason_each(tmp_path):
    name = "iVBORw0KGgo" * 20_000
    rows = [{"id": str(k), "image": image, "question": "What?", "chosen": "a b", "rejected": "c"}
            for k, image in enumerate([name, f"data:image/png;base64,{name}", "https://example.org/a.jpg", "file:///a.jpg"])]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records, rejects = formats.read(tmp_path / "d.jsonl")
    assert not records and all(len(reject["reason"]) < 200 and "not a file name" in reject["reason"] for reject in rejects)


# ---- no case without a test --------------------------------------------------------------------------------------

GUARDS = {                                                               # what is not a table of rows has a test of its own
    "answers-odd": "test_cases.py::test_odd_answers_have_reasons",
    "data-file-link": "test_cases.py::test_a_data_file_that_is_a_link_and_a_snapshot_of_links",
    "hub-snapshot-symlinks": "test_cases.py::test_a_data_file_that_is_a_link_and_a_snapshot_of_links",
    "duplicate-ids-messages": "test_cases.py::test_who_repeats_an_id_in_messages_is_kept_and_numbered",
    "evaluate-null-values": "test_cases.py::test_null_nan_lists_and_strings_in_stored_files_are_named_or_counted",
    "image-base64": "test_cases.py::test_embedded_pictures_have_one_short_reason_each",
    "judge-schema-refused": "test_judge.py::test_a_refusal_that_names_no_field_is_answered_without_the_schema",
    "llava-lora-non_lora_trainables": "test_lora.py::test_llava_s_own_lora_folder_is_read_with_its_projector",
    "mm-vet-odd": "test_cases.py::test_odd_benchmark_files_have_a_reason",
    "mt-bench-odd": "test_cases.py::test_odd_benchmark_files_have_a_reason",
    "picture-kinds": "test_cases.py::test_every_picture_that_a_viewer_shows_is_read_upright_and_in_its_colours",
    "pope-answers": "test_cases.py::test_pope_labels_and_answers_in_any_case_give_f1",
    "hostile/calls_log_torn": "test_judge.py::test_a_torn_last_line_is_cut_off_and_a_damaged_one_is_named",
    "hostile/config_types": "test_checkpoint.py::test_a_field_of_another_type_is_named",
    "hostile/deep_extra_field": "test_cases.py::test_one_bad_byte_and_a_deep_field_cost_their_own_record",
    "hostile/disk_full_at_the_end": "test_resume.py::test_a_disk_that_is_full_at_the_end_loses_no_training",
    "hostile/eps_as_image": "test_vision.py::test_a_picture_starts_no_program",
    "hostile/fifo_as_image": "test_formats.py::test_a_missing_image_is_named",
    "hostile/grade_given_twice": "test_judge.py::test_a_grade_that_is_given_twice_counts_for_nothing",
    "hostile/headers_in_drips": "test_judge.py::test_headers_that_never_end_are_given_up",
    "hostile/journal_row_without_fields": "test_cases.py::test_a_journal_row_without_its_fields_is_named",
    "hostile/json_too_deep": "test_cases.py::test_deep_json_is_one_message",
    "hostile/mtbench_07": "test_evaluate_scores.py::test_mt_bench_error_is_no_answer_and_odd_grades_are_read",
    "hostile/one_bad_byte": "test_cases.py::test_one_bad_byte_and_a_deep_field_cost_their_own_record",
    "hostile/reproduce_orphans": "test_reproduce.py::test_workers_end_with_the_process_that_started_them_even_killed",
    "hostile/steer_attribute": "test_cases.py::test_a_steer_json_of_another_form_is_damaged",
    "hostile/steer_brace": "test_cases.py::test_a_steer_json_of_another_form_is_damaged",
    "hostile/steer_unknown": "test_cases.py::test_a_steer_json_of_another_form_is_damaged",
    "hostile/stored_judgments": "test_cases.py::test_odd_benchmark_files_have_a_reason",
    "hostile/strip_cropped": "test_vision.py::test_a_strip_takes_no_gigabytes",
    "hostile/terminal_escapes": "test_cases.py::test_escapes_reach_no_terminal",
    "hostile/tokenizer_beyond_the_weights": "test_data.py::test_words_beyond_the_weights_are_refused_at_the_door",
    "hostile/two_at_once": "test_door.py::test_a_folder_that_another_process_writes_is_refused",
    "hostile/umask_077": "test_checkpoint.py::test_no_file_is_more_open_than_the_umask_says",
}


def case_names():
    found = set(GUARDS)
    for place in PLACES:
        found |= {path.name for path in place.iterdir() if path.is_dir() and path.name != "hostile"}
        found |= {f"hostile/{path.name}" for path in place.glob("hostile/*/")}
    return sorted(found)


@pytest.mark.parametrize("name", case_names())
def test_every_case_has_its_test(name):
    if name in FOLDERS:
        return                                                           # run above
    file, test = GUARDS[name].split("::")
    assert f"\ndef {test}(" in (Path(__file__).parent / file).read_text()
