"""What each TensorFlow operation is in torch: a function for each, a module for each family.

A new operation is a function in the module of its family; `LOWERINGS` has all of them by op type.
"""

from collections.abc import Mapping

from openwafer.frontends.tf.ops import (
    arithmetic,
    convolution,
    gather,
    losses,
    normalization,
    pooling,
    products,
    random,
    reductions,
    shapes,
)
from openwafer.frontends.tf.ops.table import Lowering

__all__ = ["LOWERINGS"]

LOWERINGS: Mapping[str, Lowering] = {
    **arithmetic.OPS,
    **convolution.OPS,
    **gather.OPS,
    **losses.OPS,
    **normalization.OPS,
    **pooling.OPS,
    **products.OPS,
    **random.OPS,
    **reductions.OPS,
    **shapes.OPS,
}
