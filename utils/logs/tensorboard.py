"""TensorBoard's event files."""

import io
import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np

from utils.logs.atomic_write import append_atomic

HISTOGRAM_BINS = 64
SERIAL_NUMBERS = itertools.count()  # of the files of this process


class EventFile:
    """File of TensorBoard events, each of which is in the file when `add_...` returns.

    SummaryWriter's thread prints a traceback where the disk is full or the folder is gone, and is dead from then on.
    Here an event that cannot be written raises an OSError and leaves nothing behind; the next one is tried again.

    Args:
        folder: where to make the file.
        purge_step: TensorBoard hides events of this step and later ones in older files of the folder.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path, purge_step: int) -> None:
        # These imports take a second, and only the first process writes.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self.event_type, self.record_writer_type, self.summary = Event, RecordWriter, summary
        host = socket.gethostname()
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{host}.{os.getpid()}.{next(SERIAL_NUMBERS)}"
        self.add(purge_step, file_version="brain.Event:2")
        self.add(purge_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, **content: Any) -> None:
        """Add an event with the given fields."""
        record = io.BytesIO()
        event = self.event_type(wall_time=time.time(), step=step, **content)
        self.record_writer_type(record).write(event.SerializeToString())
        append_atomic(self.path, record.getvalue())

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.add(step, summary=self.summary.scalar(name, value))

    def add_histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self.add(step, summary=self.summary.histogram(name, values, HISTOGRAM_BINS))

    def add_image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Add an image (H, W, 3), uint8."""
        self.add(step, summary=self.summary.image(name, pixels, dataformats="HWC"))
