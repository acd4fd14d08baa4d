"""The sweep over pairs of classes."""
