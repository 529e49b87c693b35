"""Datasets, transforms and loaders."""

from data.build import Data, build_data, build_targets, kernels_in_use

__all__ = ["Data", "build_data", "build_targets", "kernels_in_use"]
