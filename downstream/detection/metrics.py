"""COCO's metrics for boxes and masks, computed by faster-coco-eval."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from torch import Tensor

from downstream.detection.data.annotations import read_annotations
from downstream.detection.model.masks import CHUNK_PIXELS, paste_masks
from downstream.detection.model.structures import Detections, Size
from utils.logs.atomic_write import write_atomic

# COCO's twelve metrics in its order: AP over IoU 0.50 to 0.95, at 0.50, at 0.75, by area; recall by number and area.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KINDS = {"box": "bbox", "mask": "segm"}
Result = dict[str, Any]


def coco_results(
    detections: Detections, *, image_id: int, size: Size, category_ids: Sequence[int], kernels: str = "torch"
) -> list[Result]:
    """Return detections of an image of `size` (height, width) as COCO results: boxes x y width height, masks as RLE.

    Large images have few masks in memory at a time. `kernels` is MODEL.KERNELS.
    """
    chunk = max(1, CHUNK_PIXELS // (size[0] * size[1]))
    parts = zip(detections.mask_probabilities.split(chunk), detections.boxes.split(chunk), strict=True)
    masks = [mask for part in parts for mask in encode_masks(paste_masks(*part, *size, kernels=kernels))]
    boxes = detections.boxes.cpu().double()
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
            detections.labels.tolist(), boxes.tolist(), detections.scores.tolist(), masks, strict=True
        )
    ]


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Return masks (D, H, W) bool as run lengths that fit into JSON."""
    height, width = masks.shape[1:]
    if masks.device.type == "cpu":
        columns = np.asfortranarray(masks.numpy().transpose(1, 2, 0), dtype=np.uint8)  # (H, W, D)
        encoded = rle.encode(columns)
    else:
        encoded = [
            rle.frPyObjects({"size": [height, width], "counts": runs}, height, width) for runs in run_lengths(masks)
        ]
    return [{"size": item["size"], "counts": item["counts"].decode()} for item in encoded]


def run_lengths(masks: Tensor) -> list[list[int]]:
    """Return the lengths of each mask's runs, in turn outside and inside, column by column, from masks (D, H, W) bool.

    They are found on the device: a copy of the masks to the host would take longer than the detector.
    """
    columns = masks.transpose(1, 2).flatten(1)  # (D, W * H)
    begins = columns ^ F.pad(columns, (1, 0))[:, :-1]
    owners, places = begins.nonzero().T.cpu().numpy()
    length, ends = columns.shape[1], np.searchsorted(owners, np.arange(len(masks)), side="right")
    parts = np.split(places, ends[:-1])
    return [np.diff(part, prepend=0, append=length).tolist() for part in parts[: len(masks)]]


class CocoEvaluator:
    """COCO's evaluation of results against an annotation file, which is repaired as for training."""

    def __init__(self, annotations: str | Path) -> None:
        self.truth = COCO(read_annotations(Path(annotations), log_repairs=False))

    def compute(self, results: Sequence[Result], *, per_class: bool = False) -> dict[str, float]:
        """Return box_AP, box_AP50, ..., mask_ARl, in percent; -1 if the file has no object for a metric.

        Args:
            results: output of `coco_results`.
            per_class: also return box_AP/<name> and mask_AP/<name> of each category.
        """
        scores: dict[str, float] = {}
        for kind, iou_type in KINDS.items():
            own = [dict(result) for result in results]
            if kind == "mask":
                for result in own:
                    del result["bbox"]  # or AP by area would use the box's area
            evaluator = COCOeval_faster(self.truth, self.truth.loadRes(own), iou_type)
            evaluator.evaluate()
            evaluator.accumulate()
            evaluator.summarize()
            scores |= {f"{kind}_{name}": percent(value) for name, value in zip(METRICS, evaluator.stats, strict=False)}
            if per_class:
                scores |= self.class_metrics(kind, evaluator)
        return scores

    def class_metrics(self, kind: str, evaluator: COCOeval_faster) -> dict[str, float]:
        """Return the mean AP of each category over IoU 0.50 to 0.95, all areas, 100 detections."""
        precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (IoUs, recalls, categories)
        metrics = {}
        for index, category_id in enumerate(evaluator.params.catIds):
            values = precision[:, :, index]
            name = self.truth.cats[category_id]["name"]
            metrics[f"{kind}_AP/{name}"] = percent(values[values > -1].mean()) if (values > -1).any() else -1.0
        return metrics


def percent(share: float) -> float:
    return 100 * float(share) if share >= 0 else -1.0


def metrics_table(metrics: Mapping[str, float]) -> list[str]:
    """Return the 24 metrics as lines of text."""
    lines = ["      " + "".join(f"{name:>7}" for name in METRICS)]
    return lines + [f"{kind:<6}" + "".join(shown(metrics[f"{kind}_{name}"]) for name in METRICS) for kind in KINDS]


def shown(value: float) -> str:
    """Return a metric in seven characters; "n/a" for -1, where the file has no object for it."""
    return f"{value:7.2f}" if value >= 0 else f"{'n/a':>7}"


def write_results(results: Sequence[Result], path: Path) -> None:
    """Write a COCO results file, complete or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(json.dumps(list(results))))
