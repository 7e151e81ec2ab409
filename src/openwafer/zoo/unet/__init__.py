"""U-Net: segmentation of images."""

from openwafer.zoo.family import Family
from openwafer.zoo.unet.metrics import UNetMetrics
from openwafer.zoo.unet.torch_model import UNetConfig, UNetModel

__all__ = ["FAMILY", "UNetConfig", "UNetMetrics", "UNetModel"]

FAMILY = Family(
    name="unet",
    title="U-Net: a class for every pixel",
    task="segmentation",
    config=UNetConfig,
    model=UNetModel,
    metrics=UNetMetrics,
    from_data={"image_shape": "image_shape", "num_classes": "num_classes"},
)
