"""Settings: what is wrong is named with the nearest right thing."""

from __future__ import annotations

from typing import Any

import pytest

from clipfreeze.errors import DataError
from clipfreeze.train.settings import training_settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"epoch": 3}, "there is no setting 'epoch'\n  fix: did you mean epochs?"),
        ({"epochs": 0}, "epochs = 0: input should be greater than 0"),
        ({"batch_size": "many"}, "batch_size = 'many'"),
        ({"precision": "fp8"}, "precision = 'fp8': input should be 'auto', 'fp32', 'bf16' or 'fp16'"),
        ({"evaluate_every": "often"}, "evaluate_every = 'often': write a number of steps"),
        ({"save_every": "0 steps"}, "0 is no stretch"),
        ({"on_floor": "stop"}, "on_floor without a retain_floor"),
        ({"batch_size": "auto", "micro_batch": 2}, "with micro_batch, say a number"),
        ({"clip_grad": float("inf")}, "clip_grad = inf"),
        ({"ema": 1.0}, "ema = 1.0: input should be less than 1"),
    ],
)
def test_each_fault_is_told(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        training_settings(**values)
    assert words in str(caught.value)
    assert len(caught.value.problems) == 1


def test_what_decides_is_evaluated_each_epoch() -> None:
    assert training_settings().evaluates is None
    assert training_settings(best="top1").evaluates == "1 epochs"
    assert training_settings(patience=2).evaluates == "1 epochs"
    assert training_settings(retain_floor=0.9, evaluate_every="5 steps").evaluates == "5 steps"
