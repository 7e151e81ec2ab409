"""What the tests of BERT's families share: weights copied by the rules, slowly, and comparisons."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from openwafer.zoo.family import Family
from openwafer.zoo.model import AnyModel, ModelConfig
from openwafer.zoo.weights import Rule

VOCAB, WIDTH, LENGTH = 50, 24, 12
THEIR_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": LENGTH,
}


def slow(*values: Any) -> Any:
    """A parameter set for `make test-all` only."""
    return pytest.param(*values, marks=pytest.mark.slow)


def spread_out(model: nn.Module) -> None:
    """Weights so large, and biases so uneven, that nothing is lost in the noise."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(0.1, 0.3)
    for part in model.modules():
        if isinstance(getattr(part, "decoder", None), nn.Linear):
            part.bias.data.copy_(part.decoder.bias.data)  # untied, transformers does not read it


def expanded(family: Family, config: ModelConfig) -> list[tuple[Rule, str, tuple[str, ...]]]:
    """Each rule with the names of each layer."""
    assert family.weights is not None
    return [
        (rule, rule.ours.format(layer=layer), tuple(n.format(layer=layer) for n in rule.theirs))
        for rule in family.weights.rules(config)
        for layer in range(getattr(config, rule.layers) if rule.layers else 1)
    ]


def ours_from(family: Family, config: ModelConfig, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for rule, ours, names in expanded(family, config):
        tensors = [theirs[name] for name in names]
        state[ours] = rule.join(*tensors) if rule.join else tensors[0]
    return state


def theirs_from(family: Family, config: ModelConfig, ours: dict[str, Tensor]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for rule, name, names in expanded(family, config):
        tensors = rule.split(ours[name]) if rule.split else (ours[name],)
        state.update(zip(names, tensors, strict=True))
    return state


def converted(family: Family, theirs: nn.Module) -> AnyModel:
    """Our model with the weights of theirs, in evaluation form; every weight is from theirs, and
    what goes back is what came."""
    assert family.weights is not None
    spread_out(theirs)
    theirs.eval()
    config = family.config.from_section(family.weights.config_from(theirs.config.to_dict()))
    model = family.model(config).eval()
    state = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    model.load_state_dict(ours_from(family, config, state), strict=True)
    back = theirs_from(family, config, model.state_dict())
    unknown = set(state) - set(back)
    assert all(name.startswith(family.weights.ignored) for name in unknown), unknown
    assert all(torch.equal(back[name], state[name]) for name in back)
    again = theirs.config_class(**family.weights.config_to(config))
    assert again.architectures == [type(theirs).__name__]
    kept = {**theirs.config.to_dict(), **family.weights.config_to(config)}
    assert type(theirs)(theirs.config_class(**kept)).load_state_dict(back, strict=False)
    return model


def gradients_agree(family: Family, model: AnyModel, theirs: nn.Module) -> None:
    """After both backward passes: every gradient within 1e-4 of theirs, none missing."""
    of_theirs = {name: weight.grad for name, weight in theirs.named_parameters()}
    parameters = dict(model.named_parameters())
    seen = 0
    for _, ours, names in expanded(family, model.config):
        gradient = of_theirs[names[0]]
        assert gradient is not None
        torch.testing.assert_close(parameters[ours].grad, gradient, atol=1e-4, rtol=1e-4)
        seen += 1
    assert seen == len(parameters)


def text_batch(num_rows: int = 4, num_segments: int = 2, pad_id: int = 0) -> dict[str, Tensor]:
    """Tokens above 2, the first rows padded on the right."""
    generator = torch.Generator().manual_seed(2)
    shape = (num_rows, LENGTH)
    ids = torch.randint(3, VOCAB, shape, generator=generator)
    mask = torch.ones(shape, dtype=torch.int64)
    mask[0, 7:], mask[1, 3:] = 0, 0
    return {
        "input_ids": ids.masked_fill(mask == 0, pad_id),
        "attention_mask": mask,
        "token_type_ids": torch.randint(0, num_segments, shape, generator=generator),
    }


def masked_tokens(batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The batch with three masked positions a row, one of them unused, and the labels of every
    position as Hugging Face wants them, -100 where nothing is masked."""
    num_rows = len(batch["input_ids"])
    positions = torch.tensor([[0, 2, 1]]).expand(num_rows, -1).contiguous()
    labels = torch.arange(3 * num_rows).reshape(num_rows, 3) % VOCAB
    mask = torch.tensor([[1, 1, 0]]).expand(num_rows, -1).contiguous()
    full = torch.full(batch["input_ids"].shape, -100)
    full.scatter_(1, positions, torch.where(mask == 1, labels, -100))
    ours = {"masked_lm_positions": positions, "labels": labels, "masked_lm_mask": mask}
    return {**batch, **ours}, full


def wider(batch: dict[str, Tensor], by: int = 3) -> dict[str, Tensor]:
    """The same batch with more padding, of arbitrary tokens."""
    ids = batch["input_ids"]
    junk = torch.full((len(ids), by), 7)
    zeros = torch.zeros_like(junk)
    more = {"input_ids": junk, "attention_mask": zeros, "token_type_ids": zeros + 1}
    return {
        name: torch.cat([tensor, more[name]], dim=1) if name in more else tensor
        for name, tensor in batch.items()
    }


def with_filling_rows(batch: dict[str, Tensor], count: int = 2) -> dict[str, Tensor]:
    """The same batch with rows of zeros after it, as a short last batch is filled."""
    return {
        name: torch.cat([tensor, tensor.new_zeros((count, *tensor.shape[1:]))])
        for name, tensor in batch.items()
    }


def small(family: Family, **changes: Any) -> AnyModel:
    """A small model of a family, in evaluation form, with weights that can be told apart."""
    sizes = {ours: THEIR_SIZES[name] for ours, name in _SIZES.items()}
    sizes["max_position_embeddings"] += 3  # for padding that a test adds
    model = family.model(family.config(**{**sizes, **changes})).eval()
    spread_out(model)
    return model


_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "filter_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}
