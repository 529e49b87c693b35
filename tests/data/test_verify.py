from pathlib import Path

import pytest

from data import decoding, make_zip, verify
from tests.helpers import exit_code, make_image_folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Twelve images, of which three are broken and one is damaged where only a strict decoder notices."""
    root = make_image_folder(tmp_path / "images", train=4, val=2)
    cat = root / "train" / "cat"
    (cat / "1.jpg").write_bytes(b"")
    (cat / "2.jpg").write_text("text")
    whole = (root / "val" / "dog" / "0.jpg").read_bytes()
    (root / "val" / "dog" / "0.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "val" / "dog" / "1.jpg").write_bytes(whole[: len(whole) // 2] + decoding.END_OF_IMAGE)
    return root


@pytest.mark.parametrize("workers", ["0", "2"])
@pytest.mark.parametrize("zipped", [False, True])
def test_broken_images_are_listed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: str, zipped: bool
) -> None:
    output = tmp_path / "new" / "bad.txt"
    source = images
    if zipped:
        source = tmp_path / "zips"
        assert make_zip.main([str(images), str(source)]) == 0
    words = [str(source), "--workers", workers, "--output", str(output), *(["--zip"] if zipped else [])]
    assert verify.main(words) == 1
    lines = [line.split("\t") for line in output.read_text().splitlines()]
    names = [name.replace(f"{source}/", "") for name, _ in lines]
    separator = ".zip: " if zipped else "/"
    expected = ["train@cat/1.jpg", "train@cat/2.jpg", "val@dog/0.jpg", "val@dog/1.jpg"]
    reasons = ["an empty file", "not an image", "cut off", "premature end"]
    if decoding.simplejpeg is None:
        expected, reasons = expected[:3], reasons[:3]
    assert names == [name.replace("@", separator) for name in expected]
    assert all(reason in found for reason, (_, found) in zip(reasons, lines, strict=True))
    assert f"12 images, {len(expected)} cannot be used" in capsys.readouterr().out
    assert exit_code(verify.main, words) == 2
    assert "bad.txt exists; move it" in capsys.readouterr().err


def test_names_that_are_not_utf8(images: Path, tmp_path: Path) -> None:
    """As archives in Latin-1 unpack; the list holds the bytes of the names."""
    (images / "train" / "cat" / "1.jpg").rename(images / "train" / "cat" / "caf\udce9.jpg")
    assert verify.main([str(images), "--workers", "0", "--output", str(tmp_path / "bad.txt")]) == 1
    assert b"/train/cat/caf\xe9.jpg\tan empty file" in (tmp_path / "bad.txt").read_bytes()


def test_no_list_for_a_good_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "images", train=2, val=1)
    assert verify.main([str(tmp_path / "images"), "--workers", "0", "--output", str(tmp_path / "bad.txt")]) == 0
    assert "6 images, 0 cannot be used" in capsys.readouterr().out
    assert not (tmp_path / "bad.txt").exists()


def test_user_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, reason in (
        (["--zip"], "no train.zip in it"),
        ([], "no folder"),
        (["--workers", "-1"], "argument --workers: -1: must be a whole number, at least 0"),
    ):
        assert exit_code(verify.main, [str(tmp_path), "--output", str(tmp_path / "bad.txt"), *words]) == 2
        assert reason in capsys.readouterr().err


def test_an_unwritable_output_is_noticed_before_the_scan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_image_folder(tmp_path / "images", train=1, val=1)
    (tmp_path / "file").touch()
    assert exit_code(verify.main, [tmp_path / "images", "--output", tmp_path / "file" / "bad.txt"]) == 2
    assert f"error: {tmp_path}/file/bad.txt: " in capsys.readouterr().err
