"""Processes that load images."""

import os


def leave_process_group(_: int) -> None:
    """For a DataLoader's worker_init_fn: signals to the group of the training process no longer reach this worker.

    Launchers send SIGTERM, and terminals Ctrl-C, to all of a group. The training process has to save first, which it
    could not do with dead workers; it ends them itself, and they end when it is gone.
    """
    os.setpgrp()
