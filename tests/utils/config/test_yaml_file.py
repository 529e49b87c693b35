import pytest

from utils.config.errors import ConfigError
from utils.config.yaml_file import parse_yaml


def nested_aliases(depth: int) -> str:
    lines = ["a0: &a0 {K: 1, L: 2}"]
    lines += [f"a{i}: &a{i} {{K: *a{i - 1}, L: *a{i - 1}}}" for i in range(1, depth)]
    return "\n".join(lines)


def test_aliases() -> None:
    assert parse_yaml("A: &a {B: 1}\nC: *a", "x.yaml") == {"A.B": 1, "C.B": 1}
    assert len(parse_yaml(nested_aliases(5), "x.yaml")) == 2 + 4 + 8 + 16 + 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (nested_aliases(40), "has, with its aliases written out, over 100,000 values"),
        ("A: &a {B: *a}", "line 1 contains itself by an alias"),
        ("A: &a [1, *a]", "line 1 contains itself by an alias"),
    ],
)
def test_aliases_without_end_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"x.yaml: not a YAML file: .*{message}"):
        parse_yaml(text, "x.yaml")
