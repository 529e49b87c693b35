"""Train or evaluate Mask R-CNN on MLLA, or another backbone, from a YAML file, as one process or many.

torchrun --nproc_per_node=8 -m downstream.detection.main --cfg downstream/detection/cfgs/mlla_t_mrcnn_1x.yaml \\
    --data-path COCO --pretrained mlla_t.pth --output OUT
python -m downstream.detection.main --cfg downstream/detection/cfgs/mlla_t_mrcnn_1x.yaml --data-path COCO \\
    --eval --resume DETECTOR.pth
"""

import sys
from collections.abc import Sequence
from functools import partial

from downstream.detection.build import build_detector
from downstream.detection.config import SCHEMA, load_config
from downstream.detection.model.flops import PUBLISHED, profile_detector
from downstream.detection.task import Detection
from downstream.run import describe_out_of_memory, run_evaluation, run_training
from utils.config.command_line import parse_command_line, report_user_errors
from utils.speed.flops import profile_table
from utils.training.launch import run_process

COCO_CLASSES = 80


def main(argv: Sequence[str] | None = None) -> int:
    with report_user_errors():
        config = load_config(*parse_command_line(__doc__, argv, schema=SCHEMA))
    if config.PROFILE_MODE:
        with report_user_errors():
            model = build_detector(config, COCO_CLASSES)
        print(f"{config.MODEL.NAME}, {COCO_CLASSES} classes, 1280x800, 1000 proposals and 100 masks")
        print(profile_table(profile_detector(model), PUBLISHED.get(config.MODEL.NAME)))
        return 0
    work = run_evaluation if config.EVAL_MODE else run_training
    return run_process(
        lambda process: work(Detection(), config, process),
        config.LOCAL_RANK,
        compile_setting=f"TRAIN.COMPILE {config.TRAIN.COMPILE}",
        explain_out_of_memory=partial(describe_out_of_memory, config),
    )


if __name__ == "__main__":
    sys.exit(main())
