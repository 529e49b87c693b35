from typing import Any

import pytest
import torch
from timm.scheduler.step_lr import StepLRScheduler

from utils.tools.official_state import OfficialStateError, official_state
from utils.training.lr_schedule import ClassificationSchedule


def schedule(name: str) -> ClassificationSchedule:
    lengths = {"warmup_steps": 4, "total_steps": 40, "decay_steps": 10, "decay_rate": 0.1}
    return ClassificationSchedule(name, base_lr=0.4, warmup_lr=0.1, min_lr=0.01, **lengths)


def content(*, num_groups: int = 2, **entries: Any) -> dict[str, Any]:
    """Return a checkpoint of three epochs."""
    groups = [{"params": [i], "lr": 9.0, "fused": True, "weight_decay": 0.0} for i in range(num_groups)]
    return {"optimizer": {"state": {0: {}}, "param_groups": groups}, "epoch": 2, "steps": 0, "scaler": {}, **entries}


@pytest.mark.parametrize("name", ["cosine", "step", "linear"])
def test_the_state_continues_the_schedule(name: str) -> None:
    """Three epochs of 5 steps are done: the next step is 15, whose rate is that of t = 14."""
    state = official_state(content(), "w.pth", schedule(name), 5)
    assert state["epoch"] == 3
    assert state["optimizer"]["state"] == {0: {}}
    group = {"lr": schedule(name).rate_at(14), "initial_lr": 0.4, "fused": None, "weight_decay": 0.0}
    assert state["optimizer"]["param_groups"] == [{"params": [i], **group} for i in range(2)]


def test_the_state_of_the_step_schedule() -> None:
    state = official_state(content(), "w.pth", schedule("step"), 5)["lr_scheduler"]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = StepLRScheduler(optimizer, decay_t=1, t_in_epochs=False)
    scheduler.load_state_dict(state)
    for t in (0, 3, 4, 9, 10, 25, 39):
        scheduler.step_update(t)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(schedule("step").rate_at(t))


@pytest.mark.parametrize(
    ("entries", "message"),
    [({"steps": 3}, "is from within an epoch"), ({"num_groups": 7}, "has 7 groups of parameters")],
)
def test_states_that_the_official_code_lacks(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(OfficialStateError, match=message):
        official_state(content(**entries), "w.pth", schedule("cosine"), 5)
