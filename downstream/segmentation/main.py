"""Train, evaluate or profile UperNet from a YAML file, as one process or many.

python -m downstream.segmentation.main --cfg downstream/segmentation/cfgs/shapes.yaml --data-path shapes
torchrun --nproc_per_node=8 -m downstream.segmentation.main --cfg downstream/segmentation/cfgs/mlla_b_upernet.yaml \
    --data-path ADEChallengeData2016 --pretrained mlla_b.pth --output out
python -m downstream.segmentation.main --cfg downstream/segmentation/cfgs/mlla_b_upernet.yaml \
    --data-path ADEChallengeData2016 --eval --resume upernet_mlla_b.pth --multi-scale
"""

import sys
from collections.abc import Sequence
from functools import partial

import torch
from yacs.config import CfgNode

from downstream.run import describe_out_of_memory, run_evaluation, run_training
from downstream.segmentation.build import build_model
from downstream.segmentation.config import FLAGS, SCHEMA, load_config
from downstream.segmentation.task import Segmentation
from utils.config.command_line import parse_command_line, report_user_errors
from utils.speed.flops import profile, profile_table
from utils.training.launch import run_process

PROFILE_SIZE = (512, 2048)  # height and width that published MACs are of
ADE20K_CLASSES = 150
PUBLISHED_FIGURES = {"mlla_b_upernet": (128, 1183)}  # millions of parameters, GMACs


def main(argv: Sequence[str] | None = None) -> int:
    with report_user_errors():
        config = load_config(*parse_command_line(__doc__, argv, schema=SCHEMA, extra_flags=FLAGS))
    if config.PROFILE_MODE:
        return run_profile(config)
    torch.backends.cudnn.benchmark = True  # crops have one size
    work = run_evaluation if config.EVAL_MODE else run_training
    return run_process(
        lambda process: work(Segmentation(config, process), config, process),
        config.LOCAL_RANK,
        compile_setting=f"TRAIN.COMPILE {config.TRAIN.COMPILE}",
        explain_out_of_memory=partial(describe_out_of_memory, config),
    )


def run_profile(config: CfgNode) -> int:
    """Parameters with both heads, MACs of inference, which the auxiliary head has no part in."""
    with report_user_errors(), torch.device("meta"):
        model = build_model(config, config.MODEL.NUM_CLASSES or ADE20K_CLASSES)
    print(f"{config.MODEL.NAME}, {PROFILE_SIZE[0]}x{PROFILE_SIZE[1]}")
    print(profile_table(profile(model, PROFILE_SIZE), PUBLISHED_FIGURES.get(config.MODEL.NAME)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
