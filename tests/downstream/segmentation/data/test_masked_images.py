import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.errors import BrokenImageError, DataError
from downstream.segmentation.data.masked_images import (
    ADE20K_CLASSES,
    MaskedImages,
    read_classes,
    read_image,
    read_mask,
)
from tests.helpers import deep_gray
from utils.config.errors import MissingFileError


def write_pair(
    root: Path, name: str, *, split: str = "train", masks: str = "masks", size: tuple[int, int] = (6, 8)
) -> None:
    """A gray image and a mask whose pixel (row, column) is of class (row + column) mod 3."""
    for kind in ("images", masks):
        (root / kind / split).mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), 90, dtype=np.uint8)).save(root / "images" / split / f"{name}.jpg")
    mask = (np.add.outer(np.arange(size[0]), np.arange(size[1])) % 3).astype(np.uint8)
    Image.fromarray(mask).save(root / masks / split / f"{name}.png")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split in ("train", "val"):
        for name in ("b", "a"):
            write_pair(tmp_path, name, split=split)
    (tmp_path / "classes.txt").write_text("grass\n\nsky\nroad, path\n")
    return tmp_path


def open_folder(root: Path, **options: object) -> MaskedImages:
    return MaskedImages(str(root), "train", **({"layout": "folder", "reduce_zero_label": False} | options))  # type: ignore[arg-type]


def test_folder_layout(folder: Path) -> None:
    images = open_folder(folder)
    assert images.classes == ["grass", "sky", "road, path"]
    assert images.names == ["a", "b"]
    image, mask = images.read(0)
    assert image.shape == (6, 8, 3)
    assert mask.dtype == np.uint8
    assert mask[0].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_sixteen_bits_keep_their_upper_eight(tmp_path: Path) -> None:
    deep_gray().save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png").mean() == pytest.approx(127.5, abs=1)


def test_reduce_zero_label_ignores_zero(folder: Path) -> None:
    _, mask = open_folder(folder, reduce_zero_label=True).read(0)
    assert mask[0].tolist() == [255, 0, 1, 255, 0, 1, 255, 0]


def test_ade20k_layout(tmp_path: Path) -> None:
    for split in ("training", "validation"):
        write_pair(tmp_path, f"ADE_{split}_1", split=split, masks="annotations")
    for split, name in (("train", "ADE_training_1"), ("val", "ADE_validation_1")):
        images = MaskedImages(str(tmp_path), split, layout="ade20k", reduce_zero_label=True)
        assert images.names == [name]
        assert len(images.classes) == 150


def test_ade20k_classes() -> None:
    classes = read_classes(ADE20K_CLASSES)
    assert (len(classes), classes[0], classes[12], classes[66], classes[149]) == (
        150,
        "wall",
        "person",
        "flower",
        "flag",
    )


@pytest.mark.parametrize("mode", ["P", "L", "I;16", "1"])
def test_mask_kinds(tmp_path: Path, mode: str) -> None:
    values = np.array([[0, 1], [1, 0]], dtype=np.uint8)
    picture = Image.fromarray(
        values.astype(np.uint16) if mode == "I;16" else values.astype(bool) if mode == "1" else values
    )
    if mode == "P":
        picture.putpalette([200, 0, 0, 0, 0, 200])
    assert picture.mode == mode
    picture.save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", num_classes=2, reduce_zero_label=False).tolist() == values.tolist()


def test_255_is_ignored(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(tmp_path / "m.png")
    for reduce, expected in ((False, [[0, 255]]), (True, [[255, 255]])):
        assert read_mask(tmp_path / "m.png", num_classes=3, reduce_zero_label=reduce).tolist() == expected


def test_labels_beyond_the_classes_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 2, 3, 7]], dtype=np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=r"m\.png: the mask holds 3, 7; .* must be 0 to 2, 255 for ignored"):
        read_mask(tmp_path / "m.png", num_classes=3, reduce_zero_label=False)
    with pytest.raises(DataError, match=r"m\.png: the mask holds 7; .* must be 1 to 3, 0 and 255 for ignored"):
        read_mask(tmp_path / "m.png", num_classes=3, reduce_zero_label=True)


def test_colored_masks_are_refused(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=r"m\.png: a mask must hold one number per pixel .* mode is RGB"):
        read_mask(tmp_path / "m.png", num_classes=3, reduce_zero_label=False)


