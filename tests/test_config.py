import re
from pathlib import Path
from typing import Any

import pytest

from config import SCHEMA, load_config
from utils.config.errors import ConfigError

EMPTY_VALUES = {"5": "5", "0": "0", "false": "False", "''": "''", "[]": r"\[\]"}


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_later_sources_win(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "TRAIN: {EPOCHS: 100, BASE_LR: 1e-3}\nTAG: base\nSEED: 5\n")
    path = write(tmp_path, "run.yaml", "BASE: [base.yaml]\nTRAIN:\n  EPOCHS: 50\nTAG: file\n")
    config = load_config(path, ["TAG", "opts", "DATA.BATCH_SIZE", "64"], {"DATA.BATCH_SIZE": 32})
    assert config.TRAIN.BASE_LR == 1e-3  # PyYAML alone would read this as text
    assert config.SEED == 5
    assert config.TRAIN.EPOCHS == 50
    assert config.TAG == "opts"
    assert config.DATA.BATCH_SIZE == 32
    assert config.TRAIN.WEIGHT_DECAY == 0.05


ROPE = ["MODEL.LINEAR_VIT.ROPE", "True", "MODEL.LINEAR_VIT.SINGLE_HEAD", "True"]


@pytest.mark.parametrize("name", ["mlla_t", "mlla_s", "mlla_b", "digits"])
def test_dump_can_be_used_again(tmp_path: Path, name: str) -> None:
    config = load_config(f"cfgs/{name}.yaml", ["AUG.CUTMIX_MINMAX", "[0.2, 0.8]", "TAG", "12"])
    for source in (write(tmp_path, "config.yaml", config.dump()), config.dump()):
        again = load_config(source)
        assert again == config
        assert again.TAG == "12"


def test_text_names_no_base_files() -> None:
    with pytest.raises(ConfigError, match="only a configuration file") as caught:
        load_config("BASE: [cfgs/mlla_t.yaml]\nTAG: x\n")
    assert caught.value.key == "BASE"


def test_opts_and_flags_override_text() -> None:
    config = load_config("TAG: text\nSEED: 5\n", ["TAG", "opts"], {"DATA.BATCH_SIZE": 32})
    assert (config.TAG, config.SEED, config.DATA.BATCH_SIZE) == ("opts", 5, 32)


def test_dump_of_a_measurement_can_be_used_again(tmp_path: Path) -> None:
    """The BENCHMARK keys stay in the file and do not block other modes."""
    flags = {"THROUGHPUT_MODE": True, "BENCHMARK.TRAIN": True, "BENCHMARK.SIZES": "32"}
    path = write(tmp_path, "config.yaml", load_config("cfgs/digits.yaml", flags=flags).dump())
    assert load_config(path, flags={"THROUGHPUT_MODE": False}).BENCHMARK.TRAIN
    assert not load_config(path, flags={"THROUGHPUT_MODE": False, "BENCHMARK.TRAIN": False}).BENCHMARK.TRAIN


def test_shipped_values() -> None:
    t, s, b = (load_config(f"cfgs/mlla_{size}.yaml") for size in "tsb")
    assert [c.AUG.MESA for c in (t, s, b)] == [1.0, 1.5, 2.0]
    assert [c.MODEL.DROP_PATH_RATE for c in (t, s, b)] == [0.2, 0.3, 0.5]
    assert [c.DATA.BATCH_SIZE for c in (t, s, b)] == [128, 64, 64]
    assert [c.MODEL.MLLA.DEPTHS for c in (t, s, b)] == [[2, 4, 8, 4], [3, 6, 21, 6], [3, 6, 21, 6]]
    assert [c.MODEL.MLLA.NUM_HEADS for c in (t, s, b)] == [[2, 4, 8, 16], [2, 4, 8, 16], [3, 6, 12, 24]]
    assert all(c.TRAIN.EPOCHS == 300 and c.TRAIN.WARMUP_EPOCHS == 20 and c.EMA.ENABLED for c in (t, s, b))


