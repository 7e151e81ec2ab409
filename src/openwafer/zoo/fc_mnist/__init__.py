"""fc_mnist: digits by fully connected layers."""

from openwafer.zoo.family import Family
from openwafer.zoo.fc_mnist.metrics import FcMnistMetrics
from openwafer.zoo.fc_mnist.torch_model import FcMnistConfig, FcMnistModel

__all__ = ["FAMILY", "FcMnistConfig", "FcMnistMetrics", "FcMnistModel"]

FAMILY = Family(
    name="fc_mnist",
    title="fully connected network on handwritten digits",
    task="digits",
    config=FcMnistConfig,
    model=FcMnistModel,
    metrics=FcMnistMetrics,
    from_data={"image_shape": "image_shape", "num_classes": "num_classes"},
)
