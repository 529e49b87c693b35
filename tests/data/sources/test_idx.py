import gzip
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from config import load_config
from data import build_data
from data.errors import DataError
from data.sources.idx import FASHION_CLASSES, IdxImages
from utils.config.errors import MissingFileError

SPLITS = {"train": 12, "t10k": 6}


def idx(array: np.ndarray) -> bytes:
    return (
        bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 5, 4), dtype=np.uint8)


def write_dataset(
    folder: Path, prefix: str = "", ending: str = "-ubyte", splits: Sequence[str] = ("train", "t10k"), first: int = 0
) -> Path:
    """Write 12 and 6 images, 5 high and 4 wide, of three classes from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in zip(splits, SPLITS.values(), strict=True):
        contents = {"images-idx3": idx(pixels(count)), "labels-idx1": idx(first + np.arange(count) % 3)}
        for kind, content in contents.items():
            data = gzip.compress(content) if ending.endswith(".gz") else content
            (folder / f"{prefix}{split}-{kind}{ending}").write_bytes(data)
    return folder


@pytest.mark.parametrize("ending", ["-ubyte", "-ubyte.gz"])
@pytest.mark.parametrize("splits", [("train", "t10k"), ("train", "test")])
def test_published_and_unpacked_files(tmp_path: Path, ending: str, splits: tuple[str, str]) -> None:
    write_dataset(tmp_path, ending=ending, splits=splits)
    train, val = (IdxImages(str(tmp_path), split) for split in ("train", "val"))
    assert (len(train), len(val), val.labels.tolist(), val.classes) == (12, 6, [0, 1, 2, 0, 1, 2], ["0", "1", "2"])
    image = val.read(3)
    assert image.shape == (5, 4, 3)
    assert (image.numpy() == pixels(6)[3][..., None]).all()
    assert val.name(3).endswith(f"{splits[1]}-images-idx3{ending}: image 3")


def test_names_of_kaggle(tmp_path: Path) -> None:
    for path in write_dataset(tmp_path).iterdir():
        path.rename(tmp_path / path.name.replace("-idx", ".idx"))
    assert len(IdxImages(str(tmp_path), "val")) == 6


@pytest.mark.parametrize("dataset", ["idx", "idx/", "idx/fashion", "idx/{}/fashion"])
def test_settings_that_name_the_folder(tmp_path: Path, dataset: str) -> None:
    folder = write_dataset(tmp_path / "fashion")
    path = {"idx": folder, "idx/": folder, "idx/fashion": tmp_path}.get(dataset, "")
    keys = ["DATA.DATASET", dataset.format(tmp_path), "DATA.DATA_PATH", str(path), "MODEL.NUM_CLASSES", "10"]
    data = build_data(load_config("cfgs/digits.yaml", [*keys, "DATA.IMG_SIZE", "8"]))
    assert (data.num_train_images, data.num_val_images, data.classes) == (12, 6, FASHION_CLASSES)
    assert data.preview(6)[0].shape == (6, 3, 8, 8)


def test_names_of_classes(tmp_path: Path) -> None:
    """A list beside the files, else Fashion-MNIST's in a folder called so, else numbers."""
    for name in ("fashion-mnist", "FashionMNIST/raw"):
        assert IdxImages(str(write_dataset(tmp_path / name)), "val").classes == FASHION_CLASSES
    folder = write_dataset(tmp_path / "fashion-mnist" / "others" / "mnist")
    assert IdxImages(str(folder), "val").classes == ["0", "1", "2"]
    (folder / "classes.txt").write_text("ant\nbee\ncat\ndog\n")
    assert IdxImages(str(folder), "val").classes == ["ant", "bee", "cat", "dog"]


def test_emnist(tmp_path: Path) -> None:
    """Several sets in one folder, labels from 1, names from the mapping, images upright."""
    write_dataset(tmp_path, "emnist-digits-", splits=("train", "test"))
    assert IdxImages(str(tmp_path), "val").classes == ["0", "1", "2"]
    write_dataset(tmp_path, "emnist-letters-", splits=("train", "test"), first=1)
    with pytest.raises(MissingFileError, match=r"several datasets: emnist-digits-t.*, such as idx/\S+/emnist-digits$"):
        IdxImages(str(tmp_path), "val")
    mapping = tmp_path / "emnist-letters-mapping.txt"
    mapping.write_text("1 65 97\n2 66 98\n3 67 99\n\n")
    for split in ("train", "val"):
        letters = IdxImages(str(tmp_path / "emnist-letters"), split)
        assert letters.classes == ["A/a", "B/b", "C/c"]
        assert letters.labels.tolist()[:4] == [0, 1, 2, 0]
    assert (np.asarray(letters.read(3))[..., 0] == pixels(6)[3].T).all()
    for text, complaint in (("1 65\n2 66\n", "does not name label 3"), ("1 65 x", "not lines of a label and codes")):
        mapping.write_text(text)
        with pytest.raises(DataError, match=rf"^{mapping}: .*{complaint}"):
            IdxImages(str(tmp_path / "emnist-letters"), "val")


def huge() -> bytes:
    """Return the header of a file of 3 TiB, and a little of it."""
    return bytes([0, 0, 8, 3]) + struct.pack(">3I", 2**32 - 1, 28, 28) + bytes(100)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "no IDX file of bytes in 3 dimensions"),
        (idx(pixels(6))[:9], "no IDX file of bytes in 3 dimensions"),
        (b"\x00\x00\x0d\x03" + idx(pixels(6))[4:], "no IDX file of bytes in 3 dimensions"),
        (idx(np.arange(6)), "no IDX file of bytes in 3 dimensions"),
        (idx(pixels(6))[:-1], "announces 120 bytes, but there are only 119; get it again"),
        (idx(pixels(6)) + b"x", "announces 120 bytes, but there are more; get it again"),
        (idx(pixels(5)), "5 images, but .*t10k-labels-idx1-ubyte.* has 6 labels"),
        (idx(pixels(0)), "announces 0 bytes"),
        (huge(), r"announces 3367254359280 bytes; \d+ bytes of memory are available"),
    ],
)
@pytest.mark.parametrize("ending", ["-ubyte", "-ubyte.gz"])
def test_damaged_images(tmp_path: Path, content: bytes, complaint: str, ending: str) -> None:
    path = write_dataset(tmp_path, ending=ending) / f"t10k-images-idx3{ending}"
    path.write_bytes(gzip.compress(content) if ending.endswith(".gz") else content)
    with pytest.raises(DataError, match=rf"^{path}: .*{complaint}") as caught:
        IdxImages(str(tmp_path), "val")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: data[:-20], "damaged or cut off"),
        (lambda data: data[:40] + bytes(20) + data[60:], "damaged or cut off|cannot be read"),
        (lambda _: b"text", "cannot be read: Not a gzipped file"),
    ],
)
def test_damaged_gzip(tmp_path: Path, damage: "type[bytes]", complaint: str) -> None:
    path = write_dataset(tmp_path, ending="-ubyte.gz") / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=rf"^{path}: .*({complaint})"):
        IdxImages(str(tmp_path), "train")


def test_missing_files(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "fashion")
    (folder / "t10k-labels-idx1-ubyte").unlink()
    for name in ("fashion", "nowhere", "nowhere/deeper"):
        with pytest.raises(MissingFileError, match=r"no t10k-(images|labels)-idx\d-ubyte or.*: apt-get install"):
            IdxImages(str(tmp_path / name), "val")
