"""The paper's unified view of linear attention and Mamba, and the models of its ablation study."""
