"""Models made of the layer API are validated, and train in both modes as in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from openwafer.config.hyperparameters import SGDOptions
from openwafer.config.optimizer import OptimizerConfig
from openwafer.config.schedule import Constant
from openwafer.frontends.torch.capture import Captured, capture_module, flatten_batch
from openwafer.frontends.torch.plain import PlainExecutor
from openwafer.layers import (
    EmbeddingLayer,
    FeedForwardNetwork,
    GPTLMHeadModelLoss,
    MultiheadAttention,
    RelativePositionEmbeddingLayer,
    RotaryPositionEmbeddingHelper,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
    create_autoregressive_mask,
    smooth_loss,
)
from openwafer.pipeline import validate_program
from openwafer.plan.layers import cut_layers
from openwafer.runtime.compiled import compile_layers
from openwafer.runtime.executor import Executor
from openwafer.runtime.layer_pipelined import LayerPipelined
from openwafer.runtime.stores.store import RamStore, copies_wanted, make_shards
from openwafer.runtime.weight_streaming import WeightStreaming
from openwafer.runtime.workload import Workload

BATCH, SEQ, HIDDEN, HEADS, VOCAB = 2, 6, 8, 2, 13
CPU = torch.device("cpu")


class Gpt(nn.Module):
    """Decoder only: rotary positions, tied head, causal and padding masks, dropout, GPT's loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = EmbeddingLayer(
            VOCAB, HIDDEN, max_position_embeddings=SEQ, position_embedding_type="rotary"
        )
        self.rotary = RotaryPositionEmbeddingHelper(SEQ, 2)
        layer = TransformerDecoderLayer(
            HIDDEN, HEADS, 12, norm_first=True, add_cross_attention=False, activation="gelu_new"
        )
        self.decoder = TransformerDecoder(layer, 2, nn.LayerNorm(HIDDEN))
        self.head = nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.embedding.get_input_embeddings().weight
        self.loss = GPTLMHeadModelLoss(VOCAB, 0.1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = self.decoder(
            self.embedding(ids),
            tgt_mask=create_autoregressive_mask(SEQ, device=ids.device) * -1e4,
            tgt_key_padding_mask=1 - mask,
            rotary_position_embedding_helper=self.rotary,
        )
        return self.loss(self.head(hidden), labels, mask)


class Bert(nn.Module):
    """Encoder only: segments, a padding row, learned positions, loss of the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = EmbeddingLayer(
            VOCAB, HIDDEN, pad_token_id=0, max_position_embeddings=SEQ, num_segments=2
        )
        layer = TransformerEncoderLayer(
            HIDDEN,
            HEADS,
            12,
            use_projection_bias_in_attention=True,
            use_ffn_bias_in_attention=True,
            use_ffn_bias=True,
        )
        self.encoder = TransformerEncoder(layer, 2, nn.LayerNorm(HIDDEN))
        self.pooler = FeedForwardNetwork(HIDDEN, [HIDDEN, 3], ["tanh", None], [0.1, None])

    def forward(
        self, ids: torch.Tensor, segments: torch.Tensor, padding: torch.Tensor, kinds: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.encoder(self.embedding(ids, segments), src_key_padding_mask=padding)
        scores = self.pooler(hidden[:, 0])
        loss = F.cross_entropy(scores, kinds, reduction="none")
        return smooth_loss(scores, loss, 0.1, 3).mean()


class Translation(nn.Module):
    """Encoder and decoder, fixed positions; without dropout torch runs a fused attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = EmbeddingLayer(
            VOCAB, HIDDEN, max_position_embeddings=8, position_embedding_type="fixed"
        )
        self.transformer = Transformer(HIDDEN, HEADS, 1, 1, 12, 0.0, activation="relu")
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, padding: torch.Tensor
    ) -> torch.Tensor:
        hidden = self.transformer(
            self.embedding(source),
            self.embedding(target),
            tgt_mask=create_autoregressive_mask(SEQ, torch.bool, target.device),
            src_key_padding_mask=padding,
            memory_key_padding_mask=padding,
        )
        return F.cross_entropy(self.head(hidden).flatten(0, 1), target.flatten())


