"""FeatureStore: create, open, describe and view a store."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import zarr
import zarr.errors

from ncbatch import __version__
from ncbatch.arrays import Array, cuda_chunk, cuda_meta
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.store.chunks import checksums
from ncbatch.store.classifiers import checked_classifier, read_classifier, store_classifier
from ncbatch.store.commit_records import Share
from ncbatch.store.finalizing import finalize_split
from ncbatch.store.format import (
    ATTRIBUTE,
    CLASSIFIER,
    DTYPES,
    FORMAT,
    MAX_CLASSES,
    LayerSpec,
    check_metadata,
    check_name,
    layer_specs,
    read_header,
)
from ncbatch.store.layer_writing import LayerWriter
from ncbatch.store.nodes import subgroups
from ncbatch.store.split import Split
from ncbatch.store.writing import Writer

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

    from ncbatch.store.chunks import Fault


class FeatureStore:
    """Features of layers, labels and classifiers in one Zarr v3 group.

    Use `create` or `open`; the format is described in ``docs/store.md``.
    """

    def __init__(self, root: zarr.Group, path: str) -> None:
        self._root = root
        self.path = path
        self._header = read_header(root, path)

    def __repr__(self) -> str:
        return f"FeatureStore('{self.path}', K={self.n_classes}, splits={self.splits})"

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        n_classes: int,
        layers: Mapping[str, int] | None = None,
        dtype: str = "float16",
        *,
        class_names: Sequence[str] | None = None,
        overwrite: bool = False,
    ) -> FeatureStore:
        """Create an empty store.

        Parameters
        ----------
        path : path
            A directory that does not exist yet.
        n_classes : int
            K; labels are 0..K-1.
        layers : mapping of str to int, optional
            Width D of each layer that writers write by default.
        dtype : {"float16", "bfloat16", "float32", "float64"}, optional
            How those layers are stored.
        class_names : sequence of str, optional
            A name per class.
        overwrite : bool, optional
            Delete what is there, if that is a store.

        Raises
        ------
        StoreError
            When something is there already.
        UsageError
            For bad layer names, widths, dtype or number of classes.
        """
        where = os.fspath(path)
        specs = layer_specs(layers or {}, dtype)
        if not 1 <= n_classes <= MAX_CLASSES:
            raise UsageError(f"a store of {n_classes} classes", f"1 to {MAX_CLASSES} classes")
        if class_names is not None and len(class_names) != n_classes:
            raise DataError(f"{len(class_names)} class names", f"{n_classes}, one per class")
        if Path(where).exists():
            if not overwrite:
                raise StoreError(
                    f"'{where}' exists", "a path that is free", "choose another, or overwrite it"
                )
            cls.open(where)  # never delete what is no store
            shutil.rmtree(where)
        header: dict[str, Any] = {
            "format": FORMAT,
            "id": str(uuid.uuid4()),
            "n_classes": int(n_classes),
            "producer": f"ncbatch {__version__}",
            "layers": {
                name: {"n_features": s.n_features, "dtype": s.dtype} for name, s in specs.items()
            },
        }
        if class_names is not None:
            header["class_names"] = [str(name) for name in class_names]
        try:
            root = zarr.create_group(
                _zarr_path(where), zarr_format=3, attributes={ATTRIBUTE: header}
            )
        except OSError as error:
            raise StoreError(
                f"no store can be made at '{where}': {error.strerror}", "a folder to write to"
            ) from error
        return cls(root, where)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> FeatureStore:
        """Open a store, a local path or any URL that zarr opens.

        Raises
        ------
        StoreError
            When nothing is there, it is no store, its format is newer than this version, or its
            metadata is damaged.
        """
        where = os.fspath(path)
        remote = "://" in where
        if not remote and not Path(where).exists():
            raise StoreError(f"no store at '{where}': nothing is there", "the path of a store")
        if not remote and not Path(where).is_dir():
            raise StoreError(f"'{where}' is a file", "the directory of a store")
        try:
            root = zarr.open_group(_zarr_path(where), mode="r" if remote else "r+", zarr_format=3)
        except (zarr.errors.BaseZarrError, FileNotFoundError, KeyError, ValueError) as error:
            raise StoreError(
                f"'{where}' is no store: no Zarr v3 group can be read there",
                remedy="make one with 'ncbatch import' or nc.FeatureStore.create",
            ) from error
        store = cls(root, where)
        if not remote:
            check_metadata(Path(where))
        return store

    @property
    def id(self) -> str:
        """The store's own identifier, a UUID."""
        return str(self._header["id"])

    @property
    def n_classes(self) -> int:
        """K, the number of classes."""
        return int(self._header["n_classes"])

    @property
    def class_names(self) -> list[str] | None:
        """A name per class, where recorded."""
        return self._header.get("class_names")

    @property
    def model(self) -> str | None:
        """Name of the model that made the features, where recorded."""
        return self._header.get("model")

    @property
    def step(self) -> int | None:
        """Training step of that model, where recorded."""
        return self._header.get("step")

    @property
    def layer_notes(self) -> dict[str, dict[str, Any]]:
        """What is recorded of layers by name.

        ``depth``: the share of the model's blocks that come before, 0 to 1; ``hidden_state``: its
        index among a Hugging Face model's ``hidden_states``.
        """
        return {name: dict(notes) for name, notes in self._header.get("layer_notes", {}).items()}

    def describe(
        self,
        *,
        model: str | None = None,
        step: int | None = None,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Record where the features come from; what is given replaces what was recorded.

        Parameters
        ----------
        model : str, optional
            Name of the model.
        step : int, optional
            Its training step.
        layers : mapping of str to mapping, optional
            Notes of layers, as in `layer_notes`.
        """
        header = dict(self._header)
        if model is not None:
            header["model"] = str(model)
        if step is not None:
            header["step"] = int(step)
        if layers:
            kept = self.layer_notes
            header["layer_notes"] = {
                **kept, **{name: {**kept.get(name, {}), **notes} for name, notes in layers.items()}
            }  # fmt: skip
        self._root.update_attributes({ATTRIBUTE: header})
        self._header = header

    @property
    def declared_layers(self) -> dict[str, LayerSpec]:
        """The layers that writers write by default."""
        return {
            name: LayerSpec(int(spec["n_features"]), str(spec["dtype"]))
            for name, spec in self._header.get("layers", {}).items()
        }

    @property
    def splits(self) -> list[str]:
        """Names of the splits that hold committed rows or ended empty."""
        return sorted(
            name for name, group in subgroups(self._root) if name != CLASSIFIER and "label" in group
        )

    @property
    def lost_splits(self) -> dict[str, int]:
        """Complete splits whose labels are gone, with the samples that they had."""
        found = {}
        for name, group in subgroups(self._root):
            attributes: Any = group.attrs.get(ATTRIBUTE, {})
            if "n_samples" in attributes and "label" not in group:
                found[name] = int(attributes["n_samples"])
        return found

    def split(self, name: str) -> Split:
        """Give a split for reading.

        Raises
        ------
        UnknownNameError
            When there is none of that name.
        """
        splits = self.splits
        if name not in splits:
            raise unknown_name("split", name, splits, self.path)
        group = self._root[name]
        assert isinstance(group, zarr.Group)
        return Split(name, group, self.path, self.n_classes)

    def layers(self, split: str | None = None) -> list[str]:
        """Name the complete layers of a split, or of any split, in the order written."""
        names = [split] if split is not None else self.splits
        return list(dict.fromkeys(layer for name in names for layer in self.split(name).layers))

    def writer(
        self,
        split: str,
        *,
        rank: int = 0,
        world_size: int = 1,
        layers: Mapping[str, int] | Iterable[str] | None = None,
        dtype: str | None = None,
        n_samples: int | None = None,
        head: str | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Writer:
        """Start writing a split; a context manager with ``append``.

        Parameters
        ----------
        split : str
            A split that does not exist yet.
        rank, world_size : int, optional
            Which one of several writers this is, 0..world_size-1, and how many there are. They need
            not talk or run at once; each appends rows of its own. Once all are closed, one process
            calls `finalize`.
        layers : mapping of str to int, or iterable of str, optional
            Widths of the layers to write, or names of declared ones; all declared by default.
        dtype : str, optional
            Stored dtype of layers given with widths; float16 by default.
        n_samples : int, optional
            Rows to come, where known; more or fewer may come. Several writers must give it, all the
            same: an upper bound of the rows of all of them together, such as the length of the
            data set. Chunks are sized for an even share, but each writer has room for all rows,
            so shares need not be even, and a bound that is too large costs nothing.
        head : str, optional
            The layer whose classifier made the predictions that will be appended; of several
            writers all append predictions if it is given, and none otherwise.
        resume : bool, optional
            Go on after an interrupted writer; ``writer.position`` rows are committed. One of
            several goes on with its own rank; if it never began it begins, and if it had ended
            it has no rows left to append.
        overwrite : bool, optional
            Delete the split first if it exists; for a single writer only.

        Raises
        ------
        StoreError
            When the split exists and neither `resume` nor `overwrite` is given, when a writer of
            this rank has begun, or when other writers gave other arguments.
        UsageError
            For bad names, an unknown dtype, or a rank that is not in 0..world_size-1.
        """
        share = Share(rank, world_size)
        if overwrite and share.several:
            raise UsageError(
                "overwrite with several writers, where the last one would delete the others' rows",
                "one process that deletes the split before they begin",
                f"call store.delete_split('{split}') first",
            )
        check_name("split", split)
        specs = self._specs_to_write(layers, dtype)
        for name, spec in specs.items():
            self.check_width(name, spec.n_features, but=split if overwrite else None)
        if head is not None and head not in specs:
            raise unknown_name("head layer", head, specs, f"the layers of split '{split}'")
        return Writer(
            self._root, split, self.path, self.n_classes, specs, share=share,
            n_samples=n_samples, head=head, resume=resume, overwrite=overwrite,
        )  # fmt: skip

    def add_layers(
        self,
        split: str,
        layers: Mapping[str, int],
        dtype: str = "float16",
        *,
        head: str | None = None,
        overwrite: bool = False,
    ) -> LayerWriter:
        """Start adding layers to a split that is complete; invisible until all rows are there.

        Parameters
        ----------
        split : str
            A finalized split.
        layers : mapping of str to int
            Width of each new layer.
        dtype : str, optional
            Their stored dtype.
        head : str, optional
            The layer whose classifier made the predictions that will be appended.
        overwrite : bool, optional
            Replace complete layers of the same name, and predictions.

        Raises
        ------
        StoreError
            When the split is not complete or a layer exists.
        DataError
            When another split has the layer with another width.
        """
        specs = layer_specs(layers, dtype)
        target = self.split(split)
        for name, spec in specs.items():
            self.check_width(name, spec.n_features, but=split)
        return LayerWriter(target, specs, head=head, overwrite=overwrite)

    def finalize(self, split: str) -> Split:
        """Complete a split of several writers, once all are closed.

        Its arrays are cut after the last row, blocks that no writer came to become holes, and the
        number of samples is recorded. A split that is complete stays as it is.

        Parameters
        ----------
        split : str
            Which split.

        Returns
        -------
        Split
            The complete split.

        Raises
        ------
        UnknownNameError
            When no writer has begun a split of that name.
        StoreError
            Names the writers that have not begun or not ended.
        CorruptionError
            When labels that a writer committed are missing.
        """
        check_name("split", split)
        group = self._root.get(split)
        if not isinstance(group, zarr.Group):
            raise unknown_name("split", split, self.splits, self.path)
        if not Split(split, group, self.path, self.n_classes).finalized:
            finalize_split(group, f"split '{split}' of {self.path}")
        return self.split(split)

    def delete_split(self, split: str) -> None:
        """Delete a split with all its layers, if it is there."""
        if split in self._root:
            del self._root[split]

    def check_width(self, layer: str, n_features: int, but: str | None = None) -> None:
        """Refuse a layer whose width differs from that in other splits, or from its classifier's.

        Parameters
        ----------
        layer : str
            Which layer.
        n_features : int
            The width D that it is to have.
        but : str, optional
            A split, or ``"classifier"``, that does not matter: it is to be replaced.

        Raises
        ------
        DataError
            Names both widths and where the other is.
        """
        for name in self.splits:
            split = self.split(name)
            if name != but and layer in split.features:
                width = split.spec(layer).n_features
                if width != n_features:
                    raise DataError(
                        f"layer '{layer}' with {n_features} features",
                        f"{width}, as in split '{name}' of {self.path}",
                    )
        if but != CLASSIFIER and layer in self.classifiers:
            arrays = {array.basename: array for array in self.classifier_arrays(layer)}
            width = int(arrays["weight"].shape[1])
            if width != n_features:
                raise DataError(
                    f"layer '{layer}' with {n_features} features",
                    f"{width}, as its classifier in {self.path} reads",
                    "write it under another name, or into another store",
                )

    def set_classifier(self, layer: str, weight: Array, bias: Array | None = None) -> None:
        """Store the linear classifier that reads a layer, replacing an earlier one.

        Parameters
        ----------
        layer : str
            The layer whose features the classifier takes.
        weight : array (K, D)
            Float weights.
        bias : array (K,), optional
            Float biases.

        Raises
        ------
        DataError
            When shapes do not fit or a value is not finite.
        """
        check_name("layer", layer)
        w, b = checked_classifier(weight, bias, self.n_classes)
        self.check_width(layer, w.shape[1], but=CLASSIFIER)
        store_classifier(self._root, layer, w, b)

    def classifier(
        self, layer: str, *, lazily: bool = False
    ) -> tuple[Any, npt.NDArray[Any] | None] | None:
        """Read the classifier of a layer: weight (K, D) and bias (K,) or None; None without one.

        bfloat16 is read as float32. With `lazily` the weight is a `ClassifierRows`, read slice by
        slice and never held whole.
        """
        if layer not in self.classifiers:
            return None
        return read_classifier(self.classifier_arrays(layer), lazily=lazily)

    def classifier_fingerprint(self, layer: str) -> str:
        """Hash the shapes and stored checksums of a layer's classifier; 32 hexadecimal digits."""
        digest = hashlib.sha256()
        for array in self.classifier_arrays(layer):
            digest.update(array.basename.encode() + checksums(array))
        return digest.hexdigest()[:32]

    def classifier_arrays(self, layer: str) -> list[zarr.Array[Any]]:
        """Give the stored arrays of a layer's classifier."""
        group = self._root[f"{CLASSIFIER}/{layer}"]
        assert isinstance(group, zarr.Group)
        return [array for _, array in sorted(group.arrays(), key=lambda item: item[0])]

    @property
    def classifiers(self) -> list[str]:
        """Layers that have a classifier."""
        if CLASSIFIER not in self._root:
            return []
        group = self._root[CLASSIFIER]
        assert isinstance(group, zarr.Group)
        return sorted(name for name, g in group.groups() if g.attrs.get("complete"))

    def to_dask(self, split: str, layer: str, device: Literal["cpu", "cuda"] = "cpu") -> da.Array:
        """Give a layer's rows as a Dask array (sample, unit), one block per chunk.

        Rows without a sample (label -1) are included; bfloat16 becomes float32.

        Parameters
        ----------
        split, layer : str
            Which rows.
        device : {"cpu", "cuda"}
            ``cuda``: chunks are CuPy arrays, each on the GPU of the worker that reads it.

        Raises
        ------
        UnknownNameError
            When there is no such split or layer.
        UsageError
            When ``cuda`` is asked for and CuPy or a device is missing here.
        """
        import dask.array as da

        if device not in ("cpu", "cuda"):
            raise UsageError(f"device '{device}'", "cpu or cuda")
        array = da.from_zarr(self.split(split).feature(layer))
        dtype = np.dtype("float32") if array.dtype == DTYPES["bfloat16"] else array.dtype
        if device == "cuda":
            return array.map_blocks(cuda_chunk, dtype=dtype, meta=cuda_meta(dtype))
        return array.astype(dtype)

    def to_xarray(self, split: str, layer: str) -> xr.Dataset:
        """Give a layer as a Dask-backed Dataset of its samples.

        Returns
        -------
        xarray.Dataset
            ``feature(sample, unit)`` and ``label(sample)``, and ``prediction(sample)`` where
            stored; rows that are no samples are left out.
        """
        import xarray as xr

        part = self.split(split)
        labels = part.labels()
        variables: dict[str, Any] = {
            "feature": (("sample", "unit"), self.to_dask(split, layer)),
            "label": (("sample",), labels),
        }
        if part.head is not None:
            variables["prediction"] = (("sample",), part.predictions())
        dataset = xr.Dataset(
            variables,
            attrs={"store": self.path, "store_id": self.id, "split": split, "layer": layer},
        )
        rows = np.flatnonzero(labels >= 0)
        return dataset if rows.size == labels.size else dataset.isel(sample=rows)

    def validate(self) -> list[Fault]:
        """Read everything and name every bad chunk and impossible value; empty when all is well."""
        from ncbatch.store.checking import find_faults

        return find_faults(self)

    def _specs_to_write(
        self, layers: Mapping[str, int] | Iterable[str] | None, dtype: str | None
    ) -> dict[str, LayerSpec]:
        declared = self.declared_layers
        if isinstance(layers, Mapping):
            specs = layer_specs(layers, dtype or "float16")
        else:
            names = list(declared if layers is None else layers)
            for name in names:
                if name not in declared:
                    raise unknown_name("layer", name, declared, self.path)
            specs = {name: declared[name] for name in names}
        if not specs:
            raise UsageError(
                "no layer to write", "layers declared at create, or layers={name: width}"
            )
        return specs


def _zarr_path(path: str) -> str:
    """Make a local path absolute.

    When zarr (3.1.6) lists keys it cuts the store's path out wherever it occurs, so that a store
    at ``s`` would lose the end of ``layers/`` in every key.
    """
    return path if "://" in path else os.path.abspath(path)
