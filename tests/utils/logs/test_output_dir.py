from pathlib import Path

import pytest

from utils.checkpoint.files import Progress, move_replaced_checkpoints
from utils.logs import output_dir
from utils.logs.output_dir import OutputError, lock_output_dir, open_output_dir, save_config


def test_the_lock_names_its_holder_and_deletes_leftovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_dir, "LOCK_SECONDS", 0.1)
    (tmp_path / "metrics.jsonl.1.tmp").touch()
    (tmp_path / "notes.tmp").touch()
    (tmp_path / "folder.1.tmp").mkdir()
    with lock_output_dir(tmp_path):
        assert sorted(path.name for path in tmp_path.glob("*.tmp")) == ["folder.1.tmp", "notes.tmp"]  # the user's own
        holder = (tmp_path / "run_holder.txt").read_text().strip()
        with pytest.raises(OutputError) as caught:
            lock_output_dir(tmp_path)
        assert holder in str(caught.value)
    with lock_output_dir(tmp_path):
        pass


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_a_lock_that_another_run_may_have_is_noticed(tmp_path: Path, moved: bool, replaced: bool) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with lock_output_dir(folder) as lock:
        lock.check()
        if moved:
            folder.rename(tmp_path / "moved")
        else:
            (folder / "run.lock").unlink()
        if replaced:
            folder.mkdir(exist_ok=True)
            other = lock_output_dir(folder)
            other.check()
        with pytest.raises(OutputError, match=rf"^{folder}/run.lock: was deleted or moved away") as caught:
            lock.check()
        assert "\n" not in str(caught.value)
    if replaced:
        other.check()
        other.lock.release()


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="TensorBoard cannot write to a path that is not UTF-8; change OUTPUT"):
        open_output_dir(str(tmp_path / "caf\udce9"), "m", "t", rank=0)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    with pytest.raises(OutputError, match=rf"^{missing}: cannot be written: No such file .*OUTPUT"):
        save_config(missing, "SEED: 1\n")
    (tmp_path / "max_acc.pth").touch()
    (tmp_path / "replaced_1").symlink_to(tmp_path / "gone" / "folder")
    with pytest.raises(OutputError, match=rf"^{tmp_path}/replaced_1: cannot be written: .*OUTPUT"):
        move_replaced_checkpoints(tmp_path, Progress(0), continues=False)
