"""A file's content as plain dictionaries and lists, of bounded size."""

from typing import Any

import torch

MAX_ITEMS = 10_000_000  # with shared parts counted as often as they are referred to
MAX_DEPTH = 50


class ContentError(ValueError):
    """A file's content contains itself, or is too deep or too large."""


def plain_content(content: Any) -> Any:
    """Return nested containers as built-in dictionaries, lists and tuples, and all other values as they are.

    A pickle may set attributes of an OrderedDict, such as its `get`, and may refer to one list so often that written
    out it would fill the memory.

    Raises:
        ContentError: it contains itself, is deeper than MAX_DEPTH, or has more than MAX_ITEMS items.
    """
    copies: dict[int, tuple[Any, int]] = {}  # by the id of the original, with its number of items

    def copy(value: Any, depth: int) -> tuple[Any, int]:
        if not isinstance(value, dict | list | tuple) or isinstance(value, torch.Size):
            return value, 1
        if depth > MAX_DEPTH:
            raise ContentError(f"its content is nested more than {MAX_DEPTH} deep, or contains itself")
        if id(value) not in copies:
            # By the type's own methods: an instance's may have been replaced.
            items = dict.values(value) if isinstance(value, dict) else value
            parts = [copy(item, depth + 1) for item in items]
            count = 1 + sum(number for _, number in parts)
            if count > MAX_ITEMS:
                raise ContentError(f"its content, written out, has more than {MAX_ITEMS:,} items")
            values = [part for part, _ in parts]
            if isinstance(value, dict):
                copies[id(value)] = dict(zip(dict.keys(value), values, strict=True)), count
            else:
                copies[id(value)] = (tuple(values) if isinstance(value, tuple) else values), count
        return copies[id(value)]

    return copy(content, 0)[0]
