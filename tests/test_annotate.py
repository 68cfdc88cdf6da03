"""Sampling that can be stopped anywhere, scores that become pairs, and what one sees of them.

    python -m pytest tests/test_annotate.py -q

What a judge over HTTP does is in tests/test_judge.py; the pair rule is in tests/test_dpo.py.
"""
import html.parser
import json
import os
import re
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import annotate
import checkpoint
import common
import data
from toy import oracle
from judge import report as pairs
import formats as records
from judge import rubric
from toy import tasks
from common import BadInput
from conftest import meet, picture, tiny_checkpoint
from formats import ATTRIBUTES


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("annotate") / "tiny", "byte")


@pytest.fixture
def prompts(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for k in range(3):
        picture(30 + k, 20, seed=k).save(folder / f"{k}.png")
    rows = [{"id": f"p{k}", "images": [f"{k % 3}.png"], "messages": [{"role": "user", "content": f"<image>\nWhat is {k}?"}], "mine": k} for k in range(11)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder / "prompts.jsonl"


def sample(ckpt, prompts, out, **more):
    settings = {"n": 3, "max_new": 8, "batch": 4, "device": "cpu"} | more
    annotate.run(annotate.Settings(ckpt=str(ckpt), data=str(prompts), out=str(out), **settings))


def sampled(ckpt, prompts, out, **more):
    sample(ckpt, prompts, out, **more)
    return common.read_jsonl(out / "records.jsonl")


# ---- sampling --------------------------------------------------------------------------------------------------

def test_records_leave_as_they_came_plus_answers_and_their_folder_stands_alone(ckpt, prompts, tmp_path):
    rows = sampled(ckpt, prompts, tmp_path / "out")
    raw = [json.loads(line) for line in open(prompts)]
    assert [{k: v for k, v in r.items() if k != "answers"} for r in rows] == raw
    assert all(len(r["answers"]) == 3 and all(a["finish"] in ("stop", "length") for a in r["answers"]) for r in rows)
    assert len({a["text"] for r in rows for a in r["answers"]}) > 20, "answers differ"
    for path in prompts.parent.iterdir():
        path.unlink()
    again, rejects = records.read(tmp_path / "out" / "records.jsonl")
    assert len(again) == 11 and not rejects


def test_the_answers_are_those_of_the_sampler_one_record_at_a_time(ckpt, prompts, tmp_path):
    rows = sampled(ckpt, prompts, tmp_path / "out", temperature=0.8, top_p=0.9, seed=3)
    model = checkpoint.load(ckpt)
    tokens, pixels = data.Tokens(ckpt, model.config), data.Pixels(model.config)
    items, _ = records.read(prompts)
    for record, row in zip(items, rows):
        alone, = annotate.sample_batch(model, tokens, pixels, [record], n=3, temperature=0.8, top_p=0.9, max_new=8, seed=3)
        assert alone == row["answers"]


def test_sampling_goes_on_where_it_stopped_with_the_same_result(ckpt, prompts, tmp_path, monkeypatch):
    whole = sampled(ckpt, prompts, tmp_path / "whole")
    real, count = common.Journal.append, iter(range(100))

    def dies(self, row):
        if next(count) == 6:
            raise KeyboardInterrupt
        real(self, row)
    with monkeypatch.context() as m:
        m.setattr(common.Journal, "append", dies)
        with pytest.raises(KeyboardInterrupt):
            sampled(ckpt, prompts, tmp_path / "out")
    journal = tmp_path / "out" / "answers-0.jsonl"
    assert len(journal.read_text().splitlines()) == 6
    with open(journal, "a") as f:
        f.write('{"key": "torn')
    batches = []
    sample = annotate.sample_batch
    monkeypatch.setattr(annotate, "sample_batch", lambda m, t, p, items, **how: batches.append(len(items)) or sample(m, t, p, items, **how))
    assert sampled(ckpt, prompts, tmp_path / "out") == whole
    assert batches == [4, 3] and len(journal.read_text().splitlines()) == 11, "whole batches, so that rounding is the same"
    sampled(ckpt, prompts, tmp_path / "out")
    assert batches == [4, 3], "nothing is sampled twice"
    sampled(ckpt, prompts, tmp_path / "out", temperature=0.5)
    assert batches == [4, 3, 4, 4, 3], "another setting is another question"


def test_the_end_says_what_to_run_next(ckpt, prompts, tmp_path, capsys):
    sample(ckpt, prompts, tmp_path / "out")
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: python annotate.py --data {tmp_path}/out/records.jsonl --out {tmp_path}/out --judge gemini:MODEL --dry_run"


def test_two_processes_make_the_same_file(ckpt, prompts, tmp_path, one_thread):
    whole, log = sampled(ckpt, prompts, tmp_path / "whole"), tmp_path / "log.txt"
    assert meet(2, partial(sample, ckpt, prompts, tmp_path / "out"), log), log.read_text()
    assert sorted(p.name for p in (tmp_path / "out").glob("answers-*")) == ["answers-0.jsonl", "answers-1.jsonl"]
    assert common.read_jsonl(tmp_path / "out" / "records.jsonl") == whole
    assert log.read_text().count("usable") == 1, "one process speaks"
    assert sum(len(p.read_text().splitlines()) for p in (tmp_path / "out").glob("answers-*")) == 11, "nothing is done twice"


def test_records_that_have_answers_keep_them(ckpt, prompts, tmp_path):
    raw = [json.loads(line) for line in open(prompts)]
    raw[4]["answers"] = [{"text": "mine"}]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in raw))
    rows = sampled(ckpt, prompts, tmp_path / "out")
    assert rows[4]["answers"] == [{"text": "mine"}] and all(len(r["answers"]) == 3 for r in rows if r["id"] != "p4")


