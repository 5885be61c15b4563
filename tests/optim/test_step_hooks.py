"""What happens around a step."""

import pytest
import torch
from torch import nn

from clipfreeze.optim.step_hooks import Pull, clamp_after_steps, pull_before_steps


def pulled(fused: bool = False) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.tensor([3.0, 5.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0, fused=fused)
    pull_before_steps(optimizer, [Pull("w", parameter, torch.tensor([1.0, 1.0]), 0.1)])
    return parameter, optimizer


def test_a_parameter_without_gradient_is_pulled_all_the_same():
    parameter, optimizer = pulled()
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([3 - 0.4, 5 - 0.8]))


def test_a_fused_optimizer_that_unscales_by_itself_pulls_no_less():
    parameter, optimizer = pulled(fused=True)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)  # as GradScaler.step does
    parameter.grad = torch.tensor([8.0, 0.0])
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.tensor([3 - 1.4, 5 - 0.8]))


def test_hooks_come_off():
    parameter = nn.Parameter(torch.tensor([3.0]))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    handle = clamp_after_steps(optimizer, [(parameter, (0.0, 1.0))])
    optimizer.step()
    assert parameter.item() == 1
    handle.remove()
    parameter.grad = torch.tensor([-9.0])
    optimizer.step()
    assert parameter.item() == 10


@pytest.mark.parametrize("name", ["AdamW", "RMSprop"])
def test_bounds_hold_for_optimizers_with_state(name):
    parameter = nn.Parameter(torch.tensor([0.5]))
    optimizer = getattr(torch.optim, name)([parameter], lr=10.0)
    clamp_after_steps(optimizer, [(parameter, (0.0, 1.0))])
    for sign in (1.0, -1.0, -1.0, -1.0):
        parameter.grad = torch.tensor([sign])
        optimizer.step()
        assert 0 <= parameter.item() <= 1
