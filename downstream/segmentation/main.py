"""Train, evaluate or profile UperNet from a YAML file, on one or many processes.

python -m downstream.segmentation.main --cfg downstream/segmentation/cfgs/shapes.yaml --data-path shapes
torchrun --nproc_per_node=8 -m downstream.segmentation.main --cfg downstream/segmentation/cfgs/mlla_b_upernet.yaml \
    --data-path ADEChallengeData2016 --pretrained mlla_b.pth --output out
python -m downstream.segmentation.main --cfg downstream/segmentation/cfgs/mlla_b_upernet.yaml \
    --data-path ADEChallengeData2016 --eval --resume upernet_mlla_b.pth --multi-scale
"""

import gc

if __name__ == "__main__":
    gc.disable()  # until run_and_end: imports make no garbage, and looking for it takes a sixth of their time

from collections.abc import Sequence
from functools import partial

from downstream.segmentation.config import FLAGS, SCHEMA, load_config
from downstream.segmentation.task import Segmentation
from utils.benchmark.throughput import run_throughput
from utils.checkpoint.stored_config import load_config_of
from utils.config.command_line import parse_command_line, report_user_errors
from utils.training.launch import run_and_end
from utils.training.run import run_task


def main(argv: Sequence[str] | None = None) -> int:
    with report_user_errors():
        config = load_config_of(load_config, *parse_command_line(__doc__, argv, schema=SCHEMA, extra_flags=FLAGS))
    return run_task(Segmentation(), config, run_throughput=run_throughput)


command = partial(run_and_end, main)  # the program as a process of its own, which it ends


if __name__ == "__main__":
    command()
