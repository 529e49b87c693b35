import pytest
import torch
from torch import nn

from utils.training.ema import ModelEma


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1))


def test_average_by_hand_and_buffers_included() -> None:
    net = model()
    nn.init.constant_(net[0].weight, 1.0)
    ema = ModelEma(net, decay=0.9)
    nn.init.constant_(net[0].weight, 2.0)
    net[1].running_mean.fill_(10.0)  # type: ignore[operator, union-attr]
    net[1].num_batches_tracked.fill_(7)  # type: ignore[operator, union-attr]
    ema.update()
    ema.update()
    state = ema.module.state_dict()
    assert state["0.weight"].item() == pytest.approx(1.19)  # 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 2
    assert state["1.running_mean"].item() == pytest.approx(1.9)
    assert state["1.num_batches_tracked"].item() == 7


def test_warmup_by_hand() -> None:
    """Decays 1/10, 2/11, 3/12 and then 0.3, the final one; the next step's follows from its number alone."""
    net = model()
    nn.init.constant_(net[0].weight, 0.0)
    ema = ModelEma(net, decay=0.3, warmup=True)
    values = []
    for step, weight in enumerate((1.0, 2.0, 3.0, 4.0)):
        nn.init.constant_(net[0].weight, weight)
        ema.set_step(step)
        ema.update()
        values.append(ema.module.state_dict()["0.weight"].item())
    first = 0.9
    second = first * 2 / 11 + 2 * 9 / 11
    third = second * 3 / 12 + 3 * 9 / 12
    assert values == pytest.approx([first, second, third, 0.3 * third + 0.7 * 4])
    resumed = ModelEma(net, decay=0.9999, warmup=True)
    resumed.set_step(990)
    assert resumed.weight.item() == pytest.approx(0.009)
    resumed.set_step(10**6)
    assert resumed.weight.item() == pytest.approx(1e-4)


def test_without_warmup_the_decay_is_the_same_in_each_step() -> None:
    ema = ModelEma(model(), decay=0.9)
    ema.set_step(0)
    assert ema.weight.item() == pytest.approx(0.1)


def test_evaluation_mode_and_no_gradient() -> None:
    ema = ModelEma(model().train(), decay=0.9)
    assert not ema.module.training
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_follows_a_model_whose_weights_were_loaded_later() -> None:
    net = model()
    ema = ModelEma(net, decay=0.0)
    net.load_state_dict({name: torch.full_like(value, 3) for name, value in net.state_dict().items()})
    ema.update()
    assert ema.module.state_dict()["0.weight"].item() == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kept_on_the_cpu() -> None:
    net = model().cuda()
    ema = ModelEma(net, decay=0.5, force_cpu=True)
    nn.init.constant_(net[0].weight, 2.0)
    nn.init.constant_(ema.module[0].weight, 1.0)
    ema.update()
    assert ema.ema_tensors[0].device.type == "cpu"
    assert ema.module[0].weight.item() == 1.5
    assert next(ema.on(torch.device("cuda")).parameters()).is_cuda
