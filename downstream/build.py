"""Build from a configuration what detection and segmentation share: backbones and data loaders."""

from typing import Any

import cv2
import torch
from torch import nn
from torch.utils.data import Dataset
from yacs.config import CfgNode

from data.workers import RestartingDataLoader, choose_num_workers, ignore_signals
from downstream.backbone import MLLABackbone, TimmBackbone
from models import use_kernels
from models.build import mlla_sizes


def build_backbone(config: CfgNode) -> nn.Module:
    """Return the backbone that MODEL.* describes, newly initialized: four maps at strides 4, 8, 16, 32.

    The widths of the maps are its attribute `widths`.

    Raises:
        ConfigError: MODEL.TYPE names a timm model that does not exist or has no such maps.
    """
    kind, _, name = config.MODEL.TYPE.partition(":")
    if kind == "timm":
        return TimmBackbone(name, drop_path_rate=config.MODEL.DROP_PATH_RATE)
    return use_kernels(MLLABackbone(**mlla_sizes(config)), config.MODEL.KERNELS)


def make_loader(config: CfgNode, dataset: Dataset[Any], **options: Any) -> RestartingDataLoader:
    """Return a loader of a dataset with the DATA.* settings that all loaders of dense tasks share.

    Args:
        options: other arguments of DataLoader.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_workers = choose_num_workers(config.DATA.NUM_WORKERS, device)
    return RestartingDataLoader(
        dataset,
        num_workers=num_workers,
        pin_memory=config.DATA.PIN_MEMORY and device.type == "cuda",
        persistent_workers=num_workers > 0,
        set_up_worker=set_up_worker,
        generator=torch.Generator(),  # the default one also serves dropout and sampling, whose numbers would change
        **options,
    )


def set_up_worker(number: int) -> None:
    """Detach a loader's worker from the signals of the training process, and keep OpenCV to one core."""
    ignore_signals(number)
    cv2.setNumThreads(0)
