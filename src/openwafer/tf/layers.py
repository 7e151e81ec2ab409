"""`openwafer.tf.layers`: the documented TensorFlow layer API.

Decides the names a script imports; what they are is in `frontends/tf/layers`.
"""

from openwafer.frontends.tf.layers import *  # noqa: F403
from openwafer.frontends.tf.layers import __all__ as __all__  # noqa: PLC0414
