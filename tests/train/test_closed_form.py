"""L-BFGS on logit scale and bias finds the minimum of the very loss that steps go down on, within bounds, in a step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

import clipfreeze
from clipfreeze.errors import DataError, InterruptedRunError, PlanError, RunError
from clipfreeze.optim.optimizers import build_optimizer
from clipfreeze.policy.schema import Optimizer
from clipfreeze.stored import WEIGHTS, read_weights
from clipfreeze.train.batches import Tokenizer, TrainingLoader
from clipfreeze.train.checkpoints import read_checkpoint
from clipfreeze.train.closed_form import Least, products_of
from clipfreeze.train.loop import Callback, Result, Run, fit
from clipfreeze.train.objective import ClassPrompts, Contrastive, Training

import tiny
from hand import COLOURS, Words, colour_pairs, transform

OBJECTIVES = ("clip", "siglip", "classes")
FAR = {"logit_scale": (-20.0, 20.0)}


def made(objective: str, batches: int = 20, size: int = 16) -> tuple[Training, list[dict[str, Tensor]]]:
    """An objective, and features that tell pairs or classes apart in part; in each batch two pairs say the same."""
    draw = torch.Generator().manual_seed(0)
    bias = nn.Parameter(torch.tensor(-10.0)) if objective == "siglip" else None
    model: Any = SimpleNamespace(logit_scale=nn.Parameter(torch.tensor(2.659)), logit_bias=bias)

    def normal(*shape: int) -> Tensor:
        return nn.functional.normalize(torch.randn(*shape, 32, generator=draw), dim=-1)

    classes, found = normal(10), []
    for _ in range(batches):
        text, label = normal(size), torch.randint(10, (size,), generator=draw)
        image = nn.functional.normalize((classes[label] if objective == "classes" else text) + 3 * normal(size), dim=-1)
        concepts = torch.arange(size)
        concepts[-1] = 0
        targets = {"label": label} if objective == "classes" else {"concepts": concepts}
        found.append({"image": image, "text": classes if objective == "classes" else text, **targets})
    return ClassPrompts(model, 10) if objective == "classes" else Contrastive(model), found


def scalars_of(model: Any) -> dict[str, nn.Parameter]:
    return {name: value for name, value in vars(model).items() if value is not None}


def least(module: Training, batches: list[dict[str, Tensor]], bounds: dict[str, tuple[float, float]]) -> Least:
    parts = [products_of(module, **batch) for batch in batches]
    products = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Least(module.model, scalars_of(module.model), bounds, products)


def by_steps(module: Training, batches: list[dict[str, Tensor]]) -> Callable[[Any], float]:
    """The mean loss of the batches as steps take it, in double precision, of values of the scalars."""
    exact = [{n: v.double() if v.is_floating_point() else v for n, v in batch.items()} for batch in batches]

    @torch.no_grad()
    def at(values: Any) -> float:
        for parameter, value in zip(scalars_of(module.model).values(), values, strict=True):
            parameter.data = torch.tensor(float(value), dtype=torch.float64)
        return float(torch.stack([module.loss(**batch) for batch in exact]).mean())

    return at


def lbfgs(module: Training) -> torch.optim.Optimizer:
    group = {"params": list(scalars_of(module.model).values()), "name": "", "lr": 1.0, "weight_decay": 0.0}
    return build_optimizer(Optimizer(name="lbfgs"), [group])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_slopes_are_those_of_the_steps(objective: str) -> None:
    module, batches = made(objective)
    of = least(module, batches, FAR)
    loss = of.evaluate()
    slopes = {name: scalar.grad for name, scalar in scalars_of(module.model).items()}
    expected = torch.stack([module.loss(**batch) for batch in batches]).mean()
    assert loss == pytest.approx(expected.item(), abs=1e-6)
    for name, scalar in scalars_of(module.model).items():
        torch.testing.assert_close(slopes[name], torch.autograd.grad(expected, scalar, retain_graph=True)[0])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_minimum_is_where_another_optimizer_finds_it(objective: str) -> None:
    module, batches = made(objective)
    calls: list[float] = []
    of = least(module, batches, FAR)
    real = of.evaluate
    of.evaluate = lambda: calls.append(real()) or calls[-1]  # type: ignore[method-assign, func-returns-value]
    loss = of.find(lbfgs(module))
    found = [scalar.item() for scalar in scalars_of(module.model).values()]
    best = minimize(
        by_steps(module, batches),
        [2.659, -10.0][: len(found)],
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-14},
    )
    assert found == pytest.approx(list(best.x), abs=1e-5)
    assert loss == pytest.approx(best.fun, abs=1e-7)
    assert len(calls) < 60


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (3.5, 4.6052)])
def test_past_a_bound_the_minimum_is_on_it_and_the_bias_is_the_best_there(
    objective: str, bounds: tuple[float, float]
) -> None:
    module, batches = made(objective)
    loss = least(module, batches, {"logit_scale": bounds}).find(lbfgs(module))
    scale, *bias = (scalar.item() for scalar in scalars_of(module.model).values())
    assert scale == pytest.approx(bounds[0] if bounds[0] else bounds[1], abs=1e-6)
    at = by_steps(module, batches)
    best = (
        minimize(
            lambda values: at([scale, *values]), bias, method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-14}
        )
        if bias
        else None
    )
    assert bias == pytest.approx([] if best is None else list(best.x), abs=1e-5)
    assert loss == pytest.approx(at([scale, *bias]), abs=1e-7)


def test_a_line_search_that_leaps_past_a_bound_comes_back_to_a_minimum_before_it() -> None:
    module, batches = made("clip")
    free = least(module, batches, FAR)
    free.find(lbfgs(module))
    scale = module.model.logit_scale
    expected = scale.item()
    scale.data.fill_(expected - 2)
    least(module, batches, {"logit_scale": (-20.0, expected + 1e-3)}).find(lbfgs(module))
    assert scale.item() == pytest.approx(expected, abs=1e-5)


def applied(family: str = "clip_vit", **knobs: Any) -> Any:
    torch.manual_seed(0)
    module = tiny.FAMILIES[family]()
    policy = clipfreeze.load_policy("logit_scale", optimizer="lbfgs", **knobs)
    return clipfreeze.apply(clipfreeze.resolve(policy, module), module)


def run(of: Any, **settings: Any) -> Result:
    values = {"train": colour_pairs(2), "epochs": 1, "batch_size": 4} | settings
    return fit(of, tokenizer=Words(), transform=transform(), **values)


@pytest.mark.parametrize(
    ("family", "objective"), [("clip_vit", "contrastive"), ("siglip", "auto"), ("coca", "classes")]
)
def test_a_run_ends_in_the_minimum_of_its_epoch(family: str, objective: Any) -> None:
    classes = objective == "classes"
    data = colour_pairs(2, labelled=classes)
    of = applied(family, clamp_min=-3.0)
    before = {name: value.clone() for name, value in of.model.state_dict().items()}
    result = run(of, train=data, objective=objective, micro_batch=3)
    assert result.steps == 1
    model = of.model
    tokens = Tokenizer(Words(), model)
    module = ClassPrompts(model, len(COLOURS)) if classes else Contrastive(model)
    loader = TrainingLoader(
        data, transform(), None if classes else tokens, batch_size=4, seed=0, num_workers=0, labels=classes
    )
    batches = [
        {"text": tokens(list(COLOURS)), **loaded.batch} if classes else loaded.batch for loaded in loader.batches(0)
    ]

    @torch.no_grad()
    def loss() -> float:
        return float(torch.stack([module(**batch) for batch in batches]).mean())

    assert result.loss == pytest.approx(loss(), abs=1e-5)
    for name, parameter in of.trainable().items():
        if classes and name == "logit_bias":
            continue
        for aside in (-0.1, 0.1):
            moved = parameter.item() + aside
            if name == "logit_bias" or -3 <= moved <= 4.6052:
                kept = parameter.detach().clone()
                parameter.data.fill_(moved)
                assert loss() > result.loss
                parameter.data.copy_(kept)
    changed = {
        name for name, value in model.state_dict().items() if value.numpy().tobytes() != before[name].numpy().tobytes()
    }
    assert changed == set(of.trainable())


class StopAt(Callback):
    """As a signal does after a step."""

    def on_step(self, run: Run, record: Any) -> None:
        run.stopping.asked = "SIGTERM"


def test_a_step_is_an_epoch_and_a_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def train(name: str, of: Any, **settings: Any) -> Result:
        values = {"tests": {"target": colour_pairs(labelled=True)}, "evaluate_every": "1 epochs", "best": "nll"}
        return run(of, epochs=3, folder=tmp_path / name, keep=3, **values | settings)

    straight = train("straight", applied())
    with pytest.raises(InterruptedRunError, match="after step 1 of 3"):
        train("run", applied(), callbacks=[StopAt()])
    saved = read_checkpoint(tmp_path / "run")
    torch.manual_seed(0)
    resumed = train("run", clipfreeze.load(saved.path, tiny.FAMILIES["clip_vit"]()), resume=saved)
    assert (resumed.steps, resumed.after, resumed.loss) == (3, straight.after, straight.loss)
    one, two = (read_weights(tmp_path / name / WEIGHTS)[0] for name in ("straight", "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr"] for line in lines if "loss" in line] == [{"lr=1 wd=0 constant": 1.0}] * 3


def test_settings_that_nothing_would_read_and_losses_without_end_are_errors() -> None:
    with pytest.raises(DataError, match=r"ema does not go with lbfgs(.|\n)*clip_grad does not go with lbfgs"):
        run(applied(), ema=0.9, clip_grad=1.0)
    of = applied()
    of.model.visual.proj.data.fill_(float("nan"))
    with pytest.raises(RunError, match="the loss is nan at step 1"):
        run(of)


RULE = '[[rule]]\nmatch = "@{logit_scale,logit_bias}"\ntrain = true\nlr = 1.0\n'
HOLDS = '[optimizer]\nname = "LBFGS"\n'


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (RULE.replace("logit_bias", "projections") + HOLDS, "trains, which changes the features"),
        (RULE + '[[rule]]\nmatch = "@logit_bias"\nlr = 0.5\n' + HOLDS, "one param group, and this plan has 2"),
        (RULE + HOLDS + 'weight_decay = 0.1\n', "no weight decay"),
        (RULE + 'l2sp = 0.1\n' + HOLDS, "l2sp"),
        (RULE + HOLDS + '[schedule]\nname = "cosine"\n', "has a schedule"),
        (RULE + 'schedule = { name = "constant", warmup = 2 }\n' + HOLDS, "has a schedule"),
        (RULE + HOLDS + "warm_start = 3\n", "warm_start = 0"),
        (RULE + HOLDS + '[[phase]]\nuntil = "50%"\n[[phase]]\n', "has phases"),
        (RULE + HOLDS + "max_itr = 3\n", "did you mean max_iter"),
    ],
)  # fmt: skip
def test_what_lbfgs_cannot_do_is_refused_with_the_fix(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "mine.toml"
    module = tiny.siglip()
    path.write_text(RULE + HOLDS, encoding="utf-8")
    clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy(path), module), module).remove()
    path.write_text(text, encoding="utf-8")
    with pytest.raises(PlanError, match=complaint):
        clipfreeze.apply(clipfreeze.resolve(clipfreeze.load_policy(path), module), module)
