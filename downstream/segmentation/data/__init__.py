"""Datasets, transforms and samplers of semantic segmentation."""
