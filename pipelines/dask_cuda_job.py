"""Measure a store on all GPUs of a machine, or on the workers of a scheduler that runs.

    python pipelines/dask_cuda_job.py run.zarr --out results.zarr --state state
    python pipelines/dask_cuda_job.py run.zarr --cluster tcp://HOST:8786 --out results.zarr

Needs the extra ``gpu`` (``pip install 'ncbatch[gpu]'``) and an NVIDIA driver on every worker; with
``--cluster processes --device cpu`` it runs anywhere. ``docs/cluster.md`` says how to start a
scheduler, and what its workers must share.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ncbatch as nc


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="neural collapse of stored features, on GPUs")
    parser.add_argument("stores", nargs="+", type=Path, metavar="STORE")
    parser.add_argument("--layer", action="append", help="by default all; repeatable")
    parser.add_argument("--cluster", default="cuda", help="cuda, an address or a scheduler file")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu", "auto"])
    parser.add_argument("--precision", default="exact", choices=["exact", "fp32", "tf32"])
    parser.add_argument("--memory", help="ceiling of resident memory per worker, such as 32GiB")
    parser.add_argument(
        "--state", type=Path, help="keeps finished work; every worker must reach it"
    )
    parser.add_argument("--out", type=Path, required=True, help=".zarr, .nc, .csv or .json")
    return parser.parse_args()


def main() -> None:
    """Measure, save, show."""
    options = parse()
    results = nc.measure(
        options.stores,
        options.layer,
        cluster=options.cluster,
        device=options.device,
        precision=options.precision,
        memory=options.memory,
        state=options.state,
    )
    nc.save_results(results, options.out)
    print(results)
    print(f"device: {results.attrs['device']}")


if __name__ == "__main__":
    try:
        main()
    except nc.NcbatchError as error:
        sys.exit(str(error))
