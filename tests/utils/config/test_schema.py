import pytest

from utils.config.errors import ConfigError
from utils.config.schema import ANY, YES_NO, Key, Section, at_least, checked, one_of


@pytest.fixture
def tree() -> Section:
    tree = Section()
    tree.SEED = Key(0, help="seed")
    tree.MODEL = Section()
    tree.MODEL.NAME = Key("", help="name")
    tree.MODEL.HEAD = Section()
    tree.MODEL.HEAD.WIDTHS = Key([1, 2], at_least(1), help="widths")
    tree.MODEL.HEAD.BIAS = Key(True, help="bias")
    return tree


def test_type_and_rule_follow_from_the_default() -> None:
    flag, text, numbers = Key(True, help="flag"), Key("", help="text"), Key([0.5], help="numbers")
    assert (flag.type, flag.rule) == (bool, YES_NO)
    assert (text.type, text.rule, text.is_list) == (str, ANY, False)
    assert (numbers.type, numbers.is_list) == (float, True)
    assert Key(None, help="unset", type=bool, optional=True).rule == YES_NO


def test_flatten_keeps_the_order(tree: Section) -> None:
    assert list(tree.flatten()) == ["SEED", "MODEL.NAME", "MODEL.HEAD.WIDTHS", "MODEL.HEAD.BIAS"]


def test_a_value_changes_the_default_of_a_clone_alone(tree: Section) -> None:
    clone = tree.clone()
    clone.MODEL.HEAD.WIDTHS = [3]
    clone.MODEL.DEPTH = Key(4, help="depth")
    before, after = tree.flatten(), clone.flatten()
    assert before["MODEL.HEAD.WIDTHS"].default == [1, 2]
    assert after["MODEL.HEAD.WIDTHS"].default == [3]
    assert after["MODEL.HEAD.WIDTHS"].rule == before["MODEL.HEAD.WIDTHS"].rule
    assert set(after) - set(before) == {"MODEL.DEPTH"}


def test_subset(tree: Section) -> None:
    assert list(tree.subset("MODEL.HEAD", "SEED").flatten()) == ["MODEL.HEAD.WIDTHS", "MODEL.HEAD.BIAS", "SEED"]
    for name in ("MODEL.NAMES", "MODLE", "MODLE.NAME"):
        with pytest.raises(AttributeError, match="no key or section"):
            tree.subset(name)


def test_a_value_needs_a_key_that_exists(tree: Section) -> None:
    with pytest.raises(AttributeError, match="no key or section NAMES; there are NAME, HEAD"):
        tree.MODEL.NAMES = "x"


def test_names_of_a_fixed_set_may_be_in_capitals() -> None:
    schema = {"NAME": Key("sgd", one_of("sgd", "adamw"), help="name"), "PATH": Key("", help="path")}
    assert checked(schema, "NAME", "AdamW", "x") == "adamw"
    assert checked(schema, "PATH", "Data", "x") == "Data"
    with pytest.raises(ConfigError, match=r"NAME 'Adam' .*: must be one of sgd, adamw"):
        checked(schema, "NAME", "Adam", "x")
