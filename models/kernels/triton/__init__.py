"""Device code of the kernels, a file for each group of operators. Importing this package does not import Triton."""

LARGEST_WIDTH = 1024  # channels that one program normalizes