def test_what_does_not_fit_the_model_is_rejected_before_anything_is_sampled(ckpt, prompts, tmp_path):
    with open(prompts, "a") as f:
        f.write(json.dumps({"id": "long", "messages": [{"role": "user", "content": "what? " * 2000}]}) + "\n")
    rows = sampled(ckpt, prompts, tmp_path / "out")
    assert len(rows) == 11
    reject, = [json.loads(line) for line in open(tmp_path / "out" / "rejects.jsonl")]
    assert reject["id"] == "long" and "lower --max_new" in reject["reason"]


@pytest.mark.parametrize("flags, why", [({"ckpt": ""}, "say with --ckpt which model"), ({"n": 0}, "--n must lie from 1 to 26"), ({"n": 27}, "from 1 to 26"),
                                        ({"temperature": -1.0}, "not negative"), ({"export": "csv"}, "the one format known is trl"), ({"ckpt": "nowhere"}, "no such folder")])
def test_the_door(ckpt, prompts, tmp_path, flags, why):
    with pytest.raises(BadInput, match=why):
        sampled(**{"ckpt": ckpt, "prompts": prompts, "out": tmp_path / "out"} | flags)


def test_another_picture_of_the_same_name_is_not_written_over(ckpt, prompts, tmp_path):
    sampled(ckpt, prompts, tmp_path / "out")
    before = (tmp_path / "out" / "0.png").read_bytes()
    (prompts.parent / "0.png").unlink()
    picture(9, 9).save(prompts.parent / "0.png")
    with pytest.raises(BadInput, match="another picture of that name; choose another --out"):
        sampled(ckpt, prompts, tmp_path / "out")
    assert (tmp_path / "out" / "0.png").read_bytes() == before


# ---- the rubric ------------------------------------------------------------------------------------------------

def with_answers(*texts, **more):
    return {"id": "x", "root": ".", "images": [], "images_sha": "", "messages": [{"role": "user", "content": "<image><image>\nWhich?"},
            {"role": "assistant", "content": "This."}, {"role": "user", "content": "Why?"}], "answers": [{"text": t} for t in texts]} | more


