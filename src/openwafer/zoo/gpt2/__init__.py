"""GPT-2: next-token prediction with a pre-norm decoder; sizes of 124 million to 1.56 billion."""

from openwafer.zoo.family import Family
from openwafer.zoo.gpt2.metrics import NextTokenMetrics
from openwafer.zoo.gpt2.torch_model import GPT2, GPT2Config
from openwafer.zoo.gpt2.weights import WEIGHTS

FAMILY = Family(
    name="gpt2",
    title="GPT-2, causal language model",
    task="causal_lm",
    config=GPT2Config,
    model=GPT2,
    metrics=NextTokenMetrics,
    from_data={"vocab_size": "vocab_size", "max_position_embeddings": "max_sequence_length"},
    weights=WEIGHTS,
)
