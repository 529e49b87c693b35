"""main.py with heartbeats that end a run after a few seconds, started by test_heartbeat.py.

torchrun --nproc_per_node=3 tests/utils/distributed/heartbeat_worker.py ARGS...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

import main
from utils.distributed import heartbeat

if __name__ == "__main__":
    heartbeat.INTERVAL_SECONDS, heartbeat.HANG_SECONDS = 0.5, 5.0
    sys.exit(main.main(sys.argv[1:]))