def test_the_judge_reads_rubric_conversation_and_answers_in_the_stored_order():
    record = with_answers("one", "two", "three", "four")
    q, order = annotate.question(record, "judge", 0, False), rubric.shown_order(record, 0)
    assert "user: [picture 1][picture 2]\nWhich?\nassistant: This.\nuser: Why?" in q.text
    assert re.findall(r"<candidate_(.)>\n(.*)\n", q.text) == [("ABCD"[p], record["answers"][k]["text"]) for p, k in enumerate(order)]
    assert sorted(order) == [0, 1, 2, 3] and all(name in q.system for name in ATTRIBUTES)
    fields = q.schema["properties"]["candidates"]["items"]["required"]
    assert fields.index("comment") < fields.index("helpfulness") and q.system.index('"comment"') < q.system.index('"helpfulness"')


def test_every_order_comes_up_and_is_the_records_own():
    orders = [tuple(rubric.shown_order({"id": str(k), "answers": [0] * 3}, 0)) for k in range(600)]
    assert len(set(orders)) == 6 and min(orders.count(o) for o in set(orders)) > 60
    assert rubric.shown_order({"id": "7", "answers": [0] * 3}, 0) == list(orders[7]) != rubric.shown_order({"id": "7", "answers": [0] * 3}, 5)


def test_golden_comes_first_and_only_on_request():
    for golden in (False, True):
        q = annotate.question(with_answers("a", "b"), "", 0, golden)
        assert ("golden_answer" in q.system) == ("golden_answer" in q.schema["required"]) == golden
    assert q.schema["required"][0] == "golden_answer" and q.system.index("golden_answer") < q.system.index('"candidates"')


def test_the_schema_is_one_that_gemini_takes():
    """A subset of JSON schema: no additionalProperties, no $schema, integers with bounds instead of enums, exactly n candidates."""
    def walk(node):
        assert set(node) <= {"type", "properties", "required", "items", "minItems", "maxItems", "minimum", "maximum"}, node
        for child in [*node.get("properties", {}).values(), *([node["items"]] if "items" in node else [])]:
            walk(child)
    schema = rubric.RUBRIC.schema(5, True)
    walk(schema)
    assert schema["properties"]["candidates"]["minItems"] == schema["properties"]["candidates"]["maxItems"] == 5


def test_the_oracle_speaks_as_a_judge_does():
    record = tasks.preference_prompts(1, 0)[0] | {"root": ".", "images_sha": ""}
    turn = record["truth"]["turns"][-1]
    record["answers"] = [{"text": t} for t in (turn["bare"], turn["full"], "the star is green .")]
    found = rubric.RUBRIC.read(oracle.exact_reply(record, rubric.shown_order(record, 0), True), 3, True)
    for (scores, comment), k in zip(found["shown"], rubric.shown_order(record, 0)):
        assert (scores, comment) == oracle.judge(record, record["answers"][k]["text"])
    assert found["golden"] == turn["full"]
    with pytest.raises(BadInput, match="record y: --judge oracle knows"):
        oracle.exact_reply({"id": "y", "answers": [{"text": "a"}]}, [0], False)


# ---- pairs -----------------------------------------------------------------------------------------------------

def judged(id, *rows, order=None, texts=None):
    answers = [{"text": (texts or "abcdefgh")[k], "scores": dict(zip(ATTRIBUTES, row)), "comment": "why"} for k, row in enumerate(rows)]
    return {"id": id, "images": [], "messages": [{"role": "user", "content": "q"}], "answers": answers} | ({"judge": {"order": order}} if order else {})


