"""One record, whatever the file: every accepted shape becomes it, and nothing is dropped without a reason.

    python -m pytest tests/test_formats.py -q
"""
import gzip
import io
import json
import os
import sys
from collections import Counter

import pytest

import dpo
import formats
import vision
from common import BadInput
from conftest import picture, tiny_checkpoint

QUESTION, GOOD, BAD = "What color is the circle?", "The circle is red.", "There is no circle."
RECORD = {"id": "r", "images": ["a.png"], "messages": [{"role": "user", "content": f"<image>\n{QUESTION}"}],
          "answers": [{"text": GOOD}, {"text": BAD}], "pair": [0, 1]}
SCORES = {"helpfulness": 4, "correctness": 0, "coherence": 3, "complexity": 1, "verbosity": 2}


@pytest.fixture
def folder(tmp_path):
    """A data folder with two pictures in it."""
    (tmp_path / "data").mkdir()
    picture(20, 10, seed=1).save(tmp_path / "data" / "a.png")
    picture(10, 20, seed=2).save(tmp_path / "data" / "b.jpg")
    return tmp_path / "data"


def write(folder, raws, array=False, name="data.json"):
    text = json.dumps(raws) if array else "".join(json.dumps(r) + "\n" for r in raws)
    (folder / name).write_text(text, encoding="utf8")
    return folder / name


def read(folder, *raws, **kw):
    return formats.read(write(folder, raws, **kw))


def reason(folder, raw) -> str:
    """Why the only record of a file is rejected; also checks that it was."""
    kept, rejects = read(folder, raw)
    assert kept == [] and len(rejects) == 1, (kept, rejects)
    assert rejects[0]["id"] == str(raw.get("id", "data-000001"))
    return rejects[0]["reason"]


def turns(*contents):
    """Alternating messages, the first one the user's."""
    return [{"role": ("user", "assistant")[k % 2], "content": c} for k, c in enumerate(contents)]


# ---- every accepted shape ------------------------------------------------------------------------

def said(text):
    return [{"role": "assistant", "content": text}]


PREFERENCES = {
    "ours": RECORD,
    "the authors'": {"id": "r", "image": "a.png", "question": {"from": "human", "value": f"<image>\n{QUESTION}"},
                     "chosen": {"from": "gpt", "value": GOOD}, "rejected": {"from": "gpt", "value": BAD},
                     "ref_win_logp": -12.5, "ref_rej_per_token_logp": [-1.0, -2.0]},
    "TRL, explicit prompt": {"id": "r", "images": ["a.png"], "prompt": turns(f"<image>\n{QUESTION}"),
                             "chosen": said(GOOD), "rejected": said(BAD)},
    "TRL, implicit prompt": {"id": "r", "images": ["a.png"], "chosen": turns(f"<image>\n{QUESTION}", GOOD),
                             "rejected": turns(f"<image>\n{QUESTION}", BAD)},
    "TRL, content in parts": {
        "id": "r", "images": ["a.png"],
        "prompt": [{"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]}],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": BAD}]}]},
    "TRL, plain strings": {"id": "r", "images": ["a.png"], "prompt": f"<image>\n{QUESTION}", "chosen": GOOD, "rejected": BAD},
    "TRL, marker left out": {"id": "r", "images": ["a.png"], "prompt": turns(QUESTION), "chosen": said(GOOD),
                             "rejected": said(BAD)},
    "RLHF-V": {"idx": "r", "image_path": "a.png", "question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "RLHF-V on the hub": {"idx": "r", "image": "a.png", "ds_name": "RLHF-V", "origin_split": "{}",
                          "text": json.dumps({"question": QUESTION, "chosen": GOOD, "rejected": BAD})},
}


@pytest.mark.parametrize("raw", PREFERENCES.values(), ids=PREFERENCES)
def test_every_preference_format_becomes_the_same_record(folder, raw):
    for array in (False, True):
        [record], rejects = read(folder, raw, array=array)
        assert rejects == []
        for key, value in RECORD.items():
            assert record[key] == value, key


def test_llava_conversations_become_a_prompt_and_a_golden_answer(folder):
    raw = {"id": 7, "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."},
        {"from": "human", "value": "Which color?"}, {"from": "gpt", "value": "Red."}]}
    [record], rejects = read(folder, raw)
    assert rejects == []
    assert record["id"] == "7" and record["images"] == ["a.png"] and record["answers"] == []
    assert record["messages"] == turns("<image>\nWhat is it?", "A circle.", "Which color?")
    assert record["golden"] == "Red."


