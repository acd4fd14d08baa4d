"""Which dtype the layers of a dump are stored in: as asked, else as the store has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ncbatch.errors import UsageError
from ncbatch.store import FeatureStore


def stored_dtypes(
    store: FeatureStore | None,
    split: str,
    layers: Iterable[str],
    asked: str | None,
    default: str = "float16",
    *,
    overwrite: bool = False,
) -> dict[str, str]:
    """Choose how each layer is stored.

    Parameters
    ----------
    store : FeatureStore or None
        The store, if there is one.
    split : str
        The split to be written.
    layers : iterable of str
        The layers to be written.
    asked : str or None
        What the user asked for. It also replaces what is declared but has no rows yet.
    default : str, optional
        What layers get of which the store says nothing, where it says nothing of the others.
    overwrite : bool, optional
        Whether the split will be replaced, so that its own rows do not matter.

    Returns
    -------
    dict of str to str
        A dtype per layer.

    Raises
    ------
    UsageError
        When the store has rows of a declared layer in another dtype than the one asked for.
    """
    names = list(layers)
    if store is None:
        return dict.fromkeys(names, asked or default)
    held = _held(store, split, names, overwrite)
    declared = {name: spec.dtype for name, spec in store.declared_layers.items() if name in names}
    if asked is not None:
        for name in declared:
            where, dtype = held.get(name, (None, asked))
            if dtype != asked:
                raise UsageError(
                    f"dtype {asked} for layer '{name}'",
                    f"{dtype}, as in split '{where}' of {store.path}",
                    "leave --dtype (dtype=) out, or write into another store",
                )
        return dict.fromkeys(names, asked)
    known = declared | {name: dtype for name, (_, dtype) in held.items()}
    common = set(known.values())
    rest = common.pop() if len(common) == 1 else default
    return {name: known.get(name, rest) for name in names}


def one_dtype(dtypes: Mapping[str, str]) -> str:
    """Give the one dtype of layers that are written together.

    Raises
    ------
    UsageError
        When they have several.
    """
    if len(set(dtypes.values())) > 1:
        raise UsageError(
            "layers of several dtypes: "
            + ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items()),
            "one dtype for layers that are written together",
            "set dtype= to the one declared, or dump the others afterwards",
        )
    return next(iter(dtypes.values()))


def _held(
    store: FeatureStore, split: str, layers: list[str], overwrite: bool
) -> dict[str, tuple[str, str]]:
    """Find a split with rows of each layer, and their dtype; the split itself comes first."""
    found: dict[str, tuple[str, str]] = {}
    layout = store.layout(split)
    if layout is not None:
        found = {
            name: (split, layout.layers[name].dtype) for name in layers if name in layout.layers
        }
    for other in sorted(store.splits, key=lambda name: name != split):
        if overwrite and other == split:
            continue
        part = store.split(other)
        for name in layers:
            if name in part.features:
                found.setdefault(name, (other, part.spec(name).dtype))
    return found
