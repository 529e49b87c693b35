"""The configuration that goes with a weights file."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint.download import released_name
from utils.checkpoint.weights_file import CheckpointError, load_checkpoint
from utils.config.errors import ConfigError


def stored_config(content: Mapping[str, Any], source: str) -> str:
    """Return the configuration that a file holds, as YAML text; for released weights the name of theirs.

    Args:
        content: of the file.
        source: its path, URL or name.

    Raises:
        CheckpointError: the file has none.
    """
    config = content.get("config")
    if isinstance(config, str):
        return config
    if (name := released_name(source)) and not Path(source).is_file():
        return name.replace("-", "_")
    raise CheckpointError(f"{source}: holds no configuration; name its YAML file with --cfg, for example mlla_t")


def load_config_of(load: Callable[..., Any], path: str, opts: Sequence[str], flags: Mapping[str, Any]) -> Any:
    """Load the configuration of --cfg, or without it the one of the weights of --resume.

    Args:
        load: a task's `load_config`.
        path: of --cfg, "" without it.
        opts: alternating keys and values, as typed after --opts.
        flags: values by key, of those flags that were typed; without `path` MODEL.RESUME is one.

    Raises:
        UserError: weights or configuration are not right.
    """
    if path:
        return load(path, opts, flags)
    source = flags["MODEL.RESUME"]
    text = stored_config(load_checkpoint(source, tolerant=True), source)
    try:
        return load(text, opts, flags)
    except ConfigError as error:
        if error.key in {*opts[::2], *flags}:
            raise
        message = f"{source}: its configuration is not for this command, or is damaged: {error}; name one with --cfg"
        raise ConfigError(message, key=error.key) from error
