import json
import os
from copy import deepcopy
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import mask as rle

from downstream.detection import metrics
from downstream.detection.metrics import (
    METRICS,
    CocoEvaluator,
    choose_scoring_workers,
    coco_results,
    encode_masks,
    encode_runs,
    metrics_table,
    run_lengths,
    run_places,
    split_evaluation,
    write_results,
)
from downstream.detection.model.structures import Detections
from tests.utils.speed.test_shape_graphs import DEVICES

TABLES_OF = CocoEvaluator.tables_of
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 17, "name": "dog"}, {"id": 90, "name": "never there"}]
HEIGHT, WIDTH = 240, 320


def ellipse(rng: np.random.Generator) -> np.ndarray:
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    radius = np.exp(rng.uniform(np.log(6), np.log(90), 2))  # small, medium and large ones
    center = rng.uniform(0.2, 0.8, 2) * (HEIGHT, WIDTH)
    return ((ys - center[0]) / radius[0]) ** 2 + ((xs - center[1]) / radius[1]) ** 2 <= 1


def encoded(mask: np.ndarray) -> dict[str, Any]:
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": encoded["size"], "counts": encoded["counts"].decode()}


@pytest.mark.parametrize("device", DEVICES)
def test_run_lengths_are_found_on_the_device(device: str) -> None:
    """Of empty, full and random masks, and of single pixels in both corners."""
    torch.manual_seed(0)
    masks = torch.rand(5, 7, 9) < 0.5
    masks[0], masks[1], masks[2:4] = False, True, False
    masks[2, 0, 0] = masks[3, -1, -1] = True
    expected = encode_masks(masks)
    lengths = run_lengths(run_places(masks.to(device)), len(masks), 7 * 9)
    assert [sum(runs[1::2]) for runs in lengths] == masks.sum(dim=(1, 2)).tolist()
    assert encode_runs(masks.to(device)) == expected
    assert encode_masks(masks.to(device)) == expected
    assert encode_runs(masks[:0].to(device)) == []


