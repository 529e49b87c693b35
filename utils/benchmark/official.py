"""Recorded speed of the official code, for comparison in tables and charts."""

# Images per second of all processes together, 224x224, float16 AMP: the official training step with EMA and clipping,
# and official inference. torch 2.11, 2026-11-30; inference and batch 512 from 2026-11-23.
CHIP = "NVIDIA H200"
OFFICIAL: dict[tuple[str, str, int, int], float] = {  # model, work, batch per process, processes
    ("mlla_tiny", "training", 128, 1): 672,
    ("mlla_tiny", "training, MESA", 128, 1): 605,
    ("mlla_tiny", "training", 128, 2): 1034,
    ("mlla_tiny", "training, MESA", 128, 2): 946,
    ("mlla_tiny", "training", 512, 1): 1120,
    ("mlla_tiny", "training, MESA", 512, 1): 860,
    ("mlla_tiny", "inference", 256, 1): 3612,
}


def official_speed(*, model: str, work: str, chip: str, batch: int, size: int | str, processes: int) -> float | None:
    """Return the official code's images per second at the same work, or None where it was not measured."""
    return OFFICIAL.get((model, work, batch, processes)) if chip == CHIP and size == 224 else None