def test_a_conversation_without_an_image_needs_no_marker(folder):
    raw = {"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]}
    [record], _ = read(folder, raw)
    assert record["images"] == [] and record["messages"] == turns("Hi") and record["golden"] == "Hello."


def test_an_implicit_marker_is_one_per_image_before_the_first_turn(folder):
    raw = {"id": "t", "images": ["a.png", "b.jpg"], "prompt": turns("Compare.", "They differ.", "How?"),
           "chosen": said(GOOD), "rejected": said(BAD)}
    [record], _ = read(folder, raw)
    assert record["messages"] == turns("<image>\n<image>\nCompare.", "They differ.", "How?")


def test_an_implicit_trl_prompt_may_hold_several_turns(folder):
    raw = {"id": "t", "chosen": turns("One?", "Yes.", "Two?", GOOD), "rejected": turns("One?", "Yes.", "Two?", BAD)}
    [record], _ = read(folder, raw)
    assert record["messages"] == turns("One?", "Yes.", "Two?") and [a["text"] for a in record["answers"]] == [GOOD, BAD]


def test_a_prompt_beside_whole_conversations_is_history_or_their_beginning(folder):
    """TRL's rows, both ways; what stands in the prompt is never dropped."""
    before, after = turns("My name is Ann.", "Hello Ann.", "What is my name?"), turns("What is my name?")
    for prompt in (turns("My name is Ann.", "Hello Ann."), before):
        rows = [{"id": "t", "prompt": prompt, "chosen": begun + said("Ann."), "rejected": begun + said("I do not know.")}
                for begun in (after, before)]
        for raw in rows[len(prompt) == 3:]:
            [record], rejects = read(folder, raw)
            assert rejects == [] and record["messages"] == before and record["pair"] == [0, 1]
            assert [a["text"] for a in record["answers"]] == ["Ann.", "I do not know."]


def test_a_system_message_may_come_first(folder):
    system = {"role": "system", "content": "Answer in one word."}
    rows = [RECORD | {"messages": [system, *RECORD["messages"]]},
            PREFERENCES["TRL, marker left out"] | {"prompt": [system, *turns(QUESTION)]},
            {"image": "a.png", "conversations": [{"from": "system", "value": system["content"]},
                                                 {"from": "human", "value": QUESTION}, {"from": "gpt", "value": "Red."}]}]
    for raw in rows:
        [record], rejects = read(folder, raw)
        assert rejects == [] and record["messages"] == [system, *turns(f"<image>\n{QUESTION}")]


def test_our_own_fields_survive_the_reading(folder):
    raw = RECORD | {"answers": [{"text": GOOD, "finish": "stop", "scores": SCORES, "comment": "fine"}, {"text": BAD}],
                    "golden": "Red.", "judge": {"model": "m"}, "truth": {"seed": 3}}
    for more in ({}, {"chosen": "x", "rejected": "y"}):                  # whoever keeps what the pair was made from
        [record], _ = read(folder, raw | more)
        assert {k: record[k] for k in raw} == raw


def test_a_question_may_ask_what_was_chosen(folder):
    (record,), _ = read(folder, {"question_id": 1, "image": "a.png", "text": "Why was this color chosen?"})
    assert record["messages"] == turns("<image>\nWhy was this color chosen?")


def test_a_record_without_an_id_gets_the_files_name_and_its_place(folder):
    raw = {k: v for k, v in RECORD.items() if k != "id"}
    assert [r["id"] for r in read(folder, raw, raw)[0]] == ["data-000001", "data-000002"]
    assert [r["id"] for r in read(folder, raw, raw, array=True)[0]] == ["data-000000", "data-000001"]
    [zero], [cut] = read(folder, raw | {"id": 0}, raw | {"id": None, "idx": "cut \ud83d"})
    assert zero["id"] == "0" and cut["id"] == "cut ?"                     # which a file of rejects can hold


def test_who_repeats_an_id_is_numbered_and_kept(folder):
    """llava_instruct_150k.json has up to three conversations per picture, all with the picture's number as id."""
    raw = {"id": "000000033471", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A circle."}]}
    ours = RECORD | {"id": "000000033471"}
    kept, rejects = read(folder, raw, ours, raw, RECORD | {"id": "s#2"}, RECORD | {"id": "s"}, RECORD | {"id": "s"})
    assert rejects == [] and [r["id"] for r in kept] == ["000000033471", "000000033471#2", "000000033471#3", "s#2", "s", "s#2#2"]


def test_text_in_any_script_arrives_unchanged(folder):
    """Line and paragraph separators are legal inside JSON strings; a file may start with a byte-order mark."""
    text = "Grüße 你好 مرحبا 🙂🏽 tab\tline\u2028next\u2029\x85end \u00a0"
    raw = RECORD | {"id": "ид-1", "messages": turns("<image>\n" + text), "answers": [{"text": text}, {"text": "no"}]}
    for name, encoding in (("plain.jsonl", "utf8"), ("bom.jsonl", "utf-8-sig")):
        (folder / name).write_text(json.dumps(raw, ensure_ascii=False) + "\n\n", encoding=encoding)
        [record], rejects = formats.read(folder / name)
        assert rejects == [] and record["id"] == "ид-1"
        assert record["messages"] == raw["messages"] and record["answers"][0]["text"] == text
    (folder / "bom.json").write_text(json.dumps([raw], ensure_ascii=False), encoding="utf-8-sig")
    assert len(formats.read(folder / "bom.json")[0]) == 1


# ---- every reason --------------------------------------------------------------------------------

def but(**changes):
    return {k: v for k, v in (RECORD | changes).items() if v is not ...}


def scored(**changes):
    return but(pair=..., answers=[{"text": GOOD, "scores": SCORES | changes}, {"text": BAD}])


USER, BOT = turns("<image>\nHi?", "Yes.")
UNUSABLE = {
    "unknown shape": (but(messages=...), "known shapes (fields: id, images, answers, pair)"),
    "nothing at all": ({}, "known shapes (fields: none)"),
    "no messages": (but(messages=[]), "no messages"),
    "messages null": (but(messages=None), "a turn must be a text"),
    "a message that is none": (but(messages=["Hi?"]), "a turn must be a text"),
    "ends with the assistant": (but(messages=[USER, BOT], golden="Yes."), "turns must alternate"),
    "begins with the assistant": (but(messages=[BOT, USER]), "the user's, and they are assistant, user"),
    "two users": (but(messages=[USER, USER]), "turns must alternate"),
    "system later": (but(messages=[USER, {"role": "system", "content": "Be nice."}, USER]), "turns must alternate"),
    "system alone": (but(messages=[{"role": "system", "content": "Be nice."}], images=[]), "no messages"),
    "a role that is no text": (but(messages=[USER | {"role": ["user"]}]), "turns must alternate"),
    "empty turn": (but(messages=[USER, BOT | {"content": " \n"}, USER]), "message 1 has no text"),
    "content a number": (but(messages=[USER | {"content": 3}]), "message 0 has no text"),
    "fewer markers": (but(images=["a.png", "b.jpg"]), "1 <image> markers but 2 images"),
    "more markers": (but(images=[]), "1 <image> markers but 0 images"),
    "marker in an assistant turn": (but(messages=turns("<image>", "a <image>", "Hi?")), "message 1 contains <image>"),
    "marker in an answer": (but(answers=[{"text": "see <image>"}, {"text": BAD}]), "answer 0 contains <image>"),
    "marker in the system's": (but(messages=[{"role": "system", "content": "<image>"}, USER]), "message 0 contains <image>"),
    "marker in golden": (but(golden="red <image>"), "golden contains <image>"),
    "golden a number": (but(golden=4), "golden is no text"),
    "half a character": (but(answers=[{"text": GOOD}, {"text": "cut \ud83d"}]), "surrogates not allowed"),
    "judge a list": (but(judge=["m"]), "judge must be an object"),
    "order of other answers": (but(judge={"order": [2, 0, 1]}), "judge's order is not one of these"),
    "order a number": (but(judge={"order": 1}), "its order a list"),
    "answers not a list": (but(answers={"text": GOOD}), "answers must be a list"),
    "answer no object": (but(answers=[GOOD, BAD]), "answer 0 is no object"),
    "comment a number": (but(answers=[{"text": GOOD, "comment": 3}, {"text": BAD}]), "answer 0: its comment is no text"),
    "answer without text": (but(answers=[{"text": GOOD}, {"txt": BAD}]), "answer 1 is no text"),
    "score 5": (scored(helpfulness=5), "answer 0: score helpfulness is 5"),
    "score -1": (scored(coherence=-1), "answer 0: score coherence is -1"),
    "score '4'": (scored(correctness="4"), "answer 0: score correctness is '4'"),
    "score 4.0": (scored(complexity=4.0), "answer 0: score complexity is 4.0"),
    "score true": (scored(verbosity=True), "answer 0: score verbosity is True"),
    "score null": (scored(verbosity=None), "answer 0: score verbosity is None"),
    "score absent": (but(answers=[{"text": GOOD, "scores": {"helpfulness": 4}}]), "score correctness is None"),
    "scores a list": (but(answers=[{"text": GOOD, "scores": [4, 4, 4, 4, 4]}]), "answer 0: scores must be an object"),
    "chosen == rejected": (but(answers=[{"text": GOOD}, {"text": f" {GOOD}\n"}]), "chosen and rejected are the same text"),
    "pair out of range": (but(pair=[0, 2]), "pair [0, 2] does not name two of its 2 answers"),
    "pair negative": (but(pair=[0, -1]), "pair [0, -1] does not name"),
    "pair of no whole numbers": (but(pair=[0.0, 1]), "does not name two"),
    "pair a number": (but(pair=5), "pair 5 does not name"),
    "pair of three": (but(pair=[0, 1, 0]), "does not name two"),
    "the authors', same text": (PREFERENCES["the authors'"] | {"rejected": {"from": "gpt", "value": GOOD}}, "same text"),
    "chosen empty": (PREFERENCES["RLHF-V"] | {"id": "r", "chosen": []}, "no messages"),
    "LLaVA's answer beside chosen": ({"id": "r", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
                                      "chosen": "c", "rejected": "d"}, "turns must alternate"),
    "chosen null": (PREFERENCES["RLHF-V"] | {"id": "r", "chosen": None}, "a turn must be a text"),
    "question null value": (PREFERENCES["the authors'"] | {"question": {"from": "human", "value": None}}, "no text"),
    "TRL, nothing in common": ({"id": "r", "images": ["a.png"], "chosen": said(GOOD), "rejected": said(BAD)}, "no messages"),
    "TRL, two turns apart": ({"id": "r", "chosen": turns("a", "b", "c", "d"), "rejected": turns("a", "x", "c", "e")},
                             "one assistant turn after a shared prompt"),
    "conversations of others": ({"id": "r", "conversations": [{"from": "bing", "value": "x"}]}, "the user's, and they are bing"),
    "conversations empty": ({"id": "r", "image": "a.png", "conversations": []}, "no messages"),
    "RLHF-V with a broken text": ({"id": "r", "text": '{"question": "chosen'}, "'text' field is not JSON"),
    "RLHF-V, nested without end": ({"id": "r", "text": '{"chosen":' * 50000}, "'text' field is not JSON"),
    "a part that lost its text": ({"id": "r", "prompt": QUESTION, "chosen": GOOD, "rejected": [
        {"role": "assistant", "content": [{"type": "text", "text": None}]}]}, "content part of type 'text'; known: image, text with its text"),
    "RLHF-V with a list as text": ({"id": "r", "text": '["chosen"]'}, "'text' field is not JSON"),
    "image a number": (but(images=[3]), "image 3 is not a file name"),
    "image with a zero byte": (but(images=["a\0.png"]), "is not a file name"),
    "images that spell a deep list": (but(images="[" * 900 + "]" * 900), "a picture as text, not a file name"),
    "a text beside a rejected answer": ({"messages": "Hi?", "query": "Hi?", "response": GOOD, "rejected_response": BAD}, "no list of turns"),
}


def test_what_cannot_be_used_is_rejected_with_id_and_reason(folder):
    for case, (raw, why) in UNUSABLE.items():
        assert why in reason(folder, raw), case


def test_a_field_nested_too_deeply_is_refused(folder):
    deep = []
    for _ in range(100_000):                             # Python 3.12 writes 2,000 levels
        deep = [deep]
    with pytest.raises(BadInput, match="maximum recursion depth"):
        formats.check(but(meta=deep))


def test_what_is_no_object_is_rejected(folder):
    strange = [None, 3, "text", ["list"], True]
    kept, rejects = read(folder, RECORD, *strange)
    assert [r["id"] for r in kept] == ["r"]
    assert rejects == [{"id": f"data-{k:06d}", "reason": "is not a JSON object"} for k in range(2, 7)]


def test_the_usable_neighbours_of_what_is_refused_are_kept(folder):
    for raw in (scored(helpfulness=0), scored(helpfulness=4), but(judge={"order": [1, 0]}), but(messages="Hi?"),
                but(messages=[USER, BOT]), but(answers=[{"text": ""}, {"text": BAD}]), but(answers=None, pair=...)):
        assert len(read(folder, raw)[0]) == 1, raw


def test_a_malformed_line_is_named_by_its_number_and_the_rest_is_read(folder):
    lines = [json.dumps(RECORD), '{"id": "x", "mess', "", json.dumps(RECORD | {"id": "s"}), '{"id":' * 50000, '{"id": "\xe9"}']
    (folder / "data.jsonl").write_text("\n".join(lines), encoding="latin1")
    kept, rejects = formats.read(folder / "data.jsonl")
    assert [r["id"] for r in kept] == ["r", "s"]
    assert rejects[0]["id"] == "line 2" and rejects[0]["reason"].startswith("malformed JSON (Unterminated string")
    assert rejects[2]["id"] == "line 6" and rejects[2]["reason"].startswith("malformed JSON ('utf-8' codec can't decode")
    assert rejects[1]["id"] == "line 5" and rejects[1]["reason"].startswith("malformed JSON (maximum recursion depth")


@pytest.mark.parametrize("name, content, why", [
    ("absent.jsonl", None, "No such file"), ("latin.json", b'[{"id": "\xe9"}]', "malformed JSON array"),
    ("broken.json", b'[{"id": "r"}, ', "malformed JSON array"),
    ("deep.json", b"[" * 50000, "malformed JSON array")], ids=lambda x: x if isinstance(x, str) else "")
def test_a_file_that_cannot_be_read_at_all_is_an_error_that_names_it(folder, name, content, why):
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(BadInput, match=why) as error:
        formats.read(folder / name)
    assert str(folder / name) in str(error.value)


# ---- images --------------------------------------------------------------------------------------

def test_a_path_that_leads_out_of_the_root_is_refused(folder, tmp_path):
    picture(8, 8).save(tmp_path / "secret.png")
    os.symlink(tmp_path / "secret.png", folder / "link.png")
    os.symlink(tmp_path, folder / "up")
    for name in ("../secret.png", "x/../../secret.png", str(tmp_path / "secret.png"), "link.png", "up/secret.png", "/etc/passwd"):
        assert f"image {name} leads outside {folder}" in reason(folder, but(images=[name])), name


def test_links_that_lead_out_are_followed_where_the_user_says_so_and_other_ways_out_never(folder, tmp_path):
    """As a snapshot of the hub lies on the disk: every file is a link into a folder of blobs."""
    (tmp_path / "blobs").mkdir()
    picture(9, 9).save(tmp_path / "blobs" / "1f0e.png")
    os.symlink("../blobs/1f0e.png", folder / "blob.png")
    os.symlink(tmp_path / "blobs", folder / "up")
    for name in ("blob.png", "up/1f0e.png"):
        path = write(folder, [but(images=[name])])
        assert "or say --follow_links, for it is a link" in formats.read(path)[1][0]["reason"]
        [record], rejects = formats.read(path, follow_links=True)
        assert record["images"] == [name] and record["follow_links"] and rejects == []
        assert vision.image_path(folder, name, True).read_bytes() == (tmp_path / "blobs" / "1f0e.png").read_bytes()
    for name in ("../blobs/1f0e.png", "up/../../blobs/1f0e.png", str(tmp_path / "blobs" / "1f0e.png"), "/etc/passwd"):
        [reject] = formats.read(write(folder, [but(images=[name])]), follow_links=True)[1]
        assert "leads outside" in reject["reason"] and "--follow_links" not in reject["reason"], name


def test_the_pictures_of_a_data_file_that_is_a_link_lie_beside_the_link(folder, tmp_path):
    path = write(tmp_path, [but(images=["a.png"])])
    os.symlink(path, folder / "prefs.jsonl")
    [record], _ = formats.read(folder / "prefs.jsonl")
    assert record["root"] == str(folder)


@pytest.mark.parametrize("name", ["data:image/png;base64,iVBORw0KGgo", "https://example.org/a.jpg", "s3://bucket/a.jpg"])
def test_an_address_is_no_file_name(folder, name):
    assert f"image {name} is an address, not a file name; write embedded" in reason(folder, but(images=[name]))


def test_a_root_next_door_that_starts_with_the_same_letters_is_outside(folder, tmp_path):
    (tmp_path / "data2").mkdir()
    picture(8, 8).save(tmp_path / "data2" / "a.png")
    assert "leads outside" in reason(folder, but(images=["../data2/a.png"]))


def test_a_path_that_stays_inside_the_root_is_fine(folder):
    (folder / "sub").mkdir()
    os.symlink(folder / "a.png", folder / "sub" / "inner.png")
    for name in ("sub/../a.png", "sub/inner.png", "./a.png", str(folder / "a.png")):
        assert read(folder, but(images=[name]))[1] == [], name


def test_image_root_is_where_names_start_from(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    picture(9, 9).save(tmp_path / "elsewhere" / "z.png")
    path = write(folder, [but(images=["z.png"])])
    assert str(folder / "z.png") in formats.read(path)[1][0]["reason"]
    [record], _ = formats.read(path, str(tmp_path / "elsewhere"))
    assert record["root"] == str(tmp_path / "elsewhere")


def test_names_start_from_the_folder_that_data_names_also_through_a_link(folder, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "data.jsonl").write_text(json.dumps(RECORD))
    os.symlink(tmp_path / "shared" / "data.jsonl", folder / "data.jsonl")
    [record], _ = formats.read(folder / "data.jsonl")
    assert record["root"] == str(folder)


def test_a_missing_image_is_named(folder):
    assert f"image {folder / 'no.jpg'}: No such file" in reason(folder, but(images=["no.jpg"]))
    why = reason(folder, but(images=["iVBORw0KGgo" * 1000]))              # a picture embedded as base64
    assert "is a picture as text, not a file name; write embedded" in why and len(why) < 200
    (folder / "dir.png").mkdir()
    os.mkfifo(folder / "pipe.png")                                        # reading it would wait for ever
    for name in ("dir.png", "pipe.png"):
        assert f"image {folder / name}: not a regular file" in reason(folder, but(images=[name]))


def test_a_truncated_jpeg_is_refused(folder):
    picture(200, 150).save(folder / "whole.jpg")
    data = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(data[:len(data) // 2])
    (folder / "text.jpg").write_text("no picture")
    assert read(folder, but(images=["whole.jpg"]))[1] == []
    for name, why in (("cut.jpg", "cannot be decoded"), ("text.jpg", "cannot be decoded (it is none of JPEG, PNG")):
        assert f"image {folder / name}: {why}" in reason(folder, but(images=[name]))


def test_an_image_bomb_is_refused_before_it_is_decoded(folder):
    """A few kilobytes that say they are 10,000 x 10,000 pixels: only the header is read."""
    write_bomb(folder / "bomb.png")
    assert (folder / "bomb.png").stat().st_size < 2000
    assert "bomb.png: cannot be decoded (10000 x 10000 pixels, more than the" in reason(folder, but(images=["bomb.png"]))


def write_bomb(path, side=10_000):
    """A PNG whose header announces side x side pixels; its body is too short, which nobody should get to see."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
                     + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def test_the_images_hash_changes_with_a_byte_of_a_picture(folder):
    first = read(folder, RECORD)[0][0]["images_sha"]
    assert read(folder, RECORD)[0][0]["images_sha"] == first
    picture(20, 10, seed=3).save(folder / "a.png")
    assert read(folder, RECORD)[0][0]["images_sha"] != first


# ---- the count -----------------------------------------------------------------------------------

def test_kept_and_rejected_add_up_to_what_the_file_holds(folder, capsys):
    raws = [RECORD | {"id": f"good-{k}"} for k in range(3)]
    raws += [raw | {"id": f"bad-{k}"} for k, (raw, _) in enumerate(UNUSABLE.values())][:20]
    path = write(folder, raws)
    with open(path, "a") as f:
        f.write("{broken\n")
    kept, rejects = formats.read(path)
    assert [r["id"] for r in kept] == ["good-0", "good-1", "good-2"]
    assert [r["id"] for r in rejects] == [f"bad-{k}" for k in range(20)] + [f"line {len(raws) + 1}"]

    formats.report(path, len(kept), rejects, folder)
    shown = capsys.readouterr().out
    assert f"{path}: 3 records usable, {len(rejects)} rejected" in shown and "bad-0: " in shown
    listed = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert listed == rejects


def test_messages_that_end_with_the_assistant_hold_the_golden_answer(folder):
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi?"}]},
             {"role": "assistant", "content": [{"type": "text", "text": "Hello."}]}]
    record = formats.convert({"messages": turns, "images": ["a.png"]}, "x")
    assert record["messages"] == [{"role": "user", "content": "<image>\nHi?"}] and record["golden"] == "Hello."


def test_preferences_may_stand_beside_or_around_the_conversation(folder):
    """LLaMA-Factory's rows (conversations + chosen + rejected) and TRL's with whole conversations in chosen and rejected."""
    user, red, blue = {"role": "user", "content": "What color?"}, *({"role": "assistant", "content": c} for c in ("red", "blue"))
    beside = {"conversations": [{"from": "human", "value": "What color?"}], "chosen": {"from": "gpt", "value": "red"},
              "rejected": {"from": "gpt", "value": "blue"}}
    around = {"prompt": "What color?", "chosen": [user, red], "rejected": [user, blue]}
    for raw in (beside, around, {"messages": [user], "chosen": "red", "rejected": "blue"}):
        record = formats.convert(raw, "x")
        assert record["messages"] == [user] and record["pair"] == [0, 1]
        assert [a["text"] for a in record["answers"]] == ["red", "blue"]


def test_an_empty_field_does_not_hide_the_full_one():
    for empty in (None, [], ""):
        raw = {"images": empty, "image": "a.png", "prompt": empty, "question": "Hi?", "chosen": "a", "rejected": "b"}
        record = formats.convert(raw, "x")
        assert record["images"] == ["a.png"] and record["messages"][0]["content"] == "<image>\nHi?"


# ---- questions without answers -------------------------------------------------------------------

@pytest.mark.parametrize("raw, question, golden, images", [
    ({"question_id": 7, "image": "a.jpg", "text": "What is it?", "category": "conv"}, "<image>\nWhat is it?", None, ["a.jpg"]),
    ({"image_id": "2412112", "question": "Is there a dog?", "answer": "No.", "task": "negative"},
     "<image>\nIs there a dog?", "No.", ["2412112.jpg"]),
    ({"id": "s1", "image_file": "f.png", "caption": "c", "q_a_pairs": [["What is shown?", "A curve."], ["Why?", "Because."]]},
     "Why?", "Because.", ["f.png"]),
    ({"id": "s2", "image_file": "f.png", "q_a_pairs": [["x", "y"]],
      "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A."}]},
     "<image>\nWhat?", "A.", ["f.png"])])
def test_question_files_are_recognised(raw, question, golden, images):
    record = formats.convert(raw, "here")
    formats.check(record)
    assert record["messages"][-1]["content"] == question and record.get("golden") == golden and record["images"] == images
    assert record["messages"][0]["content"].startswith("<image>") and record["answers"] == []
    assert all(record[key] == raw[key] for key in ("category", "task", "caption") if key in raw), "unknown fields travel along"


# ---- what a mutation showed untested -------------------------------------------------------------

def test_pairs_of_questions_that_are_none_are_refused():
    for pairs in (["What?"], [["a", "b", "c"]], "What?", [3]):
        with pytest.raises(BadInput, match="q_a_pairs must be a list"):
            formats.convert({"q_a_pairs": pairs}, "here")


def test_an_empty_answer_is_not_golden():
    for answer in (None, "", " "):
        assert "golden" not in formats.convert({"question": "What?", "answer": answer}, "here")


def test_text_comes_before_question_and_the_last_pair_is_asked():
    assert formats.convert({"text": "a?", "question": "b?"}, "here")["messages"][-1]["content"] == "a?"
    messages = formats.convert({"q_a_pairs": [["1?", "1."], ["2?", "2."], ["3?", None]]}, "here")["messages"]
    assert [m["content"] for m in messages] == ["1?", "1.", "2?", "2.", "3?"] and [m["role"][0] for m in messages] == list("uauau")


def test_several_processes_decode_each_picture_once_between_them_and_reject_alike(tmp_path, monkeypatch):
    """Without a second process: what the other one found is computed here, and handed over where they would meet."""
    import parallel
    rows = [{"id": str(k), "images": [f"{k}.png"], "messages": [{"role": "user", "content": "<image>\nWhat?"}]} for k in range(7)]
    path = write(tmp_path, [*rows[:3], {"id": "no messages"}, *rows[3:]])
    for k in range(7):
        picture(8, 8, k).save(tmp_path / f"{k}.png")
    (tmp_path / "4.png").write_bytes(b"not a picture")
    alone, opened, real = formats.read(path), [], formats.check_images
    monkeypatch.setattr(formats, "check_images", lambda record, *a: opened.append(record["id"]) or real(record, *a))
    shares = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda: rank)
        monkeypatch.setattr(parallel, "world", lambda: 2)
        monkeypatch.setattr(parallel, "gather", lambda mine: shares.append(mine) or [mine] * 2)
        try:
            formats.read(path)
        except (IndexError, TypeError):                                  # rows of the other are not there
            pass
    assert sorted(opened) == list("0123456") and len(shares) == 2
    monkeypatch.setattr(parallel, "gather", lambda mine: shares)
    assert formats.read(path) == alone and [r["id"] for r in alone[1]] == ["no messages", "4"]


# ---- parquet, packed files, objects around rows ------------------------------------------------------------------

def image_bytes(size, seed):
    buffer = io.BytesIO()
    picture(*size, seed=seed).save(buffer, "PNG")
    return buffer.getvalue()


def hub_rows(n=5):
    """Rows as RLHF-V (all in "text") and RLAIF-V (fields of their own) have them, and the same for JSON lines."""
    tables = {"RLHF-V": [], "RLAIF-V": []}
    lines = []
    for k in range(n):
        said = {"question": f"What is in picture {k}?", "chosen": f"A circle, {k}.", "rejected": "No idea."}
        image = {"bytes": image_bytes((20 + k, 10), k), "path": f"{k}.png"}
        tables["RLHF-V"].append({"ds_name": "RLHF-V", "image": image, "text": json.dumps(said), "origin_dataset": "LCS", "idx": k})
        tables["RLAIF-V"].append({"ds_name": "RLAIF-V", "image": image, **said, "origin_split": "{}", "idx": k, "image_path": f"x/{k}.png"})
        lines.append({"id": str(k), "image": f"{k}.png", **said})
    return tables, lines


@pytest.mark.parametrize("name", ["RLHF-V", "RLAIF-V"])
def test_parquet_of_the_hub_trains_like_the_same_rows_in_json_lines(folder, tmp_path, name, monkeypatch):
    """The reference log-probs are those of the files, and pictures stand in the run's folder once."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    ckpt = tiny_checkpoint(tmp_path / "tiny", "byte")
    tables, lines = hub_rows()
    hub = tmp_path / "hub"
    hub.mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(tables[name]), hub / "train.parquet")
    for k in range(5):
        (folder / f"{k}.png").write_bytes(image_bytes((20 + k, 10), k))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    logps = {}
    for file in ("train.parquet", "data.jsonl"):
        out = tmp_path / file
        dpo.run(dpo.Settings(ckpt=str(ckpt), data=str((hub if file == "train.parquet" else folder) / file), out=str(out), steps=0, device="cpu"))
        logps[file] = {row["id"]: row["logps"] for row in map(json.loads, open(out / "reference.jsonl"))}
    assert logps["train.parquet"] == logps["data.jsonl"] and len(logps["data.jsonl"]) == 5
    assert len(list((tmp_path / "train.parquet" / "pictures").iterdir())) == 5


def test_parquet_without_pyarrow_is_one_message(folder, monkeypatch):
    (folder / "train.parquet").write_bytes(b"PAR1" + b"\0" * 100 + b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(BadInput, match="^--data .*train.parquet: parquet is read by pyarrow: pip install pyarrow$"):
        formats.read(folder / "train.parquet")


def test_a_packed_file_and_an_object_around_the_rows_are_read(folder):
    rows = [but(id="a"), but(id="b")]
    with gzip.open(folder / "data.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "around.json").write_text(json.dumps({"data": rows}))
    (folder / "hub.json").write_text(json.dumps({"features": [], "rows": [{"row_idx": k, "row": row} for k, row in enumerate(rows)]}, indent=1))
    for name in ("data.jsonl.gz", "around.json", "hub.json"):
        records, rejects = formats.read(folder / name)
        assert [record["id"] for record in records] == ["a", "b"] and rejects == [], name


@pytest.mark.parametrize("content", [b"id,text\n1,hello\n2,you\n", b"PK\x03\x04" + b"\0" * 99, b"id\ttext\n1\thello\n"])
def test_a_table_or_an_archive_is_one_message(folder, content):
    (folder / "data.csv").write_bytes(content)
    with pytest.raises(BadInput, match="^--data .*data.csv is neither JSON nor parquet; unpack"):
        formats.read(folder / "data.csv")


def test_fields_that_nothing_uses_are_counted_once_and_escaped(folder, capsys):
    path = write(folder, [but(id="a", category="x", odd="\x1b[2J"), but(id="b", category="y")])
    records, rejects = formats.read(path)
    unused = Counter(name for record in records for name in formats.unused(record))
    formats.report(path, len(records), rejects, None, unused)
    assert "fields not used: category (2), odd (1)" in capsys.readouterr().out


@pytest.mark.parametrize("more", [
    {"tools": [{"name": "f"}]}, {"video": "a.mp4"}, {"audios": ["a.wav"]}, {"rejected_images": ["b.png"]},
    {"output_3": "x", "answers": []}], ids=str)
def test_a_field_that_surely_means_something_refuses_the_row(folder, more):
    assert "would be lost" in reason(folder, but(**more))


@pytest.mark.parametrize("text", ["<image_1>\nWhat?", "<ImageHere>What?", "<|image|>What?", "USER: What? ASSISTANT:", "<|im_start|>user\nWhat?", "[INST] What? [/INST]"])
def test_what_another_project_replaces_is_never_trained_on_as_words(folder, text):
    row = {"id": "r", "image": "a.png", "question": text, "chosen": "a cat", "rejected": "a dog"}
    assert "another project's spelling" in reason(folder, row)


def test_keep_marker_leaves_pictures_where_they_stand(folder):
    row = {"id": "r", "image": "a.png", "question": "What is it?\n<image>", "chosen": "a cat", "rejected": "a dog"}
    path = write(folder, [row])
    assert formats.read(path)[0][0]["messages"][0]["content"] == "<image>\nWhat is it?"
    assert formats.read(path, keep_marker=True)[0][0]["messages"][0]["content"] == "What is it?\n<image>"


def test_an_id_is_shown_escaped_and_short(folder, capsys):
    path = write(folder, [but(id="\x1b]0;owned\x07\n" + "x" * 500, images=["no.png"])])
    records, rejects = formats.read(path)
    formats.report(path, len(records), rejects, None)
    said = capsys.readouterr().out
    assert "\\x1b]0;owned\\x07\\n" in said and "\x1b" not in said and max(map(len, said.splitlines())) < 500
