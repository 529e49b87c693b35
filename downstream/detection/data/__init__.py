"""COCO annotations, transforms and samplers."""
