"""Formats of other tools: one module per family, and the table of endings."""
