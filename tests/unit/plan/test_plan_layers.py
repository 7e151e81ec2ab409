"""Where models are cut, and which layers count as copies."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from handmade_program import program_of
from openwafer.graph.program import Parameter, Program, Site, TensorSpec
from openwafer.plan.layers import Layer, cut_layers

Linear, ModuleList, Sequential = nn.Linear, nn.ModuleList, nn.Sequential


class Net(nn.Module):
    def __init__(self, forward: Callable[..., Any], **members: Any) -> None:
        super().__init__()
        for name, member in members.items():
            setattr(self, name, member)
        self._forward = (forward,)

    def forward(self, *args: Any) -> Any:
        return self._forward[0](self, *args)


class Norm(nn.Module):
    """Reads its weight in its last operation only, as T5's norm does."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class Block(nn.Module):
    def __init__(self, *, cross: bool = False, norm: Callable[[int], nn.Module] = Norm) -> None:
        super().__init__()
        self.norm, self.attend, self.out = norm(8), Linear(8, 24), Linear(8, 8)
        self.cross = Linear(8, 8) if cross else None

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        q, k, v = self.attend(self.norm(x)).chunk(3, -1)
        h = F.dropout((q @ k.transpose(-1, -2)).softmax(-1), 0.1, self.training) @ v
        if self.cross is not None:
            h = h + self.cross(memory)
        return x + self.out(h)


def gpt(num_blocks: int = 3) -> nn.Module:
    def forward(m: Any, ids: torch.Tensor) -> torch.Tensor:
        x = m.wte(ids) + m.wpe(torch.arange(ids.shape[1]))
        for block in m.h:
            x = block(x)
        return m.head(m.ln(x)).square().mean()

    return Net(
        forward, wte=nn.Embedding(9, 8), wpe=nn.Embedding(5, 8),
        h=ModuleList(Block() for _ in range(num_blocks)), ln=Norm(), head=Linear(8, 9, bias=False),
    )  # fmt: skip


class Stack(nn.Module):
    """As in T5: blocks and a final norm."""

    def __init__(self, *, cross: bool) -> None:
        super().__init__()
        self.block = ModuleList(Block(cross=cross) for _ in range(3))
        self.final_norm = Norm()

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        for block in self.block:
            x = block(x, memory)
        return self.final_norm(x)


def t5() -> nn.Module:
    def forward(m: Any, ids: torch.Tensor) -> torch.Tensor:
        memory = m.encoder(m.shared(ids))
        return m.head(m.decoder(m.shared(ids), memory)).square().mean()

    return Net(
        forward, shared=nn.Embedding(9, 8), encoder=Stack(cross=False), decoder=Stack(cross=True),
        head=Linear(8, 9),
    )  # fmt: skip


def unet() -> nn.Module:
    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(m.down[0](x))
        b = F.relu(m.down[1](F.max_pool2d(a, 2)))
        u = F.relu(m.up[0](torch.cat([F.relu(m.mid(b)), b], 1)))
        return m.head(torch.cat([F.interpolate(u, scale_factor=2), a], 1)).mean()

    return Net(
        forward,
        down=ModuleList([nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)]),
        mid=nn.Conv2d(4, 4, 3, padding=1), up=ModuleList([nn.Conv2d(8, 4, 3, padding=1)]),
        head=nn.Conv2d(8, 1, 1),
    )  # fmt: skip


def plain_fc() -> nn.Module:
    return Net(
        lambda m, x: m.fc3(F.relu(m.fc2(F.relu(m.fc1(x))))).mean(),
        fc1=Linear(8, 8), fc2=Linear(8, 8), fc3=Linear(8, 2),
    )  # fmt: skip


def lenet() -> nn.Module:
    return Net(
        lambda m, x: m.fc(F.relu(m.conv2(F.relu(m.norm(m.conv1(x))))).mean((2, 3))).mean(),
        conv1=nn.Conv2d(1, 4, 3), norm=nn.BatchNorm2d(4), conv2=nn.Conv2d(4, 4, 3),
        fc=Linear(4, 2),
    )  # fmt: skip


