"""A Dataset of results: arranged, saved, loaded, printed."""
