"""What one would use instead, TRL's DPOTrainer and transformers.generate, in processes of their own.

speed.py starts this file. After every step it says a line on stdout and stops itself; speed.py lets
it go on. Nothing of ours is imported, so that the process has the environment that a user of these
libraries has (common.py tells OpenMP how its threads wait, which suits our code and may not suit
theirs).

    pip install transformers==5.23.0 trl==1.16.0 peft==0.21.2
"""
import json
import os
import platform
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_mib() -> float:
    """The most memory that this process has held: of the GPU where there is one, else of the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if platform.system() == "Darwin" else 1024                  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def open_gate() -> Callable:
    """-> gate(**said): say that a step is over, and stop until speed.py lets this process go on."""
    words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                            # what libraries print is no word

    def gate(**said):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(json.dumps(said | {"peak_mib": peak_mib()}), file=words, flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    return gate


def compete(ways: dict):
    """Do the job on the command line, by the one of these functions that its "what" names."""
    job = json.loads(sys.argv[1])
    ways[job["what"]](open_gate(), Path(job["folder"]), job)


def dpo(gate: Callable, folder: Path, job: dict):
    """TRL's trainer on what trl.json says; the vision tower is frozen, as ours is."""
    import datasets
    import peft
    import transformers
    from trl import DPOConfig, DPOTrainer

    llava = transformers.LlavaForConditionalGeneration
    model = llava.from_pretrained(folder / "model")
    model.model.vision_tower.requires_grad_(False)
    rows = json.loads((folder / "trl.json").read_text())
    data = datasets.Dataset.from_list(rows)
    data = data.cast_column("images", datasets.Sequence(datasets.Image()))

    class Gate(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            gate(tokens=state.num_input_tokens_seen / state.global_step / job["pairs"])

    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=job["pairs"],
        max_steps=10**6,
        max_length=None,
        gradient_checkpointing=job["checkpointing"],
        bf16=False,                                          # on a GPU the weights already are
        include_num_input_tokens_seen=True,
        disable_tqdm=True,
    )
    adapters = None
    if job["lora"]:
        adapters = peft.LoraConfig(
            r=job["lora"],
            lora_alpha=2 * job["lora"],
            target_modules=r".*language_model.*_proj",
            modules_to_save=["multi_modal_projector"],
        )
    trainer = DPOTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=transformers.AutoProcessor.from_pretrained(folder / "model"),
        peft_config=adapters,
        callbacks=[Gate()],
    )
    trainer.train()


def sample(gate: Callable, folder: Path, job: dict):
    """n sampled answers to every prompt of prompts.pt, of at most `words` tokens."""
    import transformers

    llava = transformers.LlavaForConditionalGeneration
    model = llava.from_pretrained(folder / "model")
    if torch.cuda.is_available():
        model = model.cuda()
    asked = torch.load(folder / "prompts.pt")
    ids = asked["ids"].to(model.device)
    ends = torch.tensor(job["ends"])
    while True:
        torch.manual_seed(0)
        said = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=asked["pixels"].to(model.device, model.dtype),
            do_sample=True,
            num_return_sequences=job["n"],
            max_new_tokens=job["words"],
            eos_token_id=job["ends"],
            pad_token_id=job["ends"][0],
        )
        ended = torch.isin(said[:, ids.shape[1]:].cpu(), ends).cumsum(1) > 0
        gate(tokens=int((~ended).sum()))


if __name__ == "__main__":
    compete({"dpo": dpo, "sample": sample})
