"""Commands and options in the Markdown pages, and a folder in which the commands can run."""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn
from yacs.config import CfgNode

import config as classification
from data import make_zip
from downstream.detection import config as detection
from downstream.detection.build import build_detector
from downstream.detection.make_shapes import make_shapes
from downstream.segmentation import build as segmentation_build
from downstream.segmentation import config as segmentation
from downstream.segmentation import make_shapes as segmentation_shapes
from models import build_model
from models.variants import RELEASED
from tests.helpers import ROOT, make_image_folder, photo

PROGRAMS = "python|torchrun|make|pip|tensorboard|sbatch|srun|bash|sh|git|conda|docker|export|source|cd|curl|wget"
SMALL_TIMM = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1), "drop_path_rate": 0.0}
SMALL_MLLA = "MODEL.MLLA.EMBED_DIM 8 MODEL.MLLA.DEPTHS [1,1,1,1] MODEL.MLLA.NUM_HEADS [1,1,1,1]"
SMALL_VIT = "MODEL.LINEAR_VIT.EMBED_DIM 8 MODEL.LINEAR_VIT.DEPTHS [1,1] MODEL.LINEAR_VIT.NUM_HEADS [1,1]"
# What makes a full-size configuration small, by command: words after --opts.
SMALL = {
    "main": f"{SMALL_MLLA} {SMALL_VIT} DATA.IMG_SIZE 32 DATA.BATCH_SIZE 4 DATA.NUM_WORKERS 0 "
    "TRAIN.EPOCHS 1 TRAIN.WARMUP_EPOCHS 0 TEST.COMPILE off",
    "utils.export": SMALL_MLLA,
    "utils.predict": SMALL_MLLA,
    "downstream.detection.main": f"{SMALL_MLLA} MODEL.DETECTOR.WIDTH 8 MODEL.DETECTOR.HIDDEN 16 "
    "MODEL.DETECTOR.ROI_SAMPLES 16 MODEL.DETECTOR.MAX_PROPOSALS 50 AUG.SHORT_SIDES [32,64] AUG.LONG_SIDE 80 "
    "TEST.SHORT_SIDE 64 TEST.LONG_SIDE 80 DATA.NUM_WORKERS 0 TRAIN.EPOCHS 1 TRAIN.DECAY_EPOCHS [1]",
    "downstream.segmentation.main": f"{SMALL_MLLA} MODEL.HEAD.CHANNELS 8 MODEL.HEAD.AUXILIARY_CHANNELS 4 "
    "DATA.SCALE [64,64] DATA.NUM_WORKERS 0 AUG.CROP_SIZE 64 TRAIN.STEPS 2 TRAIN.EVAL_STEPS 2 TRAIN.WARMUP_STEPS 1",
}
# What reads a configuration, by command.
TASKS = {"main": classification, "downstream.detection.main": detection, "downstream.segmentation.main": segmentation}
DETECTION_CFG = "downstream/detection/cfgs/mlla_t_mrcnn_1x.yaml"


class Block(NamedTuple):
    """A block of code: its page, its language ("" where it is indented), and its text."""

    page: str
    language: str
    text: str


def pages() -> list[Path]:
    """The Markdown files of the project, hidden folders and results left out."""
    found = (path.relative_to(ROOT) for path in ROOT.glob("**/*.md"))
    return sorted(path for path in found if not path.parts[0].startswith((".", "output", "build")))


def blocks() -> list[Block]:
    """All blocks of code, indented and fenced."""
    found = []
    for page in pages():
        text = (ROOT / page).read_text()
        for fence in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S):
            found.append(Block(str(page), fence[1] or "bash", fence[2]))
        without = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
        for block in re.finditer(r"(?:\A|(?<=\n\n))((?: {4}.*\n)(?:(?: {4}.*)?\n)*)", without):
            found.append(Block(str(page), "", re.sub(r"^ {4}", "", block[1], flags=re.M).strip() + "\n"))
    return found


def code_spans() -> list[tuple[str, str]]:
    """(page, text) of code within sentences and tables, on one line."""
    found = []
    for page in pages():
        text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
        text = re.sub(r"^ {4}.*$", "", text, flags=re.M)
        found += [(str(page), " ".join(span.split())) for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text)]
    return found


def commands() -> dict[str, str]:
    """Every shell command, on one line, and the page that it is on."""
    found = {}
    for page, language, text in blocks():
        if language in ("", "bash", "sh", "shell", "console") and re.match(rf"(\w+=\S+ )*({PROGRAMS})\b", text):
            for line in text.replace("\\\n", " ").splitlines():
                found[" ".join(line.removeprefix("$ ").split())] = page
    found |= {text: page for page, text in code_spans() if re.match(rf"({PROGRAMS}) \S", text)}
    return {command: page for command, page in found.items() if command}


def small_config(task: Any, path: str, command: str) -> CfgNode:
    return task.load_config(ROOT / path, SMALL[command].split())