def test_statistics_by_hand():
    rows = [judged("p", (4, 4, 4, 1, 0), (0, 0, 0, 0, 1), order=[1, 0], texts=["a long answer here", "short"]),   # a pair
            judged("q", (2, 2, 2, 1, 0), (2, 2, 2, 0, 1), order=[0, 1]),                                            # equal in S
            judged("r", (3, 3, 3, 2, 2), (3, 3, 2, 2, 2)),                                                            # a gap of one
            {"id": "s", "images": [], "messages": [], "answers": [{"text": "x"}]}]                                   # not judged
    x = pairs.statistics(rows)
    assert (x["records"], x["scored"], x["pairs"], x["all_equal"], x["tied_best"]) == (4, 3, 1, 1, 1)
    assert x["scores"]["helpfulness"] == [1, 0, 2, 2, 1] and (x["words_chosen"], x["words_rejected"], x["chosen_longer"]) == (4, 1, 1)
    table = np.array([[a["scores"][n] for n in ATTRIBUTES] for r in rows for a in r["answers"] if "scores" in a])
    assert np.allclose(x["correlations"], np.corrcoef(table.T), atol=1e-3)
    a, b = x["places"]
    assert (a["place"], a["n"], a["S"], a["best"], a["fair"]) == ("A", 2, (0 + 6) / 2, (0 + 0.5) / 2, 0.5) and b["best"] == (1 + 0.5) / 2
    assert a["ci"] == pytest.approx(1.96 * (0.25 / 2) ** 0.5)
    page = pairs.show(x)
    assert "1 of 4 records (25%)" in page and "1 not scored" in page and "chosen 4.0 words, rejected 1.0" in page


def test_statistics_of_a_judge_that_always_likes_the_first():
    rng = np.random.default_rng(0)
    rows = []
    for k in range(200):
        order = rng.permutation(4).tolist()
        rows.append(judged(str(k), *[(4, 4, 4, 0, 0) if order[0] == j else (1, 1, 1, 0, 0) for j in range(4)], order=order))
    places = pairs.statistics(rows)["places"]
    assert places[0]["best"] == 1 > places[0]["fair"] + places[0]["ci"] and places[3]["best"] == 0


def test_statistics_of_nothing():
    for rows in ([], [{"id": "s", "answers": [{"text": "x"}]}]):
        assert pairs.show(pairs.statistics(rows)) == f"no scores in {len(rows)} records"
    constant = pairs.statistics([judged("p", (2, 2, 2, 2, 2), (2, 2, 2, 2, 2))])
    assert constant["correlations"][0][1] is None and "-" in pairs.show(constant)
    given = {"id": "t", "answers": [{"text": "x"}, {"text": "y z"}], "pair": [0, 1]}
    assert "1 of 1 records" in pairs.show(pairs.statistics([given]))


def test_what_is_exported_for_trl_is_read_back_as_the_same_pair(tmp_path):
    record = judged("p", (4, 4, 4, 1, 0), (0, 0, 0, 0, 1), texts=["good", "bad"])
    record |= {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": "<image>\nFirst?"}, {"role": "assistant", "content": "One."},
                                                         {"role": "user", "content": "And <image> here?"}]}
    row = pairs.to_trl(record, (0, 1))
    assert row["prompt"][0]["content"] == [{"type": "image"}, {"type": "text", "text": "First?"}]
    assert row["chosen"] == [{"role": "assistant", "content": [{"type": "text", "text": "good"}]}]
    back = records.convert(json.loads(json.dumps(row)), "x")
    assert back["pair"] == [0, 1] and [a["text"] for a in back["answers"]] == ["good", "bad"] and back["images"] == ["a.png", "b.png"]
    assert "".join(m["content"] for m in back["messages"]).count("<image>") == 2


def test_trl_takes_the_export():
    trl = pytest.importorskip("trl")
    record = judged("p", (4, 4, 4, 1, 0), (0, 0, 0, 0, 1), texts=["good", "bad"]) | {"images": ["a.png"]}
    record["messages"] = [{"role": "user", "content": "<image>\nWhat?"}]
    row = pairs.to_trl(record, (0, 1))
    assert trl.is_conversational({k: row[k] for k in ("prompt", "chosen", "rejected")})
    from trl.data_utils import prepare_multimodal_messages
    ready = prepare_multimodal_messages(row["prompt"] + row["chosen"], images=[picture(8, 8)])
    assert [p["type"] for p in ready[0]["content"]] == ["image", "text"]


