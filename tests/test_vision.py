"""From an image file to patch vectors: what a person sees, the pixels transformers would give,
CLIP's own features.

    python -m pytest tests/test_vision.py -q

Every file format is compared with an image built by hand; the pipeline and the tower with
transformers, where it is installed. All pictures are made here.
"""
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import picture, randomize
from PIL import Image, ImageFile

import vision
from common import BadInput
from vision import CLIP_MEAN, CLIP_STD, ViT, VisionConfig, decode_image, load_image, preprocess

RGB = np.asarray(picture(5, 3))      # (3, 5, 3): three rows, five columns, nothing symmetric


def read(path) -> np.ndarray:
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def save(image: Image.Image, path, **options):
    image.save(path, **options)
    return path


# ---- what a person sees --------------------------------------------------------------------------

def palette_image():
    index = np.arange(15, dtype=np.uint8).reshape(3, 5) % 4
    colours = np.array([[255, 0, 0], [0, 200, 10], [3, 2, 1], [9, 90, 190]], np.uint8)
    image = Image.fromarray(index, "L").convert("P")
    image.putdata(index.flatten().tolist())
    image.putpalette(colours.flatten().tolist())
    return image, index, colours


def test_grey_and_black_and_white_become_three_equal_channels(tmp_path):
    grey = RGB[..., 0]
    assert np.array_equal(read(save(Image.fromarray(grey), tmp_path / "x.png")),
                          np.stack([grey] * 3, -1))
    bits = grey > 100
    assert np.array_equal(read(save(Image.fromarray(bits), tmp_path / "x.png")),
                          np.stack([bits * 255] * 3, -1))


@pytest.mark.parametrize("kind", ["png", "gif"])
def test_a_palette_is_looked_up_and_its_transparent_entry_is_white(tmp_path, kind):
    image, index, colours = palette_image()
    assert np.array_equal(read(save(image, tmp_path / f"x.{kind}")), colours[index])
    colours[2] = 255
    assert np.array_equal(read(save(image, tmp_path / f"y.{kind}", transparency=2)), colours[index])


ALPHA = np.array([[0, 1, 127, 254, 255]] * 3, np.uint8)[..., None]


@pytest.mark.parametrize("channels", [3, 1])
def test_transparency_is_blended_with_white(tmp_path, channels):
    colour = RGB[..., :channels]
    got = read(save(Image.fromarray(np.concatenate([colour, ALPHA], -1)), tmp_path / "x.png"))
    assert np.abs(got - (colour * (ALPHA / 255) + 255 * (1 - ALPHA / 255))).max() <= 1
    assert (got[:, 0] == 255).all() and (got[:, 4] == colour[:, 4]).all()


def test_transparency_of_palettes_and_a_colour_key_are_white_too(tmp_path):
    image, index, colours = palette_image()
    alpha = np.array([255, 128, 0, 64])[:, None]
    blended = colours * (alpha / 255) + 255 * (1 - alpha / 255)
    got = read(save(image, tmp_path / "x.png", transparency=bytes(alpha.flatten().tolist())))
    assert np.abs(got - blended[index]).max() <= 1

    pixels = RGB.copy()
    pixels[1, 2] = key = (7, 8, 9)
    got = read(save(Image.fromarray(pixels), tmp_path / "y.png", transparency=key))
    pixels[1, 2] = 255
    assert np.array_equal(got, pixels)


@pytest.mark.parametrize("top", [65535, 30000, 200])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path, top):
    """Pillow's own conversion clips everything above 255 to white. A dark picture stays dark."""
    deep = (RGB[..., 0].astype(float) / 255 * top).astype(np.uint16)
    got = read(save(Image.fromarray(deep), tmp_path / "x.png"))
    assert np.abs(got - deep[..., None] / 65535 * 255).max() <= 0.5
    assert got.min() < got.max() or top == 200


def test_floating_point_grey_is_refused_by_name(tmp_path):
    Image.fromarray(RGB[..., 0].astype(np.float32)).save(tmp_path / "x.tiff")
    with pytest.raises(BadInput, match="x.tiff: cannot be decoded .floating-point grey"):
        load_image(tmp_path / "x.tiff")


def test_cmyk_jpeg_has_the_right_colours(tmp_path):
    inks = np.zeros((16, 64, 4), np.uint8)
    for k, ink in enumerate([(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0), (40, 80, 120, 60)]):
        inks[:, 16 * k:16 * k + 16] = ink
    got = read(save(Image.fromarray(inks, "CMYK"), tmp_path / "x.jpg", quality=95))
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:].astype(float)) / 255
    assert np.abs(got - expected).max() <= 6                  # white, cyan, red, brown; never the negatives


UPRIGHT = {1: lambda x: x, 2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud,
           5: lambda x: x.swapaxes(0, 1),
           6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
           8: lambda x: np.rot90(x)}


