"""Started by torchrun from test_interruptions.py: main.py, in which one process fails while the others wait for it.

torchrun --nproc_per_node=2 tests/utils/distributed/faulty_worker.py RANK WORDS...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import main
from utils.training.trainer import Trainer

if __name__ == "__main__":
    rank = int(sys.argv[1])
    report = Trainer.report

    def fail(trainer: Trainer, *words: object) -> None:
        if trainer.process.rank == rank:
            raise IndexError("the injected fault")
        report(trainer, *words)  # type: ignore[arg-type]

    Trainer.report = fail  # type: ignore[assignment, method-assign]
    sys.exit(main.main(sys.argv[2:]))
