"""The layers of the documented TensorFlow layer API, on Keras.

Each has the arguments of the fact sheet, section 6.3 (CS-2 software 1.6). All take
`boundary_casting=False, tf_summary=False` and Keras' own arguments at the end.
"""

from openwafer.frontends.tf.layers.attention import AttentionLayer, SelfAttentionLayer
from openwafer.frontends.tf.layers.base import (
    AbstractRecomputeWrapper,
    BaseLayer,
    SetupInputTensor,
    boundary_cast,
    summarize_tensor,
    summary_layer,
)
from openwafer.frontends.tf.layers.embedding import (
    EmbeddingLayer,
    PositionEmbeddingLayer,
    SegmentEmbeddingLayer,
    SharedWeightsDenseLayer,
)
from openwafer.frontends.tf.layers.feed_forward import (
    FeedForwardNetwork,
    FeedForwardNetworkV2,
    PrePostProcessWrapper,
)
from openwafer.frontends.tf.layers.plain import (
    ActivationLayer,
    AddLayer,
    Conv2DLayer,
    Conv2DTransposeLayer,
    DenseLayer,
    DropoutLayer,
    LayerNormalizationLayer,
    MaxPool2DLayer,
    ReshapeLayer,
    SoftmaxLayer,
)
from openwafer.frontends.tf.layers.reductions import (
    CrossEntropyFromLogitsLayer,
    PoolerLayer,
    PoolerLayerV2,
    SquaredErrorLayer,
)

__all__ = [
    "AbstractRecomputeWrapper",
    "ActivationLayer",
    "AddLayer",
    "AttentionLayer",
    "BaseLayer",
    "Conv2DLayer",
    "Conv2DTransposeLayer",
    "CrossEntropyFromLogitsLayer",
    "DenseLayer",
    "DropoutLayer",
    "EmbeddingLayer",
    "FeedForwardNetwork",
    "FeedForwardNetworkV2",
    "LayerNormalizationLayer",
    "MaxPool2DLayer",
    "PoolerLayer",
    "PoolerLayerV2",
    "PositionEmbeddingLayer",
    "PrePostProcessWrapper",
    "ReshapeLayer",
    "SegmentEmbeddingLayer",
    "SelfAttentionLayer",
    "SetupInputTensor",
    "SharedWeightsDenseLayer",
    "SoftmaxLayer",
    "SquaredErrorLayer",
    "boundary_cast",
    "summarize_tensor",
    "summary_layer",
]
