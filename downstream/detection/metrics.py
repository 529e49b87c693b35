"""COCO's figures for boxes and masks, by faster-coco-eval."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from torch import Tensor

from downstream.detection.model.masks import paste_masks
from downstream.detection.model.structures import Detections, Size
from utils.logs.atomic_write import write_atomic

# COCO's twelve, in its order: mean over IoU 0.50 to 0.95, at 0.50, at 0.75, by area; recall by detections and by area.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KINDS = {"box": "bbox", "mask": "segm"}
Result = dict[str, Any]


def coco_results(found: Detections, *, image_id: int, size: Size, category_ids: Sequence[int]) -> list[Result]:
    """Detections of an image of `size` (height, width) as COCO results, boxes x y width height, masks run lengths."""
    masks = paste_masks(found.mask_probabilities, found.boxes, *size)
    boxes = found.boxes.cpu().double()
    boxes[:, 2:] -= boxes[:, :2]
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label],
            "bbox": box,
            "score": score,
            "segmentation": mask,
        }
        for label, box, score, mask in zip(
            found.labels.tolist(), boxes.tolist(), found.scores.tolist(), encoded(masks), strict=True
        )
    ]


def encoded(masks: Tensor) -> list[dict[str, Any]]:
    """Masks (D, H, W) bool as run lengths that JSON can hold."""
    columns = np.asfortranarray(masks.cpu().numpy().transpose(1, 2, 0), dtype=np.uint8)  # (H, W, D)
    return [{"size": item["size"], "counts": item["counts"].decode()} for item in rle.encode(columns)]


class CocoEvaluator:
    """Compares results with an annotation file."""

    def __init__(self, annotations: str | Path) -> None:
        self.truth = COCO(str(annotations))

    def compute(self, results: Sequence[Result], *, per_class: bool = False) -> dict[str, float]:
        """box_AP, box_AP50, ..., mask_ARl, in percent; -1 where the file has nothing to judge by.

        Args:
            results: as `coco_results` gives them.
            per_class: also box_AP/<name>, mask_AP/<name> of each category.
        """
        scores: dict[str, float] = {}
        for kind, iou_type in KINDS.items():
            own = [dict(result) for result in results]
            if kind == "mask":
                for result in own:
                    del result["bbox"]  # else AP by area goes by the box's area
            evaluator = COCOeval_faster(self.truth, self.truth.loadRes(own), iou_type)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            scores |= {f"{kind}_{name}": percent(value) for name, value in zip(METRICS, evaluator.stats, strict=False)}
            if per_class:
                scores |= self.class_metrics(kind, evaluator)
        return scores

    def class_metrics(self, kind: str, evaluator: COCOeval_faster) -> dict[str, float]:
        """Mean AP of each category over IoU 0.50 to 0.95, all areas, 100 detections."""
        precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (IoUs, recalls, categories)
        figures = {}
        for index, category_id in enumerate(evaluator.params.catIds):
            values = precision[:, :, index]
            name = self.truth.cats[category_id]["name"]
            figures[f"{kind}_AP/{name}"] = percent(values[values > -1].mean()) if (values > -1).any() else -1.0
        return figures


def percent(share: float) -> float:
    return 100 * float(share) if share >= 0 else -1.0


def metrics_table(figures: Mapping[str, float]) -> list[str]:
    """The 24 figures as lines of text."""
    lines = ["      " + "".join(f"{name:>7}" for name in METRICS)]
    return lines + [f"{kind:<6}" + "".join(f"{figures[f'{kind}_{name}']:7.2f}" for name in METRICS) for kind in KINDS]


def write_results(results: Sequence[Result], path: Path) -> None:
    """Write a COCO results file, complete or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(list(results))))