def test_masks_of_another_size_are_refused(folder: Path) -> None:
    Image.new("L", (5, 6)).save(folder / "masks/train/a.png")
    with pytest.raises(DataError, match=r"masks/train/a\.png: the mask is 5x6 pixels, its image .*a\.jpg is 8x6"):
        open_folder(folder).read(0)


@pytest.mark.parametrize("kind", ["images/train/a.jpg", "masks/train/a.png"])
def test_unpaired_files_are_refused(folder: Path, kind: str) -> None:
    (folder / kind).unlink()
    with pytest.raises(DataError, match=r"files without (a mask|an image) of the same name, 1 in all: .*/a\.(png|jpg)"):
        open_folder(folder)


@pytest.mark.parametrize("kind", ["images/train/a.jpg", "masks/train/a.png"])
def test_damaged_files_are_refused(folder: Path, kind: str) -> None:
    content = (folder / kind).read_bytes()
    (folder / kind).write_bytes(content[: len(content) // 2])
    with pytest.raises(BrokenImageError, match=rf"{kind}: cannot be read as an image \(") as caught:
        open_folder(folder).read(0)
    assert "\n" not in str(caught.value)


def test_only_formats_of_photographs_are_opened(folder: Path) -> None:
    """Pillow would start Ghostscript for EPS, whatever the file's ending."""
    Image.new("RGB", (8, 6)).save(folder / "images/train/a.jpg", "EPS")
    with pytest.raises(BrokenImageError, match=r"a\.jpg: cannot be read as an image \(not an image"):
        open_folder(folder).read(0)


def test_two_images_of_one_name_are_refused(folder: Path) -> None:
    Image.new("RGB", (8, 6)).save(folder / "images/train/a.png")
    with pytest.raises(DataError, match=r"a\.png: a\.jpg has the same name"):
        open_folder(folder)


def test_missing_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"classes\.txt: cannot be read"):
        open_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("one\ntwo\n")
    with pytest.raises(MissingFileError, match="images/train: no such folder"):
        open_folder(tmp_path)
    (tmp_path / "images/train").mkdir(parents=True)
    with pytest.raises(DataError, match="images/train: no files that end in"):
        open_folder(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds 0 classes; must be 2 to 255"),
        ("window\n\n", "holds 1 classes; must be 2 to 255, one per line, with a class for the rest"),
        ("a\nb\na\n", "a occurs more than once"),
    ],
)
def test_wrong_class_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(tmp_path / "classes.txt")


def test_hidden_folders_and_links(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Hidden folders and other files are counted; links are followed, and must lead somewhere."""
    for kind, other in (("images", ".gif"), ("masks", ".json")):
        shutil.copytree(folder / kind / "train", folder / kind / "train" / ".ipynb_checkpoints")
        (folder / kind / "train" / "more").symlink_to(folder / kind / "val")
        (folder / kind / "train" / f"x{other}").touch()
    assert open_folder(folder).names == ["a", "b", "more/a", "more/b"]
    for kind, other in (("images", ".gif"), ("masks", ".json")):
        assert f"{kind}/train: left out: " in caplog.text
        assert f"1 files with the ending {other} (such as x{other})" in caplog.text
    assert caplog.text.count("1 hidden files or folders (such as .ipynb_checkpoints)") == 2
    (folder / "masks/train/c.png").symlink_to(folder / "c.png")
    with pytest.raises(MissingFileError, match=r"masks/train: dangling links, 1 in all, such as c\.png"):
        open_folder(folder)


def test_classes_without_pixels(folder: Path) -> None:
    assert open_folder(folder).classes_without_pixels() == []
    for name in ("a", "b"):
        Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).save(folder / "masks" / "train" / f"{name}.png")
    assert open_folder(folder).classes_without_pixels() == ["sky", "road, path"]
    assert open_folder(folder, reduce_zero_label=True).classes_without_pixels() == ["grass", "sky", "road, path"]


def test_images_are_rotated_as_their_exif_data_say(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    Image.fromarray(np.full((8, 6, 3), 90, dtype=np.uint8)).save(folder / "images/train/a.jpg", exif=exif)
    assert open_folder(folder).read(0)[0].shape == (6, 8, 3)
