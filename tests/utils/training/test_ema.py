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
