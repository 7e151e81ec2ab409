"""What a run may hold: the account of device and host memory, and what becomes of activations."""
