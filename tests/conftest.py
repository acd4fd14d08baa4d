"""What several test folders use: small chunks, a small data set, the command line, folder listings."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import chdir, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Workers share the processors: threads of BLAS that spin in each of them take what the others need.
if "PYTEST_XDIST_WORKER" in os.environ:
    for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(_name, "1")

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings

from tests.clusters import scheduler_address, scheduler_file  # noqa: F401  (fixtures)
from tests.objects import objects, server, url  # noqa: F401  (fixtures)

# The machines that run this are shared: a slow example is no failure.
settings.register_profile("ncbatch", deadline=None)
settings.load_profile("ncbatch")

Array = npt.NDArray[Any]


# Rooms whose tests meet compiled kernels, and how long they wait for them at most.
_COMPILED = ("golden", "gpu", "measurement", "metrics", "states")
_COMPILED_SECONDS = 120
_FLAG = "NCBATCH_TESTS_COMPILED"


def pytest_configure(config: pytest.Config) -> None:
    """Begin to compile the kernels while the workers start and collect."""
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        return
    flag = Path(tempfile.mkdtemp(prefix="ncbatch-tests-")) / "compiled"
    os.environ[_FLAG] = str(flag)
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-m", "tests.compiled", str(flag)], cwd=root)

    def end() -> None:
        process.kill()
        process.wait()
        shutil.rmtree(flag.parent)

    config.add_cleanup(end)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Let the first test that may meet a kernel wait until all are compiled."""
    flag = os.environ.get(_FLAG)
    if flag is None or item.path.relative_to(Path(__file__).parent).parts[0] not in _COMPILED:
        return
    stop = time.monotonic() + _COMPILED_SECONDS
    while not Path(flag).exists() and time.monotonic() < stop:
        time.sleep(0.1)


@dataclass(frozen=True)
class Toy:
    """Five classes of 300 rows of 4 features, in float32, with a classifier and two more splits."""

    X: Array
    y: Array
    W: Array
    b: Array
    X_test: Array
    y_test: Array
    X_ood: Array
    n_classes: int = 5


@dataclass(frozen=True)
class Answer:
    """What a command said."""

    code: int
    out: str
    err: str


def make_toy(n: int = 300, n_features: int = 4, seed: int = 0) -> Toy:
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((5, n_features))

    def rows(y: Array) -> Array:
        return (means[y] + 0.2 * rng.standard_normal((len(y), n_features))).astype(np.float32)

    y, y_test = rng.permutation(np.arange(n) % 5), rng.permutation(np.arange(n // 2) % 5)
    W, b = means + 0.3 * rng.standard_normal(means.shape), rng.standard_normal(5)
    outside = rng.standard_normal((n // 3, n_features)).astype(np.float32)
    return Toy(rows(y), y, W, b, rows(y_test), y_test, outside)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Give the content of every file below a folder by relative path; None stands for a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def run_command(*arguments: object, cwd: Path, **options: Any) -> Answer:
    """Run ``ncbatch`` as a user does, in a process of its own."""
    command = [str(Path(sys.executable).with_name("ncbatch")), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, **options)
    return Answer(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def toy() -> Toy:
    return make_toy()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let 1 KiB be a chunk: 64 rows of 4 float32 features."""
    monkeypatch.setattr("ncbatch.store.format.CHUNK_BYTES", 1024)


def run_here(*arguments: object, cwd: Path) -> Answer:
    """Run the command line in this process, which is quicker."""
    from ncbatch.cli import main

    out, err = io.StringIO(), io.StringIO()
    with (  # noqa: PT012
        chdir(cwd),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(SystemExit) as left,
    ):
        patch.setattr(sys, "argv", ["ncbatch", *map(str, arguments)])
        main()
    return Answer(int(left.value.code or 0), out.getvalue(), err.getvalue())


@pytest.fixture
def ncbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """Run the command line in this process, in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    return partial(run_here, cwd=tmp_path)
