"""Decode every image of a dataset in parallel and list those that cannot be used.

python -m data.verify PATH [--zip] [--workers N] [--output bad_images.txt]

PATH is what --data-path is. A line of the list is `file<TAB>reason`. The exit code is 1 if any image cannot be used.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data.dataset import Failure, ImageSource, keep_batch
from data.decoding import decode_fast
from data.errors import BrokenImageError, DataError, as_data_error
from data.sources.image_folder import ImageFolder
from data.sources.zip_folder import ZipFolder
from utils.config.command_line import MAX_WORKERS, Parser, at_least, report_user_errors

CHUNK = 32


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("path", help="folder with train/ and val/, or with train.zip and val.zip")
    parser.add_argument("--zip", action="store_true", help="read the archives")
    parser.add_argument(
        "--workers", type=at_least(0, MAX_WORKERS), default=os.cpu_count() or 1, help="number of processes"
    )
    parser.add_argument("--output", type=Path, default=Path("bad_images.txt"), help="file for the list; must not exist")
    args = parser.parse_args(argv)
    with report_user_errors():
        with as_data_error(args.output, "written"):  # now, because it must not cost a scan
            if args.output.exists():
                raise DataError(f"{args.output} exists; move it, or name another file with --output")
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.touch()
            args.output.unlink()
        sources: list[ImageSource] = [
            ZipFolder(args.path, split) if args.zip else ImageFolder(args.path, split) for split in ("train", "val")
        ]
    try:
        failures = [failure for source in sources for failure in find_failures(source, args.workers)]
    except KeyboardInterrupt:
        return 130
    print(f"{sum(map(len, sources))} images, {len(failures)} cannot be used")
    if failures:
        args.output.write_text(
            "".join(f"{name}\t{reason}\n" for name, reason in failures), encoding="utf-8", errors="surrogateescape"
        )
        print(f"listed in {args.output}")
    return 1 if failures else 0


def find_failures(source: ImageSource, num_workers: int) -> list[Failure]:
    """Return the images of a source that cannot be used, in its order."""
    loader = DataLoader(DecodeChecks(source), batch_size=CHUNK, num_workers=num_workers, collate_fn=keep_batch)
    failures = []
    with tqdm(total=len(source), unit=" images") as bar:
        for count, new_failures in loader:
            failures += new_failures
            bar.update(count)
    return failures


class DecodeChecks(Dataset[tuple[int, list[Failure]]]):
    """Decodes images by lists of indices; gives their number and the failures among them."""

    def __init__(self, source: ImageSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitems__(self, indices: Sequence[int]) -> tuple[int, list[Failure]]:
        reasons = {index: self.failure_reason(index) for index in indices}
        return len(indices), [Failure(self.source.name(i), reason) for i, reason in reasons.items() if reason]

    def failure_reason(self, index: int) -> str:
        """Return why an image cannot be used, or "" if it can."""
        try:
            content = self.source.read(index)
            if isinstance(content, bytes):
                decode_fast(content)
        except BrokenImageError as error:
            return str(error)
        return ""


if __name__ == "__main__":
    sys.exit(main())
