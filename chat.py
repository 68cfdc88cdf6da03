"""Talk to a checkpoint about pictures, in a terminal; or to two at once.

An evaluation is a number; a conversation shows what it is a number of. Turns go through the very
function that training and benchmarks get their tokens from (data.make_tree), so what you see here
is what they saw.

    python chat.py                                      the shipped LLaVA-mini
    python chat.py --vs runs/dpo/model                  before and after, side by side
    python chat.py --ckpt llava-1.5-7b-hf --temperature 0.7

    /image PATH    attach a picture to the next question (again for more)
    /draw          a picture of the miniature's world, and a question about it
    /reset         begin anew
    /quit
"""
import math
import sys
import tempfile
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import common  # first: it tells OpenMP how to wait
import checkpoint
from common import BadInput, device_and_dtype, main
from data import Pixels, Tokens, make_tree, target_scores
from formats import check
from generate import stream
from toy import tasks
from vision import load_image


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
    device: str = "auto"         # cpu, cuda, ...
    dtype: str = "auto"          # float32, bfloat16; auto: float32 on the CPU


class Speaker:
    """One checkpoint and its side of the conversation."""

    def __init__(self, name: str, s: Settings):
        folder = checkpoint.resolve(name)
        self.name = name
        self.s = s
        self.model = checkpoint.load(folder, *device_and_dtype(s.device, s.dtype))
        self.pixels = Pixels(self.model.config)
        self.tokens = Tokens(folder, self.model.config, s.template)
        if s.target:
            self.tokens = self.tokens.asking(target_scores(s.target))
        if self.tokens.template.ask:
            print(f"{name}: every question ends with {self.tokens.template.ask!r}")
        self.reset()

    def reset(self):
        self.messages = []
        self.images = []

    def say(self, question: str, images: list[str]):
        """Print the answer as it comes, and remember both; nothing where it raises BadInput."""
        if images and not self.tokens.patches:
            print(f"({self.name} sees no pictures, and is asked without)")
            images = []
        content = "<image>\n" * len(images) + question
        record = {
            "id": self.name,
            "root": "/",
            "images": self.images + images,
            "messages": [*self.messages, {"role": "user", "content": content}],
        }
        check(record)
        tree = make_tree(self.tokens, record, [])
        prompt = tree.ids()
        room = min(self.s.max_new, self.tokens.room - len(prompt))
        if room < 1:
            raise BadInput(f"{self.name}: {len(prompt)} tokens so far, and it was built for "
                           f"{self.tokens.room}; /reset")
        unknown = self.tokens.tokenizer.token_to_id("<unk>")
        strange = self.tokens.encode(record["messages"][-1]["content"]).count(unknown)
        if strange:
            print(f"({self.name} does not know {strange} of these words)")

        said = self.answer(prompt, self.pixels(tree.images), room)
        self.messages = [*record["messages"], {"role": "assistant", "content": said}]
        self.images = record["images"]

    def answer(self, prompt, pixels, room):
        """Print what the model says, token by token -> its text."""
        ids, said = [], ""
        seed = self.s.seed + len(self.messages)
        tokens = stream(self.model, [prompt], [pixels], max_new=room, seeds=[[seed]],
                        temperature=self.s.temperature, ends=self.tokens.ends)
        for token in tokens:
            if token.item() in self.tokens.ends:
                print()
                return said
            ids.append(token.item())
            text = self.tokens.decode(ids)
            if not text.endswith("\ufffd"):             # half a character: wait for the rest
                print(text[len(said):], end="", flush=True)
                said = text
        print(f" ... (cut after {room} tokens)")
        return said


def attach(path) -> str:
    """A picture's path from the root of the disk, opened once. Raises BadInput."""
    path = Path(path).expanduser().resolve()
    load_image(path)
    return str(path.relative_to("/"))


def draw(k: int) -> Path:
    """The miniature's k-th picture; prints what is in it and something to ask."""
    record = tasks.items("attribute", k + 1)[k]
    [drawn] = tasks.draw([record], Path(tempfile.mkdtemp()))
    path = Path(drawn["root"], drawn["images"][0])
    print(f"{path}: {tasks.written(tasks.scene_of(record)).removeprefix('scene : ')}")
    print(f"try: {record['truth']['turns'][0]['question']}")
    return path


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
    waiting = []                                        # pictures for the next question
    pictures = map(draw, count())                       # the miniature's, drawn as they are wanted
    print("a question and return; /image PATH, /draw, /reset, /quit")
    while (line := typed()) != "/quit":
        try:
            answer(line, speakers, waiting, pictures)
        except BadInput as problem:
            print(problem)


def answer(line, speakers, waiting, pictures):
    """Do as a line says: a command, or a question about the pictures that are `waiting`."""
    command, _, rest = line.partition(" ")
    if command == "/image":
        waiting.append(attach(rest))
    elif command == "/draw":
        waiting.append(attach(next(pictures)))
    elif command == "/reset":
        waiting.clear()
        for speaker in speakers:
            speaker.reset()
    elif command.startswith("/"):
        raise BadInput(f"{command}: choose /image, /draw, /reset or /quit")
    elif line:
        asked = waiting.copy()
        waiting.clear()
        for speaker in speakers:
            print(f"{speaker.name}: " if len(speakers) > 1 else "", end="", flush=True)
            speaker.say(line, asked)


if __name__ == "__main__":
    main(Settings, run)
