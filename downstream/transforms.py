"""Image sizes as detection and segmentation both compute them."""

Size = tuple[int, int]  # height, width


def fitting_size(size: Size, *, short: int, long: int) -> Size:
    """Return the largest size of the same proportions with sides of at most `short` and `long`."""
    scale = min(long / max(size), short / min(size))
    return max(1, int(size[0] * scale + 0.5)), max(1, int(size[1] * scale + 0.5))
