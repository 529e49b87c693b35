"""GPU kernels for MLLA's blocks."""
