"""From stores and options to a Dataset of metrics."""
