"""Processes that load the images of dense tasks."""

import cv2

from data.workers import leave_process_group


def set_up_worker(number: int) -> None:
    """For a RestartingDataLoader: out of reach of the training process's signals, and on one core, where OpenCV
    would take them all.
    """
    leave_process_group(number)
    cv2.setNumThreads(0)
