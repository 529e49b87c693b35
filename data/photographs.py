"""Photographs for benchmarks: scikit-learn's two, in 12 versions, as JPEGs that are typical of ImageNet."""

import io
import os
import statistics
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_sample_images

SIZE, FILE_BYTES = (500, 375), 72_000
CLASSES = ("even", "odd")


def save_photographs(root: Path, num_train: int, num_val: int | None = None) -> float:
    """Save training images, and as many or `num_val` validation images: crops of the photographs and mirror images.

    They are of two classes in turn. From the second on, equal files are hard links.

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
    for split, count in (("train", num_train), ("val", num_train if num_val is None else num_val)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
        paths = [root / split / CLASSES[i % len(CLASSES)] / f"{i:06}.jpg" for i in range(count)]
        for i, path in enumerate(paths):
            if i < len(files):
                path.write_bytes(files[i])
            else:
                os.link(paths[i % len(files)], path)
    return statistics.mean(len(file) for file in files)


def jpeg_near(size: int, image: Image.Image) -> bytes:
    """Encode a JPEG with the quality whose size in bytes is nearest to `size`."""
    candidates = []
    for quality in range(75, 99):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        candidates.append(buffer.getvalue())
    return min(candidates, key=lambda data: abs(len(data) - size))
