"""Many strings in two arrays. A list of a million is a million objects, whose reference counts each forked worker
writes to and thereby copies; arrays stay shared.
"""

from collections.abc import Iterable

import numpy as np


class StringTable:
    """An immutable sequence of strings."""

    def __init__(self, strings: Iterable[str]) -> None:
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)
        self.characters = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index > 0 else 0
        return self.characters[start : self.ends[index]].tobytes().decode("utf-8", "surrogateescape")
