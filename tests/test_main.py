"""main.py from its command line: training, resuming, evaluation, speed, and error messages."""

import functools
import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from config import load_config
from main import NUM_CANDIDATES, NUM_MISTAKES, NUM_PREVIEWS, choose_previews
from models import MLLA, build_model
from tests.faults.tasks import SMALL_BACKBONE
from tests.helpers import MICRO, ROOT, THREE_DIGITS, make_image_folder, run_python
from utils.checkpoint.weights_file import load_checkpoint
from utils.training import losses
from utils.training.amp import make_precision
from utils.training.trainer import Trainer

pytestmark = pytest.mark.slow

RunMain = Callable[..., tuple[int, str, str]]
SMALL = [*SMALL_BACKBONE, "TRAIN.WARMUP_EPOCHS", "0"]
SCORES = re.compile(r" \* Acc@1 (\d+\.\d{3})(?: Acc@5 (\d+\.\d{3}))?")
AS_TRAINED = ["--opts", "AMP_DTYPE", "bfloat16"]  # --eval alone is in float32


def records_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def digits(output: Path, *opts: str, epochs: int = 2, batch_size: int = 128) -> list[str]:
    """Return the command line of a short run on three digits."""
    return all_digits(output, *THREE_DIGITS, *opts, epochs=epochs, batch_size=batch_size)


