"""The table of all metrics, in order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ncbatch.errors import unknown_name
from ncbatch.metrics.metric import Metric
from ncbatch.metrics.nc1 import NC1
from ncbatch.metrics.nc2 import NC2, NC2_WEIGHT
from ncbatch.metrics.nc3_to_nc5 import NC3, NC4, NC5
from ncbatch.metrics.spectra import SPECTRA

# In the order of variables in results, which files of others rely on.
_TABLES = (NC1, NC2, NC3, NC2_WEIGHT, NC4, NC5, SPECTRA)
CATALOGUE: Mapping[str, Metric] = {metric.name: metric for table in _TABLES for metric in table}


def find_metrics(names: Iterable[str] | None = None) -> list[Metric]:
    """Return the metrics of those `names`, in the table's order.

    Parameters
    ----------
    names : iterable of str, optional
        By default all that need no read of their own.

    Raises
    ------
    UnknownNameError
        For a name that is not in the table; suggests the nearest.

    Examples
    --------
    >>> [m.name for m in find_metrics(["nc1_quot", "nc1_pinv"])]
    ['nc1_pinv', 'nc1_quot']
    """
    if names is None:
        return [metric for metric in CATALOGUE.values() if not metric.only_named]
    wanted = list(names)
    for name in wanted:
        if name not in CATALOGUE:
            raise unknown_name("metric", name, CATALOGUE)
    return [metric for name, metric in CATALOGUE.items() if name in wanted]