# ---- the board -------------------------------------------------------------------------------------------------

class Tags(html.parser.HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_board_escapes_everything_and_fetches_nothing(tmp_path):
    picture(700, 300).save(tmp_path / "a.jpg")
    evil = '<script>alert("x")</script><img src="http://evil/x.png" onerror=\'y\'>&amp;{braces}%s'
    record = judged("<b>id</b>", (4, 4, 4, 1, 0), (0, 0, 0, 0, 1), order=[1, 0], texts=[evil, "bad"])
    record |= {"images": ["a.jpg"], "messages": [{"role": "user", "content": "<image>\n" + evil}], "golden": evil}
    record["answers"][0]["comment"] = evil
    record["judge"] |= {"model": evil, "state": "ok"}
    page = pairs.board([record], tmp_path, title=evil)
    seen = Tags(page)
    assert [t for t, _ in seen.tags].count("script") == 1 and [a["src"][:22] for t, a in seen.tags if t == "img"] == ["data:image/jpeg;base64"]
    assert not [(t, a) for t, a in seen.tags if {"onerror", "href", "action"} & set(a) or t in ("link", "iframe")]
    assert not re.search(r"""(src|href)=["']?(http|//)|@import|url\(""", page.replace(evil, "").replace(pairs.html.escape(evil), ""))
    assert seen.text.count('<script>alert("x")</script>') >= 4 and "default-src 'none'" in page
    roles = [a["class"] for t, a in seen.tags if a.get("class", "").startswith("answer")]
    assert roles == ["answer chosen", "answer rejected", "answer"] and 'data-gap="12"' in page


def test_a_board_of_many_records_is_a_seeded_sample(tmp_path):
    rows = [judged(f"r{k}", (4, 4, 4, 1, 0), (0, 0, 0, 0, 1)) for k in range(pairs.SHOWN + 50)]
    page = pairs.board(rows, tmp_path, seed=1)
    assert page.count("<article") == pairs.SHOWN and f"{pairs.SHOWN} of {len(rows)}" in page
    assert page == pairs.board(rows, tmp_path, seed=1) != pairs.board(rows, tmp_path, seed=2)


# ---- the whole of it --------------------------------------------------------------------------------------------

def test_the_miniature_end_to_end(tmp_path, capsys):
    torch.manual_seed(0)
    annotate.run(annotate.Story(out=str(tmp_path / "out"), prompts=40, export="trl"))
    said = capsys.readouterr().out
    assert "judged: 40 ok" in said and "position bias" in said
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"records.jsonl", "journal.jsonl", "answers-0.jsonl", "prompts.jsonl", "pairs.json", "board.html", "trl.jsonl", "config.json", "images"} <= names
    rows = [json.loads(line) for line in open(tmp_path / "out" / "records.jsonl")]
    for row in rows:
        assert row["judge"] == {"model": "oracle", "version": "exact", "prompt_sha": common.sha(rubric.RUBRIC.text(False)), "state": "ok",
                                "order": rubric.shown_order(row, 0), "usage": {}}
        for answer in row["answers"]:
            assert (answer["scores"], answer["comment"]) == oracle.judge(row, answer["text"])


