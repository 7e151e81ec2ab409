"""`openwafer.tf`: the TensorFlow interface of release 1.6.

Decides the names a script imports. Needs TensorFlow 2.15: `pip install 'openwafer[tf]'`.
"""

from openwafer.frontends.tf.adamw import AdamWOptimizer
from openwafer.frontends.tf.base_model import TFBaseModel
from openwafer.frontends.tf.cluster import CSSlurmClusterResolver
from openwafer.frontends.tf.estimator import CerebrasEstimator
from openwafer.frontends.tf.estimator_spec import CSEstimatorSpec
from openwafer.frontends.tf.run import run
from openwafer.frontends.tf.run_config import CSRunConfig
from openwafer.frontends.tf.run_params import create_arg_parser
from openwafer.frontends.tf.trainer import Trainer

__all__ = [
    "AdamWOptimizer",
    "CSEstimatorSpec",
    "CSRunConfig",
    "CSSlurmClusterResolver",
    "CerebrasEstimator",
    "TFBaseModel",
    "Trainer",
    "create_arg_parser",
    "run",
]
