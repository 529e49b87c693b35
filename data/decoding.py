"""From an encoded image to RGB pixels, in two ways: Pillow's, as published figures are made, and a faster one.

Both refuse what they cannot decode faithfully, and refuse the same files.
"""

import io
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.errors import BrokenImageError

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

MAX_PIXELS = 89_478_485  # Pillow's limit for what may be a decompression bomb: 256 MiB of RGB
END_OF_IMAGE = b"\xff\xd9"
HARMLESS = ("extraneous bytes before marker", "JFIF revision", "SOS parameters")  # warnings, not about pixels


class JpegFrame(NamedTuple):
    """What the frame header of a JPEG says."""

    width: int
    height: int
    components: int
    marker: int  # 0xC0 baseline, 0xC1 extended, 0xC2 progressive; others are rare


def jpeg_frame(data: bytes) -> JpegFrame | None:
    """The frame header of a JPEG; None where the data are no JPEG, or none that can be understood."""
    if data[:2] != b"\xff\xd8":
        return None
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a byte of filling
            position += 1
        elif marker == 0xDA:  # pixels, and no frame header before them
            return None
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(data[position + 5 : position + 7], "big")
            width = int.from_bytes(data[position + 7 : position + 9], "big")
            return JpegFrame(width, height, data[position + 9], marker)
        else:
            position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return None


def decode_pillow(data: bytes) -> Image.Image:
    """An RGB image, by Pillow; colors and orientation as they are stored, whatever EXIF says of the orientation.

    Raises:
        BrokenImageError: the data are no image, cut off, or too large.
    """
    refuse_broken(data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refuse_large says it, as an error
            image = Image.open(io.BytesIO(data))
        refuse_large(*image.size)
        return to_rgb(image)
    except (BrokenImageError, MemoryError):
        raise
    except Image.UnidentifiedImageError as error:
        raise BrokenImageError("not an image, or of an unknown format") from error
    except Exception as error:  # Pillow's readers raise all kinds, from SyntaxError to struct.error
        raise BrokenImageError(f"cannot be decoded: {error}") from error


def decode_fast(data: bytes) -> Tensor:
    """RGB pixels (H, W, 3), uint8; the same as decode_pillow's.

    Ordinary JPEGs go to libjpeg-turbo through simplejpeg, which saves Pillow's copies and reports where the library
    made up pixels for damaged data. Everything else goes through Pillow, as do all images without simplejpeg.

    Raises:
        BrokenImageError: the data are no image, cut off, or too large.
    """
    frame = None if simplejpeg is None else jpeg_frame(data)
    if frame is None or frame.components not in (1, 3) or frame.marker > 0xC2 or not frame.height:
        return image_to_tensor(decode_pillow(data))
    refuse_broken(data)
    refuse_large(frame.width, frame.height)
    try:
        return torch.from_numpy(simplejpeg.decode_jpeg(data, strict=True))  # (H, W, 3)
    except ValueError as error:
        if any(words in str(error) for words in HARMLESS):
            return image_to_tensor(decode_pillow(data))
        raise BrokenImageError(f"cannot be decoded: {error}") from error


def image_to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as pixels (H, W, 3), uint8."""
    return torch.from_numpy(np.array(image))  # (H, W, 3)


def refuse_broken(data: bytes) -> None:
    """Raise BrokenImageError for what some decoder would make gray pixels of."""
    if not data:
        raise BrokenImageError("an empty file")
    is_jpeg = data[:2] == b"\xff\xd8"
    if is_jpeg and not data.endswith(END_OF_IMAGE) and data.rfind(END_OF_IMAGE) < data.rfind(b"\xff\xda"):
        raise BrokenImageError("a JPEG that is cut off: no end-of-image marker after its pixels")


def refuse_large(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenImageError(f"{width}x{height} pixels, above the limit of {MAX_PIXELS:,} (a decompression bomb?)")


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as RGB. Transparency is dropped, as everywhere in the field; 16 bits keep their upper 8, where
    Pillow's own conversion would cut off all that is brighter than 255 of 65,535.
    """
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # without the detour Pillow warns
    elif image.mode == "F":
        raise BrokenImageError("floating-point pixels, which have no fixed range")
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BrokenImageError("32-bit pixels, which have no fixed range")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")
