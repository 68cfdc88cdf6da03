"""The losses in closed form, the reference, the contract, the loop, and what comes out.

    python -m pytest tests/test_dpo.py -q           with transformers installed also loads what was
    saved there
"""
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from conftest import RECORDS, picture, rows_of, tiny_checkpoint, turns, write_data
from safetensors.torch import load_file, save_file

import checkpoint
import dpo
import formats
from common import BadInput
from data import Pixels, Tokens, choose_pair, make_tree
from dpo import LOSSES
from judge.rubric import RUBRIC
from model import answer_logps, summed, token_logps
from train import Part, Run, schedule

LN2 = math.log(2)


# ---- fixtures ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("dpo") / "tiny", "byte")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def align(ckpt, data, out, **changes):
    flags = {"ckpt": str(ckpt), "data": str(data), "out": str(out), "device": "cpu", "steps": 2,
             "batch": 4, "lr": 1e-3}
    return dpo.align(dpo.Settings(**(flags | changes)))


def loaded(ckpt, data):
    """(model, pairs, pixels): what `align` hands to `train`."""
    model = checkpoint.load(ckpt)
    tokens, pixels = Tokens(ckpt, model.config), Pixels(model.config)
    records, _ = formats.read(data)
    trees = [make_tree(tokens, r, [answer["text"] for answer in r["answers"]]) for r in records]
    reference = dpo.reference_logps(model, trees, pixels, dpo.Settings(pack=8192))
    return model, dpo.make_pairs(trees, map(choose_pair, records), reference), pixels


# ---- the losses ----------------------------------------------------------------------------------
# TRL's formulas, written by hand: value and slope of each loss, of log-ratios d = (w - l) - (ref_w
# - ref_l).

def s_of(loss: str, beta: float = 0.1) -> dpo.Settings:
    return dpo.Settings(loss=loss, beta=beta, smoothing=0.2 if loss == "robust" else 0.0)


def numbers(n=64, seed=0):
    """(n, 2) log-probs now, and under the reference."""
    g = torch.Generator().manual_seed(seed)
    logps, reference = -50 * torch.rand(2, n, 2, generator=g, dtype=torch.float64)
    return logps.requires_grad_(), reference


def robust_slope(d, b):
    return -b * (0.8 * torch.sigmoid(-b * d) + 0.2 * torch.sigmoid(b * d)) / 0.6


FORMULAS = {
    "sigmoid": (lambda d, b: torch.log1p(torch.exp(-b * d)), lambda d,
                b: -b / (1 + torch.exp(b * d))),
    "ipo": (lambda d, b: (d - 1 / (2 * b)) ** 2, lambda d, b: 2 * (d - 1 / (2 * b))),
    "hinge": (lambda d, b: torch.relu(1 - b * d), lambda d, b: -b * (b * d < 1).double()),
    "robust": (lambda d, b: (-0.8 * F.logsigmoid(b * d) + 0.2 * F.logsigmoid(-b * d)) / 0.6,
               robust_slope),
}
AT_ZERO = {"sigmoid": (LN2, -0.05), "ipo": (25.0, -10.0), "hinge": (1.0, -0.1),
           "robust": (LN2, -0.05 / 0.6)}           # for beta 0.1


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_and_its_gradient_are_the_formula_s_in_fp64(name):
    value, slope = FORMULAS[name]
    for beta in (0.02, 0.1, 1.0):
        logps, reference = numbers()
        loss, margin = LOSSES[name](logps, reference, s_of(name, beta))
        w, l, ref_w, ref_l = logps[:, 0], logps[:, 1], reference[:, 0], reference[:, 1]
        d = ((w - l) - (ref_w - ref_l)).detach()
        torch.testing.assert_close(loss.detach(), value(d, beta))
        torch.testing.assert_close(margin.detach(), beta * d)
        gradient = torch.autograd.grad(loss.sum(), logps)[0]
        torch.testing.assert_close(gradient, torch.stack([slope(d, beta), -slope(d, beta)], 1))

        shifted = LOSSES[name](logps + 7, reference + 3, s_of(name, beta))[0]
        torch.testing.assert_close(shifted, loss, rtol=1e-6, atol=1e-6)          # only differences count


@pytest.mark.parametrize("name", LOSSES)
def test_where_policy_and_reference_agree_a_loss_starts_at_its_own_value_and_raises_the_chosen_answer(name):
    logps, _ = numbers()
    loss, margin = LOSSES[name](logps, logps.detach().clone(), s_of(name))
    start, slope = AT_ZERO[name]
    assert (margin == 0).all()
    torch.testing.assert_close(loss.detach(), torch.full_like(margin, start).detach(), atol=1e-12,
                               rtol=0)
    gradient, = torch.autograd.grad(loss.sum(), logps)
    expected = torch.tensor([[slope, -slope]], dtype=torch.float64).expand(64, 2)
    torch.testing.assert_close(gradient, expected, atol=1e-12, rtol=0)


