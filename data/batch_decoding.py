"""JPEGs that a GPU decodes: which of them the workers leave to it, and their decoding (nvJPEG, through torchvision).

The pixels differ from libjpeg's, since nvJPEG repeats subsampled chroma, which libjpeg interpolates: evaluation never
uses them.
"""

import io
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from data.decoding import check_complete, decode_fast, jpeg_segments
from data.errors import DataError

BASELINE = 0xC0  # marker of the frame header of a sequential JPEG with Huffman coding
SCAN, ADOBE = 0xDA, 0xEE
SAMPLINGS = ((0x11, 0x11, 0x11), (0x21, 0x11, 0x11), (0x22, 0x11, 0x11))  # 4:4:4, 4:2:2, 4:2:0
MAX_IMAGE_PIXELS = 2**24  # larger photographs are decoded and cut by the workers, to save the device's memory
MAX_GROUP_PIXELS = 2**27  # that are decoded at once: 400 MB, and at most one image more
NUM_QUEUES = 32  # of this process on the GPU, the most there are; nvJPEG has 14 streams


class DeviceJpeg(NamedTuple):
    """A JPEG that is left to the device, with its size in pixels."""

    data: bytes
    height: int
    width: int


def device_jpeg(data: bytes) -> DeviceJpeg | None:
    """Return an encoded image as one for the device, or None if a worker must decode it.

    The device gets baseline JPEGs of the usual kinds: Y, Cb and Cr of 8 bits in one scan, the most common samplings.

    Raises:
        BrokenImageError: the JPEG is cut off.
    """
    segments = dict(jpeg_segments(data))
    frame, scan, adobe = (segments.get(marker, b"") for marker in (BASELINE, SCAN, ADOBE))
    if len(frame) != 15 or any(0xC1 <= marker <= 0xCF and marker not in (0xC4, 0xCC) for marker in segments):
        return None
    height, width = (int.from_bytes(frame[start : start + 2], "big") for start in (1, 3))
    is_usual = frame[0] == 8 and bytes(frame[6::3]) == b"\1\2\3" and tuple(frame[7::3]) in SAMPLINGS
    is_rgb = adobe[:5] == b"Adobe" and adobe[11:12] == b"\0"
    if not is_usual or is_rgb or scan[:1] != b"\3" or not 0 < height * width <= MAX_IMAGE_PIXELS:
        return None
    check_complete(data)
    return DeviceJpeg(data, height, width)


def decode_in_groups(jpegs: Sequence[Tensor], num_pixels: Sequence[int], device: torch.device) -> Iterator[Tensor]:
    """Yield RGB pixels (3, H, W), uint8, on the device; of so many images at once as have MAX_GROUP_PIXELS.

    Args:
        jpegs: files (bytes,), uint8, on the CPU.
        num_pixels: pixels of each image.
        device: where they are decoded; a CPU decodes with libjpeg.

    Raises:
        BrokenImageError: one of them cannot be decoded.
    """
    for group in pixel_groups(num_pixels):
        yield from decode_on(device, [jpegs[i] for i in group])


def pixel_groups(num_pixels: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of images in groups of about MAX_GROUP_PIXELS."""
    ends = list(itertools.accumulate(num_pixels))
    for _, group in itertools.groupby(range(len(ends)), key=lambda i: ends[i] // MAX_GROUP_PIXELS):
        yield list(group)


def decode_on(device: torch.device, jpegs: list[Tensor]) -> list[Tensor]:
    """Decode JPEGs together. Those that the device rejects are decoded on the CPU as by a worker."""
    try:
        if device.type == "cuda":
            # torchvision decodes on a stream of its own, without waiting for what still reads this memory on this one;
            # nvJPEG's hardware decoder would not even wait for an event: it writes when it is called.
            torch.cuda.current_stream(device).synchronize()
        return decode_jpeg(jpegs, ImageReadMode.RGB, device)
    except RuntimeError:
        if len(jpegs) > 1:
            return [pixels for jpeg in jpegs for pixels in decode_on(device, [jpeg])]
        return [decode_fast(jpegs[0].numpy().tobytes()).permute(2, 0, 1).to(device)]


def use_many_queues() -> None:
    """Give the streams of this process hardware queues of their own; to be called before CUDA starts.

    By default a process has eight queues on a GPU. Then some of nvJPEG's streams share one with the training step, and
    their work waits for its CUDA graph. With 32 only a few processes find room on a GPU, so this is for processes that
    decode alone. A value of CUDA_DEVICE_MAX_CONNECTIONS in the environment stays.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(NUM_QUEUES))


def check_support(device: torch.device) -> None:
    """Raise DataError if torchvision cannot decode JPEGs on the device."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    try:
        decode_jpeg([torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)], ImageReadMode.RGB, device)
    except (AttributeError, RuntimeError) as error:
        raise DataError(
            f"DATA.DECODE_ON gpu: torchvision {torchvision.__version__} cannot decode JPEGs on this GPU "
            f"({str(error).splitlines()[0]}); set it to cpu"
        ) from error
