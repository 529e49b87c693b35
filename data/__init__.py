"""Datasets, transforms and loaders."""

from data.build import Data, build_data, build_targets

__all__ = ["Data", "build_data", "build_targets"]
