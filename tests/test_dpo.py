"""The loss in closed form, the pair rule, the reference, the loop; and SFT, which runs on the same rails.

    python -m pytest tests/test_dpo.py -q           with transformers installed also loads what was saved there
"""
import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import formats as records
import checkpoint
import common
import dpo
import sft
from judge.report import choose_pair
from common import BadInput, schedule
from conftest import picture, tiny_checkpoint
from data import Features, Pixels, Tokens, ahead, answer_logps, make_tree, pack_size, token_logps
from dpo import dpo_loss
from vision import ViT

LN2 = math.log(2)


# ---- fixtures --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("dpo") / "tiny", "byte")


def scores(s: int) -> dict:
    """Scores with S = s, from 0 to 12."""
    h, c = min(4, s), min(4, max(0, s - 4))
    return {"helpfulness": h, "correctness": c, "coherence": s - h - c, "complexity": 1, "verbosity": 2}


def turns(*contents):
    return [{"role": ("user", "assistant")[k % 2], "content": c} for k, c in enumerate(contents)]


RECORDS = [
    ("<image>\nWhat color is it?", ["a.png"], [("The circle is red.", 10), ("No.", 3), ("Blue", 5), ("It is red.", 9)]),
    ("What is 17 plus 25?", [], [("41", 2), ("17 plus 25 is 42.", 12)]),
    ("<image>\n<image>\nCompare.", ["a.png", "b.png"], [("They are the same.", 4), ("One is wide, one is tall.", 8)]),
    ("Is there a dog?", [], [("Yes.", 6), ("No, there is no dog.", 7)]),                      # too close: no pair
    ("<image>\nHow many?", ["b.png"], [("Three.", 11), ("12 small birds, or 50 of them.", 5), ("2", 0)]),
    ("Write a poem.", [], [("The sea is wide, the sea is deep.", 9), ("no", 1)]),
]


def write_data(folder, name="data.jsonl", rows=RECORDS):
    folder.mkdir(exist_ok=True)
    for seed, (file, size) in enumerate({"a.png": (40, 30), "b.png": (20, 40)}.items()):
        picture(*size, seed=seed).save(folder / file)
    records = [{"id": f"r{k}", "images": images, "messages": turns(question),
                "answers": [{"text": text, "scores": scores(s)} for text, s in answers]}
               for k, (question, images, answers) in enumerate(rows)]
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return folder / name


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def settings(ckpt, data, out, **changes):
    base = dict(ckpt=str(ckpt), data=str(data), out=str(out), device="cpu", steps=2, batch=4, lr=1e-3)
    return dpo.Settings(**(base | changes))


def align(ckpt, data, out, **changes):
    out.mkdir(exist_ok=True)
    return dpo.align(settings(ckpt, data, out, **changes), out)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def loaded(ckpt, data, seed=0, **changes):
    """(model, pairs, pixels): what `align` hands to `train`."""
    import formats as records
    model = checkpoint.load(ckpt)
    tokens, pixels = Tokens(ckpt, model.config), Pixels(model.config)
    items, _ = records.read(data)
    trees = [make_tree(tokens, r, [a["text"] for a in r["answers"]]) for r in items]
    reference = dpo.reference_logps(model, trees, pixels, 8192)
    return model, list(dpo.make_pairs(items, trees, reference, 2, seed)), pixels


# ---- the loss --------------------------------------------------------------------------------------------------

