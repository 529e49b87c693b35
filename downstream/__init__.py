"""Object detection and semantic segmentation with MLLA."""
