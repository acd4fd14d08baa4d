"""From a torch model to a store: forward hooks on named modules, one forward pass per batch."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ncbatch.arrays.namespace import to_numpy
from ncbatch.errors import DataError, UsageError
from ncbatch.ingest.model.capture import Capture, capturing, device_of
from ncbatch.ingest.model.head import Head
from ncbatch.ingest.model.places import Batch, Pool, find_places
from ncbatch.ingest.model.rows import RowTarget
from ncbatch.ingest.model.states import StateTarget
from ncbatch.ingest.model.target import Identity, Request, Target, weights_hash
from ncbatch.store.feature_store import FeatureStore
from ncbatch.store.ranks import Share

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("ncbatch")


class Progress(Protocol):
    """Anything that wants to hear how many rows are done."""

    def advance(self, n_rows: int) -> object:
        """Count `n_rows` more rows."""


def dump(
    model: torch.nn.Module,
    batches: Iterable[tuple[Any, Any]],
    store: FeatureStore | str | os.PathLike[str],
    split: str,
    layers: str | Sequence[str] | Mapping[str, str],
    *,
    pool: Pool = "flatten",
    head: str | Literal[False] | None = None,
    head_bias: torch.Tensor | None = None,
    predictions: bool = True,
    n_classes: int | None = None,
    dtype: str | None = None,
    device: torch.device | str | None = None,
    argmax_labels: bool = False,
    rank: int = 0,
    world_size: int = 1,
    n_samples: int | None = None,
    moments: bool = False,
    means: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    identity: Identity | None = None,
    progress: Progress | None = None,
) -> FeatureStore:
    """Run a model once over `batches` and store the features of named modules.

    The model runs in eval mode without gradients; afterwards every module has the mode it had
    and no hook is left, whatever happened. One batch of features is held, and the writer's chunks.

    Parameters
    ----------
    model : torch.nn.Module
        Any model; it is not moved.
    batches : iterable of (inputs, labels)
        Inputs: a tensor, a tuple or list for ``model(*inputs)``, or a mapping for
        ``model(**inputs)``. Labels: integers of shape (B,) or (B, T); a negative label marks a
        position that is no sample and is never stored.
    store : FeatureStore or path
        Where to write; a path where nothing is becomes a new store.
    split : str
        A new split, or a complete one that lacks all of `layers`: then they are added to it and
        the labels must equal the stored ones.
    layers : sequence of str, or mapping of str to str
        Places, as in ``model.named_modules()``: ``"h.3"`` for a module's output, ``"h.3:input"``
        for its input. A mapping gives the stored names: ``{"penultimate": "fc:input"}``. Of
        outputs with several parts (tuples, dataclasses) the first tensor is taken.
    pool : {"flatten", "mean"}, optional
        What becomes of a feature's dimensions after those of the labels. ``"flatten"``: one
        axis; labels (B,) and (B, C, H, W) give D = C*H*W, labels (B, T) and (B, T, D) give B*T
        rows. ``"mean"``, with labels (B,): (B, T, D) is averaged over T, (B, C, H, W) and
        (B, C, L, H, W) over the dimensions after C; (B, D), and (B, T, D) with labels (B, T),
        are kept as they are.
    head : str, False, optional
        The linear module that classifies; by default the last ``torch.nn.Linear`` that runs.
        Its weight and bias are stored for the captured layer that is its input, the first K rows
        where it has more. False: no classifier, no predictions.
    head_bias : tensor, optional
        With the name of a `head`: a bias, one value per output, that the model adds outside of
        that module. It becomes part of the classifier and of the predictions.
    predictions : bool, optional
        Store the arg-max of the head's first K outputs, where a captured layer is its input.
    n_classes : int, optional
        K of a store to be created; by default the head's number of outputs.
    dtype : {"float16", "bfloat16", "float32", "float64"}, optional
        How layers are stored; by default as the store has or declares them, else float16.
    device : torch.device or str, optional
        Where inputs are moved to; by default where the model's parameters are.
    argmax_labels : bool, optional
        Take the head's decisions for labels. Those of the batches only say by their sign which
        positions are samples.
    rank, world_size : int, optional
        Which of several processes this is, 0..world_size-1, and how many there are. Each is given
        batches of its own; they need not talk or run at once, and whichever comes first makes the
        store. Once all have ended, one process calls ``nc.finalize(store, split)``.
    n_samples : int, optional
        Samples of all processes together, at most; several that store rows must give it, all the
        same. Too large a number costs nothing.
    moments : bool, optional
        Store no rows but what sums them up, the moments of every layer, which `measure` takes in
        the place of rows. They are folded in the model's own dtype, in float64; `dtype` only
        declares layers. In memory are, per layer, 12 bytes per feature of every class seen and
        8 D^2; they may be on the model's GPU.
    means : str, optional
        With `moments`: a split of the same store whose moments are stored. By their class means
        and by the head the samples are decided, for NC4. It may be `split` itself, in a second
        run: then only the decisions are added. Layers that no classifier reads have none.
    resume : bool, optional
        Go on after an interruption. `batches` must be the same again, in the same order; what is
        committed is skipped, without a forward pass. A split that is complete is left as it is.
        With `moments` what is folded is stored each time features of 16 times its size, and of
        256 MiB at least, were folded; what came after is folded again, to the same bits.
        One of several processes goes on with its own rank.
    overwrite : bool, optional
        Replace the split if it exists, with all its layers, and a classifier that differs; not
        with several processes. With `moments` the states of `layers` are replaced.
    identity : mapping of str to str or int, optional
        What the rows depend on, such as a hash of the data. It is recorded when the split is
        begun, with a hash of some of the model's weights; a process that goes on with it, or
        joins in, must give the same.
    progress : object with ``advance(n_rows)``, optional
        Told of rows as they are written or skipped.

    Returns
    -------
    FeatureStore
        The store, with the split complete; of several processes, with this one's part.

    Raises
    ------
    UnknownNameError
        When a module does not exist.
    DataError
        When a module runs never or more than once per pass, shapes or labels do not fit, or a
        value overflows `dtype`.
    StoreError
        When the split exists, and nothing says what to do with it; when it was begun with another
        model or another `identity`.
    UsageError
        For options that make no sense.
    BudgetError
        When the moments of all layers do not fit into memory; says how many do.
    """
    places = find_places(model, layers)
    if pool not in ("flatten", "mean"):
        raise UsageError(f"pool '{pool}'", "'flatten' or 'mean'")
    if head_bias is not None and not head:
        raise UsageError("head_bias without the name of a head", "head=, the module it belongs to")
    if means is not None and not moments:
        raise UsageError(f"means='{means}' without moments", "moments=True, to fold decisions")
    request = Request(
        store,
        split,
        places,
        dtype,
        n_classes,
        Share(rank, world_size),
        n_samples,
        resume=resume,
        overwrite=overwrite,
        labels_given=not argmax_labels,
        identity={**(identity or {}), "weights": weights_hash(model)},
    )
    target = make_target(request, moments=moments, means=means)
    watch = Head.find(model, head, target.n_classes, decides=argmax_labels, outside=head_bias)
    if target.n_classes is None and not watch.candidates:
        raise UsageError(
            "no number of classes", remedy="give n_classes=, or the head that classifies"
        )
    if target.done:
        logger.info("%s holds all of rank %d: nothing to resume", target.named, rank)
    else:
        target.check_identity()
        device = device_of(model) if device is None else device
        with capturing(model, places, pool, watch) as capture:
            _fill(target, capture, batches, device, predictions, progress)
    return target.opened


def make_target(request: Request, *, moments: bool, means: str | None) -> Target:
    """Make what takes the rows of a dump: where they go is all that the two ways differ in."""
    return StateTarget(request, means) if moments else RowTarget(request)


def _fill(
    target: Target,
    capture: Capture,
    batches: Iterable[Any],
    device: torch.device | str,
    predictions: bool,
    progress: Progress | None,
) -> None:
    """Run the model on all batches whose rows `target` does not hold yet."""
    with ExitStack() as writing:
        to_skip = target.resume(writing)
        for number, pair in enumerate(batches):
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise DataError(
                    f"batch {number} is a {type(pair).__name__}", "a pair (inputs, labels)"
                )
            inputs, marks = pair
            batch = Batch.of(marks, to_skip)
            target.expect(batch)
            to_skip -= len(batch.skipped)
            if batch.labels.size:
                # The first rows are needed as they are: the head's input is found among them.
                receive = target.receive if target.ready else None
                features = capture.run(inputs, batch, device, receive)
                if not target.ready:
                    target.begin(capture.head, features, predictions, writing)
                decisions = capture.head.decisions
                labels = batch.labels if target.request.labels_given else to_numpy(decisions)
                target.append(features, labels, decisions)
                del features  # before the next forward pass makes as many
            if progress is not None:
                progress.advance(len(batch.skipped) + len(batch.labels))
        target.end(to_skip, writing)
