"""Inject faults at random moments into short training runs, and compare each run's end with a run left alone.

python tests/soak.py                                all faults and tasks, for half an hour, on a CPU
python tests/soak.py --minutes 5 --fault disk bit --task detection --processes 2
python tests/soak.py --fault disk --task detection --processes 1 --seed 7 --rounds 1     one trial again
python tests/soak.py --gpu --signal KILL            on GPUs, with deterministic algorithms and the step as a CUDA graph

Compared, bit for bit: weights, EMA, optimizer and random number generators of the last checkpoint, weights of the best
ones, and metrics.jsonl. A run that prints a traceback, does not end, or ends with another exit code than documented
counts as a fault, too. The exit code is 1 if there is any. Results are in <output>/table.md and trials.jsonl.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.faults.campaign import Campaign, Trial, combinations, run_campaign, table, write_results
from tests.faults.injections import FAULTS
from tests.faults.tasks import TASKS


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="start no run after this time")
    parser.add_argument("--rounds", type=int, default=1000, help="runs of each fault, task and number of processes")
    parser.add_argument("--fault", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument(
        "--signal", nargs="+", choices=["KILL", "TERM", "INT"], help="only the faults with these signals"
    )
    parser.add_argument("--task", nargs="+", choices=list(TASKS), help="default: all, with --gpu classification")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kills", type=int, default=3, help="injections per run: a random number up to this")
    parser.add_argument("--epochs", type=int, default=3, help="of each run")
    parser.add_argument(
        "--gpu",
        nargs="?",
        const="reduce-overhead",
        default="",
        choices=["graphs", "reduce-overhead"],
        help="train on GPUs, as many as processes, with this TRAIN.COMPILE; graphs start sooner",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first round's random choices and moments")
    parser.add_argument("--output", type=Path, default=Path("output/soak"), help="folder of the results")
    args = parser.parse_args(argv)
    tasks = args.task or (["classification"] if args.gpu else list(TASKS))
    prefixes = tuple(f"{name.lower()}-" for name in args.signal or ())
    faults = [name for name in args.fault if name.startswith(prefixes or "")]
    folder = Path(tempfile.mkdtemp(prefix="mlla-soak-"))
    tempfile.tempdir = str(folder)
    campaign = Campaign(folder, epochs=args.epochs, injections=args.kills, forked=not args.gpu, gpu=args.gpu)
    every = combinations(faults, tasks, args.processes, args.seed)
    trials: list[Trial] = []
    for trial in run_campaign(campaign, every, minutes=args.minutes, seed=args.seed, rounds=args.rounds):
        print(trial, flush=True)
        trials.append(trial)
        write_results(args.output, trials)
    print(f"\n{table(trials)}\n{len(trials)} runs, seed {args.seed}; {args.output}/table.md, trials.jsonl")
    if is_good := all(trial.is_good for trial in trials):
        shutil.rmtree(folder, ignore_errors=True)
    return int(not is_good)


if __name__ == "__main__":
    sys.exit(main())
