"""timm's augmentation policies on a batch of uint8 images at once, for GPUs.

The random draws are made per image on the host: `RecordedPolicy` runs timm's policy on an object that records the
operations. `augment` applies them on the device, all of one kind together, and augmentation_kernels.py with fewer
launches. Results equal Pillow's, except that a few
values of rotated, sheared and translated images differ by one level of 255 (float32 instead of float64).
"""

import math
import random
from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN
from timm.data.auto_augment import AutoAugment, RandAugment
from torch import Tensor

FILL = [round(255 * mean) for mean in IMAGENET_DEFAULT_MEAN]  # timm's color of pixels from outside the image
SOLARIZE_ADD_BELOW = 128  # timm's threshold
IDENTITY = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
Matrix = tuple[float, ...]  # a to f: the pixel at (x, y) of the result is at (ax + by + c, dx + ey + f) of the image


class Kind(IntEnum):
    """Kinds of operations."""

    INVERT = 0
    POSTERIZE = 1
    SOLARIZE = 2
    SOLARIZE_ADD = 3
    BRIGHTNESS = 4
    AUTO_CONTRAST = 5
    EQUALIZE = 6
    CONTRAST = 7
    COLOR = 8
    SHARPNESS = 9
    BILINEAR = 10  # affine maps
    BICUBIC = 11


class Operation(NamedTuple):
    """One operation on one image, in numbers that a tensor can hold."""

    kind: int
    level: float
    a: float
    b: float
    c: float
    d: float
    e: float
    f: float


class OperationRecorder:
    """Stands in for an image of this size, and records the operations of a policy that transforms it."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.operations: list[Operation] = []


def record(kind: Kind, image: OperationRecorder, level: float = 0.0, **_: Any) -> OperationRecorder:
    """Record an operation that has a level."""
    image.operations.append(Operation(kind, level, *IDENTITY))
    return image


def record_desaturation(image: OperationRecorder, level: float, **_: Any) -> OperationRecorder:
    return record(Kind.COLOR, image, min(1.0, max(0.0, 1.0 - level)))


def record_affine(
    matrix: Callable[..., Matrix],
    image: OperationRecorder,
    amount: float,
    *,
    fillcolor: Any,  # noqa: ARG001
    resample: Image.Resampling | Sequence[Image.Resampling],
) -> OperationRecorder:
    """Record an affine map, after timm's draw of the filter."""
    chosen = resample if isinstance(resample, int) else random.choice(resample)
    kind = Kind.BICUBIC if chosen == Image.Resampling.BICUBIC else Kind.BILINEAR
    image.operations.append(Operation(kind, 0.0, *matrix(amount, *image.size)))
    return image


def rotation(degrees: float, width: int, height: int) -> Matrix:
    """Return the matrix of Pillow's Image.rotate."""
    angle = -math.radians(degrees % 360)
    a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return a, b, a * -x + b * -y + x, -b, a, -b * -x + a * -y + y


RECORDERS: dict[str, Callable[..., OperationRecorder]] = {
    "AutoContrast": partial(record, Kind.AUTO_CONTRAST),
    "Equalize": partial(record, Kind.EQUALIZE),
    "Invert": partial(record, Kind.INVERT),
    "Rotate": partial(record_affine, rotation),
    "SolarizeAdd": partial(record, Kind.SOLARIZE_ADD),
    "Desaturate": record_desaturation,
    "ShearX": partial(record_affine, lambda factor, *_: (1.0, factor, 0.0, 0.0, 1.0, 0.0)),
    "ShearY": partial(record_affine, lambda factor, *_: (1.0, 0.0, 0.0, factor, 1.0, 0.0)),
    "TranslateX": partial(record_affine, lambda pixels, *_: (1.0, 0.0, pixels, 0.0, 1.0, 0.0)),
    "TranslateY": partial(record_affine, lambda pixels, *_: (1.0, 0.0, 0.0, 0.0, 1.0, pixels)),
    "TranslateXRel": partial(record_affine, lambda share, width, _: (1.0, 0.0, share * width, 0.0, 1.0, 0.0)),
    "TranslateYRel": partial(record_affine, lambda share, _, height: (1.0, 0.0, 0.0, 0.0, 1.0, share * height)),
}
RECORDERS |= dict.fromkeys(["Posterize", "PosterizeIncreasing", "PosterizeOriginal"], partial(record, Kind.POSTERIZE))
RECORDERS |= dict.fromkeys(["Solarize", "SolarizeIncreasing"], partial(record, Kind.SOLARIZE))
for kind in (Kind.BRIGHTNESS, Kind.COLOR, Kind.CONTRAST, Kind.SHARPNESS):
    RECORDERS |= dict.fromkeys([kind.name.title(), f"{kind.name.title()}Increasing"], partial(record, kind))


