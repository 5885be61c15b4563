"""The proof on a user's model: it passes where chunks are right, and fails where they are not."""

from __future__ import annotations

import pytest

from clipfreeze import models
from clipfreeze.anatomy.partition import describe
from clipfreeze.errors import DataError
from clipfreeze.plan.build import resolve
from clipfreeze.plan.value import Plan
from clipfreeze.policy.loading import load_policy
from clipfreeze.train import accumulate, selftest


def plan_of(policy: str) -> Plan:
    return resolve(load_policy(policy), describe(models.build_on_meta("demo"), "demo"))


@pytest.mark.parametrize("policy", ["full", "lora", "prompt", "logit_scale"])
def test_chunks_are_proved_on_the_embedded_model(policy: str) -> None:
    checks = selftest.check_chunks(plan_of(policy), "demo", None, 4, 3)
    assert checks[0].part == "loss"
    assert all(check.holds for check in checks), checks
    assert sum(check.tensors for check in checks) > 1


def test_the_mean_over_chunks_is_found_to_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_averaging(module, batch, size):  # type: ignore[no-untyped-def]
        parts = [{name: value[start : start + size] for name, value in batch.items()} for start in range(0, 4, size)]
        losses = [module(**part) / len(parts) for part in parts]
        sum(losses).backward()
        return sum(losses).detach()

    assert accumulate.backward_in_chunks is selftest.backward_in_chunks
    monkeypatch.setattr(selftest, "backward_in_chunks", by_averaging)
    checks = selftest.check_chunks(plan_of("full"), "demo", None, 4, 2)
    assert not any(check.holds for check in checks)


def test_chunks_as_large_as_the_batch_prove_nothing() -> None:
    with pytest.raises(DataError, match="chunks of 4 of a batch of 4"):
        selftest.check_chunks(plan_of("logit_scale"), "demo", None, 4, 4)
