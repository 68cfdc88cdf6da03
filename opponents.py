"""What one would use instead, TRL's DPOTrainer and transformers.generate, in processes of their own.

speed.py starts this file and speaks with it through stdin and stdout: a line comes out when
everything is loaded and after every step, a line that goes in starts the next one. Nothing of ours
is imported, so that the process has the environment that a user of these libraries has (common.py
tells OpenMP how its threads wait, which suits our code and may not suit theirs).

    pip install transformers==5.23.0 trl==1.16.0 peft==0.21.2
"""
import json
import os
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path


def peak_mib() -> float:
    """The most memory that this process has held: of the GPU where there is one, else of the host."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 1 if platform.system() == "Darwin" else 1024                  # bytes or KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def open_gate() -> Callable:
    """-> gate(**said): report the step that is over, and wait for the word to take the next one."""
    words = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)                                            # what libraries print is no word

    def gate(**said):
        import torch
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(json.dumps(said | {"peak_mib": peak_mib()}), file=words, flush=True)
        if not sys.stdin.readline():
            os._exit(0)                                      # enough, or speed.py is gone
    return gate


def dpo(gate: Callable, folder: Path, job: dict):
    """TRL's trainer on what trl.json says; the vision tower is frozen, as ours is."""
    import datasets
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer

    llava = transformers.LlavaForConditionalGeneration
    model = llava.from_pretrained(folder / "model", dtype=job["dtype"])
    model.model.vision_tower.requires_grad_(False)
    rows = json.loads((folder / "trl.json").read_text())
    data = datasets.Dataset.from_list(rows)
    data = data.cast_column("images", datasets.Sequence(datasets.Image()))
    said = {}

    class Gate(transformers.TrainerCallback):
        def on_train_begin(self, *args, **more):
            gate()

        def on_step_end(self, *args, **more):
            gate(**said)

    class Trainer(DPOTrainer):
        def compute_loss(self, model, inputs, *args, **more):
            said["tokens"] = inputs["input_ids"].numel() / job["pairs"]
            return super().compute_loss(model, inputs, *args, **more)

    settings = DPOConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=job["pairs"],
        learning_rate=5e-7,
        max_steps=10**6,
        max_length=None,
        gradient_checkpointing=job["checkpointing"],
        bf16=False,                                          # the weights already are
        use_cpu=not torch.cuda.is_available(),
        report_to=[],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    adapters = {}
    if job["lora"]:
        import peft
        adapters["peft_config"] = peft.LoraConfig(
            r=job["lora"],
            lora_alpha=2 * job["lora"],
            target_modules=job["targets"],
            modules_to_save=["multi_modal_projector"],
        )
    processor = transformers.AutoProcessor.from_pretrained(folder / "model")
    Trainer(model=model, args=settings, train_dataset=data, processing_class=processor,
            callbacks=[Gate()], **adapters).train()


def sample(gate: Callable, folder: Path, job: dict):
    """n sampled answers of `words` tokens to every prompt of prompts.pt."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, job["dtype"])
    llava = transformers.LlavaForConditionalGeneration
    model = llava.from_pretrained(folder / "model", dtype=dtype).to(device)
    asked = torch.load(folder / "prompts.pt")
    ids, pixels = asked["ids"].to(device), asked["pixels"].to(device, dtype)
    how = {
        "do_sample": True,
        "num_return_sequences": job["n"],
        "max_new_tokens": job["words"],
        "min_new_tokens": job["words"],
        "pad_token_id": 3,
    }
    while True:
        gate()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, **how)


if __name__ == "__main__":
    import torch
    import transformers
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    transformers.utils.logging.set_verbosity_error()
    {"dpo": dpo, "sample": sample}[job["what"]](open_gate(), Path(job["folder"]), job)
