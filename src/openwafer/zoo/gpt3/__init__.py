"""GPT-3: GPT-2's network in the sizes of its paper, of 256 million to 175 billion.

Its weights were never published; GPT-2's rules convert those that are trained here."""

from openwafer.zoo.family import Family
from openwafer.zoo.gpt2.weights import WEIGHTS
from openwafer.zoo.gpt3.metrics import NextTokenMetrics
from openwafer.zoo.gpt3.torch_model import GPT3, GPT3Config

FAMILY = Family(
    name="gpt3",
    title="GPT-3, causal language model",
    task="causal_lm",
    config=GPT3Config,
    model=GPT3,
    metrics=NextTokenMetrics,
    from_data={"vocab_size": "vocab_size", "max_position_embeddings": "max_sequence_length"},
    weights=WEIGHTS,
)
