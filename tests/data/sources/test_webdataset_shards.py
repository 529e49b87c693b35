import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from data.errors import DataError
from data.sources.webdataset_shards import WebDatasetShards
from tests.helpers import encoded, photo
from utils.config.errors import MissingFileError

IMAGES = [encoded(photo(30 + i, 40, i)) for i in range(7)]


def write_shard(path: Path, files: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_shards(folder: Path, split: str) -> None:
    """Seven images in two shards, with labels in both forms, before or after the image."""
    first = [item for i in range(4) for item in ((f"{i:04}.jpg", IMAGES[i]), (f"{i:04}.cls", str(i % 3).encode()))]
    second = [("./part/0004.json", json.dumps({"label": 1, "caption": "x"}).encode()), ("./part/0004.JPG", IMAGES[4])]
    second += [("5.cls", b"2\n"), ("5.json", b'{"caption": "y"}'), ("5.jpeg", IMAGES[5])]
    second += [("notes.txt", b"no image"), ("a.b/6.png", IMAGES[6]), ("a.b/6.cls", b"0")]
    write_shard(folder / f"{split}-0000.tar", first)
    write_shard(folder / f"{split}-0001.tar", second)


def test_images_and_labels_of_all_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, "imagenet-train")
    write_shards(tmp_path / "validation", "shard")
    for split in ("train", "val"):
        source = WebDatasetShards(str(tmp_path), split)
        assert source.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
        assert [source.read(index) for index in (6, 0, 5, 1, 4, 2, 3)] == [IMAGES[i] for i in (6, 0, 5, 1, 4, 2, 3)]
        assert source.classes == ["0", "1", "2"]
        assert source.name(4).endswith("-0001.tar: part/0004")
    (tmp_path / "classes.txt").write_text("\ufeffant\r\nbee\n\ncat\n \n\n")  # blank lines do not count
    assert WebDatasetShards(str(tmp_path), "val").classes == ["ant", "bee", "cat"]


def test_the_same_samples_as_timms_reader(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    from timm.data import create_dataset

    with webdataset.TarWriter(str(tmp_path / "val-0000.tar")) as writer:
        for i, image in enumerate(IMAGES):
            writer.write({"__key__": f"deep/{i:04}", "jpg": image, "cls": i % 3})
    source = WebDatasetShards(str(tmp_path), "val")
    theirs = list(create_dataset("wds/", root=str(tmp_path), split="val-0000.tar", num_samples=7))
    assert [label for _, label in theirs] == source.labels.tolist()
    reference = [image.tobytes() for image, _ in theirs]
    from data.decoding import decode_pillow

    assert [decode_pillow(source.read(i)).tobytes() for i in range(7)] == reference


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ([("1.jpg", IMAGES[0])], "1 has no label; it needs 1.cls, or 1.json with a label"),
        ([("1.jpg", IMAGES[0]), ("1.cls", b"cat")], "1.cls holds no label"),
        ([("1.jpg", IMAGES[0]), ("1.json", b"{")], "1.json holds no label"),
        ([("1.jpg", IMAGES[0]), ("1.cls", b"-1")], "1: label -1 is not the number of a class; labels count from 0"),
        ([("1.jpg", IMAGES[0]), ("1.cls", b"1099511627776")], "1: label 1099511627776 is not the number of a class"),
        ([("1.jpg", IMAGES[0]), ("1.json", b'{"label": null}')], "1.json holds no label"),
        ([("1.jpg", IMAGES[0]), ("1.json", b'{"label": 1.5}')], "1.json holds no label"),
        ([("1.jpg", IMAGES[0]), ("1.cls", b"5")], "2 names for 6 classes"),
    ],
)
def test_invalid_labels(tmp_path: Path, files: list[tuple[str, bytes]], reason: str) -> None:
    write_shard(tmp_path / "val.tar", files)
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    with pytest.raises(DataError, match=reason):
        WebDatasetShards(str(tmp_path), "val")


def test_missing_empty_and_damaged_shards(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"no shards .*/val/\*\.tar or .*\*val\*\.tar"):
        WebDatasetShards(str(tmp_path), "val")
    write_shard(tmp_path / "val.tar", [("notes.txt", b"")])
    with pytest.raises(MissingFileError, match="no images"):
        WebDatasetShards(str(tmp_path), "val")
    (tmp_path / "val.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(DataError, match="not a complete, uncompressed tar file"):
        WebDatasetShards(str(tmp_path), "val")


def test_a_last_image_that_is_cut_off_and_what_is_no_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "train-0000.tar", [("0.cls", b"0"), ("0.jpg", bytes(5000))])
    content = (tmp_path / "train-0000.tar").read_bytes()
    (tmp_path / "train-0000.tar").write_bytes(content[: 4 * 512])
    with pytest.raises(DataError, match=r"train-0000\.tar: not a complete"):
        WebDatasetShards(str(tmp_path), "train")
    os.mkfifo(tmp_path / "val-0000.tar")  # reading it would wait forever
    with pytest.raises(MissingFileError, match="no shards"):
        WebDatasetShards(str(tmp_path), "val")
