"""Both decoders on many kinds of files, good and broken."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from data import decoding
from data.decoding import decode_fast, decode_pillow, jpeg_frame, simplejpeg
from data.errors import BrokenImageError
from tests.helpers import encoded, photo


def exact(data: bytes) -> np.ndarray:
    return np.asarray(decode_pillow(data))


def fast(data: bytes) -> np.ndarray:
    pixels = decode_fast(data)
    assert pixels.dtype == torch.uint8
    return pixels.numpy()


def png_header_only(width: int, height: int) -> bytes:
    """A PNG with a size in its header and no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def gray_jpeg(horizontal: int, vertical: int) -> bytes:
    """A gray JPEG whose luminance has the given sampling factors, which no encoder at hand writes."""
    data = encoded(Image.new("RGB", (32, 16), (128, 128, 128)))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    header = bytearray(data[: scan + 14])
    header[frame + 5 : frame + 9] = struct.pack(">HH", 8 * vertical, 8 * horizontal)
    header[frame + 11] = 16 * horizontal + vertical
    bits = "001010" * (horizontal * vertical) + "0000" * 2  # blocks without a difference to the one before
    bits += "1" * (-len(bits) % 8)
    return bytes(header) + int(bits, 2).to_bytes(len(bits) // 8, "big") + decoding.END_OF_IMAGE


ROTATED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
JPEG = encoded(photo(97, 61), quality=90)
WHOLE = {
    "JPEG": JPEG,
    "full chroma": encoded(photo(97, 61), quality=90, subsampling=0),
    "progressive": encoded(photo(97, 61), progressive=True),
    "gray": encoded(photo(97, 61).convert("L")),
    "CMYK": encoded(photo(97, 61).convert("CMYK")),
    "EXIF-rotated": encoded(photo(97, 61), exif=ROTATED),
    "after the end": JPEG + bytes(1000),
    "bytes between segments": JPEG.replace(b"\xff\xda", bytes(3) + b"\xff\xda", 1),
    "bytes before the frame": JPEG.replace(b"\xff\xc0", bytes(3) + b"\xff\xc0", 1),
    "PNG": encoded(photo(97, 61), "PNG"),
    "1x1": encoded(photo(1, 1)),
    "4x2 sampling": gray_jpeg(4, 2),
    "3x1 sampling": gray_jpeg(3, 1),
    "2x4 sampling": gray_jpeg(2, 4),
    "palette": encoded(photo(97, 61).convert("P"), "PNG", transparency=b"\0" * 200),
    "alpha": encoded(photo(97, 61).convert("RGBA"), "PNG"),
    "one bit": encoded(photo(97, 61).convert("1"), "PNG"),
    "WebP": encoded(photo(97, 61), "WEBP"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", WHOLE)
def test_both_decoders_give_pillows_pixels(kind: str) -> None:
    reference = Image.open(io.BytesIO(WHOLE[kind]))
    reference = reference.convert("RGBA").convert("RGB") if kind == "palette" else reference.convert("RGB")
    assert np.array_equal(exact(WHOLE[kind]), np.asarray(reference))
    assert np.array_equal(fast(WHOLE[kind]), np.asarray(reference))


def test_orientation_is_as_stored() -> None:
    data = WHOLE["EXIF-rotated"]
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert fast(data).shape == exact(data).shape == (61, 97, 3)


def test_sixteen_bits_keep_their_upper_eight() -> None:
    values = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    data = encoded(Image.fromarray(values), "PNG")
    assert np.array_equal(exact(data), np.repeat((values >> 8)[..., None], 3, axis=2))
    assert np.array_equal(fast(data), exact(data))


BROKEN = {
    "empty": (b"", "an empty file"),
    "text": (b"this is no image", "not an image"),
    "cut off": (JPEG[: len(JPEG) // 2], "cut off"),
    "two bytes short": (JPEG[:-2], "cut off"),
    "zeros after the middle": (JPEG[: len(JPEG) // 2] + bytes(len(JPEG) // 2), "cut off"),
    "only the start": (JPEG[:2], "not an image"),
    "header cut off": (JPEG[:100], "cannot be decoded"),
    "PNG cut off": (WHOLE["PNG"][:3000], "cannot be decoded"),
    "CMYK cut off": (WHOLE["CMYK"][: len(WHOLE["CMYK"]) // 2], "cut off"),
    "bomb": (encoded(Image.new("L", (10_000, 10_000)), quality=1), "10000x10000 pixels, above the limit"),
    "PNG bomb": (png_header_only(10_000, 10_000), "10000x10000 pixels, above the limit"),
    "greater bomb": (png_header_only(60_000, 60_000), "decompression bomb"),
    "EPS, for which Pillow would start Ghostscript": (encoded(photo(9, 9), "EPS"), "not an image"),
    "floating point": (encoded(Image.new("F", (9, 9), 0.5), "TIFF"), "floating-point"),
    "32 bits": (encoded(Image.new("I", (9, 9), 1 << 20), "TIFF"), "32-bit"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("decode", [exact, fast])
def test_broken_files_are_rejected_with_a_reason(kind: str, decode: object) -> None:
    data, reason = BROKEN[kind]
    with pytest.raises(BrokenImageError, match=reason) as caught:
        decode(data)  # type: ignore[operator]
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(simplejpeg is None, reason="needs simplejpeg")
@pytest.mark.parametrize(
    "data",
    [JPEG[: len(JPEG) // 2] + JPEG[-2:], JPEG[: len(JPEG) // 2] + b"\xff\xd3" + JPEG[len(JPEG) // 2 :]],
    ids=["cut out", "marker within"],
)
def test_made_up_pixels_are_rejected_by_the_fast_decoder(data: bytes) -> None:
    decode_pillow(data)  # Pillow does not notice
    with pytest.raises(BrokenImageError, match="cannot be decoded: Corrupt JPEG data"):
        decode_fast(data)


def test_pillow_decodes_where_simplejpeg_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "simplejpeg", None)
    for data in (JPEG, WHOLE["gray"], WHOLE["progressive"]):
        assert np.array_equal(fast(data), exact(data))
    with pytest.raises(BrokenImageError, match="cut off"):
        decode_fast(JPEG[:-2])
    with pytest.raises(BrokenImageError, match=r"cannot be decoded: [^/]*$"):
        decode_fast(JPEG[:200] + JPEG[-2:])


def test_frame_headers() -> None:
    assert jpeg_frame(JPEG) == (97, 61, 3, 0xC0)
    assert jpeg_frame(WHOLE["progressive"]) == (97, 61, 3, 0xC2)
    assert jpeg_frame(WHOLE["gray"]) == (97, 61, 1, 0xC0)
    assert jpeg_frame(WHOLE["CMYK"]) == (97, 61, 4, 0xC0)
    assert jpeg_frame(WHOLE["PNG"]) is None
    for length in range(0, len(JPEG), 37):
        assert jpeg_frame(JPEG[:length]) in (None, (97, 61, 3, 0xC0))
    assert jpeg_frame(JPEG[:2] + b"\xff" * 5 + JPEG[3:]) == (97, 61, 3, 0xC0)  # bytes of filling