def numbers(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [-50 * torch.rand(n, generator=g, dtype=torch.float64) for _ in range(4)]


@pytest.mark.parametrize("beta", (0.01, 0.1, 1.0, 10.0))
def test_loss_is_ln_2_and_margin_0_where_policy_and_reference_agree(beta):
    w, l, _, _ = numbers()
    loss, chosen, rejected = dpo_loss(w, l, w.clone(), l.clone(), beta)
    torch.testing.assert_close(loss, torch.full_like(loss, LN2), atol=1e-12, rtol=0)
    assert (chosen == 0).all() and (rejected == 0).all()


@pytest.mark.parametrize("beta", (0.1, 0.5))
def test_at_init_the_slope_is_minus_half_beta_for_chosen_and_plus_half_for_rejected(beta):
    w, l, _, _ = (x.requires_grad_() for x in numbers())
    dpo_loss(w, l, w.detach().clone(), l.detach().clone(), beta)[0].sum().backward()
    torch.testing.assert_close(w.grad, torch.full_like(w, -beta / 2), atol=1e-12, rtol=0)
    torch.testing.assert_close(l.grad, torch.full_like(l, beta / 2), atol=1e-12, rtol=0)


def test_loss_equals_the_usual_formula_and_its_derivative_in_fp64():
    """TRL's sigmoid loss, written by hand; slope -beta * sigmoid(-beta * margin)."""
    for beta in (0.05, 0.1, 1.0):
        w, l, rw, rl = numbers()
        w.requires_grad_()
        loss, chosen, rejected = dpo_loss(w, l, rw, rl, beta)
        logratios, ref_logratios = w.detach() - l, rw - rl
        margin = logratios - ref_logratios
        torch.testing.assert_close(loss.detach(), -F.logsigmoid(beta * margin))
        torch.testing.assert_close(loss.detach(), torch.log1p(torch.exp(-beta * margin)))
        torch.testing.assert_close(chosen - rejected, beta * margin)
        torch.testing.assert_close(torch.autograd.grad(loss.sum(), w)[0], -beta / (1 + torch.exp(beta * margin)))
        assert not chosen.requires_grad and not rejected.requires_grad


def test_loss_sees_only_differences():
    w, l, rw, rl = numbers()
    plain = dpo_loss(w, l, rw, rl, 0.1)[0]
    for shifted in ((w + 7, l + 7, rw, rl), (w, l, rw - 3, rl - 3), (w + 5, l, rw + 5, rl), (w, l - 2, rw, rl - 2)):
        torch.testing.assert_close(dpo_loss(*shifted, 0.1)[0], plain)


def test_the_better_answer_gaining_lowers_the_loss_and_the_worse_gaining_raises_it():
    w, l, rw, rl = numbers()
    plain = dpo_loss(w, l, rw, rl, 0.1)[0]
    assert (dpo_loss(w + 1, l, rw, rl, 0.1)[0] < plain).all() and (dpo_loss(w, l + 1, rw, rl, 0.1)[0] > plain).all()


def test_huge_margins_neither_overflow_nor_lose_the_slope():
    w = torch.tensor([1e6, -1e6], requires_grad=True)
    zero = torch.zeros(2)
    loss = dpo_loss(w, zero, zero, zero, 0.1)[0]
    assert loss.tolist() == [0.0, 1e5]
    loss.sum().backward()
    torch.testing.assert_close(w.grad, torch.tensor([0.0, -0.1]))


# ---- pairs -----------------------------------------------------------------------------------------------------

def judged(*s, texts=None, id="x"):
    return {"id": id, "answers": [{"text": (texts or "abcdefgh")[k], "scores": scores(v)} for k, v in enumerate(s)]}


def test_a_pair_needs_a_gap_of_two():
    assert choose_pair(judged(8, 7)) is None and choose_pair(judged(7, 7, 7, 7)) is None
    assert choose_pair(judged(8, 6)) == (0, 1) and choose_pair(judged(6, 8)) == (1, 0)
    assert choose_pair(judged(8, 7), gap=1) == (0, 1) and choose_pair(judged(8, 6), gap=3) is None
    assert choose_pair(judged(5)) is None and choose_pair(judged()) is None


def test_quality_is_helpfulness_correctness_and_coherence_alone():
    answer = {"scores": {"helpfulness": 1, "correctness": 2, "coherence": 4, "complexity": 4, "verbosity": 3}}
    assert records.quality(answer) == 7


def test_ties_for_the_best_go_to_the_first():
    assert choose_pair(judged(3, 9, 9)) == (1, 0)
    assert choose_pair(judged(9, 3, 9)) == (0, 1)


def test_the_rejected_answer_is_drawn_from_all_that_are_worse_by_the_gap_and_only_those():
    seen = {choose_pair(judged(10, 9, 8, 3, 0, id=str(k))) for k in range(200)}
    assert seen == {(0, 2), (0, 3), (0, 4)}
    seen = {choose_pair(judged(10, 9, 8, 3, 0), seed=k) for k in range(200)}
    assert seen == {(0, 2), (0, 3), (0, 4)}


def test_a_pair_depends_on_its_record_and_the_seed_alone():
    one, many = judged(10, 2, 3, 4, id="a"), [judged(9, 1, 2, 3, id=str(k)) for k in range(20)]
    first = choose_pair(one, seed=5)
    forward = [choose_pair(r, seed=5) for r in many]
    assert [choose_pair(r, seed=5) for r in reversed(many)][::-1] == forward and choose_pair(one, seed=5) == first
    assert [choose_pair(r, seed=6) for r in many] != forward


def test_a_pair_given_in_the_data_stands():
    record = judged(2, 9) | {"pair": [0, 1]}
    assert choose_pair(record) == (0, 1)
    assert choose_pair({"id": "x", "answers": [{"text": "a"}, {"text": "b"}], "pair": [1, 0]}) == (1, 0)


def test_answers_of_equal_text_are_never_paired():
    assert choose_pair(judged(9, 3, texts=["a", "a "])) is None
    assert {choose_pair(judged(9, 3, 2, texts=["a", "a", "b"], id=str(k))) for k in range(50)} == {(0, 2)}


def test_answers_without_scores_take_no_part():
    record = judged(9, 3)
    record["answers"] += [{"text": "unjudged"}]
    record["answers"].insert(0, {"text": "neither"})
    assert choose_pair(record) == (1, 2)


def test_pairs_carry_their_own_reference(ckpt, data):
    model, pairs, pixels = loaded(ckpt, data)
    assert [p.tree.id for p in pairs] == ["r0", "r1", "r2", "r4", "r5"]
    with torch.no_grad():
        for p in pairs:
            torch.testing.assert_close(answer_logps(model, pixels.pack([p.tree])), torch.tensor(p.reference), atol=1e-4, rtol=0)
    tokens = Tokens(ckpt, model.config)
    assert [tokens.decode(a) for a in pairs[1].tree.answers] == ["17 plus 25 is 42.", "41"], "chosen first"


def test_what_is_held_out_depends_on_the_id_alone():
    ids = [f"lrv-{k:06d}" for k in range(20000)]
    out = [dpo.is_held_out(i, 0.1) for i in ids]
    assert abs(sum(out) / len(out) - 0.1) < 0.01
    assert not any(dpo.is_held_out(i, 0.0) for i in ids) and all(dpo.is_held_out(i, 1.0) for i in ids)
    assert all(dpo.is_held_out(i, 0.2) for i, held in zip(ids, out) if held), "a larger share holds the smaller one"


# ---- the schedule ----------------------------------------------------------------------------------------------

def test_the_schedule_is_three_percent_warm_up_then_a_cosine_to_0():
    steps = 200                                             # 6 of warm-up, 194 of cosine
    for step, factor in {0: 1 / 6, 1: 2 / 6, 5: 1.0, 6: 1.0, 103: 0.5, 199: 0.5 * (1 + math.cos(math.pi * 193 / 194))}.items():
        assert schedule(step, steps) == pytest.approx(factor, abs=1e-12), step
    values = [schedule(k, steps) for k in range(6, steps)]
    assert values == sorted(values, reverse=True) and 0 < values[-1] < 1e-4
    assert schedule(steps, steps) == pytest.approx(0, abs=1e-12)


def test_the_schedule_of_short_runs_and_with_a_floor():
    assert schedule(0, 1) == 1.0 and schedule(0, 2) == 1.0 and schedule(0, 10, warmup=0) == 1.0
    assert [schedule(k, 4, warmup=0.5) for k in range(4)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert min(schedule(k, 1000, floor=0.1) for k in range(30, 1000)) == pytest.approx(0.1, abs=1e-5)


# ---- the reference ---------------------------------------------------------------------------------------------

def test_steps_0_writes_one_reference_line_per_usable_record_and_stops(ckpt, data, tmp_path, capsys):
    model = align(ckpt, data, tmp_path / "out", steps=0)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "reference.fingerprint.json", "reference.jsonl", "rejects.jsonl"]
    assert "metrics" not in capsys.readouterr().out
    rows = rows_of(tmp_path / "out" / "reference.jsonl")
    assert [set(r) for r in rows] == [{"id", "logps", "tokens"}] * len(RECORDS)
    tokens, pixels = Tokens(ckpt, model.config), Pixels(model.config)
    for k, (row, (question, images, answers)) in enumerate(zip(rows, RECORDS)):
        tree = make_tree(tokens, {"id": "", "root": data.parent, "images": images, "messages": turns(question)},
                         [text for text, _ in answers])
        with torch.no_grad():
            expected = answer_logps(model, pixels.pack([tree]))
        assert row["id"] == f"r{k}" and row["tokens"] == [len(a) for a in tree.answers]
        torch.testing.assert_close(torch.tensor(row["logps"]), expected, atol=1e-4, rtol=0)
        assert all(math.isfinite(x) and x < 0 for x in row["logps"])


def reuse(ckpt, data, out, **changes):
    """Run with the reference of an earlier run; its pass must not run again."""
    before = dpo.reference_logps
    dpo.reference_logps = lambda *a: pytest.fail("the reference was computed again")
    try:
        return align(ckpt, data, out, steps=0, **changes)
    finally:
        dpo.reference_logps = before


def test_a_reference_is_used_again_when_only_scores_gap_seed_or_packs_change(ckpt, data, tmp_path, capsys):
    align(ckpt, data, tmp_path / "out", steps=0)
    written = (tmp_path / "out" / "reference.jsonl").read_bytes()
    rescored = [(q, i, [(text, 12 - s) for text, s in a]) for q, i, a in RECORDS]
    reuse(ckpt, data, tmp_path / "out", gap=3, seed=7, pack=64, batch=2, beta=0.5, lr=1e-5)
    reuse(ckpt, write_data(tmp_path / "data", rows=rescored), tmp_path / "out")
    reuse(ckpt, data, tmp_path / "other", reference=str(tmp_path / "out" / "reference.jsonl"))
    assert f"{len(RECORDS)} records read" in capsys.readouterr().out
    assert (tmp_path / "out" / "reference.jsonl").read_bytes() == written
    assert not (tmp_path / "other" / "reference.jsonl").exists()


def other_rows(k, row):
    return RECORDS[:k] + [row] + RECORDS[k + 1:]


def spoil_tokenizer(ckpt):
    path = ckpt / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def spoil_weights(ckpt):
    from safetensors.torch import load_file, save_file
    weights = load_file(ckpt / "model.safetensors")
    weights["language_model.model.norm.weight"][0] += 1e-3
    save_file(weights, ckpt / "model.safetensors", metadata={"format": "pt"})


def spoil_config(ckpt):
    path = ckpt / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))


