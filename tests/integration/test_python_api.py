"""`openwafer.validate` and `openwafer.compile` on models that know nothing of openwafer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from fc_mnist_runs import everything_in
from torch import nn

import openwafer


class Classifier(nn.Module):
    """Gives its loss in the form that it is asked for."""

    def __init__(self, form: str = "scalar") -> None:
        super().__init__()
        self.form = form
        self.hidden = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Any:
        logits = self.head(torch.relu(self.hidden(images)))
        loss = nn.functional.cross_entropy(logits, labels)
        if self.form == "attribute":
            return Output(loss=loss, logits=logits)
        if self.form == "dict":
            return {"logits": logits, "loss": loss}
        if self.form == "first item":
            return loss, logits
        return loss


@dataclass
class Output:
    loss: torch.Tensor
    logits: torch.Tensor


torch.utils._pytree.register_dataclass(Output)  # as libraries with such outputs do

NUM_PARAMETERS = 12 * 8 + 8 + 8 * 3 + 3


def tuple_batch(size: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(size, 12), torch.zeros(size, dtype=torch.long)


def dict_batch(size: int = 4) -> dict[str, torch.Tensor]:
    images, labels = tuple_batch(size)
    return {"labels": labels, "images": images}


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        ("scalar", "layer_pipelined"),
        ("scalar", "weight_streaming"),
        ("attribute", "layer_pipelined"),
        ("dict", "weight_streaming"),
        ("first item", "layer_pipelined"),
    ],
)
def test_every_form_of_a_loss(form: str, mode: Any) -> None:
    report = openwafer.validate(Classifier(form), dict_batch(), execution_mode=mode)
    assert report.ok, str(report)
    assert report.coverage == 1.0
    assert report.refusals == ()
    assert "hidden" in str(report.kernels)
    plan = openwafer.compile(Classifier(form), dict_batch(), execution_mode=mode)
    assert plan.execution_mode == mode
    assert plan.num_parameters == NUM_PARAMETERS
    assert plan.predicted.delta_t_cycles > 0


def test_dict_tuple_list_and_single_tensor_batches() -> None:
    dict_plan = openwafer.compile(Classifier(), dict_batch())
    for batch in (tuple_batch(), list(tuple_batch())):
        plan = openwafer.compile(Classifier(), batch)
        assert plan.predicted.delta_t_cycles == dict_plan.predicted.delta_t_cycles
        assert plan.num_samples == 4

    class Energy(nn.Linear):
        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return super().forward(value).square().mean()

    assert openwafer.validate(Energy(12, 8), torch.rand(4, 12)).ok


def test_batch_size_is_that_of_the_plan() -> None:
    plan = openwafer.compile(Classifier(), dict_batch(4), batch_size=64)
    assert plan.num_samples == 64
    same = openwafer.compile(Classifier(), dict_batch(64))
    assert plan.hash == same.hash
    other = openwafer.compile(Classifier(), dict_batch(4))
    assert plan.hash != other.hash


def test_the_model_is_left_as_it_was() -> None:
    """Neither weights, gradients, batch statistics, random numbers nor modes change."""
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, value: torch.Tensor) -> torch.Tensor:
            return self.inner(value).mean()

    wrapped = Wrapped().eval()
    before = {name: value.clone() for name, value in wrapped.state_dict().items()}
    random_state = torch.get_rng_state()
    openwafer.validate(wrapped, torch.rand(4, 6))
    assert not any(module.training for module in wrapped.modules())
    assert all(weight.grad is None for weight in wrapped.parameters())
    for name, value in wrapped.state_dict().items():
        assert torch.equal(value, before[name]), name
    torch.set_rng_state(random_state)


def test_compile_dir_and_nothing_else_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    openwafer.validate(Classifier(), dict_batch())
    plan = openwafer.compile(Classifier(), dict_batch())
    assert everything_in(tmp_path) == {"cwd": None}
    openwafer.compile(Classifier(), dict_batch(), compile_dir=tmp_path / "plans")
    assert (tmp_path / "plans" / f"cs_{plan.hash}" / "plan.json").exists()
    assert everything_in(tmp_path / "cwd") == {}


def test_a_machine_and_a_mode_that_do_not_exist() -> None:
    for arguments in (
        {"machine": "wse3"},
        {"execution_mode": "pipelined"},
        {"batch_size": 0},
        {"compute_dtype": torch.float64},
    ):
        with pytest.raises(openwafer.OpenWaferError) as caught:
            openwafer.compile(Classifier(), dict_batch(), **arguments)
        assert "allowed" in str(caught.value)


def test_mixed_precision_is_planned_for_as_given_or_as_the_model_says() -> None:
    wide = openwafer.compile(Classifier(), dict_batch(), execution_mode="layer_pipelined")
    narrow = openwafer.compile(
        Classifier(), dict_batch(), execution_mode="layer_pipelined", compute_dtype=torch.bfloat16
    )
    assert narrow.hash != wide.hash
    model = Classifier()
    model.compute_dtype = torch.bfloat16
    said = openwafer.compile(model, dict_batch(), execution_mode="layer_pipelined")
    assert said.hash == narrow.hash
    off = openwafer.compile(
        model, dict_batch(), execution_mode="layer_pipelined", compute_dtype=None
    )
    assert off.hash == wide.hash
    with torch.device("meta"):
        outline = openwafer.zoo.build("gpt2/small")
    assert outline.compute_dtype is torch.bfloat16
    assert openwafer.zoo.build("gpt2/tiny").compute_dtype is None


class Unsupported(Classifier):
    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Any:
        values = torch.linalg.svdvals(images)
        return super().forward(images * values.sum(), labels)


def test_unsupported_operations_are_reported_and_refused() -> None:
    report = openwafer.validate(Unsupported(), dict_batch())
    assert not report.ok
    assert 0 < report.coverage < 1
    assert len(report.refusals) >= 1
    assert "svd" in str(report)
    assert Path(__file__).name in str(report)
    with pytest.raises(openwafer.OpenWaferError, match="svd"):
        openwafer.compile(Unsupported(), dict_batch())


def test_a_branch_on_data_names_the_line() -> None:
    class Branching(Classifier):
        def forward(self, images: torch.Tensor, labels: torch.Tensor) -> Any:
            if images.sum() > 0:  # the line
                images = -images
            return super().forward(images, labels)

    source = Path(__file__).read_text().splitlines()
    line = next(n for n, text in enumerate(source, 1) if text.endswith("# the line"))
    with pytest.raises(openwafer.OpenWaferError) as caught:
        openwafer.validate(Branching(), dict_batch())
    assert caught.value.where == f"{__file__}:{line}"
