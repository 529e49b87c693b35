"""Convert weights: python -m utils.convert IN OUT --to {official,ours,safetensors,timm} [--ema] [--size H W] [--force]

IN is what --resume and --pretrained take: a path, a URL, or mlla-t, mlla-s, mlla-b. OUT holds the weights, bit for bit,
and the names of the classes and the configuration where IN has them; not what only a resumed run needs.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from models.rope import rotary_tables
from utils.checkpoint.weights import DERIVED_KEY_SUFFIX, Weights, classes_in, no_weights_error, weights_in
from utils.checkpoint.weights_file import load_checkpoint
from utils.config.command_line import Parser, report_user_errors
from utils.logs.atomic_write import write_atomic

TOTAL_STRIDE = 32  # of the official classifier: its token grids come out even for multiples of it only
DEFAULT_SIZE = (224, 224)
ATTENTION = re.compile(r"layers\.(\d+)\.blocks\.\d+\.attn\.qk\.weight")


class ConversionError(ValueError):
    """A conversion that cannot be made: one line with what is wrong and the remedy."""


def convert(source: str, target: Path, *, form: str, ema: bool = False, size: tuple[int, int] | None = None) -> str:
    """Read weights of any kind and write them in another form, whole or not at all.

    Args:
        source: a path, a URL, or the name of released weights.
        target: the file to write; an existing one is replaced.
        form: a key of `FORMS`.
        ema: write the average's weights alone, as if they were the model's.
        size: height and width in pixels for which the official form's rotary tables are made; without it those of the
            tables in the file, else DATA.IMG_SIZE of its configuration, else 224x224.

    Returns:
        One line that says what was written.

    Raises:
        ConversionError: no average in the file, or a size that the official code cannot have.
        CheckpointError, DownloadError: the source cannot be read.
        OSError: the target cannot be written.
    """
    content = load_checkpoint(source)
    model, average = weights_in(content, "model"), weights_in(content, "state_dict_ema")
    if model is None and average is None:
        raise no_weights_error(source, content)
    if ema and average is None:
        raise ConversionError(f"{source}: has no average's weights (state_dict_ema); leave out --ema")
    found = {"model": average} if ema else {"model": model, "state_dict_ema": average}
    kinds = {key: without_rotary_tables(weights) for key, weights in found.items() if weights is not None}
    suffix = ""
    if form == "official":
        size = size or size_in(content, [weights for weights in (model, average) if weights is not None])
        kinds = {key: {**weights, **rotary_tables_of(weights, size, source)} for key, weights in kinds.items()}
        suffix = f", for images of {size[0]}x{size[1]}"
    written = FORMS[form](target, kinds, facts_in(content))
    return f"{target}: {' and '.join(written)}, {len(next(iter(kinds.values())))} tensors each, form {form!r}{suffix}"


def facts_in(content: dict[str, Any]) -> dict[str, Any]:
    """What describes the weights: the names of the classes, and the configuration as YAML."""
    facts: dict[str, Any] = {}
    if classes := classes_in(content):
        facts["classes"] = classes
    if isinstance(config := content.get("config"), dict):
        facts["config"] = yaml.safe_dump(plain(config))
    elif isinstance(config, str):
        facts["config"] = config
    return facts


def plain(value: Any) -> Any:
    """Nested settings in Python's own types, others as text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def size_in(content: dict[str, Any], kinds: list[Weights]) -> tuple[int, int]:
    """Height and width in pixels that a file is for, as far as it says."""
    table = kinds[0].get(f"layers.0.blocks.0.{DERIVED_KEY_SUFFIX}")
    if table is not None:
        return 4 * table.shape[0], 4 * table.shape[1]
    found = re.search(r"^ +IMG_SIZE: (\d+)$", facts_in(content).get("config", ""), flags=re.MULTILINE)
    return (int(found[1]), int(found[1])) if found else DEFAULT_SIZE


