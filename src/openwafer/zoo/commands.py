"""The subcommands that run a model of the zoo.

Decides their names and what each is for. A module of its own, so that `openwafer --help` loads no
torch; what they do is in run_model.py.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["COMMANDS"]

COMMANDS: Mapping[str, str] = {
    "train": "train a model of the zoo",
    "eval": "evaluate a model of the zoo",
    "eval_all": "evaluate every checkpoint in the folder of a model's run",
    "train_and_eval": "train a model of the zoo, and evaluate after each epoch and at the end",
    "predict": "write a model's predictions to <model_dir>/predict/predictions.jsonl",
    "validate": "say on which kernels a model of the zoo runs",
    "compile": "plan a model of the zoo for a machine",
}
"""They take the flags of every run; `openwafer train --help` lists them."""
