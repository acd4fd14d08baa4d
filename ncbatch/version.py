"""The version of ncbatch, which results and kept work record."""

__version__ = "0.1.0"