def spoil_steer(ckpt):
    form = {"text": " {helpfulness}", "grades": list("01234"), "target": dict.fromkeys(records.ATTRIBUTES, 4)}
    (ckpt / "steer.json").write_text(json.dumps(form))


q, i, a = RECORDS[1]
STALE = {
    "what a SteerLM model is asked for": (spoil_steer, None, {}, ["template"]),
    "weights": (spoil_weights, None, {}, ["weights"]),
    "rope theta": (spoil_config, None, {}, ["weights"]),
    "tokenizer": (spoil_tokenizer, None, {}, ["template"]),
    "an answer's text": (None, other_rows(1, (q, i, [("40", 2), a[1]])), {}, ["data"]),
    "a question": (None, other_rows(1, (q + "!", i, a)), {}, ["data"]),
    "answers swapped": (None, other_rows(1, (q, i, a[::-1])), {}, ["data"]),
    "one record less": (None, RECORDS[:-1], {}, ["data"]),
    "records in another order": (None, RECORDS[::-1], {}, ["data"]),
    "another picture's name": (None, other_rows(4, (RECORDS[4][0], ["a.png"], RECORDS[4][2])), {}, ["data"]),
    "crop": (None, None, {"crop": 1}, ["image processing"]),
    "dtype": (None, None, {"dtype": "bfloat16"}, ["weights", "dtype"]),
}


