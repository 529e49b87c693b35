from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from utils.checkpoint.plain_content import MAX_DEPTH, ContentError, plain_content
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint


def nested(depth: int, width: int = 1) -> Any:
    content: Any = {"end": 1}
    for _ in range(depth):
        content = {str(i): content for i in range(width)}
    return content


def test_containers_become_built_in_ones() -> None:
    odd = OrderedDict(a=[1, (2, 3)], size=torch.Size([4]))
    odd.get = None  # type: ignore[method-assign, assignment]
    plain = plain_content({"odd": odd, "again": odd})
    assert plain == {"odd": {"a": [1, (2, 3)], "size": torch.Size([4])}, "again": dict(odd)}
    assert type(plain["odd"]) is dict
    assert plain["odd"].get("a") == [1, (2, 3)]
    assert type(plain["odd"]["size"]) is torch.Size


def test_content_is_bounded() -> None:
    plain_content(nested(MAX_DEPTH - 1))
    with pytest.raises(ContentError, match="deep"):
        plain_content(nested(MAX_DEPTH + 1))
    with pytest.raises(ContentError, match="more than 10,000,000 items"):
        plain_content(nested(26, width=2))  # 26 dictionaries, which unfold to 134 million
    itself: list[Any] = []
    itself.append(itself)
    with pytest.raises(ContentError, match="contains itself"):
        plain_content(itself)


def test_a_file_with_such_content_is_refused_in_one_line(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1)}, "config": nested(26, width=2)}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=r"w\.pth: its content, written out, has more than"):
        load_checkpoint(tmp_path / "w.pth")