OFFICIAL_DEFAULTS = {
    "MODEL": {"NUM_CLASSES": 1000, "LABEL_SMOOTHING": 0.1, "DROP_RATE": 0.0},
    "MODEL.MLLA": {"PATCH_SIZE": 4, "IN_CHANS": 3, "EMBED_DIM": 96, "DEPTHS": [2, 2, 6, 2], "NUM_HEADS": [3, 6, 12, 24]}
    | {"MLP_RATIO": 4.0, "QKV_BIAS": True, "APE": False},
    "DATA": {"DATA_PATH": "", "IMG_SIZE": 224, "INTERPOLATION": "bicubic"},
    "TRAIN": {"EPOCHS": 300, "WARMUP_EPOCHS": 20, "WEIGHT_DECAY": 0.05, "CLIP_GRAD": 5.0, "USE_CHECKPOINT": False}
    | {"BASE_LR": 5e-4, "WARMUP_LR": 5e-7, "MIN_LR": 5e-6, "AUTO_RESUME": True},
    "TRAIN.LR_SCHEDULER": {"NAME": "cosine"},
    "TRAIN.OPTIMIZER": {"NAME": "adamw", "EPS": 1e-8, "BETAS": [0.9, 0.999]},
    "AUG": {"COLOR_JITTER": 0.4, "AUTO_AUGMENT": "rand-m9-mstd0.5-inc1", "REPROB": 0.25, "REMODE": "pixel"}
    | {"RECOUNT": 1, "MIXUP": 0.8, "CUTMIX": 1.0, "CUTMIX_MINMAX": None, "MIXUP_PROB": 1.0, "MIXUP_SWITCH_PROB": 0.5}
    | {"MIXUP_MODE": "batch", "MESA": 1.0},
    "TEST": {"CROP": True},
    "": {"OUTPUT": "", "PRINT_FREQ": 100},
}


def test_defaults_are_the_official_ones_or_listed() -> None:
    defaults = {
        f"{section}.{name}".strip("."): value
        for section, values in OFFICIAL_DEFAULTS.items()
        for name, value in values.items()
    }
    different = {
        (name, repr(SCHEMA[name].default), repr(value))
        for name, value in defaults.items()
        if SCHEMA[name].default != value
    }
    listed = re.findall(
        r"^- `([A-Z_.]+)` is `(.+?)`, officially `(.+?)`:", Path("cfgs/README.md").read_text(), re.MULTILINE
    )
    assert set(listed) == different


def test_frozen() -> None:
    config = load_config("cfgs/mlla_t.yaml")
    with pytest.raises(AttributeError):
        config.TRAIN.BASE_LR = 1.0


def test_lists_are_not_shared() -> None:
    load_config("cfgs/mlla_t.yaml").TRAIN.OPTIMIZER.BETAS.append(1.0)
    assert SCHEMA["TRAIN.OPTIMIZER.BETAS"].default == [0.9, 0.999]


