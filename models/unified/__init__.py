"""The unified view of linear attention and Mamba: the models of the paper's ablation study."""
