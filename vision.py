"""A picture becomes 576 vectors: preprocessing, then CLIP's transformer but for its last block.

The problem. A language model reads vectors. CLIP (arXiv:2103.00020) turns a picture into such
vectors: cut it into patches of p x p pixels, embed each, add a learned position, and let
bidirectional transformer blocks mix them:

    x = [class, patch_1, ..., patch_N] + position       N = (size / p)^2, 576 for 336 px and p = 14
    x = x + attention(norm(x));  x = x + mlp(norm(x))       for each block

What LLaVA reads (arXiv:2310.03744) is not CLIP's final answer, one vector trained to match a
caption, but the patches one block before it: they still say *where* things are. The class token is
dropped, and the last block is never computed.

Preprocessing decides as much as the weights do: LLaVA-1.5 pads to a square with CLIP's mean colour
(so that nothing is cut off), then resizes with Pillow's bicubic filter, then normalises. For 8-bit
RGB files the pixels equal those of transformers' image processor; transparency is shown on white,
EXIF turns are made, 16 bits are scaled.
"""
import math
import os
import re
import warnings
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from common import BadInput, shown
from kernels import Mask, attention

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# What a picture may be. Never EPS, for which Pillow would start another program.
Image.init()
KNOWN = (
    "JPEG", "MPO", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "ICO",
)
FORMATS = [name for name in KNOWN if name in Image.OPEN]     # an older Pillow has no AVIF

# Refused before a byte is decoded: a decompression bomb (Pillow refuses from 179 million on).
MAX_BYTES = 200_000_000
MAX_PIXELS = 89_000_000
MAX_SIDE = 20_000

NAME_FILES = "write embedded or distant images to files, and name those"

# How a camera was held (EXIF's orientation), and the turn that undoes it.
ORIENTATION = 0x0112
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
warnings.filterwarnings("ignore", module=r"PIL\.")       # about EXIF, of which little is read


@dataclass
class VisionConfig:
    """CLIP ViT sizes; the defaults are transformers' (a config.json states only what differs)."""
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    feature_layer: int = -2          # index into [embeddings, after block 1, after block 2, ...]

    @property
    def patches(self):
        return (self.image_size // self.patch_size) ** 2

    @property
    def depth(self):
        """How many blocks run to reach the feature layer."""
        return range(self.num_hidden_layers + 1)[self.feature_layer]


# ---- the transformer -----------------------------------------------------------------------------
# N images, P tokens each (class token first), D features, H heads of K. Module names are the
# checkpoints' names.

def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(c.hidden_size))
        self.patch_embedding = nn.Conv2d(3, c.hidden_size, c.patch_size, c.patch_size, bias=False)
        self.position_embedding = nn.Embedding(c.patches + 1, c.hidden_size)

    def forward(self, pixels):                                           # (N, 3, S, S)
        patches = self.patch_embedding(pixels).flatten(2).mT             # (N, P-1, D)
        cls = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([cls, patches], 1) + self.position_embedding.weight       # (N, P, D)


class SelfAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        D = c.hidden_size
        self.heads = c.num_attention_heads
        self.q_proj = nn.Linear(D, D)
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(self, x, mask):                                          # (N*P, D)
        q = self.q_proj(x).view(len(x), self.heads, -1)                  # (N*P, H, K)
        k = self.k_proj(x).view(len(x), self.heads, -1)
        v = self.v_proj(x).view(len(x), self.heads, -1)
        return self.out_proj(attention(q, k, v, mask).flatten(1))        # (N*P, H, K) -> (N*P, D)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.act = ACTIVATIONS[c.hidden_act]
        self.fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn = SelfAttention(c)
        self.mlp = MLP(c)
        self.layer_norm1 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def forward(self, x, mask):
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class ViT(nn.Module):
    """CLIP's vision tower. All its weights are kept, so that a checkpoint goes out as it came in;
    LLaVA uses those up to the feature layer (`post_layernorm` belongs to CLIP's own output)."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        self.embeddings = Embeddings(c)
        self.pre_layrnorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)    # sic, in checkpoints
        layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.post_layernorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)

    def after(self, depth, pixels):
        """What `depth` blocks make of (N, 3, S, S) pixels -> (N, P, D), class token first."""
        x = self.pre_layrnorm(self.embeddings(pixels))                   # (N, P, D)
        N, P, D = x.shape
        mask = Mask.full(N, P, x.device)
        x = x.flatten(0, 1)                                              # (N*P, D)
        for block in self.encoder.layers[:depth]:
            x = block(x, mask)
        return x.view(N, P, D)

    def forward(self, pixels: Tensor) -> Tensor:
        """The patch vectors of the feature layer, (N, P-1, D): the class token is dropped."""
        return self.after(self.config.depth, pixels)[:, 1:]


# ---- from a file to pixels -----------------------------------------------------------------------

def preprocess(image: Image.Image, size: int) -> Tensor:
    """An RGB picture, padded to a square with the mean colour -> (3, size, size) fp32, normalised.

    Source: LLaVA's `expand2square` and CLIPImageProcessor; equal to transformers'
    LlavaImageProcessor(do_pad=True).
    """
    side = max(image.size)
    if side * side > MAX_PIXELS:                         # a strip: its square would fill the memory
        image = image.reduce(math.ceil(side / 4096))
        side = max(image.size)
    w, h = image.size
    square = Image.new("RGB", (side, side), tuple(int(255 * m) for m in CLIP_MEAN))
    square.paste(image, ((side - w) // 2, (side - h) // 2))
    image = square.resize((size, size), Image.BICUBIC)
    x = np.asarray(image).astype(np.float64) * (1 / 255)                             # (S, S, 3)
    x = (x.astype(np.float32) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    return torch.from_numpy(np.ascontiguousarray(x.transpose(2, 0, 1)))              # (3, S, S)


def upright(image: Image.Image) -> Image.Image:
    """Turned as the camera was held. Of EXIF nothing else is read, and it may be broken."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except Exception:                                    # Pillow raises many types here
        turn = None
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """What a person sees in any viewer, as 8-bit RGB: upright, transparency on white."""
    image = upright(image)
    if image.mode == "F":
        raise ValueError("floating-point grey, and nothing says what is white")
    if image.mode.startswith("I"):                       # 16-bit grey: Pillow would clip it at 255
        grey = np.asarray(image).astype(np.float32)
        grey *= 255 / 65535
        grey.round(out=grey).clip(0, 255, out=grey)      # in place: such pictures may be large
        image = Image.fromarray(grey.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def image_path(root: Path, name, follow_links: bool = False) -> Path:
    """The file that an image's name stands for. Raises BadInput where it leads out of `root`, by
    "..", as an absolute name, or by a link, unless links are to be followed."""
    if not isinstance(name, str) or not name.strip():
        raise BadInput(f"image {shown(repr(name))} is not a file name; {NAME_FILES}")
    address = re.match("data:|https?:|file:|ftp:|s3:|gs:", name)
    if address or max(map(len, name.split("/"))) > 255:
        kind = "an address" if address else "a picture as text"
        raise BadInput(f"image {shown(name)} is {kind}, not a file name; {NAME_FILES}")
    root = Path(root).absolute()
    try:
        real = (root / name).resolve()
    except (OSError, ValueError, RuntimeError) as error:     # a zero byte, a loop of links
        raise BadInput(f"image {shown(name)} is not a file name ({shown(str(error))})") from None
    if real.is_relative_to(root.resolve()):
        return real
    plain = Path(os.path.normpath(root / name))
    by_link = plain.is_relative_to(root) and ".." not in Path(name).parts
    if by_link and follow_links:
        return plain
    remedy = ", or say --follow_links, for it is a link" if by_link else ""
    raise BadInput(
        f"image {shown(name, 200)} leads outside {root}; move it inside or set --image_root{remedy}"
    )


def read_image(path: Path) -> bytes:
    """Its bytes. Raises BadInput where the file is missing, not a regular one, or too large."""
    try:
        if path.exists() and not path.is_file():         # a pipe would never end
            raise BadInput(f"image {path}: not a regular file")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise BadInput(f"image {path}: {size:,} bytes, more than {MAX_BYTES:,}; shrink it")
        return path.read_bytes()
    except OSError as error:
        raise BadInput(
            f"image {path}: {error.strerror or error}; fix the path or set --image_root"
        ) from None


def load_image(path: Path, small: int = 0) -> Image.Image:
    """Open an image file as RGB. `small` lets a JPEG decode at reduced size (to check, not to use).

    Raises BadInput naming the file where it is missing, broken, truncated or a decompression bomb.
    """
    return decode_image(read_image(Path(path)), path, small)


def decode_image(data, name, small=0):
    """The bytes of an image file -> RGB; `name` and `small` as for load_image."""
    try:
        image = Image.open(BytesIO(data), formats=FORMATS)
        w, h = image.size
        if w * h > MAX_PIXELS or max(w, h) > MAX_SIDE:
            raise ValueError(
                f"{w} x {h} pixels, more than the {MAX_PIXELS:,} in all or {MAX_SIDE:,} on a side "
                "that are allowed"
            )
        if small:
            image.draft("RGB", (small, small))
        image.load()
        return to_rgb(image)
    except UnidentifiedImageError:
        reason = f"it is none of {', '.join(FORMATS)}"
    except Exception as error:           # Pillow's decoders raise many types
        reason = str(error)
    raise BadInput(f"image {name}: cannot be decoded ({reason}); shrink, replace or remove it")
