"""A model of the zoo in TensorFlow against its PyTorch twin: logits, losses, training.

The twin's arithmetic is compared with transformers elsewhere; mode_harness.py compares the compiled
modes with TensorFlow itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from openwafer.config.optimizer import OptimizerConfig, build_optimizer_config
from openwafer.config.schema import Report
from openwafer.data import build_dataset, make_dataloader
from openwafer.frontends.tf.library import tf
from openwafer.optim.build import build_optimizer
from openwafer.optim.schedule import learning_rate_at
from openwafer.streaming.loader import BatchSequence
from openwafer.zoo.catalog import family_of, load, model_config
from openwafer.zoo.evaluation_data import numbered
from openwafer.zoo.family import Family
from openwafer.zoo.model import AnyModel, Batch, ModelConfig
from openwafer.zoo.tf.functions import model_fn_of, tf_model_class
from openwafer.zoo.tf.names import counterparts, to_tf
from openwafer.zoo.tf.optimizer import trainer_section

ADAMW: Mapping[str, Any] = {
    "optimizer_type": "AdamW",
    "correct_bias": True,
    "weight_decay_rate": 0.01,
    "learning_rate": 1e-3,
}
MOMENTUM: Mapping[str, Any] = {"optimizer_type": "SGD", "momentum": 0.9, "learning_rate": 0.02}


@dataclass(frozen=True, slots=True, kw_only=True)
class Twin:
    """A model without dropout, its data, and its `optimizer` section."""

    family: Family
    config: ModelConfig
    train: DataLoader[Any]
    evaluation: DataLoader[Any]
    optimizer: OptimizerConfig
    raw_optimizer: Mapping[str, Any]

    def torch_model(self) -> AnyModel:
        torch.manual_seed(1)
        return self.family.model(self.config).eval()

    def model_fn(self) -> Any:
        variables = counterparts(self.torch_model())
        section = trainer_section(self.optimizer, self.raw_optimizer, variables)
        return model_fn_of(self.family, self.config, optimizer=section)


def twin(name: str, overrides: Iterable[str] = (), *, optimizer: Mapping[str, Any] = ADAMW) -> Twin:
    """The catalog's model `name` with its own data."""
    loaded, family = load(name, overrides), family_of(name)
    config = model_config(family, loaded.raw, loaded.locate)
    rates = [f.name for f in fields(config) if "dropout" in f.name]
    config = replace(config, **{r: 0.0 for r in rates if isinstance(getattr(config, r), float)})
    report = Report()
    checked = build_optimizer_config(optimizer, locate=str, report=report, notices=[])
    report.raise_if_any()
    assert checked is not None
    return Twin(
        family=family,
        config=config,
        train=_loader(family, loaded.raw, "train"),
        evaluation=_loader(family, loaded.raw, "eval"),
        optimizer=checked,
        raw_optimizer=optimizer,
    )


def _loader(family: Family, raw: Mapping[str, Any], split: Any) -> DataLoader[Any]:
    section = dict(raw[f"{split}_input"])
    if split == "eval":
        section["pad_last_batch"] = True
    dataset = build_dataset(family.task, section, split)
    loader = make_dataloader(dataset, section, split)
    return loader if split == "train" else numbered(loader)


def _first(loader: DataLoader[Any], count: int) -> list[Batch]:
    """As a PyTorch run sees them."""
    sequence = BatchSequence(loader, seed=1)
    found: list[Batch] = []
    for epoch in range(count):
        for batch in sequence.epoch(epoch):
            found.append(batch)
            if len(found) == count:
                return found
    raise AssertionError("empty epochs")


class TFModel:
    """The TensorFlow model in a session, with the weights of a PyTorch one."""

    def __init__(self, of: Twin, weights: AnyModel, batch: Batch, mode: str) -> None:
        self._graph = tf.Graph()
        with self._graph.as_default():
            tf.compat.v1.set_random_seed(1)
            tf.compat.v1.train.get_or_create_global_step()
            self._places = {
                name: tf.compat.v1.placeholder(str(tensor.dtype).partition(".")[2], tensor.shape)
                for name, tensor in batch.items()
            }
            variables = counterparts(weights)
            section = trainer_section(of.optimizer, of.raw_optimizer, variables)
            model = tf_model_class(of.family)(of.config, optimizer=section)
            outputs = model(self._places, mode)
            self.loss = model.build_total_loss(outputs, self._places, None, mode)
            self.outputs = outputs
            found = {v.op.name: v for v in tf.compat.v1.trainable_variables()}
            expected = {each.name: each for each in variables if each.trained}
            assert sorted(found) == sorted(expected)
            self.train_op = model.build_train_ops(self.loss) if mode == "train" else None
            self._session = tf.compat.v1.Session(graph=self._graph)
            self._session.run(tf.compat.v1.global_variables_initializer())
            for variable in tf.compat.v1.global_variables():
                if variable.op.name in (values := to_tf(weights)):
                    assert variable.shape == values[variable.op.name].shape, variable.op.name
                    variable.load(values[variable.op.name], self._session)

    def run(self, wanted: Any, batch: Batch) -> Any:
        feed = {place: batch[name].numpy() for name, place in self._places.items()}
        return self._session.run(wanted, feed)

    def __enter__(self) -> TFModel:
        return self

    def __exit__(self, *_: object) -> None:
        self._session.close()


def check_twin(
    name: str,
    overrides: Iterable[str] = (),
    *,
    optimizer: Mapping[str, Any] = ADAMW,
    steps: int = 10,
    rtol: float = 1e-5,
) -> None:
    """The same weights: logits and loss on a batch of training and of evaluation, and the losses
    of `steps` steps of training by the same optimizer."""
    of = twin(name, overrides, optimizer=optimizer)
    model = of.torch_model()
    for split, loader in (("train", of.train), ("eval", of.evaluation)):
        batch = _first(loader, 1)[0]
        with TFModel(of, model, batch, "eval") as ours:
            found, loss = ours.run([ours.outputs, ours.loss], batch)
        with torch.no_grad():
            logits = model.logits(**batch)
            expected = model.loss(logits, **batch)
        named = logits if isinstance(logits, dict) else {"logits": logits}
        assert sorted(found) == sorted(named)
        for head, theirs in named.items():
            scale = float(theirs.abs().max())
            np.testing.assert_allclose(
                found[head], theirs.numpy(), rtol=0, atol=1e-5 * scale, err_msg=f"{split} {head}"
            )
        assert loss.dtype == np.float32
        assert loss.shape == ()
        np.testing.assert_allclose(loss, float(expected), rtol=rtol, err_msg=split)
    batches = _first(of.train, steps)
    with TFModel(of, model, batches[0], "train") as ours:
        losses = [ours.run([ours.loss, ours.train_op], batch)[0] for batch in batches]
    np.testing.assert_allclose(losses, torch_losses(of, batches), rtol=rtol)


def torch_losses(of: Twin, batches: Iterable[Batch]) -> list[float]:
    model = of.torch_model().train()
    optimizer = build_optimizer(of.optimizer, dict(model.named_parameters()))
    losses: list[float] = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(of.optimizer.learning_rate, step)
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        if of.optimizer.max_gradient_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), of.optimizer.max_gradient_norm)
        optimizer.step()
        losses.append(float(loss))
    return losses
