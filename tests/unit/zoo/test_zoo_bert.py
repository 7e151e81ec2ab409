"""BERT's pre-training: padding, the documented losses, sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from bert_reference import masked_tokens, slow, small, text_batch, wider, with_filling_rows

import openwafer
from openwafer.errors import CheckpointError, ConfigError
from openwafer.zoo.bert import FAMILY
from openwafer.zoo.bert.torch_model import Bert, BertConfig


def pretraining_batch():
    batch, full = masked_tokens(text_batch())
    batch["next_sentence_label"] = torch.tensor([[0], [1], [1], [0]])
    return batch, full


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_pre_normalization": True},
        {"embedding_size": 16},
        {"share_embedding_weights": False},
    ],
)
def test_padding_and_filling_rows_change_nothing(changes):
    model = small(FAMILY, **changes)
    batch, _ = pretraining_batch()
    logits = model.logits(**batch)
    torch.testing.assert_close(model.logits(**wider(batch)), logits)
    torch.testing.assert_close(model(**with_filling_rows(batch)), model.loss(logits, **batch))


def test_loss_scalings_are_their_formulas():
    batch, _ = pretraining_batch()
    model = small(FAMILY, disable_nsp=True)
    logits = model.logits(**batch)["masked_lm"].detach()
    total = sum(
        F.cross_entropy(logits[row, place], batch["labels"][row, place])
        for row in range(4)
        for place in range(3)
        if batch["masked_lm_mask"][row, place]
    )
    scale = torch.full((4, 1), 4 / 8)  # samples for each of the 8 masked tokens
    expected = {
        ("num_tokens", False): total / 8,
        ("batch_size", False): total / 4 * 0.5,
        ("batch_size", True): total / 8 * 0.5,
        ("precomputed_num_masked", True): total / 8 * 0.5,
    }
    for (scaling, scaled), value in expected.items():
        weight = 1.0 if scaling == "num_tokens" else 0.5
        model = small(FAMILY, disable_nsp=True, mlm_loss_scaling=scaling, mlm_loss_weight=weight)
        given = {**batch, "mlm_loss_scale": scale} if scaled else batch
        torch.testing.assert_close(model(**given), value)
    with pytest.raises(ConfigError, match="mlm_loss_scale"):
        model(**batch)


def test_nothing_masked_is_a_loss_of_zero():
    model = small(FAMILY, disable_nsp=True)
    batch, _ = masked_tokens(text_batch())
    loss = model(**{**batch, "masked_lm_mask": batch["masked_lm_mask"] * 0})
    assert loss.item() == 0.0


def test_initial_weights_follow_the_seed_and_the_range():
    def state():
        torch.manual_seed(3)
        return Bert(BertConfig(vocab_size=200, hidden_size=96, num_hidden_layers=1)).state_dict()

    for (name, weight), other in zip(state().items(), state().values(), strict=True):
        assert torch.equal(weight, other), name
        if weight.dim() == 2:
            assert 0.015 < float(weight.std()) < 0.02  # 0.02 before the cut at twice that
            assert float(weight.abs().max()) <= 0.04


# Fact sheet section 7: the pre-training network with both heads, and tables of 512 positions.
@pytest.mark.parametrize(
    ("size", "length", "millions"),
    [
        ("base", 128, 110.1),
        slow("base", 512, 110.1),
        slow("large", 128, 336.2),
        ("large", 512, 336.2),
        *(slow("pubmedbert_base", length, 110.1) for length in (128, 512)),
        *(slow("pubmedbert_large", length, 336.2) for length in (128, 512)),
    ],
)
def test_parameter_counts_are_the_published_ones(size, length, millions):
    with torch.device("meta"):
        model = openwafer.zoo.build(f"bert/{size}_msl{length}")
    assert round(model.num_parameters / 1e6, 1) == millions
    assert model.example_batch(2)["input_ids"].shape == (2, length)
    assert model.device.type == "meta"


def test_unknown_values_are_refused_with_their_place():
    with pytest.raises(ConfigError, match="mlm_loss_scaling"):
        BertConfig.from_section({"vocab_size": 9, "mlm_loss_scaling": "none"})
    with pytest.raises(ConfigError, match=r"model\.dropout_rate"):
        BertConfig.from_section({"vocab_size": 9, "dropout_rate": 1.5})
    assert FAMILY.weights is not None
    with pytest.raises(CheckpointError, match="use_pre_normalization"):
        FAMILY.weights.config_to(BertConfig(vocab_size=9, use_pre_normalization=True))