def test_robust_without_smoothing_is_sigmoid():
    logps, reference = numbers()
    robust, _ = LOSSES["robust"](logps, reference, dpo.Settings(loss="robust"))
    torch.testing.assert_close(robust, LOSSES["sigmoid"](logps, reference, dpo.Settings())[0],
                               atol=0, rtol=0)


def test_huge_margins_neither_overflow_nor_lose_the_slope():
    logps = torch.tensor([[1e6, 0.0], [-1e6, 0.0]], requires_grad=True)
    loss, _ = LOSSES["sigmoid"](logps, torch.zeros(2, 2), dpo.Settings())
    assert loss.tolist() == [0.0, 1e5]
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[0.0, 0.0], [-0.1, 0.1]]))
    assert LOSSES["robust"](logps, torch.zeros(2, 2), s_of("robust"))[0].isfinite().all()


@pytest.mark.parametrize("flags, why", [
    ({"loss": "kto"}, "--loss kto: choose one of sigmoid, ipo, hinge, robust"),
    ({"smoothing": 0.1}, "belongs to --loss robust"),
    ({"smoothing": 0.1, "loss": "ipo"}, "belongs to --loss robust"),
    ({"smoothing": 0.5, "loss": "robust"}, "--smoothing"),
    ({"smoothing": -0.1, "loss": "robust"}, "--smoothing"), ({"gap": 0}, "--gap"),
    ({"beta": 0.0}, "--beta"),
    ({"beta": math.inf}, "--beta"), ({"holdout": 1.0}, "--holdout"),
    ({"beta": math.nan}, "--beta")])
def test_flags_that_make_no_loss_are_refused(flags, why):
    with pytest.raises(BadInput, match=why):
        dpo.align(dpo.Settings(**flags))


