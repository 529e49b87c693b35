"""Images of a predict command and the files that it writes for them."""

from pathlib import Path

import numpy as np
import pytest

from data.errors import BrokenImageError, DataError
from downstream.image_files import plan_results, read_images
from utils.tools.user_files import UserFileError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("a.jpg", "deep/b.png"):
        (tmp_path / "images" / name).touch()
    return tmp_path / "images"


def test_results_keep_names_and_folders(images: Path, tmp_path: Path) -> None:
    (tmp_path / "c.d.jpg").touch()
    planned = plan_results([images, tmp_path / "c.d.jpg"], out := tmp_path / "out", [".png"], force=False)
    assert list(planned.values()) == [out / "a", out / "deep/b", out / "c.d"]
    assert not out.exists()


def test_existing_results_need_force(images: Path, tmp_path: Path) -> None:
    for name in ("a.png", "table.json"):
        out = tmp_path / f"out_{name}"
        out.mkdir()
        (out / name).touch()
        with pytest.raises(UserFileError, match=rf"{name}: already exists; name another --output, or .* --force"):
            plan_results([images], out, [".png"], others=["table.json"], force=False)
        assert plan_results([images], out, [".png"], others=["table.json"], force=True)
    (out / "deep" / "b.png").mkdir(parents=True)
    with pytest.raises(UserFileError, match="already exists"):  # a folder is never replaced
        plan_results([images], out, [".png"], force=True)


def test_a_folder_that_is_a_file(images: Path) -> None:
    with pytest.raises(UserFileError, match=r"a.jpg: is a file; name a folder with --output"):
        plan_results([images], images / "a.jpg" / "out", [".png"], force=True)


def test_an_image_is_never_replaced(images: Path) -> None:
    with pytest.raises(UserFileError, match=r"b.png: is one of the images that are read"):
        plan_results([images / "deep"], images / "deep", [".png"], force=True)


def test_two_images_of_one_name(images: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError, match=r"a.png: .*a.jpg has the same name"):
        plan_results([images, tmp_path / "a.png"], tmp_path / "out", [".png"], force=False)


def test_broken_images_are_skipped_and_reported(capsys: pytest.CaptureFixture[str]) -> None:
    def read(path: Path) -> np.ndarray:
        if path.name == "broken":
            raise BrokenImageError("broken: damaged")
        return np.zeros((1, 1, 3), np.uint8)

    results = {Path("broken"): Path("x"), Path("good"): Path("y")}
    assert [(path, result) for path, _, result in read_images(results, read)] == [(Path("good"), Path("y"))]
    assert capsys.readouterr().err == "skipped broken: damaged\n"
    with pytest.raises(DataError, match=r"none of the files can be read"):
        list(read_images({Path("broken"): Path("x")}, read))