def sequences() -> nn.Module:
    return Net(
        lambda m, x: m.n(x).mean(),
        n=Sequential(
            nn.Flatten(), Sequential(Linear(8, 8), nn.ReLU(), nn.Dropout(0.1)),
            Sequential(Linear(8, 8), nn.ReLU()), nn.Tanh(), Linear(8, 2),
        ),
    )  # fmt: skip


def one_big_element() -> nn.Module:
    inner = Sequential(*(Sequential(Linear(8, 8), nn.ReLU()) for _ in range(3)))
    return Net(lambda m, x: m.n(x).mean(), n=Sequential(inner, Linear(8, 2)))


IDS, VECTORS, IMAGES = (
    torch.zeros(2, 5, dtype=torch.int64),
    torch.ones(2, 8),
    torch.ones(2, 1, 8, 8),
)
MODELS: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, list[str]]] = {
    "gpt": (gpt, IDS, ["wte … wpe", "h.0", "h.1", "h.2", "ln … head"]),
    "t5": (
        t5,
        IDS,
        [
            "shared", "encoder.block.0", "encoder.block.1", "encoder.block.2",
            "encoder.final_norm … shared", "decoder.block.0", "decoder.block.1", "decoder.block.2",
            "decoder.final_norm … head",
        ],
    ),
    "unet": (unet, IMAGES, ["down.0", "down.1", "mid", "up.0", "head"]),
    "plain fc": (plain_fc, VECTORS, ["fc1", "fc2", "fc3"]),
    "lenet": (lenet, IMAGES, ["conv1 … norm", "conv2", "fc"]),
    "sequences": (sequences, VECTORS, ["n.1", "n.2", "n.4"]),
    "one big element": (one_big_element, VECTORS, ["n.0.0", "n.0.1", "n.0.2", "n.1"]),
    "no weights": (lambda: Net(lambda m, x: x.square().mean()), VECTORS, ["(inputs)"]),
    "one operation": (
        lambda: Net(lambda m, x: torch.mul(m.w, x), w=nn.Parameter(torch.ones(()))),
        torch.ones(()).reshape(1)[0:1],
        ["(top)"],
    ),
    "weight norm": (
        lambda: Net(
            lambda m, x: m.b(m.a(x)).mean(),
            a=nn.utils.parametrizations.weight_norm(Linear(8, 8)), b=Linear(8, 2),
        ),
        VECTORS,
        ["a", "b"],
    ),
    "a block used twice": (
        lambda: Net(lambda m, x: m.h[1](m.h[0](m.h[1](m.h[0](x)))).mean(),
                    h=ModuleList([Linear(8, 8), Linear(8, 8)])),
        VECTORS,
        ["h.0", "h.1", "h.0#2", "h.1#2"],
    ),
}  # fmt: skip


@cache
def program_named(name: str) -> Program:
    make, batch, _ = MODELS[name]
    return program_of(make(), batch)


def assert_sound(program: Program, layers: tuple[Layer, ...]) -> None:
    """Every operation once, in order; what a layer reads is there, what is needed is given."""
    operations = [node.name for node in program.operations]
    assert [name for layer in layers for name in layer.nodes] == operations
    assert len({layer.name for layer in layers}) == len(layers)
    nodes = {node.name: node for node in program.graph.nodes}
    known = {p.name: p.node for p in program.parameters}
    buffers = {b.node for b in program.buffers}
    given = {i.node for i in program.inputs}
    for layer in layers:
        inside = set(layer.nodes)
        read = {a.name for n in layer.nodes for a in nodes[n].all_input_nodes} - inside
        assert read == {known[p] for p in layer.parameters} | {*layer.buffers, *layer.inputs}
        assert set(layer.buffers) <= buffers
        assert set(layer.inputs) <= given
        assert set(layer.outputs) <= inside
        given |= set(layer.outputs)
    wanted = {program.loss, *(b.update for b in program.buffers if b.update)}
    assert wanted <= given


