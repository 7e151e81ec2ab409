"""Defaults of the parameter file."""

from data import image_pixels


def set_defaults(params):
    for section, shuffle in (("train_input", True), ("eval_input", False)):
        input_params = params.setdefault(section, {})
        input_params.setdefault("batch_size", 128)
        input_params.setdefault("shuffle", shuffle)
        input_params.setdefault("num_workers", 0)
        input_params.setdefault("drop_last_batch", True)
    model = params["model"]
    model.setdefault("dropout", 0.0)
    model.setdefault("activation_fn", "relu")
    model.setdefault("hidden_sizes", [model.get("hidden_size", 50)] * model.get("depth", 10))
    model.setdefault("input_size", image_pixels(params["train_input"]))
    return params