class RecordedPolicy:
    """timm's policy that draws operations without applying them; the draws are timm's, in the same order.

    Args:
        transforms: timm's policy as Pillow transforms, for which `unsupported_reason` is empty; it is modified.
    """

    def __init__(self, transforms: Sequence[Any]) -> None:
        self.transforms = transforms
        for op in operations_of(transforms):
            op.aug_fn = RECORDERS[op.name]

    def __call__(self, width: int, height: int) -> list[Operation]:
        """Draw the operations on an image of this size, in their order."""
        image = OperationRecorder(width, height)
        for transform in self.transforms:
            transform(image)
        return image.operations


def operations_of(transforms: Sequence[Any]) -> list[Any]:
    """Return timm's AugmentOps of a policy."""
    policies = [getattr(transform, "policy", None) or [getattr(transform, "ops", [])] for transform in transforms]
    return [op for policy in policies for ops in policy for op in ops]


def unsupported_reason(transforms: Sequence[Any]) -> str:
    """Return why a policy cannot be applied to a batch, or an empty string."""
    for transform in transforms:
        if type(transform) not in (RandAugment, AutoAugment):
            return f"{type(transform).__name__} is not supported"
    unknown = sorted({op.name for op in operations_of(transforms)} - set(RECORDERS))
    return f"{unknown[0]} is not supported" if unknown else ""


def augment(images: Tensor, operations: Tensor) -> Tensor:
    """Apply operations to a batch, in place.

    Args:
        images: pixels (B, H, W, 3), uint8, on any device.
        operations: rows (O, 10), float64, on the CPU: the image's index, the operation's place in that image's order,
            and the fields of an Operation.
    """
    places = operations[:, 1]
    for place in range(int(places.max()) + 1 if len(operations) else 0):
        here = operations[places == place]
        for kinds, apply in APPLY.items():
            rows = here[torch.isin(here[:, 2], torch.tensor(kinds, dtype=here.dtype))]
            if len(rows):
                index = rows[:, 0].long().to(images.device, non_blocking=True)
                images.index_copy_(0, index, apply(images[index], rows[:, 2:]))
    return images


def look_up_values(images: Tensor, rows: Tensor) -> Tensor:
    """Apply operations that depend on the value alone."""
    kinds, levels = rows[:, :1], rows[:, 1:2].float()  # (N, 1)
    values = torch.arange(256.0).expand(len(rows), 256)
    step = 2 ** (8 - levels).clamp(0, 8)  # a level counts bits; timm's strongest keeps none
    results = {
        Kind.INVERT: 255 - values,
        Kind.POSTERIZE: (values / step).floor() * step,
        Kind.SOLARIZE: torch.where(values < levels, values, 255 - values),
        Kind.SOLARIZE_ADD: torch.where(values < SOLARIZE_ADD_BELOW, values + levels, values),
        Kind.BRIGHTNESS: levels * values,
    }
    for kind, result in results.items():
        values = torch.where(kinds == kind, result, values)
    tables = to_uint8(values)[:, None].expand(-1, 3, -1)  # (N, 3, 256)
    return look_up(images, tables.to(images.device, non_blocking=True))


def auto_contrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel's values to 0..255."""
    low, high = (x[..., None] for x in images.flatten(1, 2).aminmax(dim=1))  # (N, 3, 1)
    low, high = low.double(), high.double()
    scale = torch.full_like(low, 255) / (high - low)  # 255 / x would be 255 * (1 / x), which rounds differently
    values = torch.arange(256.0, dtype=torch.float64, device=images.device)
    stretched = values * scale - low * scale
    return look_up(images, to_uint8(torch.where(high > low, stretched, values)))


