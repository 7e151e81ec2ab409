"""What the zoo's TensorFlow models share: names, layers, losses, and how one is run."""
