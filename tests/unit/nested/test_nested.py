"""Tensors are found in nested containers, each in its place."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

from openwafer.nested import tensors_in


class Pair(NamedTuple):
    left: Any
    right: Any


class Recorder(pickle.Pickler):
    """Notes the tensors that pickle comes to."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: list[torch.Tensor] = []

    def persistent_id(self, obj: Any) -> str | None:
        if not isinstance(obj, torch.Tensor):
            return None
        self.found.append(obj)
        return ""


LEAVES = st.one_of(st.builds(torch.empty, st.just(0)), st.none(), st.text(), st.integers())
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.integers(), inner, max_size=3).map(OrderedDict),
    ),
    max_leaves=20,
)


@given(NESTED)
def test_those_that_pickle_comes_to_in_its_order(value: object) -> None:
    recorder = Recorder()
    recorder.dump(value)
    assert list(map(id, tensors_in(value))) == list(map(id, recorder.found))


def test_mappings_that_are_no_dict_and_what_is_not_looked_into() -> None:
    first, second = torch.zeros(1), torch.ones(1)
    batch = UserDict({"one": [first], "two": second, "text": "text", "set": {first}})
    assert list(map(id, tensors_in([batch, first]))) == [id(first), id(second), id(first)]
    assert list(tensors_in(None)) == []
