"""`openwafer.tf`: the TensorFlow interface of release 1.6.

Decides the names a script imports. Needs TensorFlow 2.15: `pip install 'openwafer[tf]'`.
"""

from openwafer.frontends.tf.adamw import AdamWOptimizer
from openwafer.frontends.tf.base_model import TFBaseModel
from openwafer.frontends.tf.cluster import CSSlurmClusterResolver
from openwafer.frontends.tf.estimator import CerebrasEstimator
from openwafer.frontends.tf.estimator_spec import CSEstimatorSpec
from openwafer.frontends.tf.grad_accum import GradAccumOptimizer
from openwafer.frontends.tf.grad_accum_hooks import (
    GradAccumLoggingTensorHook,
    GradAccumStepCounterHook,
    GradAccumSummarySaverHook,
    get_grad_accum_hooks,
)
from openwafer.frontends.tf.loss_scale import CSDynamicLossScale, wrap_optimizer
from openwafer.frontends.tf.run import run
from openwafer.frontends.tf.run_config import CSRunConfig
from openwafer.frontends.tf.run_params import create_arg_parser
from openwafer.frontends.tf.trainer import Trainer
from openwafer.frontends.tf.warm_start import create_warm_start_settings

__all__ = [
    "AdamWOptimizer",
    "CSDynamicLossScale",
    "CSEstimatorSpec",
    "CSRunConfig",
    "CSSlurmClusterResolver",
    "CerebrasEstimator",
    "GradAccumLoggingTensorHook",
    "GradAccumOptimizer",
    "GradAccumStepCounterHook",
    "GradAccumSummarySaverHook",
    "TFBaseModel",
    "Trainer",
    "create_arg_parser",
    "create_warm_start_settings",
    "get_grad_accum_hooks",
    "run",
    "wrap_optimizer",
]
