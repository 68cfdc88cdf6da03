"""A conversation in a terminal, driven as a user drives it: lines in, lines out.

    python -m pytest tests/test_chat.py -q
"""
import io

import pytest
import torch
from PIL import Image

import chat
import checkpoint
import steerlm
from common import BadInput
from conftest import tiny_checkpoint
from data import Pixels, Tokens, make_tree
from generate import sample_answers
from judge.rubric import RUBRIC
from toy.tasks import draw, items


@pytest.fixture
def talk(monkeypatch, capsys):
    """talk(lines, **settings) -> what was printed, but for the line that says what can be typed."""
    def run(lines, **settings):
        monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
        chat.run(chat.Settings(**settings))
        return [line for line in capsys.readouterr().out.splitlines() if not line.startswith("a question and return")]
    return run


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    record, = draw(items("attribute", 1), tmp_path_factory.mktemp("chat"))
    return record, f"{record['root']}/{record['images'][0]}"


def greedy(messages, images, root):
    folder = checkpoint.resolve("toy/llava")
    model = checkpoint.load(folder)
    tokens = Tokens(folder, model.config)
    tree = make_tree(tokens, {"id": "x", "messages": messages, "images": images, "root": root}, [])
    return sample_answers(model, tokens, Pixels(model.config), [tree], n=1, temperature=0.0)[0][0]["text"]


def test_two_turns_about_a_picture_are_what_the_benchmarks_would_read(talk, picture):
    record, path = picture
    first = record["messages"][0]["content"].removeprefix("<image>\n")
    one, two = talk([f"/image {path}", first, "and where is it ?"])
    messages = [record["messages"][0]]
    assert one == greedy(messages, record["images"], record["root"])
    messages += [{"role": "assistant", "content": one}, {"role": "user", "content": "and where is it ?"}]
    assert two == greedy(messages, record["images"], record["root"])


def heard(speaker, question, **how):
    """What a speaker says to one question -> [(kind, text)]."""
    return list(speaker.answer([{"role": "user", "text": question}], 0, **how))


def test_answers_come_token_by_token():
    said = heard(chat.Speaker("toy/vicuna", chat.Settings()), "what is the opposite of big ?")
    assert len(said) > 4 and said[-1] == ("end", "") and {kind for kind, _ in said[:-1]} == {"text"}
    assert "".join(text for _, text in said) == "the opposite of big is small ."


def test_half_a_character_waits_for_the_rest(tmp_path, monkeypatch):
    speaker = chat.Speaker(str(tiny_checkpoint(tmp_path / "tiny", "byte", text_only=True)), chat.Settings())
    ids = speaker.tokens.tokenizer.encode("Ünïcödé 漢字 €").ids + [*speaker.tokens.ends]
    assert any("\ufffd" in speaker.tokens.decode(ids[:k]) for k in range(len(ids))), "this tokenizer cuts characters in two"
    monkeypatch.setattr(chat, "stream", lambda *args, **how: (torch.tensor([i]) for i in ids))
    said = heard(speaker, "Write a poem.")
    assert "".join(text for _, text in said) == "Ünïcödé 漢字 €" and not any("\ufffd" in text for _, text in said)
    assert len(said) == len(ids), "one event for every token, so that a server sees at once that nobody listens"


def test_the_seed_draws_the_answer(talk):
    say = lambda seed: talk(["tell me a story about a big cat ."], ckpt="toy/vicuna", temperature=2.0, seed=seed)
    assert say(1) == say(1) and len({say(k)[0] for k in range(4)}) > 1


def test_reset_forgets_both_sides_and_the_pictures(talk, picture):
    _, path = picture
    again = talk([f"/image {path}", "what is two plus three ?", "/reset", "what is the opposite of big ?"])
    assert again[1:] == talk(["what is the opposite of big ?"])
    waiting = talk([f"/image {path}", "/reset", "what is two plus two ?"], ckpt="toy/vicuna")
    assert not any("sees no pictures" in line for line in waiting)


