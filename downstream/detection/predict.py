"""Draw what a detector finds in images, and write it down as JSON.

python -m downstream.detection.predict street.jpg dogs/*.png --weights max_box_ap.pth --output OUT
python -m downstream.detection.predict street.jpg --weights PUBLISHED.pth --cfg mlla_t_mrcnn_1x
"""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

from data.errors import as_data_error
from downstream.detection.build import build_detector
from downstream.detection.data.coco import read_image
from downstream.detection.data.dataset import Item, collate, eval_item
from downstream.detection.data.transforms import normalize
from downstream.detection.metrics import Result, coco_results
from downstream.detection.pictures import draw_objects, objects_of_results, save_image
from downstream.image_files import plan_results, read_images
from downstream.task import DenseTask
from downstream.trained_model import TrainedModel, load_trained, open_device, predict_parser, read_trained_model
from utils.checkpoint.weights_file import CheckpointError
from utils.config.command_line import report_user_errors
from utils.logs.atomic_write import write_atomic
from utils.training.amp import make_precision

CLASSIFIER = "roi_head.bbox_head.fc_cls.weight"


def main(argv: Sequence[str] | None = None) -> int:
    parser = predict_parser(__doc__, images="image files of any size, or folders of them")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="SCORE", help="lowest score that is drawn")
    args = parser.parse_args(argv)
    with report_user_errors(DenseTask.user_errors):
        predict(args)
    return 0


def predict(args: argparse.Namespace) -> None:
    """Draw and write down the detections in all images.

    Raises:
        UserError: weights or images cannot be read, or the output cannot be written.
    """
    table = args.output / "predictions.json"
    results = plan_results(args.images, args.output, [".png"], others=[table.name], force=args.force)
    device = open_device(args.device)
    trained = read_trained_model(args, task="detection")
    num_classes = count_classes(trained, args.weights)
    model = load_trained(build_detector(trained.config, num_classes), trained.weights, args.weights, device)
    precision = make_precision(device, amp=args.amp, dtype=trained.config.AMP_DTYPE)
    categories, test = categories_of(trained.classes, num_classes), trained.config.TEST
    category_ids = [category["id"] for category in categories]
    listed: list[dict[str, Any]] = []
    annotations: list[Result] = []
    for number, (path, image, result) in enumerate(read_images(results, read_image), 1):
        item = eval_item(image, short_side=test.SHORT_SIDE, long_side=test.LONG_SIDE, image_id=number)
        with precision.autocast():
            found = detect(model, item, category_ids, device, trained.config.MODEL.KERNELS)
        drawing = draw_objects(image, objects_of_results(found, categories, threshold=args.threshold))
        picture = result.with_name(result.name + ".png")
        with as_data_error(picture, "written"):
            picture.parent.mkdir(parents=True, exist_ok=True)
            save_image(drawing, picture)
        listed.append({"id": number, "file_name": str(path), "height": image.shape[0], "width": image.shape[1]})
        annotations += [{"id": len(annotations) + i, **detection} for i, detection in enumerate(found, 1)]
        num_drawn = sum(detection["score"] >= args.threshold for detection in found)
        objects = "object" if num_drawn == 1 else "objects"
        print(f"{path}: {num_drawn} {objects} with a score of {args.threshold:g} or more, drawn in {picture}")
    content = json.dumps({"images": listed, "annotations": annotations, "categories": categories})
    with as_data_error(table, "written"):
        write_atomic(table, lambda temporary: temporary.write_text(content))
    print(f"all {len(annotations)} detections: {table}")


def count_classes(trained: TrainedModel, path: str) -> int:
    """Return the number of classes that a detector's weights are for, without the background.

    Raises:
        CheckpointError: the weights are not a detector's.
    """
    if CLASSIFIER not in trained.weights:
        raise CheckpointError(f"{path}: holds no detector, which would have {CLASSIFIER}; name a detector's file")
    return trained.weights[CLASSIFIER].shape[0] - 1


def categories_of(names: Sequence[str] | None, count: int) -> list[dict[str, Any]]:
    """Return id and name of each class: names from the file; else COCO's if there are 80 classes; else numbers."""
    if names and len(names) == count:
        return [{"id": number, "name": str(name)} for number, name in enumerate(names, 1)]
    coco = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    listed = [{"id": i, "name": name} for i, name in enumerate(coco) if name not in ("__background__", "N/A")]
    return listed if len(listed) == count else [{"id": i, "name": f"class {i}"} for i in range(1, count + 1)]


def detect(model: nn.Module, item: Item, category_ids: list[int], device: torch.device, kernels: str) -> list[Result]:
    """Return the detections in one image as COCO results; `kernels` is MODEL.KERNELS."""
    batch = collate([item])
    (detections,) = model.detect(normalize(batch.images.to(device), batch.frames), batch.frames)  # type: ignore[operator]
    return coco_results(
        detections, image_id=item.image_id, size=item.frame.original, category_ids=category_ids, kernels=kernels
    )


if __name__ == "__main__":
    sys.exit(main())
