"""Many strings in two arrays, whose memory forked workers share.

Workers would soon copy a list of a million strings: reading a Python object writes its reference count.
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
