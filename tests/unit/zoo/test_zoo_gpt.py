"""GPT-2, GPT-3 and GPT-J: equal to transformers, padding, the documented losses, sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import openwafer.zoo as zoo
from openwafer.errors import CheckpointError
from openwafer.frontends.torch.capture import capture_module
from openwafer.frontends.torch.metrics import forget_all_metrics, get_all_metrics
from openwafer.pipeline import validate_program
from openwafer.zoo.catalog import family_of
from openwafer.zoo.convert import convert, from_pretrained
from openwafer.zoo.gpt2.torch_model import GPT2, GPT2Config
from openwafer.zoo.gptj.torch_model import GPTJ, GPTJConfig
from openwafer.zoo.listing import entries
from openwafer.zoo.model import AnyModel, Batch

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "max_position_embeddings": 12,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_heads": 3,
    "filter_size": 40,
}
CASES = {
    "gpt2": lambda: GPT2(GPT2Config(**SMALL)),
    "gpt2-untied-relu": lambda: GPT2(
        GPT2Config(**SMALL, share_embedding_weights=False, nonlinearity="relu")
    ),
    "gptj": lambda: GPTJ(GPTJConfig(**SMALL, rotary_dim=4)),
    "gptj-all-rotated": lambda: GPTJ(GPTJConfig(**SMALL, rotary_dim=8)),
}


@pytest.fixture(params=CASES)
def model(request: pytest.FixtureRequest) -> AnyModel:
    torch.manual_seed(5)
    model = CASES[request.param]()
    with torch.no_grad():  # so that biases and norms are tested too
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.eval()


def padded_batch(length: int = 12) -> Batch:
    """Four sequences; two are shorter, padded on the right."""
    torch.manual_seed(7)
    tokens = torch.randint(1, 61, (4, length + 1))
    mask = torch.ones(4, length, dtype=torch.int64)
    mask[1, 5:] = mask[3, 1:] = 0
    return {
        "input_ids": tokens[:, :-1] * mask,
        "attention_mask": mask,
        "labels": tokens[:, 1:] * mask,
    }


def save(model: AnyModel, folder: Path) -> Path:
    """One of our checkpoints, with its parameters beside it."""
    family = "gptj" if isinstance(model, GPTJ) else "gpt2"
    path = folder / "ours.mdl"
    torch.save({"model": model.state_dict()}, path)
    section = asdict(model.config)
    path.with_suffix(".yaml").write_text(json.dumps({"description": family, "model": section}))
    return path


@pytest.mark.slow  # importing transformers takes seconds
def test_logits_loss_and_gradients_are_those_of_transformers(
    model: AnyModel, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    checkpoint = save(model, tmp_path)
    convert(checkpoint, tmp_path / "hf")
    kind = transformers.GPTJForCausalLM if isinstance(model, GPTJ) else transformers.GPT2LMHeadModel
    theirs, report = kind.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    theirs.eval()
    batch = padded_batch()
    counts = batch["attention_mask"].bool()
    ours_logits = model.logits(**batch)
    assert isinstance(ours_logits, torch.Tensor)
    their_logits = theirs(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(ours_logits[counts], their_logits[counts], rtol=1e-5, atol=1e-5)

    expected = F.cross_entropy(their_logits[counts], batch["labels"][counts])
    loss = model(**batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    # Their gradients by our names: converted the way the weights are.
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.copy_(weight.grad)
    theirs.save_pretrained(tmp_path / "gradients")
    gradients = from_pretrained(tmp_path / "gradients").state_dict()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_weights_come_back_exactly(model: AnyModel, tmp_path: Path) -> None:
    result = convert(save(model, tmp_path), tmp_path / "hf")
    assert result.num_tensors > 10
    back = convert(tmp_path / "hf", tmp_path / "back.mdl")
    state = torch.load(back.target, weights_only=True)["model"]
    assert list(state) == list(model.state_dict())
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight), name
    again = from_pretrained(tmp_path / "hf")
    assert again.config == model.config
    # And from the checkpoint with the parameters that were written beside it.
    assert convert(back.target, tmp_path / "again").family == back.family


def test_padding_changes_nothing(model: AnyModel) -> None:
    batch = padded_batch()
    counts = batch["attention_mask"].bool()
    logits = model.logits(**batch)
    assert isinstance(logits, torch.Tensor)
    other = {**batch, "input_ids": torch.where(counts, batch["input_ids"], 9)}
    changed = model.logits(**other)
    assert isinstance(changed, torch.Tensor)
    torch.testing.assert_close(changed[counts], logits[counts], rtol=0, atol=0)
    other["labels"] = torch.where(counts, batch["labels"], 3)
    torch.testing.assert_close(model(**other), model(**batch))
    short = {name: tensor[3:, :1] for name, tensor in batch.items()}
    torch.testing.assert_close(model.logits(**short), logits[3:, :1], rtol=1e-5, atol=1e-5)


def test_losses_by_tokens_and_by_sequences() -> None:
    torch.manual_seed(1)
    model = GPT2(GPT2Config(**SMALL, loss_scaling="batch_size", loss_weight=0.25)).eval()
    batch = padded_batch()
    logits = model.logits(**batch)
    total = sum(
        F.cross_entropy(logits[row, place], batch["labels"][row, place])
        for row, place in batch["attention_mask"].nonzero().tolist()
    )
    torch.testing.assert_close(model(**batch), 0.25 * total / 4)
    nothing = {**batch, "attention_mask": batch["attention_mask"] * 0}
    assert GPT2(GPT2Config(**SMALL))(**nothing).item() == 0.0


def test_initial_weights_follow_the_seed_and_the_depth() -> None:
    def build() -> AnyModel:
        torch.manual_seed(3)
        return zoo.build("gpt2/small", layers=2, vocab_size=500, hidden_size=192, filter_size=768)

    one, other = build().state_dict(), build().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    layer = "transformer_decoder.layers.1."
    assert float(one[f"{layer}ffn.ffn.0.linear_layer.weight"].std()) == pytest.approx(
        0.02, rel=0.02
    )
    assert float(one[f"{layer}ffn.ffn.1.linear_layer.weight"].std()) == pytest.approx(
        0.01, rel=0.02
    )
    assert float(one[f"{layer}ffn.ffn.1.linear_layer.bias"].abs().max()) == 0.0


def test_parameter_counts_are_the_published_ones() -> None:
    """Fact sheet section 7, computed from the architecture with tied tables counted once; 2.7b and
    175b, which have no row there, by 12 · layers · hidden² and the tables."""
    published = {
        "gpt2/small": "124.4M",
        "gpt2/medium": "354.8M",
        "gpt2/large": "774.0M",
        "gpt2/xl": "1.56B",
        "gpt3/xl": "1.32B",
        "gpt3/6.7b": "6.66B",
        "gpt3/13b": "12.85B",
        "gpt3/20b": "20.26B",
        "gpt3/175b": "174.60B",
        "gpt3/2.7b": "2.65B",
        "gptj/6b": "6.05B",
        "gptj/summarization": "6.05B",
    }
    counts = {e.name: e.parameters for f in ("gpt2", "gpt3", "gptj") for e in entries(f)}
    assert {name: readable(counts[name]) for name in published} == published
    assert counts["gpt3/256m"] == pytest.approx(256e6, rel=0.01)
    assert counts["gpt3/590m"] == pytest.approx(590e6, rel=0.01)


def readable(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"


@pytest.mark.parametrize("name", ["gpt2/small", "gptj/6b"])
def test_the_example_batch_is_like_the_datas(name: str) -> None:
    from openwafer.data import build_dataset

    data = build_dataset("causal_lm", {"tokenizer": "byte", "max_sequence_length": 64}, "train")
    real = data.example_batch(3)
    with torch.device("meta"):
        example = zoo.build(name, layers=1, max_position_embeddings=64).example_batch(3)
    assert {n: (t.shape, t.dtype) for n, t in example.items()} == {
        n: (t.shape, t.dtype) for n, t in real.items()
    }
    assert all(tensor.is_meta for tensor in example.values())


@pytest.mark.slow  # every tiny model is trained in both modes by tests/zoo
@pytest.mark.parametrize("name", ["gpt2/tiny", "gptj/tiny"])
def test_every_operation_has_a_kernel_in_both_modes(name: str) -> None:
    with torch.device("meta"):
        model = zoo.build(name, layers=1, attention_dropout_rate=0.1)
    program = capture_module(model, model.example_batch(2)).program
    for mode in ("layer_pipelined", "weight_streaming"):
        report = validate_program(program, mode)
        assert report.ok, str(report)
        assert report.coverage == 1.0


def test_metrics_are_over_the_tokens_that_count(model: AnyModel) -> None:
    class Info:
        bytes_per_token = 2.0

    forget_all_metrics()
    family = family_of("gptj" if isinstance(model, GPTJ) else "gpt2")
    metrics = family.metrics(model.config, Info())
    batch = padded_batch()
    counts = batch["attention_mask"].bool()
    with torch.no_grad():
        logits = model.logits(**batch)
        assert isinstance(logits, torch.Tensor)
        halves = [{n: t[part] for n, t in batch.items()} for part in (slice(0, 3), slice(3, 4))]
        for half in halves:  # batches of different numbers of tokens
            metrics.update(model.logits(**half), half)
    loss = F.cross_entropy(logits[counts], batch["labels"][counts])
    values = {name: metric.compute() for name, metric in get_all_metrics().items()}
    right = (logits.argmax(-1) == batch["labels"])[counts].float().mean()
    assert values["eval/accuracy_lm"] == pytest.approx(float(right))
    assert values["eval/perplexity_lm"] == pytest.approx(float(loss.exp()), rel=1e-5)
    assert values["eval/bits_per_byte"] == pytest.approx(
        float(loss / torch.tensor(2.0).log() / 2), rel=1e-5
    )


def without_counterpart() -> list[Callable[[], GPT2 | GPTJ]]:
    return [
        lambda: GPT2(GPT2Config(**SMALL, use_ffn_bias=False)),
        lambda: GPTJ(GPTJConfig(**SMALL, rotary_dim=4, use_untied_layer_norm=True)),
    ]


@pytest.mark.parametrize("make", without_counterpart())
def test_a_network_that_transformers_has_not_is_refused(
    make: Callable[[], GPT2 | GPTJ], tmp_path: Path
) -> None:
    checkpoint = save(make(), tmp_path)
    with pytest.raises(CheckpointError, match="no counterpart"):
        convert(checkpoint, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