class T5Attention(nn.Module):
    """Relative positions, unscaled products, and the path that gives the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = RelativePositionEmbeddingLayer(HEADS, None, 8, True)
        self.blocks = nn.ModuleList(
            MultiheadAttention(HIDDEN, HEADS, dropout=0.1, attention_type="dot_product")
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.bias(SEQ, SEQ)
        x = x + self.blocks[0](x, x, x, position_bias=bias)
        attended, weights = self.blocks[1](x, x, x, position_bias=bias, need_weights=True)
        return (x + attended).square().mean() + weights.amax(dim=-1).mean()


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, dtype=torch.int32)


def _padding() -> torch.Tensor:
    return torch.tensor([[0] * SEQ, [0] * (SEQ - 2) + [1] * 2], dtype=torch.int32)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[torch.Tensor, ...]]]] = {
    "gpt": (Gpt, lambda: (_ids(BATCH, SEQ), 1 - _padding(), _ids(BATCH, SEQ))),
    "bert": (
        Bert,
        lambda: (
            _ids(BATCH, SEQ),
            _padding(),
            _padding().bool(),
            torch.randint(0, 3, (BATCH,)),
        ),
    ),
    "translation": (
        Translation,
        lambda: (_ids(BATCH, SEQ), _ids(BATCH, SEQ).long(), _padding().bool()),
    ),
    "t5 attention": (T5Attention, lambda: (torch.randn(BATCH, SEQ, HIDDEN),)),
}

_Case = tuple[nn.Module, tuple[torch.Tensor, ...], Captured]


@pytest.fixture(scope="module", params=list(MODELS))
def case(request: pytest.FixtureRequest) -> _Case:
    torch.manual_seed(1)
    make, batch = MODELS[request.param]
    model, example = make(), batch()
    return model, example, capture_module(model, example)


def _executors(case: _Case, dtype: torch.dtype | None = None) -> dict[str, Executor]:
    model, example, captured = case
    if dtype:
        captured = capture_module(model, example, autocast_dtype=dtype)
    optimizer = OptimizerConfig(
        optimizer_type="sgd",
        hyperparameters=SGDOptions(momentum=0.9),
        learning_rate=Constant(learning_rate=0.5),
    )
    shared = {
        "optimizer": optimizer,
        "learning_rate_at": lambda step: 0.5,
        "device": CPU,
        "seed": 7,
    }
    program = captured.program
    layers = cut_layers(program)
    compiled = compile_layers(program, layers)

    def workload() -> Workload:
        own = copy.deepcopy(model)
        tensors = dict([*own.named_parameters(), *own.named_buffers()])
        return Workload(
            train=compiled,
            evaluation=None,
            weights={p.name: tensors[p.name].detach() for p in program.parameters},
            buffers={
                b.node: (tensors[b.name] if b.name else b.value).detach().clone()
                for b in program.buffers
            },
            trained=tuple(p.name for p in program.parameters if p.trainable),
            leaves=flatten_batch,
            **shared,
        )

    plain, streamed = copy.deepcopy(model), workload()
    shards = make_shards(layers, list(streamed.weights), streamed.trained)
    copies = copies_wanted([compiled], streamed.weights)
    store = RamStore(streamed.weights, shards, optimizer, copies=copies)
    return {
        "plain": PlainExecutor(
            plain, lambda batch: plain(*batch), [plain], autocast_dtype=dtype, **shared
        ),
        "layer_pipelined": LayerPipelined(workload()),
        "weight_streaming": WeightStreaming(streamed, store, shards),
    }


def _train(executor: Executor, batch: tuple[torch.Tensor, ...]) -> tuple[list[float], dict]:
    losses = [executor.train_step([batch, batch], step=step).loss.item() for step in range(2)]
    state = executor.state().model
    executor.close()
    return losses, state


def test_both_modes_train_as_plain_pytorch_does(case: _Case) -> None:
    """Dropout is on, so this also says that all three draw alike."""
    _, batch, _ = case
    results = {name: _train(executor, batch) for name, executor in _executors(case).items()}
    losses, state = results.pop("plain")
    assert losses[0] != losses[1]
    for name, (mode_losses, mode_state) in results.items():
        assert mode_losses == pytest.approx(losses, rel=1e-5), name
        for key, weight in mode_state.items():
            torch.testing.assert_close(weight, state[key], rtol=1e-5, atol=1e-6, msg=key)


def test_mixed_precision_rounds_alike(case: _Case) -> None:
    """bf16 compute: the layers insert no cast of their own that only one side would see.

    rtol: one unit in the last place of bf16 (2^-8); most values are equal."""
    _, batch, _ = case
    executors = _executors(case, torch.bfloat16)
    losses = {
        name: executor.train_step([batch], step=0).loss.item()
        for name, executor in executors.items()
    }
    for executor in executors.values():
        executor.close()
    assert losses["layer_pipelined"] == losses["weight_streaming"]
    assert losses["layer_pipelined"] == pytest.approx(losses["plain"], rel=2**-8)


@pytest.mark.parametrize("mode", ["layer_pipelined", "weight_streaming"])
def test_every_operation_has_a_kernel(case: _Case, mode: str) -> None:
    report = validate_program(case[2].program, mode)
    assert report.ok, str(report)


STACKS = {Gpt: "decoder", Bert: "encoder", Translation: "transformer.encoder"}


def test_a_stack_is_cut_into_its_layers(case: _Case) -> None:
    """Each block is a layer, and copies are recognized as such."""
    model, _, captured = case
    stack = "blocks" if isinstance(model, T5Attention) else f"{STACKS[type(model)]}.layers"
    layers = [x for x in cut_layers(captured.program) if x.name.startswith(f"{stack}.")]
    num_layers = 1 if isinstance(model, Translation) else 2
    assert [layer.name for layer in layers] == [f"{stack}.{i}" for i in range(num_layers)]
    structures = {layer.structure for layer in layers}
    assert len(structures) == (2 if isinstance(model, T5Attention) else 1)
