"""UperNet, its losses and its inference."""