@pytest.mark.parametrize("spoil, rows, changes, named", STALE.values(), ids=STALE)
def test_a_stale_reference_is_refused_and_what_changed_is_named(ckpt, tmp_path, spoil, rows, changes, named):
    import shutil
    data, mine = write_data(tmp_path / "data"), tmp_path / "ckpt"
    shutil.copytree(ckpt, mine)
    align(mine, data, tmp_path / "out", steps=0)
    if spoil:
        spoil(mine)
    if rows:
        write_data(tmp_path / "data", rows=rows)
    with pytest.raises(BadInput, match="is stale") as error:
        align(mine, data, tmp_path / "out", steps=0, **changes)
    assert str(tmp_path / "out" / "reference.jsonl") in str(error.value)
    for key in ("weights", "data", "template", "image processing", "dtype"):
        assert (f"{key} (" in str(error.value)) == (key in named), str(error.value)


def test_changed_bytes_of_an_image_make_the_reference_stale(ckpt, data, tmp_path):
    align(ckpt, data, tmp_path / "out", steps=0)
    picture(40, 30, seed=9).save(data.parent / "a.png")
    with pytest.raises(BadInput, match=r"stale: it was computed with other data \("):
        align(ckpt, data, tmp_path / "out", steps=0)


def test_another_template_makes_the_reference_stale(ckpt, data, tmp_path, monkeypatch):
    align(ckpt, data, tmp_path / "out", steps=0)
    monkeypatch.setattr(dpo, "template", lambda messages: "USER: other ASSISTANT:")
    with pytest.raises(BadInput, match=r"stale: it was computed with other template \("):
        align(ckpt, data, tmp_path / "out", steps=0)


def test_a_reference_file_that_is_not_ours_is_never_written_over(ckpt, data, tmp_path):
    """--reference with the data's name by mistake must not cost the data."""
    before = data.read_bytes()
    with pytest.raises(BadInput, match="has no data.fingerprint.json beside it"):
        align(ckpt, data, tmp_path / "out", steps=0, reference=str(data))
    assert data.read_bytes() == before


def test_a_reference_with_other_ids_is_refused(ckpt, data, tmp_path):
    align(ckpt, data, tmp_path / "out", steps=0)
    path = tmp_path / "out" / "reference.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(BadInput, match="does not hold the records"):
        align(ckpt, data, tmp_path / "out", steps=0)


def test_a_record_that_the_model_gives_no_finite_log_prob_is_named(ckpt, data, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "answer_logps", lambda m, pack: torch.full((pack.answers,), float("nan")))
    with pytest.raises(BadInput, match="record r0: its reference log-prob is"):
        align(ckpt, data, tmp_path / "out", steps=0)
    assert not (tmp_path / "out" / "reference.jsonl").exists()


# ---- the contract ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("pack", (1, 8192))
def test_every_run_starts_at_ln_2(ckpt, data, tmp_path, capsys, pack):
    align(ckpt, data, tmp_path / "out", steps=1, pack=pack)
    [row] = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert row["loss"] == pytest.approx(LN2, abs=1e-5) and abs(row["margin"]) < 1e-5
    assert abs(row["reward_chosen"]) < 1e-5 and abs(row["reward_rejected"]) < 1e-5
    assert "step-0 contract holds: loss 0.6931" in capsys.readouterr().out


def test_a_fork_with_another_loss_starts_where_that_loss_does(ckpt, data, tmp_path, capsys, monkeypatch):
    """IPO (arXiv:2310.12036): (difference of log-ratios - 1 / (2 beta))^2, 25 for beta 0.1 where the ratios agree."""
    def ipo(chosen, rejected, ref_chosen, ref_rejected, beta):
        better, worse = chosen - ref_chosen, rejected - ref_rejected
        return (better - worse - 1 / (2 * beta)) ** 2, beta * better.detach(), beta * worse.detach()
    monkeypatch.setattr(dpo, "dpo_loss", ipo)
    align(ckpt, data, tmp_path / "out", steps=3, lr=2e-5)
    losses = [row["loss"] for row in rows_of(tmp_path / "out" / "metrics.jsonl")]
    assert "holds: loss 25.0000" in capsys.readouterr().out and losses[2] < losses[0] - 0.1


def test_a_run_in_bfloat16_starts_at_ln_2_too(ckpt, data, tmp_path):
    align(ckpt, data, tmp_path / "out", steps=2, dtype="bfloat16", pack=300)
    first, second = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(LN2, abs=0.05) and second["loss"] < first["loss"]
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_reference_that_is_off_stops_the_run_before_the_first_update(ckpt, data, tmp_path):
    align(ckpt, data, tmp_path / "out", steps=0)
    path = tmp_path / "out" / "reference.jsonl"
    rows = rows_of(path)
    for row in rows:
        row["logps"][0] += 0.5
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(BadInput, match="step-0 contract broken"):
        align(ckpt, data, tmp_path / "out", steps=2)
    assert rows_of(tmp_path / "out" / "metrics.jsonl") == [] and not (tmp_path / "out" / "model").exists()


def test_the_contract_has_one_tolerance_per_dtype():
    ok = torch.tensor([5e-4, -5e-4])
    dpo.check_contract(LN2 + 5e-4, ok, 0.1, torch.float32)
    dpo.check_contract(LN2 + 0.05, 700 * ok, 0.1, torch.bfloat16)                # 3.5 nats
    dpo.check_contract(LN2 + 5e-3, 10 * ok, 1.0, torch.float32)                  # the same nats at another beta
    with pytest.raises(BadInput, match="contract broken"):
        dpo.check_contract(LN2, ok, 0.01, torch.float32)
    for loss, margins, dtype in ((LN2 + 2e-3, ok, torch.float32), (LN2, 4 * ok, torch.float32), (LN2 - 0.11, ok, torch.bfloat16),
                                 (LN2, 900 * ok, torch.bfloat16)):
        with pytest.raises(BadInput, match="contract broken"):
            dpo.check_contract(loss, margins, 0.1, dtype)


