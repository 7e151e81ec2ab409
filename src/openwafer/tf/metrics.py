"""`openwafer.tf.metrics`: the documented streaming metrics.

Decides the names a script imports; what they are is in `frontends/tf/metrics`.
"""

from openwafer.frontends.tf.metrics import *  # noqa: F403
from openwafer.frontends.tf.metrics import __all__ as __all__  # noqa: PLC0414
