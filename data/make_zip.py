"""Pack ImageNet folders into train.zip, val.zip, train_map.txt and val_map.txt, which --zip reads.

python -m data.make_zip IMAGENET_DIR OUT_DIR

Images are stored uncompressed. After an interruption, the same command resumes. An archive gets its final name once all
its images were read back and compared.
"""

import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from data.errors import BrokenImageError, DataError, as_data_error
from data.sources.image_folder import ImageFolder
from data.sources.zip_folder import LOCAL_HEADER_BYTES, ZipFolder, find_members
from utils.config.command_line import Parser, report_user_errors
from utils.logs.atomic_write import write_atomic

SIGNATURE = b"PK\x03\x04"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("imagenet_dir", help="folder with train/ and val/, a folder per class in each")
    parser.add_argument("out_dir", type=Path, help="folder for the four files")
    args = parser.parse_args(argv)
    try:
        with report_user_errors():
            folders = {split: ImageFolder(args.imagenet_dir, split) for split in ("train", "val")}
            if folders["train"].classes != folders["val"].classes:
                different = sorted(set(folders["train"].classes) ^ set(folders["val"].classes))
                raise DataError(f"{args.imagenet_dir}: train/ and val/ differ in classes, such as {different[0]}")
            with as_data_error(args.out_dir, "written"):
                args.out_dir.mkdir(parents=True, exist_ok=True)
                for split, folder in folders.items():
                    make_zip(folder, split, args.out_dir)
    except KeyboardInterrupt:
        print("interrupted; run the same command again to resume", file=sys.stderr)
        return 130
    return 0


def make_zip(folder: ImageFolder, split: str, out: Path) -> None:
    """Write <split>.zip and <split>_map.txt to `out`.

    Raises:
        DataError: an image cannot be read, a file with other content exists, or the archive differs when read back.
        OSError: the disk is full.
    """
    paths = [folder.paths[index] for index in range(len(folder))]
    for path in paths:
        if path.encode("utf-8", "replace").decode() != path:
            raise DataError(f"{folder.folder}/{path}: a name that is not UTF-8, which archives need; rename it")
    archive = out / f"{split}.zip"
    partial = out / f"{split}.zip.partial"
    lines = "".join(f"{path}\t{label}\n" for path, label in zip(paths, folder.labels, strict=True))
    if archive.exists():
        if not holds_images(archive, folder, paths):
            raise DataError(f"{archive} exists with other images than {folder.folder}; move it or name another folder")
        write_map(out / f"{split}_map.txt", lines)
    else:
        pack(folder, paths, partial)
        write_map(out / f"{split}_map.txt", lines)
        compare(folder, partial, paths, split)
        partial.rename(archive)
    print(f"{archive}: {len(paths)} images, {archive.stat().st_size / 2**30:.2f} GiB")


def pack(folder: ImageFolder, paths: list[str], partial: Path) -> None:
    """Write the archive, keeping the images that an interrupted call has completed."""
    with partial.open("r+b" if partial.exists() else "w+b") as file:
        done = complete_members(file, paths)
        file.truncate(done[-1].header_offset + member_bytes(done[-1]) if done else 0)
        with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
            archive.filelist.extend(done)
            archive.NameToInfo.update({info.filename: info for info in done})
            rest = range(len(done), len(paths))
            for index in tqdm(rest, f"writing {partial.stem}", len(paths), initial=len(done), unit=" images"):
                archive.writestr(member(paths[index]), read_image(folder, index))


def read_image(source: ImageFolder | ZipFolder, index: int) -> bytes:
    try:
        return source.read(index)
    except BrokenImageError as error:
        raise DataError(f"{source.name(index)}: {error}") from error


def complete_members(file: BinaryIO, paths: list[str]) -> list[zipfile.ZipInfo]:
    """Return the leading members of an unfinished archive that are undamaged and those of `paths`, in order."""
    done: list[zipfile.ZipInfo] = []
    file.seek(0)
    for path in paths:
        info = member(path)
        info.header_offset = file.tell()
        header = file.read(LOCAL_HEADER_BYTES)
        if len(header) < LOCAL_HEADER_BYTES or header[:4] != SIGNATURE:
            break
        info.flag_bits = int.from_bytes(header[6:8], "little")
        info.CRC, info.compress_size, info.file_size, name_bytes, extra_bytes = (
            int.from_bytes(header[start:end], "little")
            for start, end in ((14, 18), (18, 22), (22, 26), (26, 28), (28, 30))
        )
        name = file.read(name_bytes)
        file.seek(extra_bytes, 1)
        is_complete = zlib.crc32(file.read(info.compress_size)) == info.CRC and name == encoded_name(path)
        if not is_complete or file.tell() != info.header_offset + member_bytes(info):
            break
        done.append(info)
    return done


def member(path: str) -> zipfile.ZipInfo:
    """Return an entry without a date, so that the same images make the same archive."""
    info = zipfile.ZipInfo(path)
    info.external_attr = 0o644 << 16
    return info


def encoded_name(path: str) -> bytes:
    return path.encode("ascii" if path.isascii() else "utf-8")


def member_bytes(info: zipfile.ZipInfo) -> int:
    return LOCAL_HEADER_BYTES + len(encoded_name(info.filename)) + info.compress_size


def holds_images(archive: Path, folder: ImageFolder, paths: list[str]) -> bool:
    """Return whether an archive holds exactly these images, by names and sizes."""
    _, sizes, _, _ = find_members(archive, paths)
    with zipfile.ZipFile(archive) as opened:
        if len(opened.infolist()) != len(paths):
            return False
    return all(Path(folder.name(index)).stat().st_size == sizes[index] for index in range(len(paths)))


def compare(folder: ImageFolder, partial: Path, paths: list[str], split: str) -> None:
    """Read every image of the new archive back and compare it with its file.

    Raises:
        DataError: an image differs.
    """
    written = ZipFolder(str(partial.parent), split, archive=partial)
    for index in tqdm(range(len(paths)), f"reading {partial.stem}", unit=" images"):
        if read_image(written, index) != read_image(folder, index):
            raise DataError(f"{written.name(index)} differs from {folder.name(index)}; delete {partial} and try again")


def write_map(path: Path, lines: str) -> None:
    """Write a map file, atomically.

    Raises:
        DataError: the file exists with other content.
    """
    content = lines.encode()
    if path.exists() and path.read_bytes() != content:
        raise DataError(f"{path} exists with other content; move it or name another folder")
    write_atomic(path, lambda temporary: temporary.write_bytes(content))


if __name__ == "__main__":
    sys.exit(main())