def test_what_cannot_be_used_is_said_and_the_conversation_goes_on(talk, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    out = talk(["/image nowhere.png", "/image ~nosuchuser/x.png", f"/image {broken}", "/dance", "<image> what color ?", "a </s> b", "what is two plus two ?"])
    for said, expected in zip(out, ("nowhere.png: No such file", "~nosuchuser/x.png: No such file", "broken.png", "/dance: choose",
                                    "1 <image> markers but 0 images", "</s>")):
        assert expected in said
    assert len(out) == 7 and "four" in out[-1]


def test_a_long_conversation_ends_with_a_remedy(talk):
    out = talk(["count from one to five . " * 6] * 14)
    assert "built for 512; begin anew (/reset)" in out[-1]


def test_max_new_cuts_and_says_so(talk):
    assert talk(["count from one to five ."], ckpt="toy/vicuna", max_new=2)[0].endswith("... (cut after 2 tokens)")


@pytest.mark.parametrize("flags", ({"max_new": 0}, {"temperature": -1.0}, {"temperature": float("nan")}), ids=str)
def test_a_value_that_makes_no_sense_is_refused_before_the_first_question(flags):
    with pytest.raises(BadInput, match=f"--{next(iter(flags))} "):
        chat.run(chat.Settings(**flags))


def test_unknown_words_are_counted(talk):
    assert "does not know 2 of these words" in talk(["hello computer"])[0]


def test_two_checkpoints_answer_and_one_without_eyes_is_asked_without(talk, picture):
    _, path = picture
    out = talk([f"/image {path}", "what is the opposite of big ?", "what is two plus two ?"], vs="toy/vicuna")
    assert out[0].startswith("toy/llava: ") and "(toy/vicuna sees no pictures" in out[1]
    assert out[2:3] + out[4:] == ["the opposite of big is small ."] + [out[4]] and out[4].startswith("toy/vicuna: two plus two is four")


def test_draw_gives_a_picture_and_a_question(talk):
    out = talk(["/draw", "/draw"])
    assert len(out) == 4 and out[0] != out[2] and all(line.startswith("try: ") for line in out[1::2])
    path = out[0].split(": ")[0]
    assert Image.open(path).size == (48, 48)


def test_a_steered_checkpoint_says_what_it_asks_for_and_asks_for_it(talk, tmp_path, monkeypatch):
    form = steerlm.steer_form(steerlm.Settings(form=" {helpfulness} {correctness} {coherence} {complexity} {verbosity}",
                                               grades="one two three four five"))
    model = checkpoint.load(checkpoint.resolve("toy/vicuna"))
    folder = checkpoint.save(model, tmp_path / "steered", checkpoint.resolve("toy/vicuna"), {"steer.json": form})
    out, = talk([], ckpt=str(folder), target="4 4 4 4 0")
    assert out.endswith("every question ends with ' five five five five one'")
    out, = talk([], ckpt=str(folder))
    assert out.endswith("every question ends with ' five five five five five'")
    asked = []
    monkeypatch.setattr(chat, "stream", lambda model, prompts, *args, **how: asked.append(prompts[0]) or iter(()))
    speaker = chat.Speaker(str(folder), chat.Settings(target="4 4 4 4 0"))
    heard(speaker, "what is two plus two ?")
    heard(speaker, "what is two plus two ?", scores=dict.fromkeys(RUBRIC.attributes, 1))
    assert "plus two ? five five five five one" in speaker.tokens.decode(asked[0])
    assert "plus two ? two two two two two" in speaker.tokens.decode(asked[1]), "scores of this answer alone"
    with pytest.raises(BadInput, match="5 numbers"):
        chat.run(chat.Settings(target="4", ckpt=str(folder)))
    with pytest.raises(BadInput, match="was not trained"):
        chat.run(chat.Settings(target="4 4 4 4 4"))
