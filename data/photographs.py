"""Photographs for benchmarks: scikit-learn's two, in 12 versions, as JPEGs that are typical of ImageNet."""

import io
import statistics
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

SIZE, FILE_BYTES = (500, 375), 72_000
CLASSES = ("even", "odd")


def save_photographs(root: Path, count: int) -> float:
    """Save `count` training and `count` validation images, made of crops of the photographs and their mirror images.

    They are of two classes in turn.

    Returns:
        The mean size of a file in bytes.
    """
    files = []
    for pixels in load_sample_images().images:
        photo = Image.fromarray(pixels)
        for crop in range(3):
            side = photo.height * SIZE[0] // SIZE[1]
            left = (photo.width - side) * crop // 2
            part = photo.crop((left, 0, left + side, photo.height)).resize(SIZE, Image.Resampling.LANCZOS)
            mirrored = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            files += [jpeg_near(FILE_BYTES, part), jpeg_near(FILE_BYTES, mirrored)]
    for split in ("train", "val"):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
        for index in range(count):
            (root / split / CLASSES[index % len(CLASSES)] / f"{index:06}.jpg").write_bytes(files[index % len(files)])
    return statistics.mean(len(file) for file in files)


def jpeg_near(size: int, image: Image.Image) -> bytes:
    """Encode a JPEG with the quality whose size in bytes is nearest to `size`."""
    candidates = []
    for quality in range(75, 99):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        candidates.append(buffer.getvalue())
    return min(candidates, key=lambda data: abs(len(data) - size))
