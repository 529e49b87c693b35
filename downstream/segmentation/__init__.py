"""Semantic segmentation: UperNet (Xiao et al., ECCV 2018, arXiv 1807.10221) on MLLA or a timm backbone."""