def save_weights(path: Path, model: nn.Module, **facts: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model": model.state_dict(), **facts}, path)


def make_folder(root: Path) -> Path:
    """A folder with everything that documented commands name: small data sets, images, and weights of small models."""
    root.mkdir()
    for name in ("cfgs", "downstream", "main.py"):
        (root / name).symlink_to(ROOT / name)
    for name in ("<imagenet>", "my_images", "photos", "PATH"):
        make_image_folder(root / name, train=8, val=4)
    (root / "IMAGENET_DIR").symlink_to(root / "PATH")
    assert make_zip.main([str(root / "PATH"), str(root / "PATH")]) == 0
    for name in ("a.jpg", "b.png", "street.jpg", "photo.jpg", "aerial.tif", "dogs/rex.png", "new_photos/c.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        photo(90, 70).save(root / name)
    (root / "pictures").mkdir()
    photo(80, 60, seed=1).save(root / "pictures" / "d.jpg")
    make_dense_data(root)
    make_weights(root)
    make_runs(root)
    return root


def make_dense_data(root: Path) -> None:
    """COCO, my_data, ADEChallengeData2016 and garden, of a few small images."""
    make_shapes(root / "shapes", {"train": 4, "val": 2}, seed=1)
    (root / "COCO" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        shutil.copy(root / "shapes" / f"{split}.json", root / "COCO" / "annotations" / f"instances_{split}2017.json")
        shutil.copytree(root / "shapes" / split, root / "COCO" / f"{split}2017")
    (root / "my_data").mkdir()
    shutil.copytree(root / "shapes" / "train", root / "my_data" / "images")
    for name in ("train.json", "val.json"):
        shutil.copy(root / "shapes" / "train.json", root / "my_data" / name)
    assert segmentation_shapes.main([str(root / "garden"), "--train", "4", "--val", "2", "--size", "64"]) == 0
    for split, count in (("training", 4), ("validation", 2)):
        for kind in ("images", "annotations"):
            (root / "ADEChallengeData2016" / kind / split).mkdir(parents=True)
        for i in range(count):
            name = root / "ADEChallengeData2016" / "{}" / split / f"{i}"
            photo(64, 64, seed=i).save(str(name).format("images") + ".jpg")
            labels = np.add.outer(np.arange(64) // 20, np.arange(64) // 20).astype(np.uint8)
            Image.fromarray(labels).save(str(name).format("annotations") + ".png")


def make_runs(root: Path) -> None:
    """Folders of two runs of three epochs."""
    for name, seed in (("default", 0), ("seed1", 1)):
        folder = root / "output" / "mlla_digits" / name
        folder.mkdir(parents=True)
        config = classification.load_config(ROOT / "cfgs/digits.yaml", ["SEED", str(seed)])
        (folder / "config.yaml").write_text(config.dump())
        lines = [{"epoch": epoch, "loss": 2.0 - epoch / 2, "acc1": 50.0 + 9 * epoch + seed} for epoch in range(3)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, run in (("RUN", "default"), ("<folder>", "default"), ("OTHER_RUN", "seed1")):
        (root / name).symlink_to(f"output/mlla_digits/{run}")


def make_weights(root: Path) -> None:
    """Files of small models under the names that the pages use; the released ones where downloads are kept."""
    config = small_config(classification, "cfgs/mlla_t.yaml", "main")
    facts = {"classes": ["cat", "dog"], "config": config.dump()}
    for name in ("mlla_t.pth", "mlla_b.pth", "best.pth"):
        save_weights(root / name, build_model(config, 2), **facts)
    trained = build_model(config, 2)
    facts["state_dict_ema"] = trained.state_dict()
    for name in ("IN", "output/mlla_tiny/default/max_ema_acc.pth"):
        save_weights(root / name, trained, **facts)
    for size in ("tiny", "small", "base"):
        save_weights(root / "hub" / "checkpoints" / RELEASED[size][1], build_model(config, 1000))
    opts = [*SMALL["main"].split(), "DATA.DATASET", "digits"]  # as the study has it
    gated = classification.load_config(ROOT / "cfgs/ablation/forget_gate.yaml", opts)
    path = root / "output/ablation/runs/linear_vit_forget_gate/seed0_epochs10/max_acc.pth"
    save_weights(path, build_model(gated, 10), config=gated.dump())

    small = small_config(detection, DETECTION_CFG, "downstream.detection.main")
    (root / "CFG").write_text(small.dump())
    for name in ("DETECTOR.pth", "mask_rcnn.pth"):
        save_weights(root / name, build_detector(small, 4))
    small = small_config(
        segmentation, "downstream/segmentation/cfgs/mlla_b_upernet.yaml", "downstream.segmentation.main"
    )
    for name, count in (
        ("upernet_mlla_b.pth", 150),
        ("max_miou.pth", 6),
        ("out/garden_upernet/default/max_miou.pth", 6),
    ):
        segmentor = segmentation_build.build_model(small, count)
        save_weights(root / name, segmentor, config=small.dump(), classes=[f"class {i}" for i in range(count)])
