"""Hugging Face datasets from a local folder; skipped where the library is not installed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.decoding import decode_fast
from data.errors import BrokenImageError, DataError
from data.sources import hugging_face
from data.sources.hugging_face import HuggingFaceImages
from tests.helpers import encoded, make_image_folder, photo


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    """The library, with its caches in a folder of the test, and offline."""
    library = pytest.importorskip("datasets")
    for name in ("HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setattr(library.config, name, str(tmp_path / "cache"))
    monkeypatch.setattr(library.config, "HF_DATASETS_OFFLINE", True, raising=False)
    return library


@pytest.mark.usefixtures("datasets")
def test_a_folder_of_images(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", train=3, val=2)
    (tmp_path / "images" / "val").rename(tmp_path / "images" / "validation")
    train, val = (HuggingFaceImages("images", str(tmp_path), split) for split in ("train", "val"))
    assert train.classes == val.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert val.labels.tolist() == [0, 0, 1, 1]
    assert val.read(3) == (tmp_path / "images" / "validation" / "dog" / "1.jpg").read_bytes()
    assert decode_fast(train.read(0)).shape[2] == 3
    assert val.name(3).endswith("images: image 3 of validation")


def test_parquet_files_and_rows_without_images(tmp_path: Path, datasets: object) -> None:
    folder = tmp_path / "set" / "data"
    folder.mkdir(parents=True)
    features = datasets.Features(  # type: ignore[attr-defined]
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee"])}  # type: ignore[attr-defined]
    )
    images = [{"bytes": encoded(photo(40, 30, i)), "path": None} for i in range(3)]
    rows = {"image": [*images, None], "label": [1, 0, 1, 1]}
    for split in ("train", "test"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(  # type: ignore[attr-defined]
            folder / f"{split}-00000-of-00001.parquet"
        )
    source = HuggingFaceImages(str(tmp_path / "set"), "", "val")
    assert source.classes == ["ant", "bee"]
    assert source.labels.tolist() == [1, 0, 1, 1]
    assert [source.read(i) for i in range(3)] == [image["bytes"] for image in images]
    with pytest.raises(BrokenImageError, match="no image in its row"):
        source.read(3)


@pytest.mark.usefixtures("datasets")
def test_user_errors(tmp_path: Path) -> None:
    make_image_folder(tmp_path / "images", train=1, val=1)
    for path in (tmp_path / "images" / "val").rglob("*.jpg"):
        path.unlink()
    with pytest.raises(
        DataError, match=r"^DATA\.DATASET hfds/images: no split validation or val or valid or test, only"
    ):
        HuggingFaceImages("images", str(tmp_path), "val")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"^DATA\.DATASET hfds/empty: [^\n]+$"):
        HuggingFaceImages("empty", str(tmp_path), "val")


@pytest.mark.parametrize("unknown", [None, -1])
def test_images_without_label_are_counted(monkeypatch: pytest.MonkeyPatch, unknown: int | None) -> None:
    """With stand-ins for the library and timm's reader, so that it runs without them."""
    library = SimpleNamespace(
        get_dataset_split_names=lambda _: ["train"], exceptions=SimpleNamespace(DatasetsError=RuntimeError)
    )
    rows = {"label": [0, 1, unknown, 1, unknown]}
    reader = SimpleNamespace(dataset=rows, label_key="label", class_to_idx={"ant": 0, "bee": 1})
    monkeypatch.setitem(sys.modules, "datasets", library)
    monkeypatch.setattr(hugging_face, "create_dataset", lambda *_, **__: SimpleNamespace(reader=reader))
    with pytest.raises(
        DataError, match=r"hfds/x: label must be known .*; 2 of 5 rows of train have none, .* is row 2$"
    ):
        HuggingFaceImages("x", "", "train")
    rows["label"] = [0, 1, 1]
    source = HuggingFaceImages("x", "", "train")
    assert source.labels.tolist() == [0, 1, 1]
    assert source.classes == ["ant", "bee"]


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="the library `datasets` is not installed; pip install datasets"):
        HuggingFaceImages("images", str(tmp_path), "val")
