"""Train or evaluate Mask R-CNN on MLLA, or another backbone, from a YAML file, on one or many processes.

torchrun --nproc_per_node=8 -m downstream.detection.main --cfg downstream/detection/cfgs/mlla_t_mrcnn_1x.yaml \\
    --data-path COCO --pretrained mlla_t.pth --output OUT
python -m downstream.detection.main --cfg downstream/detection/cfgs/mlla_t_mrcnn_1x.yaml --data-path COCO \\
    --eval --resume DETECTOR.pth
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until run_and_end: imports make no garbage, and looking for it takes a sixth of their time

from collections.abc import Sequence
from functools import partial

from downstream.detection.config import SCHEMA, load_config
from downstream.detection.task import Detection
from utils.benchmark.throughput import run_throughput
from utils.checkpoint.stored_config import load_config_of
from utils.config.command_line import parse_command_line, report_user_errors
from utils.training.launch import run_and_end
from utils.training.run import run_task


def main(argv: Sequence[str] | None = None) -> int:
    with report_user_errors():
        config = load_config_of(load_config, *parse_command_line(__doc__, argv, schema=SCHEMA))
    return run_task(Detection(), config, run_throughput=run_throughput)


command = partial(run_and_end, main)  # the program as a process of its own, which it ends


if __name__ == "__main__":
    command()
