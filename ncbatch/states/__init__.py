"""States: mergeable summaries of samples. They know no Zarr and no Dask."""
