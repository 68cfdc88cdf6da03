"""LoRA: train a thin correction of each matrix, and leave the matrix alone.

    y = W x + (alpha / r) B A x,      A (r, in) random, B (out, r) zero, W frozen          (arXiv:2106.09685)

The problem. Full fine-tuning of 13 billion weights needs 18 bytes for each; an update of rank r = 128 needs them for 4 %. B
starts at zero, so at step 0 the model is exactly what it was, and dpo.py's contract holds.

Where adapters go decides what is trained. Here: the language model's linear layers, all of them and no others. "All linear
layers" by name would catch the vision tower's q_proj, k_proj and v_proj, too: a common accident, asserted against below. The
projector between them is small and trains beside, whole, at a rate of its own. The paper (arXiv:2402.10884): rank 128, alpha
twice that, rate 5e-5 for DPO and 4e-4 for its rivals, projector 2e-5; `--lora 128` alone asks for all of it. Its dropout of 0.05
is not here: it would make policy and reference differ at step 0.

The reference needs no second model, nor the usual "switch the adapters off", which is wrong as soon as anything else trains (here
the projector): its log-probs were computed and kept before the adapters came (dpo.py).

    python dpo.py --ckpt llava-1.5-13b-hf --data prefs.jsonl --out runs/dpo --lora 128

What comes out is runs/dpo/adapter in PEFT's layout, projector included; `--merge` adds B A to W and writes runs/dpo/model,
too. Every script takes either folder as --ckpt.

Previous: model.py.  Next: parallel.py (many processes, one result).
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import checkpoint
from common import BadInput
from model import Linear

PROJECTOR_LR = 2e-5      # the paper's and LLaVA's, beside adapters
TARGETS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class Adapted(nn.Linear):
    """A frozen linear layer and its correction. The layer's own weight keeps its name."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.weight, self.bias = layer.in_features, layer.out_features, layer.weight, None
        like = {"dtype": layer.weight.dtype, "device": layer.weight.device}
        bound = self.in_features ** -0.5                                         # PEFT's: kaiming_uniform with a = sqrt(5)
        a = torch.rand(rank, self.in_features, generator=generator) * 2 * bound - bound
        self.lora_A, self.lora_B = nn.Parameter(a.to(**like)), nn.Parameter(torch.zeros(self.out_features, rank, **like))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:                                      # (T, in) -> (T, r) -> (T, out)
        return F.linear(x, self.weight) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def attach(model: nn.Module, rank: int, alpha: float, seed: int) -> None:
    """Freeze everything but the projector, and give each linear layer of the language model an adapter."""
    generator = torch.Generator().manual_seed(seed)                              # the same in every process
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("multi_modal_projector."))
    for block in model.language_model.layers:
        for part, names in TARGETS.items():
            for name in names:
                module = getattr(block, part)
                setattr(module, name, Adapted(getattr(module, name), rank, alpha, generator))
    plain = [name for name, m in model.language_model.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, Adapted)]
    other = [name for name in adapters(model) if not name.startswith("language_model.layers.")]
    assert not plain and not other, f"adapters are missing at {plain}, or stand at {other}"


def adapters(model: nn.Module) -> dict[str, Adapted]:
    """Its adapted layers by name; none where the model has none."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def merge(model: nn.Module) -> None:
    """Fold every adapter into its weight; what is left is a model like any other."""
    for name, layer in adapters(model).items():
        checkpoint.add(layer.weight, layer.lora_A, layer.lora_B, layer.scale)
        with torch.device("meta"):
            plain = Linear(layer.in_features, layer.out_features)
        plain.weight = layer.weight
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, plain)


# ---- PEFT's adapter_config.json ------------------------------------------------------------------------------------

def to_peft(model: nn.Module, base: str) -> tuple[dict[str, Tensor], dict]:
    """Adapters and projector under the names that PEFT gives them on transformers' LLaVA (or Llama), and adapter_config.json. The
    targets are one pattern, matched against whole names: a list of last names would catch the vision tower's."""
    layers, text_only = adapters(model), model.config.vision is None
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named = {"base_model.model.model." + (name.removeprefix("language_model.") if text_only else name): p.detach()
             for name, p in trained.items()}
    named = {name + ".weight" * name.endswith(("lora_A", "lora_B")): p for name, p in named.items()}
    one, last = next(iter(layers.values())), "|".join(name for names in TARGETS.values() for name in names)
    rank = len(one.lora_A)
    return named, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": rank, "lora_alpha": one.scale * rank,
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False, "use_dora": False,
        "inference_mode": True,
        "modules_to_save": None if text_only else ["multi_modal_projector"],
        "target_modules": rf".*{'' if text_only else 'language_model.*'}layers\.\d+\.({'|'.join(TARGETS)})\.({last})"}


def check_flags(s, stacked: bool) -> None:
    """Flags that contradict each other are refused before anything is read. `stacked`: --ckpt is an adapter itself."""
    if not s.lora and (s.alpha or s.merge):
        raise BadInput("--alpha and --merge are about adapters: give --lora, their rank")
    if s.lora and stacked:
        raise BadInput(f"--ckpt {s.ckpt} is an adapter, and PEFT loads none on top of another; give a model/ that --merge wrote")


def rates(s, full: float, adapters: float):
    """The settings with peak learning rates filled in where --lr is 0: `full` or `adapters`, by what is trained, and beside
    adapters the projector's own."""
    if s.lr:
        return s
    return replace(s, lr=adapters, projector_lr=s.projector_lr or PROJECTOR_LR) if s.lora else replace(s, lr=full)


