"""FeatureStore: create, open, describe and view a store."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import zarr

from ncbatch.arrays.devices import cuda_chunk, cuda_meta
from ncbatch.arrays.namespace import Array
from ncbatch.errors import DataError, StoreError, UsageError, unknown_name
from ncbatch.store import chunks, place
from ncbatch.store.classifiers import check_classifier, read_classifier, store_classifier
from ncbatch.store.faults import find_faults
from ncbatch.store.format import (
    ATTRIBUTE,
    CLASSIFIER,
    FORMAT,
    MAX_CLASSES,
    LayerSpec,
    check_name,
    layer_specs,
    read_attributes,
    read_header,
)
from ncbatch.store.ranks import Layout, Share, finalize_split
from ncbatch.store.split import Split
from ncbatch.store.states import StoredStates
from ncbatch.store.writer import LayerWriter, Writer
from ncbatch.version import __version__

if TYPE_CHECKING:
    import dask.array as da
    import xarray as xr

# An attribute of a split, beside ATTRIBUTE, which the end of writing replaces.
_DUMPED = "ncbatch_dump"


class StoreHeader:
    """What a store says of itself: identifier, classes, declared layers, origin of its features.

    Parameters
    ----------
    root : zarr.Group
        The store.
    path : str
        Its path or URL, for messages.
    """

    def __init__(self, root: zarr.Group, path: str) -> None:
        self._root = root
        self.path = path
        self._header = read_header(root, path)

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

    @property
    def declared_layers(self) -> dict[str, LayerSpec]:
        """The layers that writers write by default."""
        layers = self._header.get("layers", {})
        return {name: LayerSpec.read(spec) for name, spec in layers.items()}

    def begun_with(self, split: str, kind: str) -> dict[str, Any]:
        """Return what a dump of rows or moments into a split was begun with, as recorded."""
        group = self._root.get(split)
        dumps: Any = group.attrs.get(_DUMPED, {}) if isinstance(group, zarr.Group) else {}
        return dict(dumps.get(kind, {}))

    def set_begun_with(self, split: str, kind: str, values: Mapping[str, Any]) -> None:
        """Record what a dump of rows or moments into a split is begun with."""
        group = chunks.require_group(self._root, split)
        dumps: Any = group.attrs.get(_DUMPED, {})
        group.update_attributes({_DUMPED: {**dumps, kind: dict(values)}})

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
        for name, notes in (layers or {}).items():
            kept = header.get("layer_notes", {})
            header["layer_notes"] = kept | {name: {**kept.get(name, {}), **notes}}
        self._root.update_attributes({ATTRIBUTE: header})
        self._header = header


class FeatureStore(StoreHeader, StoredStates):
    """Features of layers, labels and classifiers in one Zarr v3 group.

    Use `create` or `open`; the format is described in ``docs/store.md``.
    """

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
        storage_options: Mapping[str, Any] | None = None,
    ) -> FeatureStore:
        """Create an empty store.

        Parameters
        ----------
        path : path or URL
            A directory that does not exist yet, or a free prefix of an object store, such as
            ``s3://bucket/run.zarr``.
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
        storage_options : mapping, optional
            Of an object store, beyond what the environment says; ``docs/store.md`` has them.

        Raises
        ------
        StoreError
            When something is there already, or an object store cannot be used.
        UsageError
            For bad layer names, widths, dtype or number of classes.
        """
        where = place.as_text(path)
        specs = layer_specs(layers or {}, dtype)
        if not 1 <= n_classes <= MAX_CLASSES:
            raise UsageError(f"a store of {n_classes} classes", f"1 to {MAX_CLASSES} classes")
        if class_names is not None and len(class_names) != n_classes:
            raise DataError(f"{len(class_names)} class names", f"{n_classes}, one per class")
        place.check_writable(where)
        if place.is_there(where, storage_options):
            if not overwrite:
                raise StoreError(
                    f"'{where}' exists", "a path that is free", "choose another, or overwrite it"
                )
            # Never delete what is no store.
            cls.open(where, storage_options=storage_options)
            place.delete_store(where, storage_options)
        header: dict[str, Any] = {
            "format": FORMAT,
            "id": str(uuid.uuid4()),
            "n_classes": int(n_classes),
            "producer": f"ncbatch {__version__}",
            "layers": {name: asdict(spec) for name, spec in specs.items()},
        }
        if class_names is not None:
            header["class_names"] = [str(name) for name in class_names]
        return cls(place.make_root(where, header, storage_options), where)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], *, storage_options: Mapping[str, Any] | None = None
    ) -> FeatureStore:
        """Open a store.

        Parameters
        ----------
        path : path or URL
            A local directory, an object store, or any other URL that zarr opens, for reading only.
        storage_options : mapping, optional
            Of an object store, beyond what the environment says.

        Raises
        ------
        StoreError
            When nothing is there, it is no store, its format is newer than this version, or its
            metadata is damaged.
        """
        where = place.as_text(path)
        store = cls(place.open_root(where, storage_options), where)
        place.check_metadata(where)
        return store

    @property
    def splits(self) -> list[str]:
        """Names of the splits that hold committed rows or ended empty."""
        names = [name for name, _ in chunks.subgroups(self._root) if name != CLASSIFIER]
        labels = chunks.find_nodes(self._root, [f"{name}/label" for name in names])
        return [name for name, label in zip(names, labels, strict=True) if label is not None]

    @property
    def lost_splits(self) -> dict[str, int]:
        """Complete splits whose labels are gone, with the samples that they had."""
        there = self.splits
        return {
            name: read_attributes(group)["n_samples"]
            for name, group in chunks.subgroups(self._root)
            if name not in there and "n_samples" in read_attributes(group)
        }

    def split(self, name: str) -> Split:
        """Open a split for reading.

        Raises
        ------
        UnknownNameError
            When there is none of that name.
        """
        # A name may lead elsewhere: deeper into the store, or to the classifiers.
        elsewhere = not name or "/" in name or name == CLASSIFIER
        group = None if elsewhere else chunks.find_node(self._root, name)
        if not isinstance(group, zarr.Group) or chunks.find_node(group, "label") is None:
            raise unknown_name("split", name, self.splits, self.path)
        return Split(name, group, self.path, self.n_classes)

    def layout(self, split: str) -> Layout | None:
        """Return what several writers of a split have agreed on.

        None when it was not begun, or by a single writer, and once it is finalized.
        """
        group = self._root.get(split)
        return Layout.read(group) if isinstance(group, zarr.Group) else None

    def claim(self, split: str, task: str, token: str) -> bool:
        """Take a task of a split; True for one of the processes that ask, until it is released.

        `token` is what `claimant` tells the others; no two processes may give the same.
        """
        try:
            group = chunks.require_group(
                chunks.require_group(self._root, split), task, {"token": token}
            )
        # Given back while this process looked.
        except KeyError:
            return False
        return group.attrs.get("token") == token

    def claimant(self, split: str, task: str) -> str | None:
        """Return the token of the process that has taken a task; None when none has."""
        group = self._root.get(f"{split}/{task}")
        token = group.attrs.get("token") if isinstance(group, zarr.Group) else None
        return None if token is None else str(token)

    def release(self, split: str, task: str) -> None:
        """Give back a task that was taken."""
        del self._root[f"{split}/{task}"]

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
        if overwrite:
            self.delete_split(split)
        return Writer(
            self._root, split, self.path, self.n_classes, specs, share, n_samples, head, resume
        )

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
        return LayerWriter(target, specs, head, overwrite)

    def finalize(self, split: str) -> Split:
        """Complete a split of several writers, once all are closed.

        Its arrays are cut after the last row, blocks that no writer came to become holes, and the
        number of samples is recorded. A split that is complete stays as it is, except that layers
        and predictions whose replacing was interrupted in an object store take their names.

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
        place.finish_renaming(group)
        return self.split(split)

    def delete_split(self, split: str) -> None:
        """Delete a split with all its layers, if it is there."""
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
        splits = [self.split(name) for name in self.splits if name != but]
        uses = [
            (split.spec(layer).n_features, f"as in split '{split.name}' of {self.path}", "")
            for split in splits
            if layer in split.features
        ]
        if but != CLASSIFIER and layer in self.classifiers:
            width = int(self.classifier_arrays(layer)[-1].shape[1])
            remedy = "write it under another name, or into another store"
            uses.append((width, f"as its classifier in {self.path} reads", remedy))
        for width, where, remedy in uses:
            if width != n_features:
                raise DataError(
                    f"layer '{layer}' with {n_features} features", f"{width}, {where}", remedy
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
        parts = check_classifier(weight, bias, self.n_classes)
        self.check_width(layer, parts["weight"].shape[1], but=CLASSIFIER)
        store_classifier(self._root, layer, parts)

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
            digest.update(array.basename.encode() + chunks.checksums(array))
        return digest.hexdigest()[:32]

    def classifier_arrays(self, layer: str) -> list[zarr.Array[Any]]:
        """Return the stored arrays of a layer's classifier: bias, where it has one, and weight."""
        names = [f"{CLASSIFIER}/{layer}/{name}" for name in ("bias", "weight")]
        return [array for array in chunks.open_arrays(self._root, names) if array is not None]

    @property
    def classifiers(self) -> list[str]:
        """Layers that have a classifier."""
        groups = chunks.subgroups(self._root, CLASSIFIER)
        return [name for name, layer in groups if layer.attrs.get("complete")]

    def to_dask(
        self,
        split: str,
        layer: str,
        device: Literal["cpu", "cuda"] = "cpu",
        dtype: npt.DTypeLike | None = None,
    ) -> da.Array:
        """Return a layer's rows as a Dask array (sample, unit), one block per chunk.

        Rows without a sample (label -1) are included.

        Parameters
        ----------
        split, layer : str
            Which rows.
        device : {"cpu", "cuda"}
            ``cuda``: chunks are CuPy arrays, each on the GPU of the worker that reads it.
        dtype : dtype, optional
            What rows are converted to. By default float32 for layers of 16 bits, whose sums
            overflow or stand still after some thousand rows, and the layer's own dtype otherwise.

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
        if dtype is None:
            dtype = "float32" if array.dtype.itemsize < 4 else array.dtype
        if device == "cuda":
            # What is copied to the GPU is as narrow as it is stored, but for bfloat16.
            copied = np.dtype("float32") if array.dtype.name == "bfloat16" else array.dtype
            array = array.map_blocks(cuda_chunk, dtype=copied, meta=cuda_meta(copied))
        return array.astype(dtype)

    def to_xarray(self, split: str, layer: str, dtype: npt.DTypeLike | None = None) -> xr.Dataset:
        """Return a layer as a Dask-backed Dataset of its samples.

        Parameters
        ----------
        split, layer : str
            Which rows.
        dtype : dtype, optional
            As for `to_dask`: features of 16 bits become float32 unless it is given.

        Returns
        -------
        xarray.Dataset
            ``feature(sample, unit)`` and ``label(sample)``, and ``prediction(sample)`` where
            stored; rows that are no samples are left out.
        """
        import xarray as xr

        rows = self.split(split)
        labels = rows.labels()
        variables: dict[str, Any] = {
            "feature": (("sample", "unit"), self.to_dask(split, layer, dtype=dtype)),
            "label": (("sample",), labels),
        }
        if rows.head is not None:
            variables["prediction"] = (("sample",), rows.predictions())
        attributes = {"store": self.path, "store_id": self.id, "split": split, "layer": layer}
        dataset = xr.Dataset(variables, attrs=attributes)
        samples = np.flatnonzero(labels >= 0)
        return dataset if samples.size == labels.size else dataset.isel(sample=samples)

    def validate(self) -> list[chunks.Fault]:
        """Read everything and name every bad chunk and impossible value; empty when all is well."""
        return list(find_faults(self))

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