@pytest.mark.parametrize("name", LOSSES)
def test_a_run_of_each_loss_starts_where_the_contract_says_and_learns(ckpt, data, tmp_path, capsys,
                                                                      name):
    smoothing = 0.2 if name == "robust" else 0.0
    align(ckpt, data, tmp_path / "out", steps=4, batch=5, loss=name, smoothing=smoothing, lr=2e-4)
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    start = AT_ZERO[name][0]
    assert rows[0]["loss"] == pytest.approx(start, rel=1e-4)
    assert rows[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert f"step-0 contract holds: loss {start:.4f}" in capsys.readouterr().out
    assert rows[3]["loss"] < rows[0]["loss"] and rows[3]["margin"] > 0.01 and rows[3]["accuracy"] == 1.0


# ---- pairs ---------------------------------------------------------------------------------------

def test_pairs_carry_their_own_reference_chosen_first(ckpt, data):
    model, pairs, pixels = loaded(ckpt, data)
    assert [pair.id for pair in pairs] == ["r0", "r1", "r2", "r4", "r5"]
    with torch.no_grad():
        for pair in pairs:
            torch.testing.assert_close(answer_logps(model, pixels.pack([pair])),
                                       torch.tensor(pair.reference), atol=1e-4, rtol=0)
    tokens = Tokens(ckpt, model.config)
    assert [tokens.decode(list(answer)) for answer in pairs[1].answers] == ["17 plus 25 is 42.",
                                                                            "41"]


def test_what_is_held_out_depends_on_the_id_alone():
    ids = [f"lrv-{k:06d}" for k in range(5000)]
    out = [dpo.is_held_out(name, 0.1) for name in ids]
    assert abs(sum(out) / len(out) - 0.1) < 0.02
    assert not any(dpo.is_held_out(name, 0.0) for name in ids)
    assert all(dpo.is_held_out(name, 0.2) for name,
               held in zip(ids, out) if held), "a larger share holds the smaller one"


# ---- the reference -------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def kept(ckpt, tmp_path_factory):
    """A run's folder that holds a reference of RECORDS; nobody writes to it."""
    folder = tmp_path_factory.mktemp("kept")
    align(ckpt, write_data(folder / "data"), folder / "out", steps=0)
    return folder / "out"


def copied(kept, out):
    out.mkdir()
    for name in ("reference.jsonl", "reference.fingerprint.json"):
        shutil.copy(kept / name, out / name)
    return out / "reference.jsonl"


def test_steps_0_writes_one_reference_line_per_usable_record_and_stops(ckpt, data, kept):
    assert sorted(path.name for path in kept.iterdir()) == [
        "config.json", "lock", "reference.fingerprint.json", "reference.jsonl", "rejects.jsonl"]
    rows = rows_of(kept / "reference.jsonl")
    assert [set(row) for row in rows] == [{"id", "logps", "tokens"}] * len(RECORDS)
    model = checkpoint.load(ckpt)
    tokens, pixels = Tokens(ckpt, model.config), Pixels(model.config)
    for k, (row, (question, images, answers)) in enumerate(zip(rows, RECORDS)):
        record = {"id": "", "root": data.parent, "images": images, "messages": turns(question)}
        tree = make_tree(tokens, record, [text for text, _ in answers])
        with torch.no_grad():
            expected = answer_logps(model, pixels.pack([tree]))
        assert row["id"] == f"r{k}" and row["tokens"] == [len(answer) for answer in tree.answers]
        torch.testing.assert_close(torch.tensor(row["logps"]), expected, atol=1e-4, rtol=0)
        assert all(math.isfinite(x) and x < 0 for x in row["logps"])


def test_a_reference_is_used_again_when_only_scores_gap_seed_loss_or_packs_change(
        ckpt, tmp_path, kept, capsys, monkeypatch):
    monkeypatch.setattr(dpo, "reference_logps", lambda *a: pytest.fail("the reference was computed again"))
    written = (kept / "reference.jsonl").read_bytes()
    rescored = [(q, images, [(text, 12 - s) for text, s in answers]) for q, images,
                answers in RECORDS]
    data = write_data(tmp_path / "data", rows=rescored)
    align(ckpt, data, tmp_path / "out", steps=0, reference=str(kept / "reference.jsonl"), gap=3,
          seed=7, pack=64, batch=2,
          beta=0.5, lr=1e-5, loss="ipo")
    assert f"{len(RECORDS)} records read" in capsys.readouterr().out
    assert (kept / "reference.jsonl").read_bytes() == written
    assert not (tmp_path / "out" / "reference.jsonl").exists()


def test_with_pairs_only_the_reference_holds_the_pairs_answers_and_says_so(ckpt, data, tmp_path, kept, capsys):
    out = tmp_path / "out"
    align(ckpt, data, out, steps=0, pairs_only=True)
    whole = {row["id"]: row["logps"] for row in rows_of(kept / "reference.jsonl")}
    records, _ = formats.read(data)
    pairs = {record["id"]: choose_pair(record) for record in records if choose_pair(record)}
    rows = rows_of(out / "reference.jsonl")
    assert [row["id"] for row in rows] == list(pairs) and 0 < len(pairs) < len(whole)
    for row in rows:
        expected = [whole[row["id"]][k] for k in pairs[row["id"]]]
        torch.testing.assert_close(torch.tensor(row["logps"]), torch.tensor(expected), atol=1e-4, rtol=0)
    about = json.loads((out / "reference.fingerprint.json").read_text())
    assert about["answers"] == "chosen and rejected alone, --tail 1"
    with pytest.raises(BadInput, match="stale.*answers"):
        align(ckpt, data, tmp_path / "other", steps=0, reference=str(out / "reference.jsonl"))
    with pytest.raises(BadInput, match="no usable pair"):
        align(ckpt, data, tmp_path / "none", steps=1, pairs_only=True, gap=100)


def test_pairs_only_trains_the_same(ckpt, data, tmp_path):
    for name, more in (("all", {}), ("pairs", {"pairs_only": True})):
        align(ckpt, data, tmp_path / name, steps=2, batch=2, **more)
    one, other = (rows_of(tmp_path / name / "metrics.jsonl") for name in ("all", "pairs"))
    for row, again in zip(one, other, strict=True):
        assert row["loss"] == pytest.approx(again["loss"], abs=1e-5)


def one_at_a_time(model, pixels, pair):
    """[log p of each token] of a pair's answers, each alone behind its prompt, in fp32."""
    found = []
    for answer in pair.answers:
        with torch.enable_grad():
            found.append(token_logps(model, pixels.pack([replace(pair, answers=[answer])])))
    return found


@pytest.fixture
def some_pairs(ckpt, data):
    model = checkpoint.load(ckpt)
    tokens, pixels = Tokens(ckpt, model.config), Pixels(model.config)
    records, _ = formats.read(data)
    trees = []
    for record in records:
        pair = choose_pair(record)
        if pair:
            tree = make_tree(tokens, record, [record["answers"][k]["text"] for k in pair])
            trees.append(replace(tree, reference=[-3.0, -4.5]))
    assert len({len(answer) for tree in trees for answer in tree.answers}) > 2, "answers of several lengths"
    return model, pixels, trees


@pytest.mark.parametrize("tail", [0.0, 0.3, 1.0])
def test_with_tail_tokens_beyond_the_shorter_answer_count_less(some_pairs, tail):
    model, pixels, trees = some_pairs
    with torch.no_grad():
        pack = pixels.pack(trees)
        ours = summed(dpo.counted(token_logps(model, pack), pack, tail), pack).view(-1, 2)
        plain = answer_logps(model, pack).view(-1, 2)
    for row, tree in zip(ours, trees):
        both = one_at_a_time(model, pixels, tree)
        shorter = min(map(len, both))
        expected = [logps[:shorter].sum() + tail * logps[shorter:].sum() for logps in both]
        torch.testing.assert_close(row, torch.stack(expected).detach(), atol=1e-4, rtol=0)
    if tail == 1:
        torch.testing.assert_close(ours, plain)


def test_nll_and_tail_have_the_gradient_of_a_loop_over_single_answers(some_pairs, tmp_path):
    model, pixels, trees = some_pairs
    s = dpo.Settings(nll=0.7, tail=0.4, pairs_only=True, lr=1e-3, batch=len(trees), pack=4096)
    run = Run(model, s, pixels.pack, steps=1)
    for p in run.trained.values():
        p.grad = None
    loss = 0
    for tree in trees:
        chosen, rejected = one_at_a_time(model, pixels, tree)
        shorter = min(len(chosen), len(rejected))
        sums = [logps[:shorter].sum() + 0.4 * logps[shorter:].sum() for logps in (chosen, rejected)]
        margin = s.beta * (sums[0] + 3.0 - sums[1] - 4.5)
        loss = loss - F.logsigmoid(margin) / len(trees) - 0.7 * chosen.mean() / len(trees)
    loss.backward()
    before = {n: p.grad.clone() for n, p in run.trained.items()}
    for p in run.trained.values():
        p.grad = None
    dpo_train_once(run, trees, s)
    for name, p in run.trained.items():
        torch.testing.assert_close(p.grad, before[name], atol=1e-5, rtol=1e-3)


def trl_loss(name, logps, mask, reference, beta, **more):
    """TRL's own loss over log-probs of tokens (2 B, L), chosen above rejected; `mask` says which are an answer's."""
    trainer = pytest.importorskip("trl.trainer.dpo_trainer").DPOTrainer
    outputs = SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), is_top1=mask.bool(), logits=torch.zeros(len(logps), 1),
                              sum_logits=torch.zeros_like(logps), num_logits=1, mean_logits=torch.zeros_like(logps))
    several = MagicMock(gather=lambda x: x, gather_for_metrics=lambda x: x, device="cpu")
    stub = SimpleNamespace(model=SimpleNamespace(training=True), accelerator=several, aux_loss_enabled=False, precompute_ref_logps=True, use_weighting=False,
                           f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0], beta=beta, _metrics=MagicMock(), _total_train_tokens=0, _tp_size=1,
                           **{"ld_alpha": None, "label_smoothing": 0.0} | more)
    shifted = torch.cat([torch.zeros(len(mask), 1, dtype=mask.dtype), mask], 1)
    inputs = {"completion_mask": shifted, "input_ids": shifted, "attention_mask": shifted, "ref_chosen_logps": reference[:, 0], "ref_rejected_logps": reference[:, 1]}
    return trainer._compute_loss(stub, lambda **inputs: outputs, inputs, False)


