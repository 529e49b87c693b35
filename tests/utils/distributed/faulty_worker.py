"""main.py with a process that fails while the others wait for it, started by test_interruptions.py.

torchrun --nproc_per_node=2 tests/utils/distributed/faulty_worker.py RANK ARGS...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import main
from utils.distributed import stop_signal
from utils.training.trainer import Trainer

if __name__ == "__main__":
    rank = int(sys.argv[1])
    stop_signal.GRACE_SECONDS = 2.0
    report = Trainer.report

    def fail(trainer: Trainer, *args: object) -> None:
        if trainer.process.rank == rank:
            raise IndexError("the injected fault")
        report(trainer, *args)  # type: ignore[arg-type]

    Trainer.report = fail  # type: ignore[assignment, method-assign]
    sys.exit(main.main(sys.argv[2:]))
