"""COCO's metrics for boxes and masks, computed by faster-coco-eval."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval import mask as rle
from torch import Tensor
from torch.utils.data import Dataset

from data.workers import RestartingDataLoader, share_of_cores
from downstream.detection.data.annotations import read_annotations
from downstream.detection.model.masks import CHUNK_PIXELS, paste_masks
from downstream.detection.model.structures import Detections, Size
from utils.logs.atomic_write import write_atomic

# COCO's twelve metrics in its order: AP over IoU 0.50 to 0.95, at 0.50, at 0.75, by area; recall by number and area.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KINDS = {"box": "bbox", "mask": "segm"}
COSTS = {"box": 1, "mask": 4}  # of evaluating a result, relative
MAX_WORKERS = 8  # to score results: each may come to copy all of them
RESULTS_PER_WORKER = 10_000  # at least: a quarter of a second
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
    columns = detections.boxes, detections.scores[:, None], detections.labels[:, None]
    rows = torch.cat([column.to(detections.boxes) for column in columns], dim=1).cpu().double()  # in one copy
    rows[:, 2:4] -= rows[:, :2]
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[int(label)],
            "bbox": box,
            "score": score,
            "segmentation": mask,
        }
        for (*box, score, label), mask in zip(rows.tolist(), masks, strict=True)
    ]


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """Return masks (D, H, W) bool as run lengths that fit into JSON."""
    if masks.device.type == "cpu":
        columns = np.asfortranarray(masks.numpy().transpose(1, 2, 0), dtype=np.uint8)  # (H, W, D)
        return to_json(rle.encode(columns))
    return encode_runs(masks)


def encode_runs(masks: Tensor) -> list[dict[str, Any]]:
    """Return what `encode_masks` does, from runs that are found on the masks' device."""
    num_masks, height, width = masks.shape
    runs = run_lengths(run_places(masks), num_masks, height * width)
    objects = [{"size": [height, width], "counts": counts} for counts in runs]
    return to_json(rle.frPyObjects(objects, height, width)) if objects else []


def to_json(encoded: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"size": item["size"], "counts": item["counts"].decode()} for item in encoded]


def run_places(masks: Tensor) -> np.ndarray:
    """Return where runs inside and outside begin in masks (D, H, W) bool, one after the other, column by column.

    They are found on the device: a copy of the masks to the host would take longer than the detector.
    """
    columns = masks.transpose(1, 2).flatten(1)  # (D, W * H)
    begins = columns ^ F.pad(columns, (1, 0))[:, :-1]
    return begins.flatten().nonzero()[:, 0].cpu().numpy()


def run_lengths(places: np.ndarray, num_masks: int, num_pixels: int) -> list[list[int]]:
    """Return the lengths of each mask's runs, in turn outside and inside, from the result of `run_places`."""
    starts = np.arange(num_masks) * num_pixels  # each mask begins with a run outside, which may be empty
    earlier = np.searchsorted(places, starts)
    runs = np.diff(np.insert(places, earlier, starts), append=num_masks * num_pixels).tolist()
    return [runs[start:end] for start, end in pairwise([*(earlier + np.arange(num_masks)).tolist(), len(runs)])]


class Job(NamedTuple):
    """Part of an evaluation: categories, by id in ascending order, whose boxes or masks are evaluated together."""

    kind: str
    category_ids: list[int]


class Tables(NamedTuple):
    """COCO's tables: precision (IoUs, recalls, categories, areas, limits) and recall, the same without `recalls`."""

    precision: np.ndarray
    recall: np.ndarray