@pytest.mark.parametrize("name, flags, theirs", [
    ("sigmoid", {}, {}), ("hinge", {}, {}), ("ipo", {"average": True}, {}), ("robust", {"smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("sigmoid", {"tail": 0.4}, {"ld_alpha": 0.4})], ids=str)
def test_losses_and_tail_are_trl_s_on_the_same_log_probs(name, flags, theirs):
    g = torch.Generator().manual_seed(3)
    pairs, longest = 6, 9
    lengths = torch.randint(1, longest + 1, (pairs, 2), generator=g)
    tokens = -3 * torch.rand(pairs, 2, longest, generator=g)
    reference = -20 * torch.rand(pairs, 2, generator=g)
    mask = (torch.arange(longest) < lengths[..., None]).long()                   # (B, 2, L)

    of_chosen_then_rejected = [x.transpose(0, 1).reshape(2 * pairs, longest) for x in (tokens * mask, mask)]
    weighted = reference * (lengths if flags.get("average") else 1)
    expected = trl_loss(name, *of_chosen_then_rejected, weighted, beta=0.3, **theirs)

    owner = torch.arange(2 * pairs).repeat_interleave(lengths.view(-1))
    pack = SimpleNamespace(owner=owner, answers=2 * pairs)
    s = dpo.Settings(loss=name, beta=0.3, **flags)
    sums = summed(dpo.counted(tokens[mask.bool()], pack, s.tail), pack).view(-1, 2)
    if s.average:
        sums = sums / lengths
    torch.testing.assert_close(LOSSES[name](sums, reference, s)[0].mean(), expected)


def dpo_train_once(run, trees, s):
    """The loop of dpo.train up to its update, which would clip and step."""
    class Enough(Exception):
        pass

    def stop(**amounts):
        raise Enough

    run.update = stop
    with pytest.raises(Enough), pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo, "check_contract", lambda *args: None)
        dpo.train(run, trees, s)


def test_the_two_terms_change_nothing_at_their_defaults_and_the_contract_holds_with_them(ckpt, data, tmp_path):
    plain = align(ckpt, data, tmp_path / "plain", steps=2)
    again = align(ckpt, data, tmp_path / "again", steps=2, nll=0.0, tail=1.0)
    assert checkpoint.digest(plain) == checkpoint.digest(again)
    align(ckpt, data, tmp_path / "both", steps=1, nll=1.0, tail=0.5, pairs_only=True)
    [row] = rows_of(tmp_path / "both/metrics.jsonl")
    assert abs(row["margin"]) < 1e-3 and row["loss"] > LN2 + 1
    for wrong in ({"tail": 0.5}, {"tail": 1.5, "pairs_only": True}):
        with pytest.raises(BadInput, match="--tail: from 0 to 1"):
            align(ckpt, data, tmp_path / "wrong", **wrong)
    with pytest.raises(BadInput, match="stale.*--tail 0.5"):
        align(ckpt, data, tmp_path / "stale", steps=0, pairs_only=True, tail=0.25, reference=str(tmp_path / "both/reference.jsonl"))


def other_row(k, row):
    return RECORDS[:k] + [row] + RECORDS[k + 1:]


def spoil_tokenizer(ckpt):
    path = ckpt / "tokenizer.json"
    path.write_text(path.read_text() + "\n")


def spoil_weights(ckpt):
    weights = load_file(ckpt / "model.safetensors")
    weights["language_model.model.norm.weight"][0] += 1e-3
    save_file(weights, ckpt / "model.safetensors", metadata={"format": "pt"})


def spoil_rope(ckpt):
    path = ckpt / "config.json"
    path.write_text(path.read_text().replace('"rope_theta": 10000.0', '"rope_theta": 20000.0'))


def spoil_steer(ckpt):
    form = {"text": " {helpfulness}", "grades": list("01234"),
            "target": dict.fromkeys(RUBRIC.attributes, 4)}
    (ckpt / "steer.json").write_text(json.dumps(form))


def spoil_template(ckpt):
    (ckpt / "template.json").write_text('{"name": "vicuna_v1", "ends": ["</s>", "<pad>"]}')


question, images, answers = RECORDS[1]
# What is done to the checkpoint, the rows, the flags; what the refusal must name, and nothing else.
STALE = {
    "weights": (spoil_weights, None, {}, ["weights"]),
    "rope theta": (spoil_rope, None, {}, ["weights"]),
    "tokenizer": (spoil_tokenizer, None, {}, ["template"]),
    "template.json": (spoil_template, None, {}, ["template"]),
    "--template": (None, None, {"template": "mistral"}, ["data", "template"]),
    "what a SteerLM model is asked for": (spoil_steer, None, {}, ["data", "template"]),
    "an answer's text": (None, other_row(1, (question, images, [("40", 2), answers[1]])), {},
                         ["data"]),
    "a question": (None, other_row(1, (question + "!", images, answers)), {}, ["data"]),
    "answers swapped": (None, other_row(1, (question, images, answers[::-1])), {}, ["data"]),
    "one record less": (None, RECORDS[:-1], {}, ["data"]),
    "records in another order": (None, RECORDS[::-1], {}, ["data"]),
    "another picture's name": (None, other_row(4, (RECORDS[4][0], ["a.png"], RECORDS[4][2])), {},
                               ["data"]),
    "another picture's bytes": (None, RECORDS, {}, ["data"]),
    "dtype": (None, None, {"dtype": "bfloat16"}, ["weights", "dtype"]),
}


@pytest.mark.parametrize("case", STALE)
def test_a_stale_reference_is_refused_and_what_changed_is_named(ckpt, tmp_path, kept, case):
    spoil, rows, changes, named = STALE[case]
    data = write_data(tmp_path / "data", rows=rows or RECORDS)
    mine = ckpt
    if spoil:
        mine = shutil.copytree(ckpt, tmp_path / "ckpt")
        spoil(mine)
    if case == "another picture's bytes":
        picture(40, 30, seed=9).save(data.parent / "a.png")
    path = copied(kept, tmp_path / "out")
    with pytest.raises(BadInput, match="is stale") as error:
        align(mine, data, tmp_path / "out", steps=0, **changes)
    assert str(path) in str(error.value)
    keys = ("weights", "data", "template", "image processing", "dtype")
    assert [key for key in keys if f" {key} (" in str(error.value)] == named, str(error.value)


def cut_a_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def tear(path):
    path.write_text(path.read_text()[:-20])


def lose_a_number(path):
    rows = rows_of(path)
    rows[0]["logps"].pop()
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rename_a_record(path):
    path.write_text(path.read_text().replace('"r2"', '"r9"'))


@pytest.mark.parametrize("spoil, why", [(cut_a_line, "other records"), (tear, "is damaged"),
                                        (rename_a_record, "other records"),
                                        (lose_a_number, "other records")])
def test_a_reference_that_is_not_whole_is_refused(ckpt, data, tmp_path, kept, spoil, why):
    path = copied(kept, tmp_path / "out")
    spoil(path)
    with pytest.raises(BadInput, match=why):
        align(ckpt, data, tmp_path / "out", steps=0)


def test_a_reference_file_that_is_not_ours_is_never_written_over(ckpt, data, tmp_path):
    """--reference with the data's name by mistake must not cost the data."""
    before = data.read_bytes()
    with pytest.raises(BadInput, match="data.fingerprint.json is damaged or not ours"):
        align(ckpt, data, tmp_path / "out", steps=0, reference=str(data))
    assert data.read_bytes() == before


def test_a_record_that_the_model_gives_no_finite_log_prob_is_named(ckpt, data, tmp_path,
                                                                   monkeypatch):
    monkeypatch.setattr(dpo, "token_logps", lambda model, pack: torch.full((len(pack.owner),), float("nan")))
    with pytest.raises(BadInput, match="record r0: its reference log-prob is"):
        align(ckpt, data, tmp_path / "out", steps=0)
    assert not (tmp_path / "out" / "reference.jsonl").exists()


# ---- the contract --------------------------------------------------------------------------------

@pytest.mark.parametrize("flags", [{"pack": 1}, {"pack": 300, "dtype": "bfloat16"}], ids=str)
def test_every_run_starts_at_ln_2_and_learns(ckpt, data, tmp_path, capsys, flags):
    align(ckpt, data, tmp_path / "out", **flags)
    first, second = rows_of(tmp_path / "out" / "metrics.jsonl")
    near = 0.05 if "dtype" in flags else 1e-5
    for name, value in {"loss": LN2, "margin": 0, "reward_chosen": 0, "reward_rejected": 0}.items():
        assert first[name] == pytest.approx(value, abs=near)
    assert second["loss"] < first["loss"] and "step-0 contract holds" in capsys.readouterr().out
    config = json.loads((tmp_path / "out" / "model" / "config.json").read_text())
    assert config["torch_dtype"] == flags.get("dtype", "float32")


def shift(ckpt, data, folder):
    align(ckpt, data, folder, steps=0)
    rows = rows_of(folder / "reference.jsonl")
    for row in rows:
        row["logps"][0] += 0.5
    (folder / "reference.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def another_template(ckpt, data, folder):
    align(ckpt, data, folder, steps=0, template="mistral")


def another_dtype(ckpt, data, folder):
    align(ckpt, data, folder, steps=0, dtype="bfloat16")


@pytest.mark.parametrize("spoil", [shift, another_template, another_dtype],
                         ids=lambda f: f.__name__)
def test_a_reference_that_is_off_stops_the_run_before_the_first_update(ckpt, data, tmp_path, kept,
                                                                       spoil):
    """Under a forged fingerprint: the contract is the last to notice that policy and reference are
    not the same."""
    out = tmp_path / "out"
    spoil(ckpt, data, out)
    shutil.copy(kept / "reference.fingerprint.json", out)
    with pytest.raises(BadInput, match="step-0 contract broken: .* do not see the same"):
        align(ckpt, data, out, batch=5)
    assert rows_of(out / "metrics.jsonl") == [] and not (out / "model").exists()


def test_the_contract_has_one_tolerance_per_dtype_and_beta_scales_it():
    def check(margins, beta, dtype):
        margin = torch.tensor(margins)
        dpo.check_contract({"margin": margin, "loss": LN2 - margin / 2}, dpo.Settings(beta=beta),
                           dtype)

    check([5e-4, -5e-4], 0.1, torch.float32)
    check([5e-3, -5e-3], 1.0, torch.float32)
    check([0.35, -0.35], 0.1, torch.bfloat16)
    for margins, beta, dtype in (([5e-4, -5e-4], 0.01, torch.float32),
                                 ([2e-3, -2e-3], 0.1, torch.float32),
                                 ([0.45, -0.45], 0.1, torch.bfloat16),
                                 ([0.2, 0.2], 0.1, torch.bfloat16),
                                 ([math.nan, 0.0], 0.1, torch.bfloat16)):
        with pytest.raises(BadInput, match="contract broken"):
            check(margins, beta, dtype)


# ---- the loop ------------------------------------------------------------------------------------

def gradients(monkeypatch, ckpt, data, **changes):
    """What the optimizer sees in the first step, by parameter name."""
    model, pairs, pixels = loaded(ckpt, data)
    s = dpo.Settings(**{"batch": 5, "lr": 1e-3} | changes)
    seen = {}
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.ones(()))
    run = Run(model, s, pixels.pack, steps=1)
    run.optimizer.step = lambda: seen.update({name: p.grad for name,
                                              p in run.trained.items() if p.grad is not None})
    dpo.train(run, pairs, s)
    return seen


def test_gradients_are_those_of_the_mean_of_the_pairs_own_losses_however_the_batch_is_packed(
        monkeypatch, ckpt, data):
    """The loop against four lines that know nothing of it: no packs, no shared prompt, the
    reference once more."""
    model, pairs, pixels = loaded(ckpt, data)
    for pair in pairs:
        w, l = (answer_logps(model, pixels.pack([replace(pair, answers=[answer])]))[0]
                for answer in pair.answers)
        (-F.logsigmoid(0.1 * ((w - w.detach()) - (l - l.detach()))) / len(pairs)).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert max(g.abs().max() for g in expected.values()) > 1e-2
    for pack in (8192, 250, 1):
        seen = gradients(monkeypatch, ckpt, data, pack=pack)
        assert seen.keys() == expected.keys()
        for name in seen:
            torch.testing.assert_close(seen[name], expected[name], atol=1e-6, rtol=1e-3, msg=name)


def test_every_step_starts_from_no_gradient(ckpt, data, tmp_path):
    """With nothing learned and all pairs in the batch, every step has the same gradient; left-overs
    would add up."""
    align(ckpt, data, tmp_path / "out", steps=3, batch=5, lr=1e-30)
    norms = [row["grad_norm"] for row in rows_of(tmp_path / "out" / "metrics.jsonl")]
    assert norms == pytest.approx([norms[0]] * 3, rel=1e-4)


def test_metrics_hold_their_columns_one_row_per_step_the_first_those_of_its_pairs(ckpt, data,
                                                                                  tmp_path):
    align(ckpt, data, tmp_path / "out", steps=4, batch=128)
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    for row in rows:
        assert tuple(row) == ("step", "loss", "margin", "accuracy", "reward_chosen",
                              "reward_rejected", "logp_chosen",
                              "logp_rejected", "length_chosen", "length_rejected", "grad_norm",
                              "lr", "pairs", "pairs_per_s")
        assert row["lr"] == pytest.approx(1e-3 * schedule(row["step"] - 1, 4))
        assert row["margin"] == pytest.approx(row["reward_chosen"] - row["reward_rejected"],
                                              abs=1e-4)
        assert all(math.isfinite(x) for x in row.values()) and row["grad_norm"] > 0
    _, pairs, _ = loaded(ckpt, data)
    for k, side in enumerate(("chosen", "rejected")):
        logp = sum(pair.reference[k] for pair in pairs) / 5
        length = sum(len(pair.answers[k]) for pair in pairs) / 5
        assert rows[0][f"logp_{side}"] == pytest.approx(logp, rel=1e-5)
        assert rows[0][f"length_{side}"] == pytest.approx(length)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["steps"] == 4 and config["pairs"] == 5 and config["settings"]["batch"] == 128


def test_fifteen_steps_raise_margin_and_accuracy(ckpt, data, tmp_path):
    align(ckpt, data, tmp_path / "out", steps=15, batch=5)
    rows = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert rows[-1]["accuracy"] == 1.0 and rows[-1]["margin"] > 1.0 and rows[-1]["loss"] < 0.4
    assert rows[-1]["margin"] > rows[7]["margin"] > rows[2]["margin"] > 0


def test_epochs_become_steps_over_the_pairs_there_are(ckpt, data, tmp_path):
    for batch, epochs, steps in ((128, 2, 2), (2, 3, 7)):            # 15 pairs seen, 2 at a time
        out = tmp_path / str(batch)
        align(ckpt, data, out, steps=-1, epochs=epochs, batch=batch)
        assert len(rows_of(out / "metrics.jsonl")) == steps


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(ckpt, data, tmp_path):
    one, two, other = (align(ckpt, data, tmp_path / name, batch=2, seed=seed) for name,
                       seed in (("a", 0), ("b", 0), ("c", 1)))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert not torch.equal(one.head, other.head)


def test_held_out_pairs_are_not_trained_on_and_start_undecided(ckpt, tmp_path, capsys, monkeypatch):
    """Before the first step the held-out margin is 0 and accuracy one half: the reference is the
    start, not the end."""
    data = write_data(tmp_path / "data", rows=[RECORDS[k % 3] for k in range(20)])
    trained, real = set(), dpo.train
    monkeypatch.setattr(dpo, "train", lambda run, pairs,
                        s: trained.update(pair.id for pair in pairs) or real(run, pairs, s))
    align(ckpt, data, tmp_path / "out", steps=2, holdout=0.3)
    held = {f"r{k}" for k in range(20) if dpo.is_held_out(f"r{k}", 0.3)}
    assert held and trained == {f"r{k}" for k in range(20)} - held
    result = json.loads((tmp_path / "out" / "heldout.json").read_text())
    assert result["before"]["pairs"] == result["after"]["pairs"] == len(held)
    assert abs(result["before"]["margin"]) < 1e-3 and result["before"]["accuracy"] == 0.5
    assert result["after"]["margin"] > 0.01
    assert f"{20 - len(held)} to train on, {len(held)} held out" in capsys.readouterr().out


def test_averages_are_sums_over_the_answers_tokens_for_policy_and_reference_alike(ckpt, data,
                                                                                  tmp_path):
    model, pairs, pixels = loaded(ckpt, data)
    part = Part(pairs, pixels.pack(pairs))
    with torch.no_grad():
        sums = answer_logps(model, part.pack).view(-1, 2)
    logps, reference, lengths = dpo.beside_reference(sums, pairs, dpo.Settings())
    means, mean_reference, _ = dpo.beside_reference(sums, pairs, dpo.Settings(average=True))
    assert lengths.tolist() == [[len(answer) for answer in pair.answers] for pair in pairs]
    torch.testing.assert_close(means, logps / lengths)
    torch.testing.assert_close(mean_reference, torch.tensor([pair.reference for pair in pairs]) / lengths)

    align(ckpt, data, tmp_path / "out", steps=1, batch=5, average=True)
    [row] = rows_of(tmp_path / "out" / "metrics.jsonl")
    assert row["logp_chosen"] == pytest.approx(means[:, 0].mean().item(), rel=1e-4)
    assert row["loss"] == pytest.approx(LN2, abs=1e-5)


def test_without_a_usable_pair_a_run_is_refused_before_weights_are_read(ckpt, tmp_path,
                                                                        monkeypatch):
    data = write_data(tmp_path / "data", rows=RECORDS[3:4])
    monkeypatch.setattr(checkpoint, "load", lambda *a: pytest.fail("weights were read"))
    with pytest.raises(BadInput, match="no usable pair among 1 records"):
        align(ckpt, data, tmp_path / "out")


# ---- what comes out ------------------------------------------------------------------------------

def test_the_saved_model_gives_the_log_probs_it_was_saved_with_here_and_in_transformers(ckpt, data,
                                                                                        tmp_path):
    model = align(ckpt, data, tmp_path / "out", steps=3)
    folder = tmp_path / "out" / "model"
    again = checkpoint.load(folder)
    _, pairs, pixels = loaded(ckpt, data)
    pack = pixels.pack(pairs)
    with torch.no_grad():
        ours = answer_logps(model, pack)
        assert torch.equal(ours, answer_logps(again, pack))

    transformers = pytest.importorskip("transformers")
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for pair, sums in zip(pairs, ours.view(-1, 2)):
        for answer, expected in zip(pair.answers, sums):
            ids = torch.tensor([pair.ids() + list(answer)])
            with torch.no_grad():
                logits = theirs.eval()(
                    input_ids=ids, pixel_values=pixels(pair.images),
                    attention_mask=torch.ones_like(ids)).logits[0]
            logps = logits.log_softmax(-1)[-len(answer) - 1:-1].gather(1,
                                                                       ids[0, -len(answer):, None])
            torch.testing.assert_close(logps.sum(), expected, atol=1e-3, rtol=0)


def test_the_tower_never_moves_while_the_rest_does(ckpt, data, tmp_path):
    before = dict(checkpoint.load(ckpt).named_parameters())
    model = align(ckpt, data, tmp_path / "out", steps=2)
    for name, p in model.named_parameters():
        frozen = name.startswith("vision_tower.")
        assert torch.equal(p, before[name]) == frozen, name
        assert p.requires_grad != frozen
    assert any(name.startswith("multi_modal_projector.") for name in before)