def test_exif_orientation_is_turned_upright(tmp_path):
    for orientation, upright in UPRIGHT.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        got = read(save(Image.fromarray(RGB), tmp_path / "x.png", exif=exif))
        assert np.array_equal(got, upright(RGB)), orientation
    smooth = picture(64, 32)                                  # and from a phone
    exif[0x0112] = 6
    plain = read(save(smooth, tmp_path / "plain.jpg", quality=95))
    assert np.array_equal(read(save(smooth, tmp_path / "x.jpg", quality=95, exif=exif)),
                          np.rot90(plain, -1))


# ---- files that cannot be used -------------------------------------------------------------------

def png(width: int, height: int) -> bytes:
    """A small, valid 1-bit PNG of any size: a decompression bomb where the size is large."""
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row, packer = bytes(1 + (width + 7) // 8), zlib.compressobj()
    rows = b"".join(packer.compress(row * min(1000, height - i)) for i in range(0, height, 1000)) + packer.flush()
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
            + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def jpeg_with_exif(path, entries):
    """A JPEG whose EXIF holds these (tag, type, count, value) entries, whatever they mean."""
    body = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    body += b"".join(struct.pack("<HHI4s", *entry) for entry in entries) + b"\0" * 4
    exif = b"Exif\0\0" + body
    picture(40, 30).save(path, quality=95)
    data = path.read_bytes()
    path.write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + data[2:])


@pytest.mark.parametrize("broken", [
    (0x011A, 2, 4, b"abc\0"), (0x0100, 2, 4, b"abc\0"), (0x011A, 5, 1, b"\xff\xff\0\0"), (0x8825, 4, 1, b"\xff\xff\xff\x7f"),
    (0x02BC, 3, 2, b"\1\0\2\0"), (0x0131, 2, 9999, b"\xff\xff\0\0")])
def test_broken_exif_costs_neither_the_picture_nor_its_turn(tmp_path, broken):
    path = tmp_path / "a.jpg"
    jpeg_with_exif(path, [(0x0112, 3, 1, b"\6\0\0\0"), broken])
    assert load_image(path).size == (30, 40), "turned, as the good entry says"
    jpeg_with_exif(path, [(0x0112, 2, 4, b"abc\0"), broken])
    assert load_image(path).size == (40, 30)


def test_a_picture_starts_no_program(tmp_path):
    """For EPS Pillow would start Ghostscript."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(BadInput, match="it is none of JPEG, PNG"):
        load_image(tmp_path / "a.png")
    assert "EPS" not in vision.FORMATS and {"JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF"} <= set(vision.FORMATS)


def test_a_strip_takes_no_gigabytes(tmp_path, monkeypatch):
    """Padded to a square 1 x 20,000 pixels would be 400 million."""
    Image.new("RGB", (20_000, 1), "red").save(tmp_path / "strip.png")
    made, new = [], Image.new
    monkeypatch.setattr(vision.Image, "new", lambda mode, size, *more: made.append(size) or new(mode, size, *more))
    pixels = preprocess(load_image(tmp_path / "strip.png"), 56)
    assert pixels.shape == (3, 56, 56) and max(w * h for w, h in made) < vision.MAX_PIXELS


def test_a_file_of_too_many_bytes_is_not_read(tmp_path):
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(vision.MAX_BYTES + 1)
    with pytest.raises(BadInput, match="200,000,001 bytes, more than 200,000,000; shrink it"):
        load_image(tmp_path / "a.png")


@pytest.mark.parametrize("size, why", [((10_000, 9_000), "10000 x 9000 pixels, more than"),
                                       ((20_000, 20_000), "400000000 pixels. exceeds"),
                                       ((300_000, 2), "300000 x 2 pixels"),
                                       ((2, 300_000), "2 x 300000 pixels")])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded(tmp_path, monkeypatch, size, why):
    """Also a thin one: few pixels, but as a square it would fill the memory."""
    assert decode_image(png(30, 20), "small").size == (30, 20)
    (tmp_path / "bomb.png").write_bytes(png(*size))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadInput, match=rf"bomb\.png.*{why}"):
        load_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("name", ["half.jpg", "half.png", "text.jpg", "empty.png", "missing.jpg",
                                  "folder.jpg"])
def test_an_unusable_file_is_named(tmp_path, name):
    path, image = tmp_path / name, picture(64, 64)
    if name.startswith("half"):
        data = save(image, tmp_path / ("whole" + path.suffix)).read_bytes()
        path.write_bytes(data[:len(data) // 2])
    elif name == "folder.jpg":
        path.mkdir()
    elif name != "missing.jpg":
        path.write_bytes(b"no image" if name == "text.jpg" else b"")
    with pytest.raises(BadInput, match=name):
        load_image(path)


def test_a_small_decode_sees_the_same_picture(tmp_path):
    path = save(picture(640, 480), tmp_path / "x.jpg", quality=95)
    small, whole = load_image(path, small=64), load_image(path)
    assert small.size[0] < 640
    assert np.abs(np.asarray(whole.resize(small.size)).astype(int) - np.asarray(small)).mean() < 8


# ---- pixels --------------------------------------------------------------------------------------

def normalised(rgb) -> torch.Tensor:
    return torch.tensor(((np.asarray(rgb) / 255 - CLIP_MEAN) / CLIP_STD).astype(np.float32)).permute(2, 0, 1)


def test_padding_by_hand():
    """A 2 x 1 picture at size 2: its row on top, CLIP's mean colour below, nothing resized."""
    pixels = preprocess(Image.fromarray(RGB[:1, :2]), 2)
    mean = [int(255 * m) for m in CLIP_MEAN]
    torch.testing.assert_close(pixels, normalised([RGB[0, :2], [mean, mean]]), atol=1e-6, rtol=0)
    assert pixels[:, 1].abs().max() < 0.02 and pixels.dtype == torch.float32 and pixels.is_contiguous()


