"""A fully connected classifier of small images, and its loss."""

from itertools import pairwise

import torch.nn.functional as F
from torch import nn

from openwafer import AccuracyMetric, PyTorchBaseModel


class MNIST(nn.Module):
    """`depth` hidden layers of `hidden_size`, or one for each of `hidden_sizes`.

    images [batch, pixels] -> log probabilities [batch, 10]
    """

    def __init__(self, input_size, hidden_sizes, dropout, activation_fn):
        super().__init__()
        sizes = [input_size, *hidden_sizes]
        self.fc_layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in pairwise(sizes)
        )
        self.last_layer = nn.Linear(sizes[-1], 10)
        self.nonlin = {"relu": nn.ReLU, "gelu": nn.GELU, "tanh": nn.Tanh}[activation_fn]()
        self.dropout = nn.Dropout(dropout)

    def forward(self, images):
        hidden = images
        for fc_layer in self.fc_layers:
            hidden = self.dropout(self.nonlin(fc_layer(hidden)))
        return F.log_softmax(self.last_layer(hidden), dim=1)


class MNISTModel(PyTorchBaseModel):
    """The network with its loss and, in evaluation, its accuracy."""

    def __init__(self, params, device=None):
        model_params = params["model"]
        self.model = MNIST(
            model_params["input_size"],
            model_params["hidden_sizes"],
            model_params["dropout"],
            model_params["activation_fn"],
        )
        self.loss_fn = nn.NLLLoss()
        self.accuracy = AccuracyMetric(name="accuracy")
        super().__init__(params=params, model=self.model, device=device)

    def __call__(self, data):
        images, labels = data
        log_probabilities = self.model(images)
        if not self.model.training:
            self.accuracy(labels=labels, predictions=log_probabilities.argmax(-1))
        return self.loss_fn(log_probabilities, labels)
