"""TensorFlow Estimators: from model_fn and input_fn to the same Program as PyTorch models."""
