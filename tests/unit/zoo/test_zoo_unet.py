"""U-Net against the same network spelled out, and the documented shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from openwafer import zoo
from openwafer.data import build_dataset
from openwafer.errors import ConfigError
from openwafer.frontends.torch.capture import capture_module
from openwafer.frontends.torch.metrics import compute_all_metrics, forget_all_metrics
from openwafer.pipeline import validate_program
from openwafer.zoo import catalog
from openwafer.zoo.unet import UNetConfig, UNetMetrics, UNetModel

SMALL = {
    "encoder_filters": (4, 6, 10),
    "decoder_filters": (6, 5),
    "image_shape": (1, 16, 24),
    "num_classes": 3,
}


def spelled_out(state, images, *, skip, activation=F.relu, pool=F.max_pool2d):
    """The network of SMALL from its weights, operation by operation."""

    def conv(image, name):
        return activation(
            F.conv2d(image, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)
        )

    def up(image, name):
        return F.conv_transpose2d(image, state[f"{name}.weight"], state[f"{name}.bias"], stride=2)

    a = conv(conv(images, "encoder.0.0.conv"), "encoder.0.1.conv")
    b = conv(conv(pool(a, 2), "encoder.1.0.conv"), "encoder.1.1.conv")
    c = conv(conv(pool(b, 2), "encoder.2.0.conv"), "encoder.2.1.conv")
    d = up(c, "decoder.0.upscale")
    d = torch.cat([d, b], dim=1) if skip else d
    d = conv(conv(d, "decoder.0.block.0.conv"), "decoder.0.block.1.conv")
    e = up(d, "decoder.1.upscale")
    e = torch.cat([e, a], dim=1) if skip else e
    e = conv(conv(e, "decoder.1.block.0.conv"), "decoder.1.block.1.conv")
    return F.conv2d(e, state["classes.weight"], state["classes.bias"])


@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({}, {"skip": True}),
        ({"skip_connect": False}, {"skip": False}),
        (
            {"nonlinearity": "LeakyReLU", "downscale_method": "avg_pool"},
            {"skip": True, "activation": F.leaky_relu, "pool": F.avg_pool2d},
        ),
    ],
    ids=["documented", "no skip", "other parts"],
)
def test_is_the_network_spelled_out(changes, reference):
    torch.manual_seed(1)
    model = UNetModel(UNetConfig(**SMALL, bias_initializer="normal", **changes))
    batch = model.example_batch(2)
    state = {n: w.detach().clone().requires_grad_() for n, w in model.named_parameters()}
    logits = spelled_out(state, batch["images"], **reference)
    torch.testing.assert_close(model.logits(**batch), logits, rtol=1e-5, atol=1e-5)
    # The mean over all pixels of -log p of the right class.
    chosen = torch.log_softmax(logits, 1).gather(1, batch["labels"][:, None])
    loss = -chosen.mean()
    torch.testing.assert_close(model(**batch), loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    model(**batch).backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, state[name].grad, rtol=1e-4, atol=1e-5)


def test_documented_shape_and_size():
    """256 × 256 × 1, two classes, 32-64-128-256 and back; parameters counted by hand."""

    def conv(inputs, outputs, size):
        return inputs * outputs * size * size + outputs

    encoder = sum(
        conv(i, o, 3) + conv(o, o, 3) for i, o in ((1, 32), (32, 64), (64, 128), (128, 256))
    )
    decoder = sum(conv(2 * o, o, 2) + conv(2 * o, o, 3) + conv(o, o, 3) for o in (128, 64, 32))
    for name in ("unet/severstal", "unet/dagm"):
        with torch.device("meta"):
            model = zoo.build(name)
            batch = model.example_batch(2)
            assert model.logits(**batch).shape == (2, 2, 256, 256)
        assert batch["images"].shape == (2, 1, 256, 256)
        assert model.num_parameters == encoder + decoder + conv(32, 2, 1)


def test_both_modes_run_every_operation():
    """With a convolution in front and the weights of a last, filled-up batch."""
    model = UNetModel(
        UNetConfig(**SMALL, initial_conv_filters=3, convs_per_block=("1x1_conv", "3x3_conv"))
    )
    batch = {**model.example_batch(2), "unique_ids": torch.arange(2)}
    program = capture_module(model, batch).program
    for mode in ("layer_pipelined", "weight_streaming"):
        report = validate_program(program, mode)
        assert report.coverage == 1.0, str(report)


def test_rows_that_only_fill_a_batch_change_nothing():
    torch.manual_seed(1)
    model = UNetModel(UNetConfig(**SMALL)).eval()
    batch = {**model.example_batch(3), "unique_ids": torch.tensor([4, 5, -1])}
    real = {name: tensor[:2] for name, tensor in batch.items() if name != "unique_ids"}
    torch.testing.assert_close(model(**batch), model(**real))
    values = []
    for each in (batch, real):
        forget_all_metrics()
        UNetMetrics(model.config, None).update(model.logits(**each), each)
        values.append(compute_all_metrics())
    forget_all_metrics()
    assert values[0] == pytest.approx(values[1])
    assert set(values[0]) == {"eval/mIOU", "eval/DSC", "eval/MPCA", "eval/Acc"}


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ({"decoder_filters": (6,)}, "model.encoder_filters"),
        ({"image_shape": (1, 16, 22)}, "model.image_shape"),
        ({"image_shape": (16, 16)}, "model.image_shape"),
        ({"convs_per_block": ()}, "model.convs_per_block"),
        ({"nonlinearity": "ReLO"}, "model.nonlinearity"),
    ],
)
def test_what_does_not_fit_is_refused(changes, where):
    with pytest.raises(ConfigError) as caught:
        UNetModel(UNetConfig(**{**SMALL, **changes}))
    assert caught.value.where == where


@pytest.mark.parametrize("section", ["train_input", "eval_input"])
def test_example_batch_is_like_the_data(section):
    model, params = zoo.build("unet/tiny"), catalog.load("unet/tiny").raw[section]
    data = build_dataset("segmentation", params, section.removesuffix("_input")).example_batch(3)
    example = model.example_batch(3)
    assert {name: (t.shape, t.dtype) for name, t in example.items()} == {
        name: (t.shape, t.dtype) for name, t in data.items()
    }
    assert torch.isfinite(model(**data))
