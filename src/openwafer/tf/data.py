"""`openwafer.tf.data`: the documented TFRecord processors and input functions.

Decides the names a script imports; what they are is in `frontends/tf/processors`.
"""

from openwafer.frontends.tf.processors import *  # noqa: F403
from openwafer.frontends.tf.processors import __all__ as __all__  # noqa: PLC0414
