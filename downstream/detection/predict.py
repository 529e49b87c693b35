"""Draw what a detector finds in images, and write it down as JSON.

python -m downstream.detection.predict street.jpg dogs/*.png --cfg downstream/detection/cfgs/mlla_t_mrcnn_1x.yaml \\
    --resume DETECTOR.pth --output OUT
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights
from yacs.config import CfgNode

from downstream.detection.build import build_detector
from downstream.detection.config import load_config
from downstream.detection.data.coco import read_image
from downstream.detection.data.dataset import Item, collate, eval_item
from downstream.detection.data.transforms import normalize
from downstream.detection.evaluation import Result, results_of
from downstream.detection.pictures import annotated, found_of, save_picture
from utils.checkpoint.weights import load_weights, read_weights
from utils.config.command_line import Parser, report_user_errors
from utils.config.errors import ConfigError
from utils.logs.output_dir import unused_name
from utils.training.amp import make_precision

CLASSIFIER = "roi_head.bbox_head.fc_cls.weight"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("images", nargs="+", type=Path, help="image files, of any size")
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file that the detector was trained with")
    parser.add_argument(
        "--resume", "--weights", required=True, metavar="FILE", help="the detector's weights, EMA's if there"
    )
    parser.add_argument("--output", type=Path, default=Path("output/predictions"), metavar="FOLDER")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="SCORE", help="lowest score that is drawn")
    parser.add_argument("--amp", action="store_true", help="16-bit autocast")
    parser.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE")
    words = parser.parse_args(argv)
    with report_user_errors():
        config = load_config(words.cfg, words.opts)
        categories, model = open_detector(config, words.resume)
        images = [read_image(path) for path in words.images]
        words.output.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = make_precision(device, amp=words.amp, dtype=config.AMP_DTYPE)
    model = model.to(device).eval()
    listed: list[dict[str, Any]] = []
    annotations: list[Result] = []
    for number, (path, image) in enumerate(zip(words.images, images, strict=True), 1):
        item = eval_item(image, short_side=config.TEST.SHORT_SIDE, long_side=config.TEST.LONG_SIDE, image_id=number)
        with precision.autocast():
            results = detect(model, item, [category["id"] for category in categories], device)
        picture = unused_name(words.output, path.stem.replace("{", "(").replace("}", ")") + "_{}.png")
        save_picture(annotated(image, found_of(results, categories, threshold=words.threshold)), picture)
        listed.append({"id": number, "file_name": str(path), "height": image.shape[0], "width": image.shape[1]})
        annotations += [{"id": len(annotations) + i, **result} for i, result in enumerate(results, 1)]
        shown = sum(result["score"] >= words.threshold for result in results)
        print(f"{path}: {shown} objects with a score of {words.threshold:g} or more, drawn in {picture}")
    written = unused_name(words.output, "predictions_{}.json")
    written.write_text(json.dumps({"images": listed, "annotations": annotations, "categories": categories}))
    print(f"all {len(annotations)} detections: {written}")
    return 0


def open_detector(config: CfgNode, path: str) -> tuple[list[dict[str, Any]], nn.Module]:
    """The categories (id, name) and the model of a weights file.

    Raises:
        ValueError: it cannot be read, holds no detector, or does not fit the configuration.
    """
    found = read_weights(path, tolerant=True)
    weights = found.average or found.model or {}
    if CLASSIFIER not in weights:
        raise ConfigError(f"{path}: holds no detector, which would have {CLASSIFIER}; --resume names a detector's file")
    model = build_detector(config, num_classes=weights[CLASSIFIER].shape[0] - 1)
    load_weights(model, weights, path)
    return categories_of(found.classes, weights[CLASSIFIER].shape[0] - 1), model


def categories_of(names: Sequence[str] | None, count: int) -> list[dict[str, Any]]:
    """Names that the file holds; COCO's with its ids where it holds none and 80 are needed; else numbers."""
    if names and len(names) == count:
        return [{"id": number, "name": str(name)} for number, name in enumerate(names, 1)]
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    listed = [{"id": i, "name": name} for i, name in enumerate(coco) if name not in ("__background__", "N/A")]
    return listed if len(listed) == count else [{"id": i, "name": f"class {i}"} for i in range(1, count + 1)]


def detect(model: nn.Module, item: Item, category_ids: list[int], device: torch.device) -> list[Result]:
    """What the model finds in one image."""
    batch = collate([item])
    (found,) = model.detect(normalize(batch.images.to(device), batch.frames), batch.frames)  # type: ignore[operator]
    return results_of(found, image_id=item.image_id, size=item.frame.original, category_ids=category_ids)


if __name__ == "__main__":
    sys.exit(main())