def all_digits(output: Path, *opts: str, epochs: int = 2, batch_size: int = 128) -> list[str]:
    args = ["--cfg", "cfgs/digits.yaml", "--output", str(output), "--batch-size", str(batch_size)]
    return [*args, "--opts", *SMALL, "TRAIN.EPOCHS", str(epochs), "TRAIN.BASE_LR", "0.01", *opts]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of the digits on two CPU processes through torchrun, with AMP, EMA and MESA."""
    output = tmp_path_factory.mktemp("run")
    args = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py", "--amp"]
    done = run_python(*args, *all_digits(output, "SAVE_FREQ", "2", batch_size=16))
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return output / "mlla_digits" / "default"


def test_files_of_a_run(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    expected = {"config.yaml", "metrics.jsonl", "curves.png", "predictions.png", "ckpt_epoch_1.pth", "max_acc.pth"}
    assert expected | {"max_ema_acc.pth", "log_rank0.txt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.endswith(".tmp") or name in ("ckpt_epoch_0.pth", "log_rank1.txt") for name in names)
    records = records_of(finished_run)
    keys = "epoch step lr grad_norm train_loss acc1 acc5 loss ema_acc1 ema_acc5 ema_loss"
    assert [list(record) for record in records] == [keys.split()] * 2
    speeds = [json.loads(line) for line in (finished_run / "speed.jsonl").read_text().splitlines()]
    keys = "epoch steps train_seconds data_wait_seconds eval_seconds images_per_second memory_mib process_seconds"
    assert [list(speed) for speed in speeds] == [keys.split()] * 2
    index = json.loads((finished_run / "latest.json").read_text())
    assert index == {"checkpoint": "ckpt_epoch_1.pth", "epochs": 2, "steps": 0}
    assert [(record["epoch"], record["step"]) for record in records] == [(0, 44), (1, 88)]
    log = (finished_run / "log_rank0.txt").read_text()
    assert "Train: [1/2][44/44]  loss" in log
    assert f"Max accuracy: {max(record['acc1'] for record in records):.3f}%" in log


def test_training_beats_chance(finished_run: Path) -> None:
    assert records_of(finished_run)[-1]["acc1"] > 30  # 10 is chance


def test_checkpoint_holds_everything_and_loads_safely(finished_run: Path) -> None:
    content = load_checkpoint(finished_run / "ckpt_epoch_1.pth")
    expected = {"model", "state_dict_ema", "optimizer", "scaler", "epoch", "max_accuracy", "max_accuracy_e"}
    expected |= {"steps", "images_per_step", "ranks", "origin", "num_train_images", "scores", "best_epochs"}
    assert expected | {"config", "classes", "versions"} == set(content)
    assert content["epoch"] == 1
    assert len(content["ranks"]) == 2
    assert content["classes"] == list("0123456789")
    assert content["config"] == (finished_run / "config.yaml").read_text()


def assert_same_scores(out: str, record: dict[str, float]) -> None:
    """Check that --eval printed the scores of the model and its EMA in a record of the training."""
    scores = [float(score) for both in SCORES.findall(out) for score in both]
    expected = [record[key] for key in ("acc1", "acc5", "ema_acc1", "ema_acc5")]
    assert scores == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("name", ["ckpt_epoch_1.pth", "max_acc.pth"])
@pytest.mark.usefixtures("on_the_cpu")
def test_evaluation_repeats_the_metrics_of_training(
    finished_run: Path, run_main: RunMain, tmp_path: Path, name: str
) -> None:
    """The configuration is the one in the checkpoint."""
    code, out, _ = run_main("--output", tmp_path, "--eval", "--resume", finished_run / name, *AS_TRAINED)
    assert code == 0
    best = max(records_of(finished_run), key=lambda record: record["acc1"])
    record = records_of(finished_run)[-1] if name.startswith("ckpt") else best
    assert_same_scores(out, record)
    assert f"Accuracy of the network on the 360 test images: {record['acc1']:.3f}%" in out
    assert f"Accuracy of the EMA network on the 360 test images: {record['ema_acc1']:.3f}%" in out


def test_repeating_a_complete_run_changes_no_file(finished_run: Path, run_main: RunMain) -> None:
    changed = ("log_rank0.txt", "run.lock", "run_holder.txt")  # by the second call
    before = {path: path.stat().st_mtime_ns for path in finished_run.iterdir() if path.name not in changed}
    code, out, _ = run_main("--cfg", finished_run / "config.yaml")
    assert code == 0
    assert "this run is complete" in out
    assert before == {path: path.stat().st_mtime_ns for path in before}


@pytest.mark.parametrize(("workers", "mesa"), [("0", "0.0"), ("1", "1.0")])
def test_a_resumed_run_ends_with_the_same_weights_and_metrics(
    run_main: RunMain, tmp_path: Path, workers: str, mesa: str
) -> None:
    """Two epochs, then a third after a restart that finds a torn newer file, against three in one go."""
    extra = ["AUG.MIXUP", "0.5", "MODEL.DROP_PATH_RATE", "0.2", "MODEL.DROP_RATE", "0.1", "AUG.MESA", mesa]
    extra += ["DATA.NUM_WORKERS", workers]
    assert run_main(*digits(tmp_path / "whole", *extra, epochs=3), "--amp")[0] == 0
    stopped = digits(tmp_path / "parts", *extra, epochs=3)

    def stop_after_two_epochs(trainer: Trainer) -> bool:
        if trainer.state.progress.epochs == 2:
            raise KeyboardInterrupt
        return train_epoch(trainer)

    train_epoch = Trainer.train_epoch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_epoch", stop_after_two_epochs)
        assert run_main(*stopped, "--amp")[0] == 130
    folder = tmp_path / "parts" / "mlla_digits" / "default"
    (folder / "ckpt_epoch_7.pth").write_bytes(b"torn")
    code, out, _ = run_main(*stopped, "--amp")
    assert code == 0
    assert "skipped a checkpoint" in out
    assert "ckpt_epoch_1.pth" in out
    whole = tmp_path / "whole" / "mlla_digits" / "default"
    one, other = (load_checkpoint(path / "ckpt_epoch_2.pth") for path in (whole, folder))
    for kind in ("model", "state_dict_ema"):
        assert all(value.equal(other[kind][name]) for name, value in one[kind].items())
    assert (whole / "metrics.jsonl").read_bytes() == (folder / "metrics.jsonl").read_bytes()


def test_evaluation_needs_explicit_weights(finished_run: Path, run_main: RunMain) -> None:
    assert "evaluation needs weights" in mistake(run_main, "--cfg", finished_run / "config.yaml", "--eval")


def test_explicit_resume_overrides_auto_resume_and_keeps_replaced_files(run_main: RunMain, tmp_path: Path) -> None:
    folder = tmp_path / "mlla_digits" / "default"
    assert run_main(*digits(tmp_path, epochs=3))[0] == 0
    first, best = folder / "ckpt_epoch_0.pth", (folder / "max_acc.pth").read_bytes()
    old = {path.name: path.read_bytes() for path in folder.glob("ckpt_epoch_[12].pth")}
    old_lines = (folder / "metrics.jsonl").read_text().splitlines()
    settings = ["TRAIN.WEIGHT_DECAY", "0.3", "TRAIN.OPTIMIZER.BETAS", "[0.5, 0.9]"]
    code, out, _ = run_main("--resume", first, *digits(tmp_path, *settings, epochs=2))
    assert code == 0
    assert f"resumed from {first}" in out
    replaced = folder / "replaced_1"
    assert f"what this run replaces is kept in {replaced}" in out
    assert {path.name: path.read_bytes() for path in replaced.glob("ckpt_*.pth")} == old
    assert (replaced / "max_acc.pth").read_bytes() == best
    assert (folder / "metrics_replaced.jsonl").read_text().splitlines() == old_lines[1:]
    assert [record["epoch"] for record in records_of(folder)] == [0, 1]
    assert sorted(path.name for path in folder.glob("ckpt_*.pth")) == ["ckpt_epoch_0.pth", "ckpt_epoch_1.pth"]
    groups = load_checkpoint(folder / "ckpt_epoch_1.pth")["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]  # the new settings, not the checkpoint's
    assert groups[0]["betas"] == (0.5, 0.9)


def test_best_checkpoints_survive_a_new_run_in_their_folder(run_main: RunMain, tmp_path: Path) -> None:
    folder = tmp_path / "mlla_digits" / "default"
    assert run_main(*digits(tmp_path, epochs=1))[0] == 0
    best = (folder / "max_acc.pth").read_bytes()
    (folder / "ckpt_epoch_0.pth").unlink()  # another name of max_acc.pth, which must stay whole
    (folder / "ckpt_epoch_0.pth").write_bytes(b"damaged")
    (folder / "metrics.jsonl").write_text('12\n{"epo')
    assert run_main(*digits(tmp_path, "SEED", "1", epochs=1))[0] == 0
    assert (folder / "replaced_1" / "max_acc.pth").read_bytes() == best
    assert (folder / "replaced_1" / "ckpt_epoch_0.pth").read_bytes() == b"damaged"
    assert len(records_of(folder)) == 1


def test_a_checkpoint_of_another_optimizer_is_refused(run_main: RunMain, finished_run: Path, tmp_path: Path) -> None:
    args = ["--cfg", finished_run / "config.yaml", "--output", tmp_path, "--resume", finished_run / "max_acc.pth"]
    message = mistake(run_main, *args, "--opts", "TRAIN.OPTIMIZER.NAME", "sgd")
    assert "was trained with another TRAIN.OPTIMIZER.NAME" in message


def test_mesa_starts_after_a_quarter_of_the_epochs(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    training_loss = losses.training_loss

    def note(logits: torch.Tensor, targets: torch.Tensor, *of_teacher: Any) -> torch.Tensor:
        seen.append(bool(of_teacher))
        return training_loss(logits, targets, *of_teacher)

    monkeypatch.setattr(losses, "training_loss", note)
    monkeypatch.setattr("utils.training.training_run.memory_warning", lambda *_: "")  # which runs the losses, too
    options = ("TRAIN.COOLDOWN_EPOCHS", "1", "AUG.MESA", "1.0", "EMA.WARMUP", "off")
    assert run_main(*digits(tmp_path, *options, epochs=3, batch_size=200))[0] == 0
    assert seen == [False] * 2 + [True] * 6  # two steps per epoch; cool-down counts


def test_compiled_evaluation_gives_the_same_metrics(
    run_main: RunMain, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a backend that only traces, since generating code takes a minute."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    args = ["--cfg", finished_run / "config.yaml", "--output", tmp_path, "--eval", "--resume"]
    plain = run_main(*args, finished_run / "max_acc.pth", "--no-amp")[1]
    compiled = run_main(*args, finished_run / "max_acc.pth", "--no-amp", "--opts", "TEST.COMPILE", "default")[1]
    assert len(SCORES.findall(plain)) == 2
    assert SCORES.findall(compiled) == SCORES.findall(plain)


@pytest.mark.parametrize("work", ["train", "evaluate", "measure"])
@pytest.mark.usefixtures("on_the_cpu")  # a GPU needs a C compiler instead, at the first start alone
def test_a_missing_compiler_is_one_line(
    run_main: RunMain, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work: str
) -> None:
    from torch._inductor import config as inductor  # takes two seconds
    from torch._inductor.utils import clear_inductor_caches

    clear_inductor_caches()  # of earlier tests, whose kernels need no compiler
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "no_such_compiler"))
    args = {
        "train": ["--tag", "compiled", "--opts", "TRAIN.COMPILE", "default"],
        "evaluate": ["--eval", "--resume", finished_run / "max_acc.pth", "--opts", "TEST.COMPILE", "default"],
        "measure": ["--throughput", "--opts", "TEST.COMPILE", "max-autotune"],
    }[work]
    with inductor.patch({"cpp.cxx": (None, str(tmp_path / "no_such_compiler"))}):
        code, out, err = run_main("--cfg", finished_run / "config.yaml", "--output", tmp_path, *args)
    assert code == 2
    line = f"{args[-2]} {args[-1]}: torch.compile needs a C++ compiler, and found none that works (CXX is {tmp_path}"
    assert line in out
    assert "install one, such as g++, or leave it off" in out
    assert "Traceback" not in out + err


def test_a_changed_configuration_is_logged_and_the_previous_one_kept(run_main: RunMain, tmp_path: Path) -> None:
    assert run_main(*digits(tmp_path, epochs=1))[0] == 0
    code, out, _ = run_main(*digits(tmp_path, "SEED", "3", epochs=2))
    assert code == 0
    assert "the configuration changed" in out
    assert "SEED 0 -> 3; TRAIN.EPOCHS 1 -> 2" in out
    folder = tmp_path / "mlla_digits" / "default"
    assert "EPOCHS: 1" in (folder / "config_1.yaml").read_text()
    assert "EPOCHS: 2" in (folder / "config.yaml").read_text()


def test_a_run_is_not_overwritten_without_auto_resume(run_main: RunMain, tmp_path: Path) -> None:
    assert run_main(*digits(tmp_path, epochs=1))[0] == 0
    code, _, err = run_main(*digits(tmp_path, "TRAIN.AUTO_RESUME", "False"))
    assert code == 2
    assert "would be overwritten; name another --tag" in err


def test_a_loss_that_is_not_finite_stops_the_run(run_main: RunMain, tmp_path: Path) -> None:
    args = digits(tmp_path, "TRAIN.CLIP_GRAD", "0.0", "TRAIN.OPTIMIZER.NAME", "sgd", "PRINT_FREQ", "2")
    args[args.index("TRAIN.BASE_LR") + 1] = "1e6"
    code, out, _ = run_main(*args)
    assert code == 1
    assert re.search(r"not finite in epoch 1, step \d \(step \d of the run\), learning rate 2.500e\+05", out)
    assert not list((tmp_path / "mlla_digits" / "default").glob("*.pth"))


def test_mesa_without_ema_is_off_with_a_warning(run_main: RunMain, tmp_path: Path) -> None:
    code, out, _ = run_main("--no-model-ema", *digits(tmp_path, "AUG.MESA", "2.0", epochs=1))
    assert code == 0
    assert "AUG.MESA 2.0 is off: its teacher is the EMA model" in out
    record = records_of(tmp_path / "mlla_digits" / "default")[0]
    assert "ema_acc1" not in record
    assert load_checkpoint(tmp_path / "mlla_digits" / "default" / "max_acc.pth")["state_dict_ema"] is None


@pytest.mark.parametrize("mode", [[], ["--throughput", "--train"]])
def test_batch_norm_needs_two_images_of_32_pixels(run_main: RunMain, tmp_path: Path, mode: list[str]) -> None:
    code, _, err = run_main(*mode, *digits(tmp_path, batch_size=1, epochs=1))
    assert code == 2
    assert err.startswith("error: DATA.BATCH_SIZE 1: batch norm cannot train on one image")
    assert err.count("\n") == 1


def test_pretrained_weights_with_another_head(run_main: RunMain, tmp_path: Path) -> None:
    torch.save({"model": MLLA(**MICRO, num_classes=10).state_dict()}, tmp_path / "weights.pth")
    args = ["--cfg", "cfgs/digits.yaml", "--pretrained", tmp_path / "weights.pth", "--output", tmp_path]
    data = make_image_folder(
        tmp_path / "images", train=8, val=5, classes=("a$", "caf\udce9$_{")
    )  # names in predictions.png
    args += ["--data-path", data, "--batch-size", "8", "--opts", "DATA.DATASET", "folder", "TRAIN.EPOCHS", "1"]
    code, out, _ = run_main(*args, "TRAIN.WARMUP_EPOCHS", "0")
    assert code == 0
    assert "the file has 10 classes, the data 2" in out
    assert "re-initialized: head" in out


def test_outputs_beyond_the_classes_are_evaluated_by_index(
    image_folder: Path, run_main: RunMain, tmp_path: Path
) -> None:
    """Of 1000 outputs 1 is the highest for every image, followed by 999 to 996; the folder has classes 0 and 1."""
    weights = MLLA(img_size=32, num_classes=1000, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)).state_dict()
    weights["head.weight"].zero_()
    weights["head.bias"].copy_(torch.arange(1000.0) + 2000 * (torch.arange(1000) == 1))
    torch.save(weights, tmp_path / "w.pth")
    args = ["--cfg", "cfgs/mlla_t.yaml", "--data-path", image_folder, "--output", tmp_path, "--batch-size", "4"]
    opts = ["--opts", *SMALL, "DATA.IMG_SIZE", "32", "DATA.NUM_WORKERS", "0"]
    args += ["--eval", "--resume", tmp_path / "w.pth", *opts]
    message = mistake(run_main, *args)
    assert "2 of another shape: head.weight (1000, 64) where the model has (2, 64)" in message
    assert "Set MODEL.NUM_CLASSES 1000 to evaluate it" in message
    code, out, _ = run_main(*args, "MODEL.NUM_CLASSES", "1000")
    assert code == 0
    assert SCORES.findall(out) == [("50.000", "50.000")]
    assert (tmp_path / "mlla_tiny" / "default" / "predictions.png").exists()


class FakeData:
    """Images with their number in the first pixel, in batches of five."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def previews(self, count: int, *, batch_size: int) -> Iterator[tuple[Tensor, list[int]]]:
        assert (count, batch_size) == (NUM_CANDIDATES, NUM_PREVIEWS)
        for start in range(0, len(self.labels), 5):
            labels = self.labels[start : start + 5]
            images = torch.zeros(len(labels), 3, 2, 2)
            images[:, 0, 0, 0] = torch.tensor(range(start, start + len(labels)))
            yield images, labels