def equalize(images: Tensor, _: Tensor) -> Tensor:
    """Make the histogram of each channel uniform."""
    counts = torch.zeros(len(images), 3 * 256, dtype=torch.int64, device=images.device)
    index = table_index(images)
    counts = counts.scatter_add_(1, index, torch.ones_like(index)).view(-1, 3, 256)  # (N, 3, 256)
    below = counts.cumsum(-1) - counts
    last = images.flatten(1, 2).amax(dim=1).long()  # (N, 3)
    step = below.gather(-1, last[..., None]) // 255  # (N, 3, 1)
    values = torch.arange(256, device=images.device)
    spread = (below + step // 2) // step.clamp(min=1)
    return look_up(images, to_uint8(torch.where(step > 0, spread, values)))


def change_contrast(images: Tensor, rows: Tensor) -> Tensor:
    """Blend images with their mean gray."""
    count = images[0, ..., 0].numel()
    total = gray(images).sum((1, 2, 3), keepdim=True)  # (N, 1, 1, 1)
    return blend((2 * total + count) // (2 * count), images, rows)


def change_color(images: Tensor, rows: Tensor) -> Tensor:
    """Blend images with their gray versions."""
    return blend(gray(images), images, rows)


def change_sharpness(images: Tensor, rows: Tensor) -> Tensor:
    """Blend images with versions smoothed by Pillow's ImageFilter.SMOOTH, which leaves the border as it is."""
    rows_sum = images[:, :-2].int() + images[:, 1:-1] + images[:, 2:]
    total = rows_sum[:, :, :-2] + rows_sum[:, :, 1:-1] + rows_sum[:, :, 2:] + 4 * images[:, 1:-1, 1:-1].int()
    smooth = images.clone()
    smooth[:, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return blend(smooth, images, rows)


def bilinear(images: Tensor, rows: Tensor) -> Tensor:
    """Apply affine maps with bilinear interpolation."""
    return transform_affine(images, rows, range(2), lambda taps, t: taps[0] + t * (taps[1] - taps[0]))


def bicubic(images: Tensor, rows: Tensor) -> Tensor:
    """Apply affine maps with bicubic interpolation."""
    return transform_affine(images, rows, range(-1, 3), interpolate_cubic)


APPLY: dict[tuple[Kind, ...], Callable[[Tensor, Tensor], Tensor]] = {
    (Kind.INVERT, Kind.POSTERIZE, Kind.SOLARIZE, Kind.SOLARIZE_ADD, Kind.BRIGHTNESS): look_up_values,
    (Kind.AUTO_CONTRAST,): auto_contrast,
    (Kind.EQUALIZE,): equalize,
    (Kind.CONTRAST,): change_contrast,
    (Kind.COLOR,): change_color,
    (Kind.SHARPNESS,): change_sharpness,
    (Kind.BILINEAR,): bilinear,
    (Kind.BICUBIC,): bicubic,
}


def to_uint8(values: Tensor) -> Tensor:
    """Clip and truncate, as Pillow does."""
    return values.clamp(0, 255).to(torch.uint8)


def table_index(images: Tensor) -> Tensor:
    """Return the index (N, H * W * 3) of each value in a flat table of three channels by 256 values."""
    return (images.long() + 256 * torch.arange(3, device=images.device)).flatten(1)


def look_up(images: Tensor, tables: Tensor) -> Tensor:
    """Replace each value by its entry in a table (N, 3, 256), uint8."""
    return tables.reshape(len(images), -1).gather(1, table_index(images)).view_as(images)


def gray(images: Tensor) -> Tensor:
    """Convert images to luma (N, H, W, 1), int32, as Pillow does."""
    red, green, blue = images.int().split(1, dim=-1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def blend(first: Tensor, second: Tensor, rows: Tensor) -> Tensor:
    """Return first + level * (second - first), as Pillow does."""
    levels = rows[:, 1].float().to(second.device, non_blocking=True)[:, None, None, None]
    return to_uint8(first.float() + levels * (second.float() - first.float()))


def transform_affine(
    images: Tensor, rows: Tensor, taps: range, interpolate: Callable[[list[Tensor], Tensor], Tensor]
) -> Tensor:
    """Apply affine maps as Pillow's Image.transform does; pixels from outside get the color FILL.

    Args:
        images: pixels (N, H, W, 3), uint8.
        rows: operations (N, 8).
        taps: neighbors of a position along one axis, relative to the pixel to its left or above.
        interpolate: function of the values at the taps (N, H, W, 3) and the fraction (N, H, W, 1).
    """
    height, width = images.shape[1:3]
    a, b, c, d, e, f = rows[:, 2:].to(images.device, non_blocking=True).T[..., None, None]  # (N, 1, 1)
    x = torch.arange(width, dtype=torch.float64, device=images.device) + 0.5  # (W,)
    y = (torch.arange(height, dtype=torch.float64, device=images.device) + 0.5)[:, None]  # (H, 1)
    u, v = a * x + b * y + c, d * x + e * y + f  # (N, H, W)
    is_inside = (u >= 0) & (u < width) & (v >= 0) & (v < height)
    left, top = (u - 0.5).floor(), (v - 0.5).floor()
    s, t = ((u - 0.5 - left).float()[..., None], (v - 0.5 - top).float()[..., None])  # (N, H, W, 1)
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    columns = [(left.long() + tap).clamp(0, width - 1) for tap in taps]
    lines = []
    for tap in taps:
        row = (top.long() + tap).clamp(0, height - 1)
        lines.append(interpolate([images[batch, row, column].float() for column in columns], s))
    fill = torch.tensor(FILL, dtype=torch.uint8, device=images.device)
    return torch.where(is_inside[..., None], to_uint8(interpolate(lines, t)), fill)


def interpolate_cubic(taps: list[Tensor], t: Tensor) -> Tensor:
    """Interpolate with Pillow's cubic kernel of affine maps, a = -1, in Horner's form: exact where taps are equal."""
    p, q, r, s = taps
    return q + t * (r - p + t * (2 * (p - q) + r - s + t * (q - p + s - r)))
