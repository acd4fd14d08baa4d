"""Array libraries: one code path over NumPy, CuPy, torch and any other array-API library."""
