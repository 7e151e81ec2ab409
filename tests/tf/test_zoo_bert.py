"""BERT in TensorFlow."""

from __future__ import annotations

import pytest

tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed: make test-tf")

from zoo_harness import MOMENTUM, check_twin  # noqa: E402

NAME = "bert/tiny"
OTHER_FORMS = {
    "normalized first": [
        "model.use_pre_normalization=True",
        "model.embedding_size=32",
        "model.position_embedding_type=fixed",
        "model.mlm_loss_scaling=batch_size",
        "model.mlm_loss_weight=0.1",
    ],
    "masked tokens alone": [
        "model.disable_nsp=True",
        "train_input.disable_nsp=True",
        "eval_input.disable_nsp=True",
        "model.use_segment_embedding=False",
        "model.share_embedding_weights=False",
        "model.attention_type=dot_product",
        "model.encoder_nonlinearity=relu",
    ],
    "every token": [
        "train_input.gather_mlm_labels=False",
        "eval_input.gather_mlm_labels=False",
        "model.use_output_bias_in_mlm=False",
        "model.use_position_embedding=False",
        "model.mlm_nonlinearity=gelu_new",
    ],
    "scaled by the input": [
        "train_input.dynamic_mlm_scale=True",
        "eval_input.dynamic_mlm_scale=True",
        "model.mlm_loss_scaling=precomputed_num_masked",
    ],
}


def test_as_in_pytorch() -> None:
    check_twin(NAME)


@pytest.mark.slow
def test_by_momentum_as_in_pytorch() -> None:
    check_twin(NAME, optimizer=MOMENTUM)


@pytest.mark.slow
@pytest.mark.parametrize("overrides", OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_other_forms_as_in_pytorch(overrides: list[str]) -> None:
    check_twin(NAME, overrides, steps=3)
