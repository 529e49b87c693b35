"""Fine-tuning with main.py: other classes and image sizes, a frozen backbone, layer decay, weights of every format."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from yacs.config import CfgNode

import main
from tests.helpers import run_python
from utils.checkpoint.weights_file import load_checkpoint

pytestmark = pytest.mark.slow

RunMain = Callable[..., tuple[int, str, str]]
THIN = ["MODEL.MLLA.EMBED_DIM", "8", "MODEL.MLLA.NUM_HEADS", "[1, 1, 1, 1]", "TRAIN.WARMUP_EPOCHS", "0"]
DIGITS_0_TO_4 = ["DATA.CLASSES", "['0', '1', '2', '3', '4']"]


def command(output: Path, *opts: str, epochs: int = 1, batch_size: int = 128) -> list[str]:
    args = ["--cfg", "cfgs/digits.yaml", "--output", str(output), "--batch-size", str(batch_size)]
    return [*args, "--opts", *THIN, "DATA.IMG_SIZE", "16", "TRAIN.EPOCHS", str(epochs), "TRAIN.BASE_LR", "0.01", *opts]


@pytest.fixture(scope="module", autouse=True)
def _no_plots() -> Iterator[None]:
    """Leave out curves and predictions, which take longer to draw than these runs to train, also of `pretrained`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(main.Classification, "draw_predictions", lambda *_: None)  # no image to log
        patch.setattr("utils.logs.recorder.plot_curves", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits 0 to 4 at 16x16, with a position table."""
    output = tmp_path_factory.mktemp("pretrained")
    assert main.main(command(output, *DIGITS_0_TO_4, "MODEL.MLLA.APE", "True")) == 0
    folder = output / "mlla_digits" / "default"
    assert "5 classes; 721 training and 180 validation images" in (folder / "log_rank0.txt").read_text()
    return folder / "ckpt_epoch_0.pth"


def test_other_classes_at_another_size_with_layer_decay(pretrained: Path, run_main: RunMain, tmp_path: Path) -> None:
    opts = ["DATA.IMG_SIZE", "24", "MODEL.MLLA.APE", "True", "MODEL.LAYER_DECAY", "0.5"]
    code, out, _ = run_main(*command(tmp_path, *opts), "--pretrained", pretrained)
    assert code == 0
    assert f"weights from {pretrained} (EMA)" in out
    assert "the file has 5 classes, the data 10" in out
    assert "not from the file, re-initialized: head" in out
    assert "position table resized from 4x4 to 6x6 tokens" in out
    content = load_checkpoint(tmp_path / "mlla_digits" / "default" / "ckpt_epoch_0.pth")
    scales = {group["lr_scale"] for group in content["optimizer"]["param_groups"]}
    assert scales == {0.5**i for i in range(7)}
    assert {group["lr"] / group["lr_scale"] for group in content["optimizer"]["param_groups"]} == {
        content["optimizer"]["param_groups"][-1]["lr"]
    }
    assert content["model"]["absolute_pos_embed"].shape == (1, 36, 8)


def test_a_frozen_backbone_on_two_processes(pretrained: Path, tmp_path: Path) -> None:
    args = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py", "--freeze-backbone"]
    opts = ["MODEL.MLLA.APE", "True", "MODEL.DROP_PATH_RATE", "0.5", "AUG.MESA", "1.0"]
    done = run_python(
        *args, "--pretrained", pretrained, *command(tmp_path, *opts, epochs=2, batch_size=64), forked=True
    )
    assert done.returncode == 0, done.stderr
    before = load_checkpoint(pretrained)["state_dict_ema"]
    after = load_checkpoint(tmp_path / "mlla_digits" / "default" / "ckpt_epoch_1.pth")
    for kind in ("model", "state_dict_ema"):
        moved = [
            name for name, value in after[kind].items() if not name.startswith("head") and not value.equal(before[name])
        ]
        assert moved == []
    assert not after["model"]["head.weight"].equal(after["state_dict_ema"]["head.weight"])
    assert [len(group["params"]) for group in after["optimizer"]["param_groups"]] == [1, 1]


def test_weights_of_other_classes(pretrained: Path, run_main: RunMain, tmp_path: Path) -> None:
    ape = ["MODEL.MLLA.APE", "True"]
    for mode in (["--eval"], []):
        code, _, err = run_main(*command(tmp_path, *ape), *mode, "--resume", pretrained)
        assert code == 2
        assert "was trained on 5 classes (0, 1, 2, ...), the data has 10 (0, 1, 2, ...)" in err
        assert err.count("\n") == 1
    code, out, _ = run_main(
        *command(tmp_path, *ape, "DATA.CLASSES", "['5', '6', '7', '8', '9']"), "--eval", "--resume", pretrained
    )
    assert code == 0
    assert "other classes than the data has, 5 of 5 differ: 0 was 0, is 5, 1 was 1, is 6, 2 was 2, is 7, ..." in out
    code, out, _ = run_main(*command(tmp_path, *ape, *DIGITS_0_TO_4), "--eval", "--resume", f"{pretrained.as_uri()}")
    assert code == 0
    assert "differ" not in out
    assert len(re.findall(r"Acc@1", out)) == 2


def test_a_frozen_run_resumes_frozen_but_not_unfrozen(pretrained: Path, run_main: RunMain, tmp_path: Path) -> None:
    """Its command names the pretrained weights, which it does not need any more."""
    opts = ["MODEL.MLLA.APE", "True", "TRAIN.FREEZE", "True"]
    pretrained = Path(shutil.copy(pretrained, tmp_path))
    assert run_main(*command(tmp_path, *opts), "--pretrained", pretrained)[0] == 0
    pretrained.unlink()
    code, out, _ = run_main(*command(tmp_path, *opts, epochs=2), "--pretrained", pretrained)
    assert code == 0
    assert "resumed from" in out
    assert f"{pretrained}, named by --pretrained, is not read: the run resumes" in out
    code, _, err = run_main(*command(tmp_path, *opts[:2], epochs=3), "--pretrained", pretrained)
    assert code == 2
    assert "its optimizer state does not fit: groups of [1, 1] parameters where this run has" in err
    assert "set TRAIN.FREEZE and MODEL.LAYER_DECAY as before" in err


def test_a_run_resumes_from_an_official_checkpoint(pretrained: Path, run_main: RunMain, tmp_path: Path) -> None:
    """The official script saves yacs's own class and a scheduler, but no states of random number generators."""
    content = load_checkpoint(pretrained)
    official = {key: content[key] for key in ("model", "state_dict_ema", "optimizer")} | {"epoch": 1}
    official["model"]["layers.0.blocks.0.attn.rope.rotations"] = torch.zeros(4, 4, 4, 2)
    config = CfgNode({"DATA": {"IMG_SIZE": 16}, "AMP": False})
    torch.save({**official, "max_accuracy": 12.5, "lr_scheduler": {}, "config": config}, tmp_path / "official.pth")
    args = command(tmp_path / "out", "MODEL.MLLA.APE", "True", *DIGITS_0_TO_4, epochs=2)
    code, out, _ = run_main(*args, "--resume", tmp_path / "official.pth")
    assert code == 0
    assert f"resumed from {tmp_path / 'official.pth'}" in out
    assert "epochs 2 to 2" in out
    folder = tmp_path / "out" / "mlla_digits" / "default"
    assert [path.name for path in folder.glob("ckpt_*")] == ["ckpt_epoch_1.pth"]
    steps = {
        entry["step"].item() for entry in load_checkpoint(folder / "ckpt_epoch_1.pth")["optimizer"]["state"].values()
    }
    assert steps == {10}  # five per epoch


def test_weights_in_every_format_are_evaluated(pretrained: Path, run_main: RunMain, tmp_path: Path) -> None:
    """The official script's checkpoint, with yacs's class in it, and a .safetensors file give the same metrics."""
    content = load_checkpoint(pretrained)
    torch.save({"model": content["model"], "config": CfgNode({"A": 1})}, tmp_path / "official.pth")
    save_file({name: value.contiguous() for name, value in content["model"].items()}, tmp_path / "w.safetensors")
    scores = set()
    for path in (pretrained, tmp_path / "official.pth", tmp_path / "w.safetensors"):
        args = command(tmp_path / "out", "MODEL.MLLA.APE", "True", *DIGITS_0_TO_4)
        code, out, _ = run_main(*args, "--eval", "--resume", path)
        assert code == 0
        scores.add(re.findall(r"Acc@1 [\d.]+", out)[0])
    assert len(scores) == 1
