"""The average is what the formula says, and evaluating it leaves the weights as they were."""

from __future__ import annotations

import torch
from torch import nn

from clipfreeze.train.ema import Average


def test_the_average_is_the_sum_by_hand_and_the_weights_come_back() -> None:
    torch.manual_seed(0)
    parameters = {"a": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(5))}
    average = Average(parameters, 0.5)
    by_hand = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for step in range(6):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        for name, parameter in parameters.items():
            by_hand[name] = decay * by_hand[name] + (1 - decay) * parameter.detach()
            torch.testing.assert_close(average.values[name], by_hand[name])
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    objects = {name: id(parameter) for name, parameter in parameters.items()}
    with average.in_place():
        for name, parameter in parameters.items():
            torch.testing.assert_close(parameter.detach(), by_hand[name])
            assert id(parameter) == objects[name]
    for name, parameter in parameters.items():
        assert torch.equal(parameter.detach(), before[name])
        torch.testing.assert_close(average.values[name], by_hand[name])