@pytest.mark.parametrize(
    ("opts", "key", "message"),
    [
        (["TRAIN.BASE_LRR", "1"], "TRAIN.BASE_LRR", r"\(in --opts\): unknown key; did you mean TRAIN.BASE_LR\?"),
        (["BATCH_SIZE", "1"], "BATCH_SIZE", r"did you mean DATA.BATCH_SIZE\?"),
        (["MODEL.SWIN.EMBED_DIM", "96"], "MODEL.SWIN.EMBED_DIM", r"did you mean MODEL.MLLA.EMBED_DIM\?"),
        (["TRAIN.BASE_LR", "fast"], "TRAIN.BASE_LR", r"'fast' \(in --opts\): must be of type float"),
        (["TRAIN.BASE_LR", "nan"], "TRAIN.BASE_LR", "must be of type float"),
        (["AMP", "1"], "AMP", "AMP 1 .*: must be of type bool"),
        (["TRAIN.EPOCHS", "True"], "TRAIN.EPOCHS", "must be of type int"),
        (["TRAIN.EPOCHS", "2.5"], "TRAIN.EPOCHS", "must be of type int"),
        (["TRAIN.EPOCHS", "["], "TRAIN.EPOCHS", "must be of type int"),
        (["TRAIN.EPOCHS", "{[]: 1}"], "TRAIN.EPOCHS", "must be of type int"),
        (["MODEL.MLLA.DEPTHS", "4"], "MODEL.MLLA.DEPTHS", "must be a list of int"),
        (["MODEL.MLLA.DEPTHS", "[]"], "MODEL.MLLA.DEPTHS", "must be a list of int"),
        (["TRAIN.EPOCHS", "0"], "TRAIN.EPOCHS", r"0 \(in --opts\): must be from 1 to 1000000"),
        (["MODEL.LABEL_SMOOTHING", "1.5"], "MODEL.LABEL_SMOOTHING", "must be from 0 to 1"),
        (["MODEL.LAYER_DECAY", "0"], "MODEL.LAYER_DECAY", "must be above 0, at most 1"),
        (["TRAIN.OPTIMIZER.BETAS", "[0.9, 1.0]"], "TRAIN.OPTIMIZER.BETAS", "at least 0 and below 1"),
        (["TRAIN.OPTIMIZER.BETAS", "[0.9]"], "TRAIN.OPTIMIZER.BETAS", "two values"),
        (["DATA.DATASET", "cifar"], "DATA.DATASET", "must be imagenet, .*, hfds/<.*> or wds/<folder>"),
        (["AUG.AUTO_AUGMENT", "randm9"], "AUG.AUTO_AUGMENT", "must be none, rand-"),
        (["MODEL.LINEAR_VIT.BLOCK", "mamba"], "MODEL.LINEAR_VIT.BLOCK", "must be one of transformer, sub, all"),
        (["MODEL.MLLA.NUM_HEADS", "[3, 4, 8, 16]"], "MODEL.MLLA.NUM_HEADS", "stage 0 is 64 wide: its 3 heads and 4"),
        (["MODEL.MLLA.NUM_HEADS", "[2, 4]"], "MODEL.MLLA.NUM_HEADS", "must be as many as MODEL.MLLA.DEPTHS"),
        (
            ["MODEL.LINEAR_VIT.NUM_HEADS", "[5, 6, 12, 24]"],
            "MODEL.LINEAR_VIT.NUM_HEADS",
            "stage 0 is 96 wide: its 5 heads and 4 must divide that",
        ),
        (
            [*ROPE, "MODEL.LINEAR_VIT.EMBED_DIM", "36", "MODEL.LINEAR_VIT.NUM_HEADS", "[6, 6, 6, 6]"],
            "MODEL.LINEAR_VIT.NUM_HEADS",
            "stage 0: a single head is 6 wide",
        ),
        (["MODEL.LINEAR_VIT.DEPTHS", "[2]"], "MODEL.LINEAR_VIT.NUM_HEADS", "must be as many as"),
        (["MODEL.LINEAR_VIT.IN_CHANS", "4"], "MODEL.LINEAR_VIT.IN_CHANS", "4: images are read as RGB"),
        (["TRAIN.WARMUP_EPOCHS", "300"], "TRAIN.WARMUP_EPOCHS", "must be below TRAIN.EPOCHS"),
        (["TRAIN.START_EPOCH", "300"], "TRAIN.START_EPOCH", "must be below the number of epochs, 300"),
        (["TRAIN.MIN_LR", "1.0"], "TRAIN.MIN_LR", "must not be above TRAIN.BASE_LR"),
        (["TRAIN.FREEZE", "True"], "TRAIN.FREEZE", "needs weights; name some with --pretrained"),
        (["DATA.BATCH_SIZE", "7"], "DATA.BATCH_SIZE", "must be even with mixup"),
        (
            ["AUG.MIXUP", "0", "AUG.CUTMIX", "0", "AUG.CUTMIX_MINMAX", "[0.2, 0.8]", "DATA.BATCH_SIZE", "7"],
            "DATA.BATCH_SIZE",
            "must be even",
        ),
        (["AUG.CUTMIX_MINMAX", "[0.5, 0.5]"], "AUG.CUTMIX_MINMAX", "differ by a pixel"),
        (["AUG.SCALE", "[1.0, 0.1]"], "AUG.SCALE", "smaller value first"),
        (["AUG.SCALE", "[0.5]"], "AUG.SCALE", "two values"),
        (["EMA.FORCE_CPU", "True"], "EMA.FORCE_CPU", "MESA runs the EMA model"),
        (
            ["DATA.ZIP_MODE", "True", "DATA.DATASET", "digits"],
            "DATA.ZIP_MODE",
            "digits, which comes without archives",
        ),
        (["DATA.CLASSES", "['1']"], "DATA.CLASSES", "works with DATA.DATASET digits, not imagenet"),
        (
            ["BENCHMARK.TRAIN", "True", "BENCHMARK.LOADING", "8", "THROUGHPUT_MODE", "True"],
            "BENCHMARK.TRAIN",
            "leave out --train",
        ),
        (["BENCHMARK.TRAIN", "True"], "BENCHMARK.TRAIN", "add --throughput"),
        (["DATA.GPU_DECODE_SHARE", "0.5"], "DATA.GPU_DECODE_SHARE", "set DATA.DECODE_ON gpu too"),
        (["EVAL_EMA", "False"], "EVAL_EMA", "--ema and --no-ema choose the weights that --eval evaluates; add --eval"),
        (["BASE", "['other.yaml']"], "BASE", "only a configuration file"),
        (["TAG"], None, "pairs of KEY VALUE"),
    ],
)
def test_wrong_settings(opts: list[str], key: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("cfgs/mlla_t.yaml", opts)
    assert caught.value.key == key
    assert str(caught.value).startswith(key or "--opts")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        *((f"TRAIN: {value}", f"TRAIN {shown} .*: is a section") for value, shown in EMPTY_VALUES.items()),
        ("TRAIN.EPOCHS: 300\nTRAIN: {EPOCHS: 40}", r"TRAIN\.EPOCHS .*stands twice, with a dot and within its section"),
        ("TRAIN: {EPOCHS: !!int abc}", "line 1: abc is no int"),
        ("TRAIN: {BASE_LR: !!float abc}", "line 1: abc is no float"),
        ("A: " + "9" * 5000, "line 1: 9{80} is no int"),
        ("TAG: " + "[" * 500, "nested too deeply"),
        ("A: 1\n" * 200_001, "has 1,000,00. characters"),
        ("a: [", "not a YAML file"),
        ("AMP: !!bool abc", "not a YAML file: line 1: abc is no bool"),
        ("\nTAG: !!timestamp abc", "not a YAML file: line 2: abc is no timestamp"),
        (f"TRAIN: {{BASE_LR: 1{'0' * 400}}}", r"TRAIN\.BASE_LR 1000.*: must be of type float"),
        ('TAG: "a\\0b"', "TAG .*: must not hold a NUL"),
        ("- 1", "must hold 'KEY: value' lines"),
        ("TRAIN: {EPOCHS: 3}\nTRAIN: {}", "TRAIN stands twice"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    path = write(tmp_path, "bad.yaml", text)
    for source in (path, f"{text}\n"):
        with pytest.raises(ConfigError, match=message) as caught:
            load_config(source)
        assert "\n" not in str(caught.value)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", deny)
    with pytest.raises(ConfigError, match=r"run.yaml: cannot be read: Permission denied"):
        load_config(write(tmp_path, "run.yaml", ""))
    monkeypatch.undo()
    (tmp_path / "run.yaml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"run.yaml: cannot be read: .*can't decode byte 0xff"):
        load_config(tmp_path / "run.yaml")


def test_unquoted_off_no_and_on_are_text(tmp_path: Path) -> None:
    text = "TEST: {COMPILE: off}\nDATA: {CACHE_MODE: no}\nEMA: {WARMUP: on}\n"
    config = load_config(write(tmp_path, "off.yaml", text))
    assert (config.TEST.COMPILE, config.DATA.CACHE_MODE, config.EMA.WARMUP) == ("off", "no", "on")
    for text in ("yes", "no", "off", "2024-13-45"):
        assert text == load_config(write(tmp_path, "tag.yaml", f"TAG: {text}\nAMP: yes\n")).TAG
    assert load_config(write(tmp_path, "amp.yaml", "AMP: yes\n")).AMP
    with pytest.raises(ConfigError, match=r"TAG True .*: must be of type str, in quotes"):
        load_config(write(tmp_path, "tag.yaml", "TAG: true\n"))


def test_empty_sections_keep_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "empty.yaml", "TRAIN:\nMODEL: {MLLA: }\n")).TRAIN.EPOCHS == 300
    assert load_config(write(tmp_path, "nothing.yaml", "")).TRAIN.EPOCHS == 300


@pytest.mark.parametrize("mode", ["EVAL_MODE", "THROUGHPUT_MODE", "PROFILE_MODE"])
def test_training_checks_do_not_run_in_other_modes(mode: str) -> None:
    assert load_config("cfgs/mlla_t.yaml", ["DATA.BATCH_SIZE", "1", "EMA.FORCE_CPU", "True", mode, "True"])[mode]


def test_configurations_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlla_t").mkdir()  # a folder is no configuration
    for name in ("mlla_s", "mlla_s.yaml", "cfgs/mlla_s.yaml"):
        assert load_config(name).MODEL.NAME == "mlla_small"
    assert load_config("ablation/forget_gate").MODEL.LINEAR_VIT.FORGET_GATE
    assert load_config(write(tmp_path, "own.yaml", "BASE: [mlla_t]\nSEED: 5\n")).MODEL.NAME == "mlla_tiny"
    write(tmp_path, "mlla_s.yaml", "MODEL: {NAME: mine}\n")  # the user's own file wins
    assert load_config("mlla_s").MODEL.NAME == load_config("mlla_s.yaml").MODEL.NAME == "mine"
    with pytest.raises(ConfigError, match=r"^mlla_x: no such configuration file; the project's own are .*mlla_t"):
        load_config("mlla_x")


def test_sizes_that_leave_nothing_or_too_much() -> None:
    for opts, message in (
        (["MODEL.TYPE", "linear_vit", "MODEL.LINEAR_VIT.PATCH_SIZE", "225"], "must not be above DATA.IMG_SIZE"),
        (["MODEL.MLLA.MLP_RATIO", "0.001"], "leaves the MLP no channels"),
        (["MODEL.MLLA.EMBED_DIM", "4096"], "the last stage would be 32768 wide; must be at most 16384"),
        (["MODEL.MLLA.DEPTHS", "[1, 1, 1, 1, 1, 1, 1, 1, 1]"], "must have at most 8 stages"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config("cfgs/mlla_t.yaml", opts)


def test_several_modes_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"PROFILE_MODE True: only one mode at a time, and EVAL_MODE \(--eval\) is on"
    ):
        load_config("cfgs/mlla_t.yaml", flags={"EVAL_MODE": True, "PROFILE_MODE": True})


@pytest.mark.parametrize("value", ["../../x", "/x", "a/../../x", ".", ""])
@pytest.mark.parametrize("key", ["TAG", "MODEL.NAME"])
def test_results_stay_within_the_output_folder(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="must be a path within OUTPUT"):
        load_config("cfgs/mlla_t.yaml", [key, value])
    assert load_config("cfgs/mlla_t.yaml", ["TAG", "sweep/lr..1"]).TAG == "sweep/lr..1"


def test_base_files_named_again_and_again(tmp_path: Path) -> None:
    for i in range(30):
        write(tmp_path, f"{i}.yaml", f"BASE: [{i + 1}.yaml, {i + 1}.yaml]")
    write(tmp_path, "30.yaml", "TAG: x")
    with pytest.raises(ConfigError, match="BASE names over 100 files, or some many times"):
        load_config(tmp_path / "0.yaml")


def test_missing_and_circular_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")
    write(tmp_path, "a.yaml", "BASE: [b.yaml]")
    with pytest.raises(ConfigError, match="circle"):
        load_config(write(tmp_path, "b.yaml", "BASE: [a.yaml]"))


def test_every_key_has_a_help_text_of_its_own() -> None:
    helps = [key.help for key in SCHEMA.values()]
    assert all(helps)
    assert len(set(helps)) == len(helps)


def test_readme_lists_every_key() -> None:
    rows = [f"| `{name}` | `{key.default!r}` | {key.rule.text} | {key.help} |" for name, key in SCHEMA.items()]
    listed = re.findall(r"^\| `[A-Z_.]+` \| .*$", Path("cfgs/README.md").read_text(), flags=re.MULTILINE)
    assert listed == rows


def test_a_number_or_a_word() -> None:
    """DATA.NUM_WORKERS is auto, or a number."""

    def workers(value: str) -> object:
        return load_config("cfgs/mlla_t.yaml", ["DATA.NUM_WORKERS", value]).DATA.NUM_WORKERS

    assert [workers(value) for value in ("auto", "AUTO", "0", "12")] == ["auto", "auto", 0, 12]
    assert load_config("BASE: ['']\nDATA: {NUM_WORKERS: auto}\n").DATA.NUM_WORKERS == "auto"
    for value, allowed in (("many", "of type int or auto"), ("-1", "auto or from 0 to 1024")):
        with pytest.raises(ConfigError, match=rf"^DATA\.NUM_WORKERS .*{value}.*: must be {allowed}"):
            workers(value)
