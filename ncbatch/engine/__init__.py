"""The engine runs passes within a memory budget; it knows nothing of neural collapse."""
