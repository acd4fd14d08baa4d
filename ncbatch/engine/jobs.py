"""Jobs: steps that read or compute, each with its price; what they are made of, and cut into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeAlias, TypeVar

from ncbatch.arrays.named_arrays import Arrays
from ncbatch.engine.kept import About, Kept, find_finished


@dataclass(frozen=True)
class Price:
    """What a step of a run costs.

    Attributes
    ----------
    step : str
        What it does.
    peak_bytes : int
        Bytes of host memory that a worker holds at once, beside the interpreter.
    device_bytes : int
        The same of GPU memory.
    bytes_read : int
        Bytes read from stores, over all reads.
    flops : int
        Floating-point operations of its products; a multiply-add counts as two.
    n_items : int
        Items, the unit of resume and balance.
    block_rows, tile_classes : int
        Rows of a block, classes of a tile's side; 0 where there are none.
    n_reads : int
        How often the data is read: once per class block.
    disk_bytes : int
        Bytes of files that are needed beside memory.
    """

    step: str
    peak_bytes: int
    device_bytes: int = 0
    bytes_read: int = 0
    flops: int = 0
    n_items: int = 0
    block_rows: int = 0
    tile_classes: int = 0
    n_reads: int = 0
    disk_bytes: int = 0


def cut(start: int, stop: int, grain: int, most: int, parts: int) -> Iterable[tuple[int, int]]:
    """Cut a range into about `parts` pieces of whole grains, none of more than `most` grains.

    Examples
    --------
    >>> list(cut(0, 10, 2, most=4, parts=2))
    [(0, 6), (6, 10)]
    """
    grains = -(-(stop - start) // grain)
    length = min(max(-(-grains // parts), 1), most) * grain
    for first in range(start, stop, length):
        yield first, min(first + length, stop)


@dataclass(frozen=True)
class Item:
    """A part of a pass: a range of rows, or of tiles, and the size of its work.

    Attributes
    ----------
    start, stop : int
        The range.
    size : int
        What progress counts, such as bytes to read.
    """

    start: int
    stop: int
    size: int


class Fold(Protocol):
    """What items are folded into, in one process, on whatever device."""

    def arrays(self) -> Arrays:
        """Return all that it is so far as arrays on the host."""
        ...

    def restore(self, arrays: Arrays) -> None:
        """Go on, to the bit, from what `arrays` returned."""
        ...

    def seal(self) -> Any:
        """Return the state; the fold is spent."""
        ...


FoldIn = TypeVar("FoldIn", bound=Fold)


class Pass(Protocol[FoldIn]):
    """One sweep over data that produces a state.

    The state is of type `kind`: it is compact, can be packed (`ncbatch.arrays.named_arrays.pack`),
    and has a `merge` for the state of other items that changes neither.
    """

    kind: ClassVar[Any]

    def start(self) -> FoldIn:
        """Make the fold of no items."""
        ...

    def fold(self, fold: FoldIn, item: Item) -> None:
        """Load an item and add it."""
        ...

    def finish(self, state: Any) -> Any:
        """Do what is to be done once, when all items are in; most passes have nothing to do."""
        return state


class Progress(Protocol):
    """Something that shows how far a run is."""

    def begin(self, label: str, total: int, unit: str) -> None:
        """Start a pass of `total` units."""
        return

    def advance(self, size: int) -> None:
        """Count `size` units as done."""
        return

    def end(self) -> None:
        """End the pass, done or given up."""
        return

    def note(self, text: str) -> None:
        """Tell the user something."""
        return


class Silent(Progress):
    """Shows nothing: what a run tells where nobody asked for a progress."""


@contextmanager
def counted(
    progress: Progress | None, label: str, total: int, unit: str
) -> Iterator[Callable[[int], None]]:
    """Show a pass of `total` units while it runs; yields what counts units as done."""
    progress = progress or Silent()
    progress.begin(label, total, unit)
    try:
        yield progress.advance
    finally:
        progress.end()


@dataclass(frozen=True)
class Sweep:
    """A step of a job that reads data: a pass, made from the results of earlier steps.

    Attributes
    ----------
    name : str
        Names the result within its job.
    label : str
        What it does, for a person.
    make : callable
        ``make(*results of needs) -> Pass``; picklable.
    items : sequence of Item
        Its parts, which depend on the data and the options only.
    needs : tuple of str
        Names of the steps whose results `make` takes.
    unit : str
        What `Item.size` counts: ``B`` for bytes, otherwise a noun.
    about : mapping
        What the result depends on, for kept states.
    price : Price, optional
        What running it costs; a plan adds up these.
    """

    name: str
    label: str
    make: Callable[..., Pass[Any]]
    items: Sequence[Item]
    needs: tuple[str, ...] = ()
    unit: str = "B"
    about: About = field(default_factory=dict)
    price: Price | None = None

    def kept(self, root: Path | None) -> Kept | None:
        """Return the place of its kept work."""
        return None if root is None else Kept(root, self.about)

    def finished(self, root: Path | None) -> Kept | None:
        """Find kept work that holds the result."""
        return None if root is None else find_finished(root, self.about)


@dataclass(frozen=True)
class Call:
    """A step of a job that computes from earlier results only.

    Attributes
    ----------
    name : str
        Names the result within its job.
    compute : callable
        ``compute(*results of needs)``; picklable.
    needs : tuple of str
        Names of the steps whose results it takes.
    price : Price, optional
        What running it costs.
    """

    name: str
    compute: Callable[..., Any]
    needs: tuple[str, ...] = ()
    price: Price | None = None


Step: TypeAlias = Sweep | Call


@dataclass(frozen=True)
class Job:
    """Steps in order of their needs; the last one's result is the job's."""

    name: str
    steps: tuple[Step, ...]

    @property
    def prices(self) -> list[Price]:
        """What its steps cost, those that cost something."""
        return [step.price for step in self.steps if step.price is not None]
