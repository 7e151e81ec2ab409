"""Where weights and optimizer state live, and how they get to the device and back."""