@pytest.mark.parametrize("name", MODELS)
def test_models_are_cut_as_the_rule_says(name: str) -> None:
    program = program_named(name)
    layers = cut_layers(program)
    assert [layer.name for layer in layers] == MODELS[name][2]
    assert_sound(program, layers)


def test_copies_have_one_structure() -> None:
    # The first element of the last model differs: no gradient goes on to the batch.
    for name, runs in (("gpt", [(1, 4)]), ("t5", [(1, 4), (5, 8)]), ("one big element", [(1, 3)])):
        structures = [layer.structure for layer in cut_layers(program_named(name))]
        for first, last in runs:
            assert len(set(structures[first:last])) == 1
        assert len(set(structures)) == len(structures) - sum(b - a - 1 for a, b in runs)


def _listed(*elements: nn.Module) -> nn.Module:
    return Net(lambda m, x: m.h(x).mean(), h=Sequential(*elements))


class Scaled(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.linear = Linear(8, 8, bias=options.get("bias", True))
        self.factor, self.act = options.get("factor", 2.0), options.get("act", torch.tanh)
        for weight in self.parameters():
            weight.requires_grad_(options.get("trains", True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.linear(x)) * self.factor


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ({}, True),
        ({"bias": False}, False),
        ({"factor": 2.5}, False),
        ({"act": torch.sigmoid}, False),
        ({"trains": False}, False),
    ],
)
def test_any_change_makes_another_structure(options: dict[str, Any], same: bool) -> None:
    model = _listed(Scaled(), Scaled(), Scaled(**options), Scaled())
    layers = cut_layers(program_of(model, VECTORS))
    assert (layers[2].structure == layers[1].structure) == same


def test_structure_depends_on_shapes_and_dtypes() -> None:
    model = _listed(Scaled(), Scaled(), Scaled())
    small, large = (cut_layers(program_of(model, torch.ones(n, 8))) for n in (2, 3))
    assert small[1].structure != large[1].structure
    double = cut_layers(program_of(model.double(), torch.ones(2, 8, dtype=torch.float64)))
    assert small[1].structure != double[1].structure


def test_parts_of_a_result_stay_with_it() -> None:
    """`chunk` in one module, its parts read in the next: they cross as tensors, never as a list."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = Linear(8, 8)

        def forward(self, pair: Any) -> Any:
            return self.linear(torch.cat(pair, -1)).chunk(2, -1)

    model = Net(lambda m, x: m.h(x.chunk(2, -1))[0].mean(), h=Sequential(Halves(), Halves()))
    program = program_of(model, VECTORS)
    nodes = {node.name: node for node in program.graph.nodes}
    for layer in cut_layers(program):
        for name in (*layer.inputs, *layer.outputs):
            assert isinstance(nodes[name].meta["val"], torch.Tensor)


def test_bytes_across_a_boundary() -> None:
    layers = cut_layers(program_named("plain fc"))
    assert [layer.input_bytes for layer in layers] == [2 * 8 * 4] * 3
    assert layers[0].output_bytes == 2 * 8 * 4


def test_a_flat_model_of_thousands_of_layers_is_cut_quickly() -> None:
    """Without export: a chain of 3,000 matrix products, by hand."""
    graph = fx.Graph()
    value = torch.empty(4, 4, device="meta")

    def note(node: fx.Node, module: str) -> fx.Node:
        node.meta.update(val=value, site=Site(module))
        return node

    weights = [note(graph.placeholder(f"w{i}"), "") for i in range(3000)]
    x = note(graph.placeholder("x"), "")
    for index, weight in enumerate(weights):
        product = graph.call_function(torch.ops.aten.mm.default, (x, weight))
        x = note(product, f"layer{index}")
    graph.output((x,))
    program = Program(
        graph=graph,
        parameters=tuple(
            Parameter(name=n.name, node=n.name, spec=TensorSpec((4, 4), "float32")) for n in weights
        ),
        buffers=(), inputs=(), loss=x.name, metrics=(), training=True, num_samples=4,
    )  # fmt: skip
    layers = cut_layers(program)
    assert len(layers) == 3000
    assert len({layer.structure for layer in layers[:-1]}) <= 2
