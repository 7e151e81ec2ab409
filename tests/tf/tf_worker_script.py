"""A script as users of 2021 had it: run as each of the tasks of a step, with the same arguments.

tf_worker_script.py MODEL_DIR CS_IP
"""

from __future__ import annotations

import sys

from tf_models import classifier_of_2021, images

from openwafer.tf import CerebrasEstimator, CSRunConfig

model_dir, cs_ip = sys.argv[1:]
config = CSRunConfig(
    cs_ip=cs_ip, tf_random_seed=1, log_step_count_steps=1, save_checkpoints_steps=20
)
estimator = CerebrasEstimator(classifier_of_2021, model_dir=model_dir, config=config, params={})
estimator.train(lambda params: images(params), max_steps=20)
