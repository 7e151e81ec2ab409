"""Transformer against torch.nn.Transformer with the same weights, and the sizes."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openwafer import zoo
from openwafer.data import build_dataset
from openwafer.errors import ConfigError
from openwafer.frontends.torch.capture import capture_module
from openwafer.pipeline import validate_program
from openwafer.zoo import catalog
from openwafer.zoo.transformer import TransformerConfig, TransformerModel

WIDTH, TOKENS = 24, 50
BIASES = {
    "use_projection_bias_in_attention": True,
    "use_ffn_bias_in_attention": True,
    "use_ffn_bias": True,
}


def small_model(**changes):
    keys = {"d_model": WIDTH, "d_ff": 36, "num_heads": 3, "src_vocab_size": TOKENS}
    layers = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 3}
    lengths = {"src_max_sequence_length": 11, "tgt_max_sequence_length": 8}
    return TransformerModel(TransformerConfig(**{**keys, **layers, **lengths, **changes}))


def batch_of(model):
    torch.manual_seed(6)
    batch = model.example_batch(3)
    batch["attention_mask"][1, 6:] = 0
    batch["decoder_attention_mask"][2, 5:] = 0
    return batch


def torch_transformer(ours, *, norm_first):
    """torch's network with our weights; where we have no bias it has zeros."""
    theirs = nn.Transformer(
        WIDTH, 3, 2, 3, 36, dropout=0.0, layer_norm_eps=1e-5, batch_first=True,
        norm_first=norm_first,
    )  # fmt: skip
    state = {name: torch.zeros_like(t) for name, t in theirs.state_dict().items()}
    projections = ("proj_q_dense_layer", "proj_k_dense_layer", "proj_v_dense_layer")
    our_state = ours.state_dict()
    for name in state:
        stack, *path = name.split(".")
        prefix = f"{stack}.{'.'.join(path)}"
        if "in_proj_" in name:
            base, _, kind = prefix.rpartition(".in_proj_")
            parts = [our_state.get(f"{base}.{p}.{kind}") for p in projections]
            if parts[0] is not None:
                state[name] = torch.cat(parts)
            continue
        ours_name = (
            prefix.replace("out_proj", "proj_output_dense_layer")
            .replace("linear1", "ffn.ffn.0.linear_layer")
            .replace("linear2", "ffn.ffn.1.linear_layer")
        )
        if ours_name in our_state:
            state[name] = our_state[ours_name]
        else:
            assert name.endswith("bias"), name
    theirs.load_state_dict(state)
    return theirs


def positions(length):
    """Slowly: sine and cosine side by side, wavelengths from 2π to 2π · 10,000."""
    table = torch.zeros(length, WIDTH)
    half = WIDTH // 2
    for position in range(length):
        for pair in range(half):
            angle = position / 10000 ** (pair / (half - 1))
            table[position, 2 * pair] = math.sin(angle)
            table[position, 2 * pair + 1] = math.cos(angle)
    return table