@pytest.mark.parametrize(
    ("num_right", "num_wrong", "wrong_shown"),
    [(7, 2, 2), (50, 2, 2), (50, 60, NUM_MISTAKES), (5, 60, NUM_PREVIEWS - 5), (0, 60, NUM_PREVIEWS), (7, 0, 0)],
)
def test_mistakes_are_shown_first(num_right: int, num_wrong: int, wrong_shown: int) -> None:
    labels = [0] * num_right + [1] * num_wrong

    def model(images: Tensor) -> Tensor:
        """Predict class 0, the later the image the more confident."""
        return torch.stack((1 + images[:, 0, 0, 0], torch.zeros(len(images))), dim=1)

    device = torch.device("cpu")
    precision = make_precision(device, amp=False, dtype="auto")
    run: Any = SimpleNamespace(data=FakeData(labels), process=SimpleNamespace(device=device), precision=precision)
    shown, line = choose_previews(run, cast(nn.Module, model))
    assert line.startswith(f"{num_wrong} of {num_right + num_wrong} images are wrong")
    assert [preview.is_right for preview in shown] == [False] * wrong_shown + [True] * (len(shown) - wrong_shown)
    assert len(shown) == min(NUM_PREVIEWS, len(labels))
    confidences = [preview.confidence for preview in shown if not preview.is_right]
    assert confidences == sorted(confidences, reverse=True)


