"""Golden results: what small fixed stores measured when they were recorded, compared to the bit.

They guard changes that are to change no number, above all moving and renaming code, so they use
only the names of the public face. ``stores.py`` builds the stores, ``cases.py`` measures them,
``records.py`` turns results into records and compares them, ``results/`` holds the records.
"""
