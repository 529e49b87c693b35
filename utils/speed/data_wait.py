"""Time for which a device waits for data."""

import time

import torch


class DataWait:
    """Seconds for which the device has nothing to do but to wait for the next batch.

    The host runs ahead of a GPU, so that its own waiting says little: there the gaps between two steps are measured.

    Args:
        device: where the steps run.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_gpu = device.type == "cuda"
        self.total = 0.0
        self.start = 0.0
        self.gaps: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        """Begin to wait, after a step's work was handed to the device."""
        if self.is_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.gaps.append((event, torch.cuda.Event(enable_timing=True)))
        else:
            self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        """End the waiting, before the next step's work is handed to the device."""
        if self.is_gpu:
            self.gaps[-1][1].record()
        else:
            self.total += time.perf_counter() - self.start

    def collect(self) -> float:
        """Return the seconds so far. Call it when the device has just been waited for."""
        self.total += sum(begin.elapsed_time(end) for begin, end in self.gaps) / 1000  # milliseconds
        self.gaps.clear()
        return self.total
