"""T5: pre-training by span corruption."""

from openwafer.zoo.family import Family
from openwafer.zoo.t5.metrics import T5Metrics
from openwafer.zoo.t5.torch_model import T5Config, T5Model
from openwafer.zoo.t5.weights import WEIGHTS

__all__ = ["FAMILY", "T5Config", "T5Metrics", "T5Model"]

FAMILY = Family(
    name="t5",
    title="T5: text to text, pre-trained by filling in spans",
    task="span_corruption",
    config=T5Config,
    model=T5Model,
    metrics=T5Metrics,
    from_data={"src_vocab_size": "vocab_size"},
    weights=WEIGHTS,
)
