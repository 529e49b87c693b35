"""What a process tells torchrun, which started it, about its error."""

import contextlib
import json
import os
import time
from pathlib import Path


def tell_launcher(message: str) -> None:
    """Give torchrun the reason why this process fails, which the page that it prints then ends with.

    It has this in place of "To enable traceback see: https://pytorch.org/...". torch's decorator `record` writes the
    same file.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return
    content = {"message": {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}}
    with contextlib.suppress(OSError):  # it is a service
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(content))
        temporary.replace(path)  # torchrun fails on half a file