def test_padding_centres_the_picture():
    pixels = preprocess(Image.new("RGB", (7, 20), (255, 0, 0)), 20)
    red = (pixels[0] > 1.5).nonzero()
    assert red[:, 1].min() == (20 - 7) // 2 and red[:, 1].max() == (20 - 7) // 2 + 6 and len(red) == 7 * 20


SHAPES = [(40, 40), (64, 30), (30, 64), (1, 50), (50, 1), (3, 2), (1, 1), (101, 100), (500, 37)]


@pytest.mark.parametrize("size", [28, 45, 336])
def test_pixels_are_those_of_transformers(size):
    pytest.importorskip("transformers")
    from transformers import LlavaImageProcessorPil
    square = {"height": size, "width": size}
    padded = LlavaImageProcessorPil(do_pad=True, do_center_crop=False, size=square,
                                    crop_size=square)
    for shape in [(336, 336), (337, 333), (64, 30)] if size == 336 else SHAPES:
        image = picture(*shape, seed=sum(shape))
        theirs = padded(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(preprocess(image, size), theirs), shape


# ---- the tower -----------------------------------------------------------------------------------

def tower(**sizes) -> ViT:
    sizes = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3,
             "num_attention_heads": 4,
             "image_size": 28, "patch_size": 14} | sizes
    return randomize(ViT(VisionConfig(**sizes)), seed=1).eval()


@pytest.mark.parametrize("sizes", [
    {}, {"image_size": 32, "patch_size": 8, "feature_layer": -1},
    {"image_size": 16, "patch_size": 16, "feature_layer": 1},
    {"image_size": 70, "num_attention_heads": 1, "feature_layer": 0},
    {"hidden_act": "gelu", "layer_norm_eps": 1e-2},
    {"feature_layer": -4},
], ids=str)
@torch.no_grad()
def test_the_tower_is_clips(sizes):
    transformers = pytest.importorskip("transformers")
    ours = tower(**sizes)
    config = {k: getattr(ours.config, k) for k in VisionConfig.__dataclass_fields__ if k != "feature_layer"}
    theirs = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**config)).eval()
    prefix = "vision_model." if any(k.startswith("vision_model.") for k in theirs.state_dict()) else ""
    theirs.load_state_dict({prefix + k: v for k, v in ours.state_dict().items()}, strict=False)
    assert {prefix + k for k in ours.state_dict()} == {k for k, _ in theirs.named_parameters()}
    pixels = torch.randn(3, 3, ours.config.image_size, ours.config.image_size)
    hidden = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[ours.config.feature_layer]
    out = ours(pixels)
    assert out.shape == (3, ours.config.patches, 32)
    torch.testing.assert_close(out, hidden[:, 1:], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_patches_come_out_row_by_row_without_the_class_token():
    """At feature layer 0 nothing has mixed yet: only the patch under a changed pixel moves."""
    vit = tower(feature_layer=0, image_size=42)
    pixels = torch.randn(1, 3, 42, 42)
    changed = pixels.clone()
    changed[0, :, 20, 30] += 1                                # row 1, column 2 of 3 x 3 patches
    moved = (vit(changed) - vit(pixels)).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [k == 1 * 3 + 2 for k in range(9)]


@torch.no_grad()
def test_the_last_block_is_never_computed():
    vit, pixels = tower(), torch.randn(1, 3, 28, 28)
    before = vit(pixels)
    for weights in (vit.encoder.layers[2], vit.post_layernorm):
        for p in weights.parameters():
            p.fill_(torch.nan)
    assert torch.equal(vit(pixels), before)
    vit.encoder.layers[1].mlp.fc2.bias.add_(1)
    assert not torch.equal(vit(pixels), before)


@torch.no_grad()
def test_pictures_do_not_see_each_other():
    vit, pixels = tower(), torch.randn(4, 3, 28, 28)
    together = vit(pixels)
    for k in range(4):
        torch.testing.assert_close(vit(pixels[k:k + 1])[0], together[k], atol=1e-5, rtol=1e-5)


def test_llava_reads_576_patches():
    assert VisionConfig(image_size=336, patch_size=14).patches == 576
    assert VisionConfig(num_hidden_layers=24).depth == 23 and vision.VisionConfig(feature_layer=5).depth == 5