# ---- the loop --------------------------------------------------------------------------------------------------

def gradients(monkeypatch, ckpt, data, tmp_path, **changes):
    """What the optimizer sees in the first step, by parameter name."""
    model, pairs, pixels = loaded(ckpt, data)
    seen = {}

    def catch(parameters, limit):
        seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        return torch.linalg.vector_norm(torch.stack([g.norm() for g in seen.values()]))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", catch)
    dpo.train(model, pairs, pixels, settings(ckpt, data, tmp_path, **changes), 1, tmp_path)
    return seen


def test_gradients_do_not_depend_on_how_a_batch_is_packed(monkeypatch, ckpt, data, tmp_path):
    whole, parts, two = (gradients(monkeypatch, ckpt, data, tmp_path, pack=pack, batch=5) for pack in (8192, 1, 250))
    assert set(whole) == set(parts) and max(g.abs().max() for g in whole.values()) > 1e-2
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], atol=1e-6, rtol=1e-4, msg=name)
        torch.testing.assert_close(whole[name], two[name], atol=1e-6, rtol=1e-4, msg=name)


def test_gradients_are_those_of_the_mean_of_the_pairs_own_losses(monkeypatch, ckpt, data, tmp_path):
    """The loop against four lines that know nothing of it: no packs, no shared prompt, the reference once more."""
    seen = gradients(monkeypatch, ckpt, data, tmp_path, batch=5)
    model, pairs, pixels = loaded(ckpt, data)
    for p in pairs:
        w, l = (answer_logps(model, pixels.pack([replace(p.tree, answers=[x])]))[0] for x in p.tree.answers)
        (-F.logsigmoid(0.1 * ((w - w.detach()) - (l - l.detach()))) / len(pairs)).backward()
    for name, p in model.named_parameters():
        if name in seen:
            torch.testing.assert_close(seen[name], p.grad, atol=1e-6, rtol=1e-3, msg=name)
    assert {n for n, p in model.named_parameters() if p.grad is not None} == set(seen)


def test_every_step_starts_from_no_gradient(ckpt, data, tmp_path):
    """With nothing learned and all pairs in the batch, every step has the same gradient; left-overs would add up."""
    align(ckpt, data, tmp_path / "out", steps=3, batch=5, lr=1e-30)
    norms = [r["grad_norm"] for r in rows_of(tmp_path / "out" / "metrics.jsonl")]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)
    model, trees, pixels = sft_trees(ckpt, conversations(tmp_path / "talk"))
    rows = []
    sft.train(model, sft.shuffled(trees, 0), pixels.pack, steps=3, batch=5, lr=0.0, log=rows.append)
    assert [r["grad_norm"] for r in rows] == pytest.approx([rows[0]["grad_norm"]] * 3, rel=1e-4)


def test_the_frozen_tower_is_not_in_the_optimizer_and_never_moves_while_the_rest_does(monkeypatch, ckpt, data, tmp_path):
    given, before = [], dict(checkpoint.load(ckpt).named_parameters())
    AdamW = torch.optim.AdamW
    monkeypatch.setattr(torch.optim, "AdamW", lambda ps, **kw: given.append((list(ps), kw)) or AdamW(given[0][0], **kw))
    model = align(ckpt, data, tmp_path / "out", steps=3)
    [(groups, _)] = given
    names = {id(p): n for n, p in model.named_parameters()}
    trained = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(trained) == sorted(n for n in before if not n.startswith("vision_tower."))
    assert all(group["weight_decay"] == 0 and group["peak"] == 1e-3 for group in groups)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in trained), name
    assert any(n.startswith("multi_modal_projector.") for n in trained)
    assert not any(p.requires_grad for n, p in model.named_parameters() if n.startswith("vision_tower."))


def test_metrics_hold_exactly_their_columns_one_row_per_step(ckpt, data, tmp_path):
    align(ckpt, data, tmp_path / "out", steps=7, batch=3)
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6, 7]
    for row in rows:
        assert tuple(row) == ("step", "loss", "margin", "accuracy", "reward_chosen", "reward_rejected", "logp_chosen",
                              "logp_rejected", "length_chosen", "length_rejected", "grad_norm", "lr", "pairs_per_s")
        assert row["lr"] == pytest.approx(1e-3 * schedule(row["step"] - 1, 7))
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"], abs=1e-4)
        assert all(math.isfinite(x) for x in row.values()) and row["grad_norm"] > 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["steps"] == 7 and config["pairs"] == 5 and config["settings"]["batch"] == 3


def test_the_columns_of_the_first_step_are_those_of_its_pairs(ckpt, data, tmp_path):
    """A batch of all pairs: means of log-probs and of lengths, counted here by hand."""
    align(ckpt, data, tmp_path / "out", steps=1, batch=128)
    [row] = rows_of(tmp_path / "out" / "metrics.jsonl")
    _, pairs, _ = loaded(ckpt, data)
    mean = lambda xs: sum(xs) / len(pairs)
    assert row["logp_chosen"] == pytest.approx(mean([p.reference[0] for p in pairs]), rel=1e-5)
    assert row["logp_rejected"] == pytest.approx(mean([p.reference[1] for p in pairs]), rel=1e-5)
    assert row["length_chosen"] == pytest.approx(mean([len(p.tree.answers[0]) for p in pairs]))
    assert row["length_rejected"] == pytest.approx(mean([len(p.tree.answers[1]) for p in pairs]))