def test_scores_of_an_earlier_judge_do_not_survive_a_new_one(prompts, tmp_path, monkeypatch):
    """A record that the new judge could not grade has no scores at all, not those of the old one."""
    raw = [json.loads(line) for line in open(prompts)][:2]
    for r in raw:
        r["answers"] = [{"text": t, "scores": dict.fromkeys(ATTRIBUTES, 4), "comment": "old"} for t in ("a", "b")]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in raw))
    monkeypatch.setattr(oracle, "exact_reply", lambda record, order, golden: "no" if record["id"] == "p0" else json.dumps(
        {"candidates": [{"id": c, "comment": "new"} | dict.fromkeys(ATTRIBUTES, 1) for c in "AB"]}))
    annotate.run(annotate.Settings(data=str(prompts), out=str(tmp_path / "out"), judge="oracle"))
    first, second = [json.loads(line) for line in open(tmp_path / "out" / "records.jsonl")]
    assert first["judge"]["state"] == "unparseable" and first["answers"] == [{"text": "a"}, {"text": "b"}]
    assert [a["comment"] for a in second["answers"]] == ["new", "new"]


# ---- what a mutation showed untested --------------------------------------------------------------------------

def test_a_golden_answer_of_the_data_stays_where_the_judge_gives_none(tmp_path):
    """Judged with the oracle, which says "golden" only on request."""
    record, = tasks.draw(tasks.preference_prompts(1, 0), tmp_path)
    row = {k: v for k, v in record.items() if k != "root"} | {"golden": "mine", "answers": [{"text": "a"}, {"text": "b"}]}
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    for golden, want in ((False, "mine"), (True, record["truth"]["turns"][-1]["full"])):
        annotate.run(annotate.Settings(data=str(tmp_path / "r.jsonl"), out=str(tmp_path / "out"), judge="oracle", golden=golden))
        assert json.loads((tmp_path / "out" / "records.jsonl").read_text())["golden"] == want


def test_every_answer_has_a_seed_of_its_own():
    assert len({annotate.answer_seed(seed, id, k) for seed in (0, 1) for id in "ab" for k in range(3)}) == 12


def test_what_an_answer_depends_on_names_it(ckpt, prompts, tmp_path):
    """Another seed, crop, dtype, checkpoint, question or picture: sampled anew; the same again: not."""
    lines_so_far = lambda: len((tmp_path / "out" / "answers-0.jsonl").read_text().splitlines())
    other = tiny_checkpoint(tmp_path / "other", "byte", seed=1)
    raw, want = [json.loads(line) for line in open(prompts)][:2], 2
    write = lambda rows: prompts.write_text("".join(json.dumps(r) + "\n" for r in rows))
    write(raw)
    first = sampled(ckpt, prompts, tmp_path / "out")
    for more in ({}, {"seed": 1}, {"crop": True}, {"n": 2}, {"ckpt": other}, {"dtype": "float32"}):
        want += 2 * bool(more)
        rows = sampled(**{"ckpt": ckpt, "prompts": prompts, "out": tmp_path / "out"} | more)
        assert lines_so_far() == want, more
        assert (rows == first) == (not more or "dtype" in more), more
    write([raw[0] | {"messages": [{"role": "user", "content": "<image>\nWhat else?"}]}, raw[1] | {"images": ["2.png"]}])
    sampled(ckpt, prompts, tmp_path / "out")
    assert lines_so_far() == want + 2, "another question, another picture"


def test_all_rejects_are_kept_and_max_new_counts(ckpt, prompts, tmp_path):
    with open(prompts, "a") as f:
        f.write('{"id": "none"}\n' + json.dumps({"id": "long", "messages": [{"role": "user", "content": "what? " * 2000}]}) + "\n")
    sampled(ckpt, prompts, tmp_path / "out")
    assert [json.loads(line)["id"] for line in open(tmp_path / "out" / "rejects.jsonl")] == ["none", "long"]
    with pytest.raises(BadInput, match="no usable record"):
        sampled(ckpt, prompts, tmp_path / "none", max_new=10**6)


