"""Compilation, CUDA graphs, streams, memory and FLOPs."""