def test_thirty_steps_raise_margin_and_accuracy(ckpt, data, tmp_path):
    align(ckpt, data, tmp_path / "out", steps=30, batch=5)
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert rows[-1]["accuracy"] == 1.0 and rows[-1]["margin"] > 1.0 and rows[-1]["loss"] < 0.4
    assert rows[-1]["margin"] > rows[10]["margin"] > rows[2]["margin"] > 0


def test_epochs_become_steps_over_the_pairs_there_are(ckpt, data, tmp_path):
    align(ckpt, data, tmp_path / "a", steps=-1, epochs=2, batch=128)
    assert len(rows_of(tmp_path / "a" / "metrics.jsonl")) == 2
    align(ckpt, data, tmp_path / "b", steps=-1, epochs=3, batch=2)
    assert len(rows_of(tmp_path / "b" / "metrics.jsonl")) == 7          # 15 pairs seen, 2 at a time


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(ckpt, data, tmp_path):
    one, two, other = (align(ckpt, data, tmp_path / name, batch=2, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.head, other.head)


def test_held_out_pairs_are_not_trained_on_and_start_undecided(ckpt, tmp_path, capsys):
    """Before the first step the held-out margin is 0 and accuracy one half: the reference is the start, not the end."""
    data = write_data(tmp_path / "data", rows=[RECORDS[k % 3] for k in range(30)])
    align(ckpt, data, tmp_path / "out", steps=2, holdout=0.3)
    held = [k for k in range(30) if dpo.is_held_out(f"r{k}", 0.3)]
    assert 0 < len(held) < 30
    result = json.loads((tmp_path / "out" / "heldout.json").read_text())
    assert result["before"]["pairs"] == result["after"]["pairs"] == len(held)
    assert abs(result["before"]["margin"]) < 1e-3 and result["before"]["accuracy"] == 0.5
    assert result["after"]["margin"] > 0.01
    assert f"{30 - len(held)} to train on, {len(held)} held out" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(ckpt, data, tmp_path):
    with pytest.raises(BadInput, match=r"step \d+: loss .*lower --lr"):
        align(ckpt, data, tmp_path / "out", steps=30, lr=1e30, clip=0)
    assert not (tmp_path / "out" / "model").exists()


def test_a_finished_run_is_never_written_over(ckpt, data, tmp_path, monkeypatch):
    align(ckpt, data, tmp_path / "out", steps=1)
    with pytest.raises(BadInput, match="already holds an aligned model"):
        dpo.run(settings(ckpt, data, tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    names = []
    for _ in range(3):
        names.append(str(dpo.run_folder(dpo.Settings())))
        (tmp_path / names[-1]).mkdir(parents=True)
        assert dpo.run_folder(dpo.Settings()) == Path(names[-1])                 # a failed start left it empty
        (tmp_path / names[-1] / "config.json").touch()
    assert names == ["runs/dpo", "runs/dpo-2", "runs/dpo-3"]


# ---- what comes out --------------------------------------------------------------------------------------------

def test_the_saved_model_gives_the_log_probs_it_was_saved_with(ckpt, data, tmp_path):
    model = align(ckpt, data, tmp_path / "out", steps=3)
    again = checkpoint.load(tmp_path / "out" / "model")
    _, pairs, pixels = loaded(ckpt, data)
    pack = pixels.pack([p.tree for p in pairs])
    with torch.no_grad():
        assert torch.equal(answer_logps(model, pack), answer_logps(again, pack))
    tokens = Tokens(tmp_path / "out" / "model", again.config)
    assert tokens.encode("Hi <image>") == Tokens(ckpt, model.config).encode("Hi <image>")


def test_transformers_loads_the_aligned_model_and_gives_our_logits(ckpt, data, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = align(ckpt, data, tmp_path / "out", steps=3)
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "out" / "model", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, pairs, pixels = loaded(ckpt, data)
    for p in pairs:
        ids = torch.tensor([p.tree.prompt + p.tree.answers[0]])
        with torch.no_grad():
            logits = theirs.eval()(input_ids=ids, pixel_values=pixels(p.tree.images), attention_mask=torch.ones_like(ids)).logits[0]
            ours = answer_logps(model, pixels.pack([p.tree]))[0]
        n = len(p.tree.answers[0])
        logps = logits.log_softmax(-1)[-n - 1:-1].gather(1, ids[0, -n:, None]).sum()
        torch.testing.assert_close(logps, ours, atol=1e-3, rtol=0)


# ---- supervised fine-tuning ------------------------------------------------------------------------------------

def conversations(folder, n=5):
    """LLaVA instruction data: one and two turns, with and without a picture."""
    write_data(folder)
    talk = lambda *said: [{"from": ("human", "gpt")[k % 2], "value": x} for k, x in enumerate(said)]
    rows = [{"id": f"s{k}", "image": "a.png", "conversations": talk("<image>\nWhat is it?", "A circle.", "Sure?", "Yes, 12.")}
            if k % 2 else {"id": f"s{k}", "conversations": talk("Hello.", "Hi there, how are you?")} for k in range(n)]
    (folder / "llava.json").write_text(json.dumps(rows))
    return folder / "llava.json"


def sft_trees(ckpt, path):
    import formats as records
    model = checkpoint.load(ckpt)
    tokens, pixels = Tokens(ckpt, model.config), Pixels(model.config)
    items, _ = records.read(path)
    return model, [make_tree(tokens, r, [sft.target(r)], history=True) for r in items], pixels


@pytest.mark.parametrize("pack", (1, 150, 8192))
def test_sft_loss_is_the_mean_over_the_batch_s_scored_tokens_however_it_is_packed(ckpt, tmp_path, pack):
    model, trees, pixels = sft_trees(ckpt, conversations(tmp_path / "data"))
    with torch.no_grad():
        logps = torch.cat([token_logps(model, pixels.pack([t])) for t in trees])
    rows = []
    sft.train(model, sft.shuffled(trees, 0), pixels.pack, steps=1, batch=len(trees), lr=1e-3, pack=pack, log=rows.append)
    assert rows[0]["loss"] == pytest.approx(-logps.mean().item(), rel=1e-5)
    assert len(logps) == sft.scored_tokens(trees)


def test_sft_gradients_do_not_depend_on_how_a_batch_is_packed(ckpt, tmp_path):
    """With a plain step of known size: Adam would divide a wrong factor away."""
    path, after = conversations(tmp_path / "data"), []
    for pack in (1, 8192):
        model, trees, pixels = sft_trees(ckpt, path)
        rows = []
        sft.train(model, sft.shuffled(trees, 0), pixels.pack, steps=1, batch=len(trees), lr=1e-3, pack=pack, log=rows.append)
        after.append((rows[0]["grad_norm"], model.head.detach().clone()))
    assert after[0][0] == pytest.approx(after[1][0], rel=1e-4)
    torch.testing.assert_close(after[0][1], after[1][1], atol=1e-5, rtol=0)


def test_earlier_assistant_turns_are_scored_and_user_turns_are_not(ckpt, tmp_path):
    _, trees, pixels = sft_trees(ckpt, conversations(tmp_path / "data"))
    tokens = Tokens(ckpt, checkpoint.read_config(ckpt)[0])
    pack = pixels.pack([trees[1]])
    text = tokens.tokenizer.decode(pack.targets.tolist(), skip_special_tokens=False)
    assert text == " A circle.</s> Yes, 12.</s>"


def test_sft_learns_what_it_is_told(ckpt, tmp_path):
    model, trees, pixels = sft_trees(ckpt, conversations(tmp_path / "data"))
    rows = []
    sft.train(model, sft.shuffled(trees, 0), pixels.pack, steps=30, batch=5, lr=3e-3, log=rows.append)
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]


def test_sft_runs_three_steps_from_llava_json(ckpt, tmp_path, capsys):
    out = tmp_path / "out"
    sft.run(sft.Settings(ckpt=str(ckpt), data=str(conversations(tmp_path / "data")), out=str(out), device="cpu", steps=3))
    rows = rows_of(out / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2, 3]
    assert set(rows[0]) == {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s"}
    assert "5 records, 5 answers to learn, 3 steps of 5" in capsys.readouterr().out
    model, trees, pixels = sft_trees(ckpt, tmp_path / "data" / "llava.json")
    with torch.no_grad():
        logps = torch.cat([token_logps(model, pixels.pack([t])) for t in trees])
    assert rows[0]["loss"] == pytest.approx(-logps.mean().item(), rel=1e-5), "earlier turns count too"
    before, after = (dict(checkpoint.load(x).named_parameters()) for x in (ckpt, out / "model"))
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"]) is False
    assert all(torch.equal(before[n], after[n]) for n in before if n.startswith("vision_tower."))
    with pytest.raises(BadInput, match="already holds a trained model"):
        sft.run(sft.Settings(ckpt=str(ckpt), data="x", out=str(out)))


def test_sft_epochs_become_steps_over_the_records_there_are(ckpt, tmp_path):
    """Five records and the paper's batch of 128: three epochs are three steps, not one."""
    path = conversations(tmp_path / "data")
    sft.run(sft.Settings(ckpt=str(ckpt), data=str(path), out=str(tmp_path / "out"), device="cpu", epochs=3))
    assert len(rows_of(tmp_path / "out" / "metrics.jsonl")) == 3


def test_sft_without_a_clip_still_learns(ckpt, tmp_path):
    model, trees, pixels = sft_trees(ckpt, conversations(tmp_path / "data"))
    before = model.head.detach().clone()
    sft.train(model, sft.shuffled(trees, 0), pixels.pack, steps=1, batch=5, lr=1e-3, clip=0)
    assert not torch.equal(before, model.head)


def test_the_sft_target_is_golden_else_the_best_scored_else_the_only_answer():
    assert sft.target(judged(3, 9) | {"golden": "gold"}) == "gold"
    assert sft.target(judged(3, 9, 9) | {"golden": ""}) == "b"
    assert sft.target({"answers": [{"text": "only"}]}) == "only"
    for answers in ([], [{"text": "a"}, {"text": "b"}]):
        with pytest.raises(BadInput, match="no golden answer"):
            sft.target({"answers": answers})


def test_every_pass_of_the_order_holds_every_item_once():
    rng = random.Random(0)
    items = rng.sample(range(100), 17)
    order = sft.shuffled(items, 3)
    passes = [[next(order) for _ in items] for _ in range(4)]
    assert all(sorted(p) == sorted(items) for p in passes) and len({tuple(p) for p in passes}) == 4
    again = sft.shuffled(items, 3)
    assert [next(again) for _ in items] == passes[0]


# ---- 16-bit weights ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_steps_smaller_than_a_16_bit_weight_can_show_still_add_up(dtype):
    """100 Adam steps of 1e-4 from 1.0: the next bf16 number below 1 is 0.996, and without fp32 masters none is reached."""
    p = torch.ones(3, dtype=dtype, requires_grad=True)
    wide = common.masters([p])
    optimizer = torch.optim.AdamW(wide, lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        p.sum().backward()
        common.update(optimizer, wide, [p])
    assert p.dtype == dtype and p.grad is None
    assert torch.allclose(p.float(), torch.tensor(0.99), atol=2e-3)


def test_gradients_of_16_bit_weights_add_up_in_fp32_over_packs():
    """256 + 1 is 256 in bf16; 1 x 256 plus 64 x 1 must be 320 whatever the order."""
    p = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    [master] = common.masters([p])
    for size in (256.0, *[1.0] * 64):
        (p * size).sum().backward()
        assert p.grad is None, "let go at once"
    assert torch.equal(master.grad, torch.full((2,), 320.0))


# ---- what must not be taught -----------------------------------------------------------------------------------------

def test_an_answer_that_was_cut_off_is_never_paired():
    record = judged(9, 3, 3)
    assert choose_pair(record) is not None
    record["answers"][0]["finish"] = "length"
    assert choose_pair(record) is None


def test_sft_learns_the_chosen_answer_of_a_pair():
    assert sft.target({"answers": [{"text": "better"}, {"text": "worse"}], "pair": [0, 1]}) == "better"


def test_a_damaged_reference_is_refused_not_read(ckpt, data, tmp_path):
    run = dict(ckpt=str(ckpt), data=str(data), out=str(tmp_path / "run"), device="cpu", steps=0)
    dpo.run(dpo.Settings(**run))
    path = tmp_path / "run" / "reference.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(BadInput, match="damaged"):
        dpo.run(dpo.Settings(**run))


def test_averages_are_sums_over_the_answers_tokens_for_policy_and_reference_alike(ckpt, data, tmp_path):
    model = checkpoint.load(ckpt)
    tokens, pixels = Tokens(ckpt, model.config), Pixels(model.config)
    items, _ = records.read(data)
    pairs = [dpo.Pair(make_tree(tokens, r, [a["text"] for a in r["answers"][:2]]), (-7.0, -11.0)) for r in items]
    lengths = torch.tensor([[len(a) for a in p.tree.answers] for p in pairs]).T
    pack = pixels.pack([p.tree for p in pairs])
    for sums, means in zip(dpo.pair_logps(model, pairs, pack, False), dpo.pair_logps(model, pairs, pack, True)):
        assert torch.allclose(means, sums / lengths) and not torch.allclose(means, sums)


def test_kept_features_give_the_same_run_and_the_tower_runs_once_per_image(ckpt, data, tmp_path, monkeypatch):
    seen, real, weights, losses = [], ViT.forward, {}, {}
    monkeypatch.setattr(ViT, "forward", lambda self, pixels: seen.append(len(pixels)) or real(self, pixels))
    for name, features, runs in (("without", "", range(6, 99)), ("first", "kept", [2]), ("again", "kept", [0])):     # two pictures
        seen.clear()
        align(ckpt, data, tmp_path / name, steps=2, batch=4, features=features and str(tmp_path / features))
        weights[name] = load_file(tmp_path / name / "model" / "model.safetensors")
        assert sum(seen) in runs, name
        losses[name] = [row["loss"] for row in common.read_jsonl(tmp_path / name / "metrics.jsonl")]
    assert losses["first"] == pytest.approx(losses["without"], rel=1e-4) and losses["again"] == losses["first"]
    assert all(torch.equal(weights["again"][key], value) for key, value in weights["first"].items())


def test_kept_features_depend_on_picture_tower_and_preprocessing(ckpt, data, tmp_path):
    model = checkpoint.load(ckpt)
    one, two = data.parent / "a.png", data.parent / "b.png"
    features = Features(model, tmp_path / "kept")([one, two])
    assert torch.allclose(features, model.vision_tower(Pixels(model.config)([one, two])), atol=1e-5)
    assert not torch.allclose(features[:1], Features(model, tmp_path / "kept", crop=True)([one]))
    kept = len(list((tmp_path / "kept").iterdir()))
    with torch.no_grad():
        model.vision_tower.embeddings.class_embedding += 1
    assert not torch.allclose(*Features(model, tmp_path / "kept")([one, two])) and kept == 3
    assert not torch.allclose(features[:1], Features(model, tmp_path / "kept")([one]))
    two.write_bytes(one.read_bytes())
    assert torch.equal(*Features(model, tmp_path / "kept")([one, two])), "the file's bytes count, not its name"


def test_the_next_pack_is_made_while_this_one_is_computed_with():
    made, used = [], []
    def make(part):
        made.append(part)
        return part * 10
    for part, pack in ahead(make, iter([1, 2, 3])):
        assert pack == part * 10
        deadline = time.monotonic() + 5
        while part < 3 and part + 1 not in made and time.monotonic() < deadline:
            time.sleep(0.001)
        used.append((part, list(made)))
    assert used == [(1, [1, 2]), (2, [1, 2, 3]), (3, [1, 2, 3])] and list(ahead(make, [])) == []
    with pytest.raises(BadInput, match="no such picture"):
        list(ahead(lambda part: (_ for _ in ()).throw(BadInput("no such picture")), [1, 2]))


def test_the_pack_fits_the_device_unless_it_is_said():
    assert pack_size(0, torch.device("cpu")) == 1024 and pack_size(0, torch.device("cuda")) == 8192
    assert pack_size(77, torch.device("cpu")) == 77
