"""LoRA: train a thin correction of each matrix, and leave the matrix alone.

    y = W x + (alpha / r) B A x,      A (r, in) random, B (out, r) zero, W frozen (arXiv:2106.09685)

The problem. Full fine-tuning of 13 billion weights needs 16 bytes for each and more; an update of
rank r = 128 needs them for 4 %. B starts at zero, so at step 0 the model is exactly what it was,
and dpo.py's contract holds.

Where adapters go decides what is trained. Here: the language model's linear layers, all of them and
no others. "All linear layers" by name would catch the vision tower's q_proj, k_proj and v_proj,
too: a common accident. The projector between the two is small and trains beside, whole, at a rate
of its own. The paper (arXiv:2402.10884): rank 128, alpha twice that, rate 5e-5 for DPO and 4e-4 for
its rivals, projector 2e-5; `--lora 128` alone asks for all of it. Its dropout of 0.05 is not here:
it would make policy and reference differ at step 0.

The reference needs no second model, nor the usual "switch the adapters off", which is wrong as soon
as anything else trains (here the projector): its log-probs were computed before the adapters came.

    python dpo.py --ckpt llava-1.5-13b-hf --data prefs.jsonl --out runs/dpo --lora 128
    python lora.py --ckpt runs/dpo/adapter --out runs/dpo/model

The first leaves runs/dpo/adapter in PEFT's layout, projector included; every script takes it as
--ckpt. The second adds B A to W, whoever trained the adapter, and writes a model like any other.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from common import BadInput, main
from model import Linear


class Adapted(nn.Module):
    """A frozen linear layer and its correction. The layer's own weight keeps its name."""

    def __init__(self, layer: Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        out_features, in_features = layer.weight.shape
        device = layer.weight.device
        bound = in_features ** -0.5                      # PEFT's: kaiming_uniform with a = sqrt(5)
        start = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        self.weight = layer.weight
        self.lora_A = nn.Parameter(start.to(device))     # what trains is fp32, whatever W is
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, device=device))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        thin = F.linear(x, self.lora_A.to(x.dtype))              # (T, in) -> (T, r)
        correction = F.linear(thin, self.lora_B.to(x.dtype))     # (T, r) -> (T, out)
        return F.linear(x, self.weight.to(x.dtype)) + self.scale * correction


def attach(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Freeze everything but the projector, and give each linear layer of the language model its
    adapter."""
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("multi_modal_projector."))
    generator = torch.Generator().manual_seed(seed)      # the same in every process
    blocks = model.language_model.layers
    for name, layer in list(blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            blocks.set_submodule(name, Adapted(layer, rank, alpha, generator))


# ---- the folder that PEFT loads ------------------------------------------------------------------

# Matched against whole names: a list of last names would catch the vision tower's, too.
TARGETS = r"layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"


def to_peft(model: nn.Module, base: str) -> tuple[dict[str, Tensor], dict]:
    """What was trained, under the names that PEFT gives it on transformers' LLaVA (or Llama), and
    adapter_config.json."""
    text_only = model.config.vision is None
    tensors = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            if text_only:
                name = name.removeprefix("language_model.")
            if name.endswith(("lora_A", "lora_B")):
                name += ".weight"
            tensors[f"base_model.model.model.{name}"] = p.detach().cpu()

    layer = model.language_model.layers[0].self_attn.q_proj                  # all are alike
    rank = len(layer.lora_A)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": layer.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
        "modules_to_save": None if text_only else ["multi_modal_projector"],
        "target_modules": (r".*" if text_only else r".*language_model.*") + TARGETS,
    }
    return tensors, config


def save_adapter(model: nn.Module, folder: Path, source: Path, more=None) -> None:
    """Write what was trained beside the model in `source`, whole or not at all, with that model's
    tokenizer; `more` are JSON files by name. Process 0 writes."""
    tensors, config = to_peft(model, str(source.resolve()))
    documents = {"adapter_config.json": config}
    documents |= checkpoint.processor_json(model.config) | (more or {})
    checkpoint.write_folder(folder, "adapter_model.safetensors", tensors, documents, source)


# ---- the command ---------------------------------------------------------------------------------

@dataclass
class Settings:
    """Add an adapter to its base model, and write a model that needs neither."""
    ckpt: str = "runs/dpo/adapter"    # the adapter's folder, PEFT's layout; it names its base model
    out: str = "runs/dpo/model"       # where the whole model goes; it must not be there yet


def run(s: Settings) -> None:
    folder, out = checkpoint.resolve(s.ckpt), Path(s.out)
    base = checkpoint.base_folder(folder)
    if base is None:
        raise BadInput(f"--ckpt {s.ckpt} is no adapter: it has no adapter_config.json")
    if out.exists():
        raise BadInput(f"--out {s.out} is there already; choose another")

    # As precise as the base model is stored.
    _, stored = next(checkpoint.tensors(base))
    model = checkpoint.load(folder, dtype=stored.dtype)
    checkpoint.save(model, out, folder)
    print(f"{base} and {folder} together: {out}")


if __name__ == "__main__":
    main(Settings, run)