def test_pictures_are_copied_where_they_cannot_be_linked_and_names_become_relative(prompts, tmp_path, monkeypatch):
    def link(source, target):
        raise OSError("another disk")
    monkeypatch.setattr(os, "link", link)
    raw = [json.loads(line) | {"answers": [{"text": "a"}]} for line in open(prompts)][:2]
    raw[1]["images"] = [str(prompts.parent / "1.png")]
    prompts.write_text("".join(json.dumps(r) + "\n" for r in raw))
    annotate.run(annotate.Settings(data=str(prompts), out=str(tmp_path / "out")))
    assert [json.loads(line)["images"] for line in open(tmp_path / "out" / "records.jsonl")] == [["0.png"], ["1.png"]]
    assert {p.name for p in (tmp_path / "out").iterdir()} >= {"0.png", "1.png"} and not list((tmp_path / "out").glob("*.part"))
    assert (tmp_path / "out" / "1.png").read_bytes() == (prompts.parent / "1.png").read_bytes()


def test_a_picture_of_equal_name_size_and_time_is_still_another_one(prompts, tmp_path):
    for folder, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8), colour).save(tmp_path / folder / "x.bmp")
        os.utime(tmp_path / folder / "x.bmp", (1, 1))
    annotate.bring_pictures({"id": "r", "root": str(tmp_path / "a"), "images": ["x.bmp"]}, tmp_path / "out")
    with pytest.raises(BadInput, match="another picture of that name"):
        annotate.bring_pictures({"id": "r", "root": str(tmp_path / "b"), "images": ["x.bmp"]}, tmp_path / "out")


def test_gap_and_seed_reach_numbers_board_and_export(tmp_path, capsys):
    scored = lambda v: {"text": f"S {v}", "scores": dict(zip(ATTRIBUTES, (min(4, v), max(0, v - 4), 0, 0, 0)))}
    rows = [{"id": f"r{k}", "images": [], "messages": [{"role": "user", "content": "q"}], "answers": list(map(scored, (8, 4, 3, 2)))} for k in range(20)]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for gap, seed in ((2, 0), (2, 1), (5, 0), (7, 0)):
        annotate.run(annotate.Settings(data=str(tmp_path / "r.jsonl"), out=str(tmp_path / "out"), gap=gap, seed=seed, pairs=True, export="trl",
                                       board=str(tmp_path / "b.html")))
        want = [rows[k]["answers"][pair[1]]["text"] for k, r in enumerate(rows) if (pair := pairs.choose_pair(r, gap, seed))]
        assert [json.loads(line)["rejected"][0]["content"][0]["text"] for line in open(tmp_path / "out" / "trl.jsonl")] == want
        assert json.loads((tmp_path / "out" / "pairs.json").read_text())["pairs"]["pairs"] == len(want) == (0 if gap == 7 else 20)
        assert re.findall(r'answer rejected"><div class="text">(S \d)', (tmp_path / "b.html").read_text()) == want


def test_the_miniature_is_drawn_by_one_process_and_judged_once(tmp_path, monkeypatch, capsys):
    for _ in range(2):
        annotate.run(annotate.Story(out=str(tmp_path / "out"), prompts=3, max_new=4))
        assert len((tmp_path / "out" / "journal.jsonl").read_text().splitlines()) == 3
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(BadInput, match="needs one process"):
        annotate.run(annotate.Story(out=str(tmp_path / "out"), prompts=3))


@pytest.mark.parametrize("bad", [{"top_p": 0.0}, {"top_p": 1.5}, {"max_new": 0}, {"batch": 0}, {"gap": 0}], ids=str)
def test_numbers_that_cannot_be_sampled_with(ckpt, prompts, tmp_path, bad):
    with pytest.raises(BadInput, match="--n must lie from 1 to 26"):
        sampled(ckpt, prompts, tmp_path / "out", **bad)


def test_everything_a_question_depends_on_is_in_its_key():
    keys = {annotate.question(with_answers("a", "b") | change, about, 0, golden).key for change, about, golden in (
        ({}, "judge", False), ({}, "other", False), ({}, "judge", True), ({"images_sha": "1"}, "judge", False), ({"id": "y"}, "judge", False),
        ({"answers": [{"text": "a"}, {"text": "c"}]}, "judge", False), ({"messages": [{"role": "user", "content": "?"}]}, "judge", False))}
    assert len(keys) == 7


