"""What TensorFlow itself says while a script runs.

Decides that TensorFlow's own training shows its losses, and that the deprecation of what all
Estimators are made of, which nobody who runs one can act on, is not shown. Does not decide our own
lines (train/progress.py).
"""

from __future__ import annotations

import logging

from openwafer.frontends.tf.library import tf

__all__ = ["show_messages"]


def show_messages(*, trains_itself: bool) -> None:
    """Set up TensorFlow's logger; `trains_itself`: no compiled run shows its own losses."""
    logger: logging.Logger = tf.get_logger()
    logger.setLevel(logging.INFO if trains_itself else logging.WARNING)
    logger.addFilter(_is_of_use)


def _is_of_use(record: logging.LogRecord) -> bool:
    return "is deprecated and will be removed" not in record.getMessage()
