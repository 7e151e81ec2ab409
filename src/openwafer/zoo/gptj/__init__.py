"""GPT-J: a decoder of 6 billion weights with rotary positions, and its fine-tuning."""

from openwafer.zoo.family import Family
from openwafer.zoo.gptj.metrics import NextTokenMetrics
from openwafer.zoo.gptj.torch_model import GPTJ, GPTJConfig
from openwafer.zoo.gptj.weights import WEIGHTS

FAMILY = Family(
    name="gptj",
    title="GPT-J, causal language model",
    task="causal_lm",
    config=GPTJConfig,
    model=GPTJ,
    metrics=NextTokenMetrics,
    from_data={"vocab_size": "vocab_size", "max_position_embeddings": "max_sequence_length"},
    weights=WEIGHTS,
)
