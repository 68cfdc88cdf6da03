"""Talk to a checkpoint about pictures, in a terminal or in a browser; or to two at once.

An evaluation is a number; a conversation shows what it is a number of. Turns go through the very
function that training and benchmarks get their tokens from (data.make_tree), so what you see here
is what they saw.

    python chat.py                                      the shipped LLaVA-mini
    python chat.py --vs runs/dpo/model                  before and after, side by side
    python chat.py --vs runs/dpo/model --web            the same on a page (web.py)
    python chat.py --ckpt llava-1.5-7b-hf --temperature 0.7

    /image PATH    attach a picture to the next question (again for more)
    /draw          a picture of the miniature's world, and a question about it
    /reset         begin anew
    /quit
"""
import math
import os
import sys
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import torch

import checkpoint
import web
from common import BadInput, device_and_dtype, main
from data import Tokens, make_tree, target_scores
from formats import check
from generate import stream
from toy import tasks, world
from vision import load_image, preprocess


@dataclass
class Settings:
    """Talk to a checkpoint, or to two."""
    ckpt: str = "toy/llava"      # checkpoint folder
    vs: str = ""                 # a second one, asked the same
    template: str = ""           # how prompts are spelled; empty: as the checkpoint's folder tells
    target: str = ""             # five scores to ask a SteerLM model for; empty: what its folder says
    temperature: float = 0.0     # 0: the likeliest token always
    max_new: int = 512           # longest answer in tokens
    seed: int = 0                # of the sampling
    web: bool = False            # on a page, for a browser on this machine
    port: int = 8000             # of that page; 0: any that is free
    device: str = "auto"         # cpu, cuda, ...
    dtype: str = "auto"          # float32, bfloat16; auto: float32 on the CPU


class Speaker:
    """One checkpoint, and how it answers. It remembers nothing: a conversation is a list of turns,
    {"role": "user" or "assistant", "text", "pictures": [PIL image]}."""

    def __init__(self, name: str, s: Settings):
        folder = checkpoint.resolve(name)
        self.name = name
        self.s = s
        self.model = checkpoint.load(folder, *device_and_dtype(s.device, s.dtype))
        self.tokens = Tokens(folder, self.model.config, s.template)
        if s.target:
            self.tokens = self.tokens.asking(target_scores(s.target))
        if self.tokens.template.ask:
            print(f"{name}: every question ends with {self.tokens.template.ask!r}")

    def answer(self, turns, temperature, scores=None):
        """The answer to the last turn, as it comes: ("note", what one should know), ("text", a
        little more of it, or "") for every token, and last ("end", "" or why it was cut off).

        `scores` {attribute: 0 to 4} are asked of a SteerLM model instead of its own. Raises BadInput
        before the first token."""
        tokens = self.tokens.asking(scores) if scores else self.tokens
        sees = tokens.patches > 0
        messages, pictures = [], []
        for turn in turns:
            shown = turn.get("pictures", ()) if sees else ()
            pictures.extend(shown)
            content = "<image>\n" * len(shown) + turn["text"]
            messages.append({"role": turn["role"], "content": content})
        if turns[-1].get("pictures") and not sees:
            yield "note", f"{self.name} sees no pictures, and is asked without"

        names = [str(k) for k in range(len(pictures))]
        record = {"id": self.name, "root": "/", "images": names, "messages": messages}
        check(record)
        prompt = make_tree(tokens, record, []).ids()
        room = min(self.s.max_new, tokens.room - len(prompt))
        if room < 1:
            raise BadInput(f"{self.name}: {len(prompt)} tokens so far, and it was built for "
                           f"{tokens.room}; begin anew (/reset)")
        unknown = tokens.tokenizer.token_to_id("<unk>")
        strange = tokens.encode(messages[-1]["content"]).count(unknown)
        if strange:
            yield "note", f"{self.name} does not know {strange} of these words"

        ids, said = [], ""
        seed = self.s.seed + len(turns) - 1
        pixels = None
        if pictures:
            size = self.model.config.vision.image_size
            pixels = torch.stack([preprocess(image, size) for image in pictures])
        draws = stream(self.model, [prompt], [pixels], max_new=room, seeds=[[seed]],
                       temperature=temperature, ends=tokens.ends)
        end = f"cut after {room} tokens"
        for token in draws:
            if token.item() in tokens.ends:
                end = ""
                break
            ids.append(token.item())
            text = tokens.decode(ids)
            whole = not text.endswith("\ufffd")         # half a character: wait for the rest
            yield "text", text[len(said):] if whole else ""
            said = text if whole else said
        rest = tokens.decode(ids)[len(said):]            # which never came
        if rest:
            yield "text", rest
        yield "end", end


def drawn(k: int):
    """The miniature's k-th picture -> the picture, what is in it, and something to ask."""
    record = tasks.items("attribute", k + 1)[k]
    scene = record["truth"]["scene"]
    about = tasks.written(scene).removeprefix("scene : ")
    return world.render(scene, record["truth"]["seed"]), about, record["truth"]["turns"][0]["question"]


# ---- in a terminal -------------------------------------------------------------------------------

def show_drawn(k: int):
    """drawn(k) in a file that the user can open, and in words."""
    image, about, question = drawn(k)
    path = Path(tempfile.mkdtemp(), "picture.png")
    image.save(path)
    print(f"{path}: {about}\ntry: {question}")
    return image


def say(speaker, turns):
    """Print the answer as it comes -> all of it."""
    said = ""
    for kind, text in speaker.answer(turns, speaker.s.temperature):
        if kind == "note":
            print(f"({text})")
        elif kind == "text":
            print(text, end="", flush=True)
            said += text
        else:
            print(f" ... ({text})" if text else "")
    return said


def typed() -> str:
    """The next line of the user's; "/quit" at the end of the file."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return "/quit"


def run(s: Settings):
    if s.max_new < 1 or not 0 <= s.temperature < math.inf:
        raise BadInput("--max_new must be at least 1, --temperature not negative")
    speakers = [Speaker(name, s) for name in (s.ckpt, s.vs) if name]
    if s.web:
        web.serve(speakers, drawn, s)
        return
    said = [[] for _ in speakers]                       # the turns of each, for answers differ
    waiting = []                                        # pictures for the next question
    pictures = map(show_drawn, count())                 # the miniature's, drawn as they are wanted
    print("a question and return; /image PATH, /draw, /reset, /quit")
    while (line := typed()) != "/quit":
        try:
            do(line, speakers, said, waiting, pictures)
        except BadInput as problem:
            print(problem)


def do(line, speakers, said, waiting, pictures):
    """As a line says: a command, or a question about the pictures that are `waiting`."""
    command, _, rest = line.partition(" ")
    if command == "/image":
        waiting.append(load_image(Path(os.path.expanduser(rest))))
    elif command == "/draw":
        waiting.append(next(pictures))
    elif command == "/reset":
        waiting.clear()
        for turns in said:
            turns.clear()
    elif command.startswith("/"):
        raise BadInput(f"{command}: choose /image, /draw, /reset or /quit")
    elif line:
        ask(line, speakers, said, waiting)


def ask(line, speakers, said, waiting):
    question = {"role": "user", "text": line, "pictures": waiting.copy()}
    waiting.clear()
    for speaker, turns in zip(speakers, said):
        print(f"{speaker.name}: " if len(speakers) > 1 else "", end="", flush=True)
        answer = say(speaker, [*turns, question])
        if answer.strip():                              # a turn without text is no turn (formats.py)
            turns += [question, {"role": "assistant", "text": answer}]


if __name__ == "__main__":
    main(Settings, run)