@pytest.mark.parametrize("launcher", ["torch.distributed.launch", "torch.distributed.run"])
def test_official_commands(launcher: str, image_folder: Path, tmp_path: Path) -> None:
    """Training, then evaluation of released-style weights, as the official README has them."""
    config = tmp_path / "tiny.yaml"
    config.write_text(
        f"BASE: ['{ROOT / 'cfgs' / 'mlla_t.yaml'}']\nDATA: {{IMG_SIZE: 32, BATCH_SIZE: 4, NUM_WORKERS: 1}}\n"
        "MODEL: {MLLA: {EMBED_DIM: 8, NUM_HEADS: [1, 1, 1, 1], DEPTHS: [1, 1, 1, 1]}}\n"
        "TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 0}\n"
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    start = ["-m", launcher, "--nproc_per_node=2", f"--master_port={port}"]
    common = ["main.py", "--cfg", config, "--data-path", image_folder, "--output", tmp_path]
    done = run_python(*start, *common, "--amp", forked=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "mlla_tiny" / "default"
    content = load_checkpoint(folder / "ckpt_epoch_0.pth")
    assert content["model"]["head.weight"].shape == (2, 64)
    torch.save({"model": content["model"]}, tmp_path / "released.pth")
    done = run_python(*start, *common, "--eval", "--resume", tmp_path / "released.pth", forked=True)
    assert done.returncode == 0, done.stderr
    ((acc1, _),) = SCORES.findall(done.stdout)
    assert float(acc1) == pytest.approx(records_of(folder)[0]["acc1"], abs=1e-3)


def test_throughput_needs_no_data(run_main: RunMain, tmp_path: Path) -> None:
    args = ["--cfg", "cfgs/digits.yaml", "--throughput", "--amp", "--batch-size", "2", "--output", tmp_path]
    assert run_main(*args)[0] == 0
    code, out, _ = run_main(*args, "--opts", "DATA.IMG_SIZE", "48")
    assert code == 0
    table = [line for line in out.splitlines() if line.split()[:1] in (["model"], ["mlla_digits"])]
    heading, row, _ = table[-3:]  # the last is for a batch of 1
    assert heading.split()[-2:] == ["peak", "MiB"]
    assert row.split()[0] == "mlla_digits"
    lines = (tmp_path / "mlla_digits" / "default" / "throughput.jsonl").read_text().splitlines()
    first, alone, second, _ = map(json.loads, lines)
    assert (alone["batch"], alone["work"]) == (1, "inference")
    assert (first["size"], second["size"]) == (32, 48)
    assert (first["precision"], first["batch"], first["layout"]) == ("bfloat16", 2, "channels_last")
    assert first["images_per_second"] == pytest.approx(2000 / first["milliseconds_per_batch"])
    assert first["memory_mib"] > 50


def test_profile(run_main: RunMain) -> None:
    code, out, _ = run_main("--cfg", "cfgs/mlla_t.yaml", "--profile")
    assert code == 0
    assert re.search(r"total +24,392,200 +4.13", out)
    assert re.search(r"paper +25 M +4.2", out)


@pytest.mark.parametrize("dataset", ["wds/foo", "hfds/foo"])
def test_profile_needs_no_dataset(run_main: RunMain, dataset: str) -> None:
    code, out, err = run_main("--cfg", "cfgs/mlla_t.yaml", "--profile", "--opts", "DATA.DATASET", dataset)
    assert (code, err) == (0, "counting parameters and MACs of mlla_tiny, in seconds, or a minute for a detector\n")
    assert re.search(r"total +24,392,200 ", out)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on a GPU")
@pytest.mark.parametrize("mode", [[], ["--eval"]])
def test_kernels_that_cannot_run_are_one_line(run_main: RunMain, tmp_path: Path, mode: list[str]) -> None:
    args = ["--cfg", "cfgs/digits.yaml", "--output", tmp_path, *(["--resume", tmp_path / "w.pth"] if mode else [])]
    torch.save(build_model(load_config("cfgs/digits.yaml")).state_dict(), tmp_path / "w.pth")
    code, out, err = run_main(*args, *mode, "--opts", "MODEL.KERNELS", "triton", "DATA.NUM_WORKERS", "0")
    assert code == 2
    assert "Traceback" not in out + err
    assert "use auto or torch" in (out + err).splitlines()[-1]


def test_workers_that_do_not_start_are_one_line(
    run_main: RunMain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.workers.RestartingDataLoader.have_started", lambda *_: False)
    code, out, err = run_main("--cfg", "cfgs/digits.yaml", "--output", tmp_path, "--opts", "DATA.NUM_WORKERS", "1")
    assert code == 2
    assert "Traceback" not in out + err
    assert "lower DATA.NUM_WORKERS, 0 loads without them" in (out + err).splitlines()[-1]


def mistake(run_main: RunMain, *args: str | Path) -> str:
    """Return the one line that a wrong command line prints."""
    code, _, err = run_main(*args)
    assert code == 2
    message = err.strip()
    assert message.startswith("error: ")
    assert "\n" not in message
    assert "Traceback" not in message
    return message


def test_mistakes_on_the_command_line(run_main: RunMain) -> None:
    digits = ("--cfg", "cfgs/digits.yaml")
    assert "--cfg" in mistake(run_main)
    assert "nothere.yaml: no such configuration file" in mistake(run_main, "--cfg", "nothere.yaml")
    assert "did you mean --throughput?" in mistake(run_main, *digits, "--througput")
    assert "did you mean --batch-size?" in mistake(run_main, *digits, "--batchsize=4")
    assert "--lr 1; set it with --opts TRAIN.BASE_LR VALUE" in mistake(run_main, *digits, "--lr", "1")
    assert "set it with --opts TRAIN.WEIGHT_DECAY VALUE" in mistake(run_main, *digits, "--weight-decay=1")
    assert "unknown key; did you mean TRAIN.BASE_LR?" in mistake(run_main, *digits, "--opts", "TRAIN.LR", "3")
    kernels = mistake(run_main, *digits, "--data-path", "nowhere", "--opts", "MODEL.KERNELS", "triton")
    assert kernels == "error: MODEL.KERNELS triton: there is no Triton for the device cpu; use auto or torch"
    assert "invalid int value" in mistake(run_main, *digits, "--batch-size", "many")
    assert "unknown key; did you mean TRAIN.EPOCHS?" in mistake(run_main, *digits, "--opts", "TRAIN.EPOCH", "3")
    assert "must be of type int" in mistake(run_main, *digits, "--opts", "TRAIN.EPOCHS", "few")
    assert "must be from 1 to" in mistake(run_main, *digits, "--opts", "TRAIN.EPOCHS", "0")
    assert "must be from 1 to" in mistake(run_main, *digits, "--batch-size", "0")
    assert "heads and 4 must divide" in mistake(run_main, *digits, "--opts", "MODEL.MLLA.NUM_HEADS", "[3, 3, 3, 3]")
    assert "comes without archives" in mistake(run_main, *digits, "--zip")
    for args in ("--train", "--baseline timm:resnet18", "--sizes 32", "--opts BENCHMARK.LOADING 8"):
        assert "add --throughput" in mistake(run_main, *digits, "--eval", *args.split())
    assert "TRAIN.EPOCH " in mistake(run_main, *digits, "--opts", "TRAIN.EPOCH", "3", "--opts", "TAG", "x")


def test_mistakes_in_paths(run_main: RunMain, tmp_path: Path) -> None:
    out = ("--output", tmp_path / "out")
    tiny = ("--cfg", "cfgs/mlla_t.yaml", *out, "--opts", "DATA.IMG_SIZE", "32")
    digits = ("--cfg", "cfgs/digits.yaml")
    assert "no folder" in mistake(run_main, "--data-path", tmp_path, *tiny)
    make_image_folder(tmp_path, train=1, val=1)
    (tmp_path / "val").rename(tmp_path / "test")
    assert f"no folder {tmp_path / 'val'}" in mistake(run_main, "--data-path", tmp_path, *tiny)
    (tmp_path / "test").rename(tmp_path / "val")
    (tmp_path / "train" / "cat" / "0.jpg").unlink()
    assert "cat: a class folder without images" in mistake(run_main, "--data-path", tmp_path, *tiny)
    (tmp_path / "file").write_text("no folder")
    assert "cannot be written: Not a directory" in mistake(run_main, *digits, "--output", tmp_path / "file" / "out")
    assert "more than the 1437 training images" in mistake(run_main, *digits, *out, "--batch-size", "1438")


def test_mistakes_in_weights(run_main: RunMain, tmp_path: Path, finished_run: Path) -> None:
    for mode in (["--eval"], []):
        args = ["--cfg", "cfgs/digits.yaml", "--output", tmp_path / "out", *mode, "--resume"]
        assert "no such checkpoint file" in mistake(run_main, *args, tmp_path / "none.pth")
        assert "is a folder" in mistake(run_main, *args, tmp_path)
        assert "cannot be read as a PyTorch weights file" in mistake(run_main, *args, "README.md")
        message = mistake(run_main, *args, finished_run / "max_acc.pth")
        assert "does not fit the model" in message
        assert len(message) - len(str(finished_run)) < 300


def test_exit_code_of_the_process() -> None:
    done = run_python("main.py", "--cfg", "nothere.yaml")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_progress_bar_on_a_terminal(tmp_path: Path) -> None:
    """A pseudo-terminal of 80 columns sees bars, with rate and end, and a line per epoch; the rest is in the log."""
    pty = pytest.importorskip("pty")
    transcript = bytearray()

    def read(fd: int) -> bytes:
        transcript.extend(data := os.read(fd, 65536))
        return data

    command = shlex.join([sys.executable, "main.py", *all_digits(tmp_path, epochs=1)])
    args = ["sh", "-c", f"stty rows 24 cols 80; exec {command}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        status = pty.spawn(args, read)
    text = transcript.decode()
    assert status == 0, text
    bars = [state for state in re.split(r"[\r\n]+", text) if state.startswith(("epoch 1/1 ", "evaluating"))]
    assert max(map(len, bars)) <= 80
    assert any(re.fullmatch(r"epoch 1/1 10/11 \|.+\| loss \d\.\d{4}  \d+ img/s  ETA 00:\d\d", bar) for bar in bars)
    assert any(re.match(r"evaluating model.* 0/3 \|", bar) for bar in bars)
    assert re.search(r"epoch 1/1: loss \d\.\d+, top-1 \d+\.\d+, EMA \d+\.\d+, 00:\d\d, best \d+\.\d+ \(epoch 1\)", text)
    log = (tmp_path / "mlla_digits" / "default" / "log_rank0.txt").read_text()
    for detail in ("[11/11]  loss", "model on 360 images", "saved ckpt_epoch_0.pth"):
        assert detail in log
        assert detail not in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_training_on_a_gpu(run_main: RunMain, tmp_path: Path, dtype: str) -> None:
    """--eval repeats its metrics, in the same precision."""
    code, out, _ = run_main(*all_digits(tmp_path, "AMP_DTYPE", dtype, "AUG.MESA", "1.0", epochs=5), "--amp")
    assert code == 0
    assert f"on cuda:0, {dtype}" in out
    folder = tmp_path / "mlla_digits" / "default"
    record = records_of(folder)[-1]
    assert record["acc1"] > 20
    args = ["--output", tmp_path / "eval", "--eval", "--resume", folder / "ckpt_epoch_4.pth"]
    code, out, _ = run_main(*args, "--opts", "AMP_DTYPE", dtype)
    assert code == 0
    assert_same_scores(out, record)