@pytest.fixture(scope="module")
def truth_and_results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Images with objects, some crowds, some empty; results near the truth, doubled, misplaced and of no truth."""
    rng = np.random.default_rng(0)
    annotations, results = [], []
    for image_id in range(1, 13):
        for _ in range(int(rng.integers(0, 9))):
            mask = ellipse(rng)
            code = encoded(mask)
            category = int(rng.choice([3, 17]))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": rle.toBbox(code).tolist(),
                    "area": float(mask.sum()),
                    "iscrowd": int(rng.random() < 0.1),
                    "segmentation": code,
                }
            )
            for _ in range(int(rng.integers(0, 3))):
                moved = encoded(np.roll(mask, rng.integers(-6, 7, 2), axis=(0, 1)))
                results.append(
                    {
                        "image_id": image_id,
                        "category_id": category if rng.random() < 0.9 else 17,
                        "bbox": (rle.toBbox(moved) + rng.normal(0, 2, 4)).clip(1).tolist(),
                        "score": float(rng.random()),
                        "segmentation": moved,
                    }
                )
    images = [{"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(1, 13)]
    path = tmp_path_factory.mktemp("coco") / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": CATEGORIES}))
    return path, results


# COCOeval's twelve of pycocotools 2.0.11 on these truths and results, in percent, for boxes and for masks.
BY_PYCOCOTOOLS = {
    "box": [
        *(14.349685758349281, 37.53820993001556, 8.576929121483575, 7.855782831030354, 17.43401238637115),
        *(42.57425742574257, 10.219298245614034, 25.767543859649123, 25.767543859649123, 15.844155844155845),
        *(26.42857142857143, 44.16666666666667),
    ],
    "mask": [
        *(20.576094274945582, 47.330978340749056, 18.47839953168249, 11.154054691183402, 26.82369140275372),
        *(45.04950495049505, 16.304824561403507, 32.71929824561403, 32.71929824561403, 23.11688311688312),
        *(34.028571428571425, 45.83333333333333),
    ],
}


def test_all_metrics_match_pycocotools(truth_and_results: tuple[Path, list[dict[str, Any]]]) -> None:
    path, results = truth_and_results
    before = deepcopy(results)
    figures = CocoEvaluator(path).compute(results)
    assert results == before
    expected = {
        f"{kind}_{name}": value
        for kind, values in BY_PYCOCOTOOLS.items()
        for name, value in zip(METRICS, values, strict=True)
    }
    assert list(figures) == list(expected)
    assert len(figures) == 24
    assert figures == pytest.approx(expected, abs=1e-9)
    assert 10 < figures["box_AP"] < 90
    assert figures["mask_APs"] != figures["box_APs"]
    assert len(set(figures.values())) > 15


def test_evaluating_twice_gives_the_same(truth_and_results: tuple[Path, list[dict[str, Any]]]) -> None:
    path, results = truth_and_results
    evaluator = CocoEvaluator(path)
    assert evaluator.compute(results) == evaluator.compute(results)


def test_workers_compute_the_same_bits(
    truth_and_results: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, results = truth_and_results
    evaluator, calls = CocoEvaluator(path), []
    expected = evaluator.compute(results, per_class=True)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    monkeypatch.setattr(CocoEvaluator, "tables_of", partialmethod(tables_of_worker, os.getpid()))
    found = evaluator.compute(results, per_class=True, num_workers=2, meanwhile=lambda: calls.append(1))
    assert list(found.items()) == list(expected.items())
    assert calls == [1]
    assert torch.equal(torch.get_rng_state(), state)  # training's numbers stay the same


def tables_of_worker(self: CocoEvaluator, parent: int, *args: Any) -> metrics.Tables:
    assert os.getpid() != parent
    return TABLES_OF(self, *args)


@pytest.mark.parametrize("num_groups", [1, 2, 3, 20])
def test_an_evaluation_is_split_by_cost(num_groups: int) -> None:
    counts = {category: 1000 // category for category in range(1, 9)}
    groups = split_evaluation(counts, num_groups)
    assert len(groups) == min(num_groups, 2 * len(counts))
    jobs = [job for group in groups for job in group]
    assert sorted((kind, i) for kind, ids in jobs for i in ids) == sorted(
        (k, i) for k in ("box", "mask") for i in counts
    )
    assert all(ids == sorted(ids) for _, ids in jobs)
    costs = [sum(metrics.COSTS[kind] * (counts[i] + 1) for kind, ids in group for i in ids) for group in groups]
    assert max(costs) <= max(1.1 * sum(costs) / num_groups, 4 * 1001)


@pytest.mark.parametrize(("cores", "num_results", "expected"), [(16, 500_000, 8), (4, 500_000, 4), (16, 25_000, 2)])
def test_number_of_scoring_workers(
    cores: int, num_results: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "share_of_cores", lambda: cores)
    assert choose_scoring_workers(num_results) == expected
    assert choose_scoring_workers(19_999) == 0  # one process is as fast


def test_metrics_by_class(truth_and_results: tuple[Path, list[dict[str, Any]]]) -> None:
    """Against evaluating one category at a time; one without objects has none."""
    path, results = truth_and_results
    figures = CocoEvaluator(path).compute(results, per_class=True)
    assert len(figures) == 24 + 6
    for category in CATEGORIES[:2]:
        content = json.loads(path.read_text())
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == category["id"]]
        content["categories"] = [category]
        own = path.with_name(f"{category['name']}.json")
        own.write_text(json.dumps(content))
        alone = CocoEvaluator(own).compute([r for r in results if r["category_id"] == category["id"]])
        for kind in ("box", "mask"):
            assert figures[f"{kind}_AP/{category['name']}"] == pytest.approx(alone[f"{kind}_AP"])
    assert figures["box_AP/never there"] == -1


def test_without_results_or_objects(truth_and_results: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    path, _ = truth_and_results
    assert CocoEvaluator(path).compute([])["box_AP"] == 0
    content = json.loads(path.read_text())
    content["annotations"] = []
    (tmp_path / "empty.json").write_text(json.dumps(content))
    assert set(CocoEvaluator(tmp_path / "empty.json").compute([]).values()) == {-1.0}


def test_detections_convert_to_coco_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = torch.tensor([[10.0, 20.0, 38.0, 48.0], [0.0, 0.0, 28.0, 56.0]])
    found = Detections(boxes, torch.tensor([0.9, 0.2]), torch.tensor([1, 0]), torch.ones(2, 28, 28))
    results = coco_results(found, image_id=7, size=(60, 80), category_ids=[3, 17])
    assert [r["bbox"] for r in results] == [[10, 20, 28, 28], [0, 0, 28, 56]]
    assert [r["category_id"] for r in results] == [17, 3]
    assert {r["image_id"] for r in results} == {7}
    mask = rle.decode(results[0]["segmentation"])
    assert mask.shape == (60, 80)
    assert mask[20:48, 10:38].all()
    assert mask.sum() == 28 * 28
    write_results(results, tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert coco_results(Detections(*(x[:0] for x in found)), image_id=7, size=(60, 80), category_ids=[3]) == []
    monkeypatch.setattr(metrics, "CHUNK_PIXELS", 60 * 80)  # one mask at a time
    shapes: list[torch.Size] = []
    monkeypatch.setattr(metrics, "encode_masks", lambda masks: shapes.append(masks.shape) or encode_masks(masks))
    assert coco_results(found, image_id=7, size=(60, 80), category_ids=[3, 17]) == results
    assert shapes == [(1, 60, 80)] * 2


def test_table_lines_up() -> None:
    values = {name: -1.0 if name == "APl" else 5.0 for name in METRICS}
    lines = metrics_table({f"{kind}_{name}": value for kind in ("box", "mask") for name, value in values.items()})
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[5:8] == ["5.00", "n/a", "5.00"]