class CocoEvaluator:
    """COCO's evaluation of results against an annotation file, which is repaired as for training."""

    def __init__(self, annotations: str | Path) -> None:
        self.truth = COCO(read_annotations(Path(annotations), log_repairs=False))

    def compute(
        self,
        results: Sequence[Result],
        *,
        per_class: bool = False,
        num_workers: int = 0,
        meanwhile: Callable[[], object] = lambda: None,
    ) -> dict[str, float]:
        """Return box_AP, box_AP50, ..., mask_ARl, in percent; -1 if the file has no object for a metric.

        Args:
            results: output of `coco_results`.
            per_class: also return box_AP/<name> and mask_AP/<name> of each category.
            num_workers: processes that share the categories, without effect on the metrics; 0: it is done here.
            meanwhile: called while the workers evaluate.
        """
        num_results = Counter(result["category_id"] for result in results)
        counts = {category_id: num_results[category_id] for category_id in sorted(self.truth.cats)}
        groups = split_evaluation(counts, max(num_workers, 1))
        loader = RestartingDataLoader(
            Evaluation(self, results, groups),
            batch_size=None,
            num_workers=num_workers,
            collate_fn=list,  # the default one would make tensors
            generator=torch.Generator(),  # the default one serves training, whose numbers would change
        )
        groups_of_tables = iter(loader)  # starts the workers
        meanwhile()
        parts = list(zip(chain(*groups), chain(*groups_of_tables), strict=True))
        scores: dict[str, float] = {}
        for kind, iou_type in KINDS.items():
            evaluator = COCOeval_faster(self.truth, None, iou_type)
            tables = join_tables([(job.category_ids, tables) for job, tables in parts if job.kind == kind])
            evaluator.eval = tables._asdict()
            evaluator.summarize()
            scores |= {f"{kind}_{name}": percent(value) for name, value in zip(METRICS, evaluator.stats, strict=False)}
            if per_class:
                scores |= self.class_metrics(kind, evaluator)
        return scores

    def tables_of(self, job: Job, results: Sequence[Result]) -> Tables:
        """Return the tables of a job's categories; other results have no influence on them."""
        category_ids = {*job.category_ids}
        own = [dict(result) for result in results if result["category_id"] in category_ids]
        if job.kind == "mask":
            for result in own:
                del result["bbox"]  # or AP by area would use the box's area
        evaluator = COCOeval_faster(self.truth, self.truth.loadRes(own), KINDS[job.kind])
        evaluator.params.catIds = job.category_ids
        evaluator.evaluate()
        evaluator.accumulate()
        return Tables(evaluator.eval["precision"], evaluator.eval["recall"])

    def class_metrics(self, kind: str, evaluator: COCOeval_faster) -> dict[str, float]:
        """Return the mean AP of each category over IoU 0.50 to 0.95, all areas, 100 detections."""
        precision = evaluator.eval["precision"][:, :, :, 0, -1]  # (IoUs, recalls, categories)
        metrics = {}
        for index, category_id in enumerate(evaluator.params.catIds):
            values = precision[:, :, index]
            name = self.truth.cats[category_id]["name"]
            metrics[f"{kind}_AP/{name}"] = percent(values[values > -1].mean()) if (values > -1).any() else -1.0
        return metrics


class Evaluation(Dataset[list[Tables]]):
    """The tables of each group of jobs, computed when it is read."""

    def __init__(self, evaluator: CocoEvaluator, results: Sequence[Result], groups: Sequence[Sequence[Job]]) -> None:
        self.evaluator, self.results, self.groups = evaluator, results, groups

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[Tables]:
        return [self.evaluator.tables_of(job, self.results) for job in self.groups[index]]


def split_evaluation(num_results: Mapping[int, int], num_groups: int) -> list[list[Job]]:
    """Return groups of jobs of about equal cost, at most `num_groups`, from the number of results by category id."""
    items = [(COSTS[kind] * (count + 1), kind, category) for kind in KINDS for category, count in num_results.items()]
    costs = [0] * num_groups
    groups: list[dict[str, list[int]]] = [defaultdict(list) for _ in costs]
    for cost, kind, category_id in sorted(items, reverse=True):
        cheapest = costs.index(min(costs))
        costs[cheapest] += cost
        groups[cheapest][kind].append(category_id)
    return [[Job(kind, sorted(ids)) for kind, ids in group.items()] for group in groups if group]


def join_tables(parts: Sequence[tuple[list[int], Tables]]) -> Tables:
    """Return the tables of all categories, by id in ascending order, from parts with some categories each."""
    order = np.argsort(np.concatenate([category_ids for category_ids, _ in parts]))
    precision = np.concatenate([tables.precision for _, tables in parts], axis=2)[:, :, order]
    recall = np.concatenate([tables.recall for _, tables in parts], axis=1)[:, order]
    return Tables(precision, recall)


def choose_scoring_workers(num_results: int) -> int:
    """Return the number of worker processes that score results; 0 if one process is as fast."""
    num_workers = min(MAX_WORKERS, share_of_cores(), num_results // RESULTS_PER_WORKER)
    return num_workers if num_workers > 1 else 0


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