def reference_loss(theirs, table, batch, smoothing):
    def embed(ids):
        return F.embedding(ids, table) * math.sqrt(WIDTH) + positions(ids.shape[1])

    length = batch["labels"].shape[1]
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    hidden = theirs(
        embed(batch["input_ids"]),
        embed(batch["decoder_input_ids"]),
        tgt_mask=future,
        src_key_padding_mask=batch["attention_mask"] == 0,
        memory_key_padding_mask=batch["attention_mask"] == 0,
        tgt_key_padding_mask=batch["decoder_attention_mask"] == 0,
    )
    logits = hidden @ table.T
    labels = batch["labels"].masked_fill(batch["decoder_attention_mask"] == 0, -100)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    return logits, loss


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("biases", [BIASES, {"use_ffn_bias": False}], ids=["biases", "none"])
def test_is_torch_transformer(norm_first, biases):
    torch.manual_seed(2)
    ours = small_model(
        use_pre_encoder_decoder_layer_norm=norm_first, dropout_rate=0.0, label_smoothing=0.1,
        **biases,
    )  # fmt: skip
    for name, parameter in ours.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    theirs = torch_transformer(ours, norm_first=norm_first)
    batch = batch_of(ours)
    table = ours.lm_head.weight.detach().clone().requires_grad_()
    logits, loss = reference_loss(theirs, table, batch, 0.1)
    torch.testing.assert_close(ours.logits(**batch), logits, rtol=1e-5, atol=1e-5)
    our_loss = ours(**batch)
    torch.testing.assert_close(our_loss, loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    our_loss.backward()
    torch.testing.assert_close(ours.lm_head.weight.grad, table.grad, rtol=1e-4, atol=1e-5)
    for theirs_name, our_name in (
        ("decoder.layers.2.linear1.weight", "decoder.layers.2.ffn.ffn.0.linear_layer.weight"),
        ("encoder.layers.0.norm1.weight", "encoder.layers.0.norm1.weight"),
        (
            "decoder.layers.0.multihead_attn.out_proj.weight",
            "decoder.layers.0.multihead_attn.proj_output_dense_layer.weight",
        ),
    ):
        expected = theirs.get_parameter(theirs_name).grad
        found = ours.get_parameter(our_name).grad
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "published"), [("base", "62.8"), ("large", "213.7")])
def test_parameter_counts(size, published):
    """One table for source, target and output; biases in the feed-forward networks only."""
    with torch.device("meta"):
        model = zoo.build(f"transformer/{size}")
    assert f"{model.num_parameters / 1e6:.1f}" == published


def test_rates_follow_the_inverse_square_root():
    """The published pieces: 0 to 0.000698684 in 4000 steps, then to 0.000471085 in 4800, ..."""
    pieces = catalog.load("transformer/base").raw["optimizer"]["learning_rate"]
    assert len(pieces) == 21
    assert sum(piece["steps"] for piece in pieces) == 100_000
    assert pieces[1]["initial_learning_rate"] == pytest.approx(0.000698684, rel=1e-6)
    assert pieces[1]["end_learning_rate"] == pytest.approx(0.000471085, rel=1e-6)
    for before, after in pairwise(pieces[1:]):
        assert before["end_learning_rate"] == after["initial_learning_rate"]


def test_what_is_behind_the_padding_changes_nothing():
    model = small_model().eval()
    batch = batch_of(model)
    changed = {name: tensor.clone() for name, tensor in batch.items()}
    changed["input_ids"][1, 6:] = 7
    changed["decoder_input_ids"][2, 5:] = 7
    changed["labels"][2, 5:] = 7
    assert torch.equal(model(**batch), model(**changed))
    written = model.predictions(model.logits(**batch), **batch)["prediction"]
    assert written[2, 5:].tolist() == [0, 0, 0]


def test_both_modes_run_every_operation():
    """With learned positions and tables of their own, which the other tests do not have."""
    model = small_model(
        share_encoder_decoder_embedding=False, share_embedding_weights=False, tgt_vocab_size=30,
        position_embedding_type="learned", use_bias_in_output=True,
        use_dropout_outside_residual_path=True, encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=1,
    )  # fmt: skip
    batch = model.example_batch(2)
    assert model.logits(**batch).shape == (2, 8, 30)
    program = capture_module(model, batch).program
    for mode in ("layer_pipelined", "weight_streaming"):
        report = validate_program(program, mode)
        assert report.coverage == 1.0, str(report)


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"tgt_vocab_size": 30}, "model.share_encoder_decoder_embedding"),
        ({"num_heads": 5}, "model.num_heads"),
    ],
)
def test_what_does_not_fit_is_refused(changes, where):
    with pytest.raises(ConfigError) as caught:
        small_model(**changes)
    assert caught.value.where == where


@pytest.mark.parametrize("section", ["train_input", "eval_input"])
def test_example_batch_is_like_the_data(section):
    model, params = zoo.build("transformer/tiny"), catalog.load("transformer/tiny").raw[section]
    data = build_dataset("translation", params, section.removesuffix("_input")).example_batch(3)
    example = model.example_batch(3)
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in data.items()
    }
    assert torch.isfinite(model(**data))