def rotary_tables_of(weights: Weights, size: tuple[int, int], source: str) -> Weights:
    """Each block's cosines and sines as the official classifier stores them: (H, W, C / 2, 2), float32.

    Args:
        weights: a classifier's.
        size: height and width of the images in pixels.
        source: the file's name, for messages.
    """
    if any(side < TOTAL_STRIDE or side % TOTAL_STRIDE for side in size):
        raise ConversionError(
            f"{size[0]}x{size[1]} pixels: the official classifier takes multiples of {TOTAL_STRIDE}; set --size H W"
        )
    found = {name: match for name in weights if (match := ATTENTION.fullmatch(name))}
    if not found:
        raise ConversionError(f"{source}: is no MLLA classifier, which would have layers.0.blocks.0.attn.qk.weight")
    tables: Weights = {}
    for name, match in found.items():
        height, width = (side // 4 // 2 ** int(match[1]) for side in size)
        cos_and_sin = rotary_tables(height, width, weights[name].shape[1], torch.device("cpu"))  # (H, W, C / 2) each
        tables[name.replace("attn.qk.weight", DERIVED_KEY_SUFFIX)] = torch.stack(cos_and_sin, dim=-1)
    return tables


def without_rotary_tables(weights: Weights) -> Weights:
    return {name: value for name, value in weights.items() if not name.endswith(DERIVED_KEY_SUFFIX)}


def write_ours(target: Path, kinds: dict[str, Weights], facts: dict[str, Any]) -> list[str]:
    """This project's and the official form: weights under `model` and `state_dict_ema`, the facts beside them."""
    write_atomic(target, lambda path: torch.save({**kinds, **facts}, path))
    return list(kinds)


def write_timm(target: Path, kinds: dict[str, Weights], facts: dict[str, Any]) -> list[str]:
    """As timm's training script saves, which timm.create_model(checkpoint_path=...) reads."""
    renamed = {"state_dict" if key == "model" else key: weights for key, weights in kinds.items()}
    return write_ours(target, renamed, facts)


def write_safetensors(target: Path, kinds: dict[str, Weights], facts: dict[str, Any]) -> list[str]:
    """One set of weights, the model's if it is there; the facts as text in the header."""
    key, weights = next(iter(kinds.items()))
    tensors: dict[str, Tensor] = {name: value.contiguous().clone() for name, value in weights.items()}
    header = {"format": "pt", **{k: v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()}}
    write_atomic(target, lambda path: save_file(tensors, path, header))
    return [key]


FORMS = {"official": write_ours, "ours": write_ours, "safetensors": write_safetensors, "timm": write_timm}


def check_target(target: Path, form: str, *, force: bool) -> None:
    """Raise ConversionError before anything is read, if OUT would be refused."""
    if target.exists() and not force:
        raise ConversionError(f"{target}: is there already; name another file, or replace it with --force")
    if (target.suffix == ".safetensors") != (form == "safetensors"):
        raise ConversionError(f"{target}: the name of a safetensors file, and of no other, ends in .safetensors")
    if not target.parent.is_dir():
        raise ConversionError(f"{target}: there is no folder {target.parent}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__.split("\n\n")[1], prog="python -m utils.convert")
    parser.add_argument("source", metavar="IN", help="a path, a URL, or mlla-t, mlla-s, mlla-b")
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument("--to", required=True, choices=sorted(FORMS), dest="form")
    parser.add_argument("--ema", action="store_true", help="write the average's weights alone")
    parser.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="pixels, for the official rotary tables")
    parser.add_argument("--force", action="store_true", help="replace OUT if it is there")
    words = parser.parse_args(argv)
    with report_user_errors():
        check_target(words.target, words.form, force=words.force)
        if words.size and words.form != "official":
            raise ConversionError("--size is of the official form only, which stores tables that depend on it")
        size = (words.size[0], words.size[1]) if words.size else None
        print(convert(words.source, words.target, form=words.form, ema=words.ema, size=size))
    return 0


if __name__ == "__main__":
    sys.exit(main())
