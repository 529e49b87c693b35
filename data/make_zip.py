"""Pack ImageNet folders into train.zip, val.zip, train_map.txt and val_map.txt, which --zip reads.

python -m data.make_zip IMAGENET_DIR OUT_DIR

Images are stored as they are, not deflated. The same command again goes on where it was stopped. What was written is
read back and compared before an archive gets its name.
"""

import sys
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from data.sources.image_folder import ImageFolder
from data.sources.zip_folder import LOCAL_HEADER_BYTES, ZipFolder, find_members
from utils.config.command_line import Parser, report_user_errors

SIGNATURE = b"PK\x03\x04"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("imagenet_dir", help="folder with train/ and val/, a folder per class in each")
    parser.add_argument("out_dir", type=Path, help="where the four files go")
    arguments = parser.parse_args(argv)
    try:
        with report_user_errors():
            folders = {split: ImageFolder(arguments.imagenet_dir, split) for split in ("train", "val")}
            if folders["train"].classes != folders["val"].classes:
                different = sorted(set(folders["train"].classes) ^ set(folders["val"].classes))
                raise ValueError(f"{arguments.imagenet_dir}: train/ and val/ differ in classes, such as {different[0]}")
            arguments.out_dir.mkdir(parents=True, exist_ok=True)
            for split, folder in folders.items():
                make_zip(folder, split, arguments.out_dir)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def make_zip(folder: ImageFolder, split: str, out: Path) -> None:
    """Make <split>.zip and <split>_map.txt in `out`.

    Raises:
        ValueError: an archive with other content is there, or what was written cannot be read back.
        OSError: an image cannot be read, or the disk is full.
    """
    paths = [folder.paths[index] for index in range(len(folder))]
    archive = out / f"{split}.zip"
    partial = out / f"{split}.zip.partial"
    listing = "".join(f"{path}\t{label}\n" for path, label in zip(paths, folder.labels, strict=True))
    if not archive.exists():
        pack(folder, paths, partial)
        write_atomic(out / f"{split}_map.txt", listing)
        compare(folder, partial, paths, split)
        partial.rename(archive)
    elif not is_same(folder, archive, paths):
        raise ValueError(
            f"{archive} is there, with other images than {folder.folder}; move it away or name another folder"
        )
    else:
        write_atomic(out / f"{split}_map.txt", listing)
    print(f"{archive}: {len(paths)} images, {archive.stat().st_size / 2**30:.2f} GiB")


def pack(folder: ImageFolder, paths: list[str], partial: Path) -> None:
    """Write the archive, after those images that an earlier, interrupted call wrote whole."""
    with partial.open("r+b" if partial.exists() else "w+b") as file:
        done = whole_members(file, paths)
        file.truncate(done[-1].header_offset + member_bytes(done[-1]) if done else 0)
        with zipfile.ZipFile(file, "a", zipfile.ZIP_STORED) as archive:
            archive.filelist.extend(done)
            archive.NameToInfo.update({info.filename: info for info in done})
            rest = range(len(done), len(paths))
            for index in tqdm(rest, f"writing {partial.stem}", len(paths), initial=len(done), unit=" images"):
                archive.writestr(member(paths[index]), folder.read(index))


def whole_members(file: BinaryIO, paths: list[str]) -> list[zipfile.ZipInfo]:
    """The members at the start of an unfinished archive, as far as they are the wanted ones and undamaged."""
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
        is_whole = zlib.crc32(file.read(info.compress_size)) == info.CRC and name == encoded_name(path)
        if not is_whole or file.tell() != info.header_offset + member_bytes(info):
            break
        done.append(info)
    return done


def member(path: str) -> zipfile.ZipInfo:
    """Without dates, so that the same images make the same archive."""
    info = zipfile.ZipInfo(path)
    info.external_attr = 0o644 << 16
    return info


def encoded_name(path: str) -> bytes:
    return path.encode("ascii" if path.isascii() else "utf-8")


def member_bytes(info: zipfile.ZipInfo) -> int:
    return LOCAL_HEADER_BYTES + len(encoded_name(info.filename)) + info.compress_size


def is_same(folder: ImageFolder, archive: Path, paths: list[str]) -> bool:
    """Whether an archive holds these images and no others, by their names and sizes."""
    with zipfile.ZipFile(archive) as opened:
        if len(opened.infolist()) != len(paths):
            return False
    _, sizes, _, _ = find_members(archive, paths)
    return all(Path(folder.name(index)).stat().st_size == sizes[index] for index in range(len(paths)))


def compare(folder: ImageFolder, partial: Path, paths: list[str], split: str) -> None:
    """Read every image of the new archive back, with its checksum."""
    written = ZipFolder(str(partial.parent), split, archive=partial)
    for index in tqdm(range(len(paths)), f"reading {partial.stem}", unit=" images"):
        if written.read(index) != folder.read(index):
            raise ValueError(f"{written.name(index)} differs from {folder.name(index)}")


def write_atomic(path: Path, text: str) -> None:
    """Write a file under another name first; one with other content is not replaced."""
    if path.exists() and path.read_bytes() != text.encode():
        raise ValueError(f"{path} is there, with other content; move it away or name another folder")
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
