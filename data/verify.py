"""Decode every image of a data set, in parallel, and list those that cannot be used.

python -m data.verify PATH [--zip] [--workers N] [--output bad_images.txt]

PATH is what --data-path is. A line of the list is `file<TAB>reason`. Exit code 1 where something is wrong.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.dataset import Failure, ImageSource, keep_batch
from data.decoding import decode_fast
from data.errors import BrokenImageError
from data.sources.image_folder import ImageFolder
from data.sources.zip_folder import ZipFolder
from utils.config.command_line import Parser, at_least, report_user_errors

CHUNK = 32


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("path", help="folder with train/ and val/, or with train.zip and val.zip")
    parser.add_argument("--zip", action="store_true", help="read the archives")
    parser.add_argument("--workers", type=at_least(0), default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--output", type=Path, default=Path("bad_images.txt"), help="the list; must not be there yet")
    arguments = parser.parse_args(argv)
    with report_user_errors():
        if arguments.output.exists():
            raise ValueError(f"{arguments.output} is there; move it away, or name another file with --output")
        arguments.output.parent.mkdir(parents=True, exist_ok=True)  # a mistake there must not cost a scan
        sources: list[ImageSource] = [
            ZipFolder(arguments.path, split) if arguments.zip else ImageFolder(arguments.path, split)
            for split in ("train", "val")
        ]
    try:
        failures = [failure for source in sources for failure in broken_images(source, arguments.workers)]
    except KeyboardInterrupt:
        return 130
    print(f"{sum(map(len, sources))} images, {len(failures)} cannot be used")
    if failures:
        arguments.output.write_text("".join(f"{name}\t{reason}\n" for name, reason in failures))
        print(f"they are listed in {arguments.output}")
    return 1 if failures else 0


def broken_images(source: ImageSource, workers: int) -> list[Failure]:
    """The images of a source that cannot be used, in its order."""
    checks = DataLoader(Checks(source), batch_size=CHUNK, num_workers=workers, collate_fn=keep_batch)
    failures = []
    with tqdm(total=len(source), unit=" images") as bar:
        for count, found in checks:
            failures += found
            bar.update(count)
    return failures


class Checks(Dataset[tuple[int, list[Failure]]]):
    """How many images were decoded, and which of them cannot be used, by lists of indices."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> tuple[int, list[Failure]]:
        reasons = {index: self.reason_against(index) for index in indices}
        return len(indices), [Failure(self.source.name(i), reason) for i, reason in reasons.items() if reason]

    def reason_against(self, index: int) -> str:
        """Why an image cannot be used; empty where it can."""
        try:
            content = self.source.read(index)
            if isinstance(content, bytes):
                decode_fast(content)
        except BrokenImageError as error:
            return str(error)
        return ""


if __name__ == "__main__":
    sys.exit(main())