def test_as_many_answers_as_letters():
    assert "<candidate_Z>" in annotate.question(with_answers(*map(str, range(26))), "", 0, False).text
    with pytest.raises(BadInput, match="record x: has 27 answers"):
        annotate.question(with_answers(*map(str, range(27))), "", 0, False)


def test_the_schema_bounds_the_grades_and_demands_them_all():
    one = rubric.RUBRIC.schema(2, False)["properties"]["candidates"]["items"]
    assert one["required"] == ["id", "comment", *ATTRIBUTES] and all((one["properties"][n]["minimum"], one["properties"][n]["maximum"]) == (0, 4) for n in ATTRIBUTES)


def test_equal_lengths_are_neither_longer_nor_shorter_and_the_gap_is_the_one_asked_for():
    rows = [judged("p", (4, 4, 4, 0, 0), (2, 4, 4, 0, 0), texts=["one two", "three four"])]
    x = pairs.statistics(rows)
    assert x["pairs"] == 1 and x["chosen_longer"] == x["chosen_shorter"] == 0 and pairs.statistics(rows, gap=3)["pairs"] == 0


def test_places_share_ties_by_three_and_leave_out_records_half_judged():
    half = judged("h", (4, 4, 4, 0, 0), (0, 0, 0, 0, 0), order=[0, 1])
    del half["answers"][1]["scores"]
    rows = pairs.places([half, judged("t", (4, 4, 4, 0, 0), (4, 4, 4, 0, 0), (0, 0, 0, 0, 0), order=[2, 0, 1])])
    assert [(p["n"], p["S"], p["best"]) for p in rows] == [(1, 0, 0), (1, 12, 0.5), (1, 12, 0.5)]
    assert [p["fair"] for p in rows] == pytest.approx([1 / 3] * 3)


def test_the_page_of_numbers_by_hand():
    page = pairs.show(pairs.statistics([judged("p", (4, 4, 4, 1, 0), (0, 0, 0, 0, 1), (1, 2, 2, 1, 0), (0, 2, 2, 0, 1))]))
    assert re.search(r"helpfulness +50% +25% +0% +0% +25% +1\.25 ", page)


def test_the_board_shows_small_pictures_reasons_and_records_in_their_order(tmp_path, monkeypatch):
    import base64, io
    from PIL import Image
    picture(700, 300).save(tmp_path / "a.jpg")
    row = judged("<i>p</i>", (1, 1, 1, 0, 0), (0, 0, 0, 0, 0)) | {"images": ["a.jpg"], "judge": {"state": "blocked", "reason": "too rude"}}
    page = pairs.board([row], tmp_path)
    embedded, = re.findall(r"base64,([^\"]+)", page)
    assert "<i>" not in page and "&lt;i&gt;p" in page, "an id is text, too"
    assert "blocked · too rude" in page and Image.open(io.BytesIO(base64.b64decode(embedded))).size == (320, 137)
    monkeypatch.setattr(pairs, "SHOWN", 5)
    ids = re.findall(r"<small>r(\d+)</small>", pairs.board([judged(f"r{k}", (0, 0, 0, 0, 0)) for k in range(40)], tmp_path))
    assert len(ids) == 5 and ids == sorted(ids, key=int)


def test_white_space_around_it_does_not_make_another_text():
    assert pairs.choose_pair(judged("x", (4, 4, 4, 0, 0), (0, 0, 0, 0, 0), texts=[" a", "a\n"])) is None


def test_no_questions_do_not_write_over_those_that_are_there(tmp_path):
    (tmp_path / "prompts.jsonl").write_text("kept")
    with pytest.raises(BadInput, match="--prompts"):
        annotate.run(annotate.Story(out=str(tmp_path), prompts=0))
    assert (tmp_path / "prompts.jsonl").read_text() == "kept"
