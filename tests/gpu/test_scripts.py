"""The scripts of the first run on a GPU stay true to the code: all that can run without one runs."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from ncbatch.arrays.devices import find_device
from tests.gpu import gpu_checks, nvrtc_compile, strict_device

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Checks that start processes; one of each kind is in the fast suite elsewhere.
PROCESSES = ("cublas_in_a_fresh_process", "measure_on_a_cluster")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in PROCESSES)) for n in gpu_checks.CHECKS],
)
@pytest.mark.filterwarnings("ignore")
def test_checks_pass_on_the_cpu(name):
    assert gpu_checks.CHECKS[name](find_device("cpu"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strict")
    return {
        name: strict_device.make_store(folder / name, *shape)
        for name, shape in strict_device.STORES.items()
    }


@pytest.mark.parametrize("case", list(strict_device.cases()), ids=str)
@pytest.mark.filterwarnings("ignore")
def test_measure_keeps_host_and_device_apart(case, stores, request):
    if case.fault:
        # Known faults of the GPU path; strict, so that a mend takes the mark away.
        request.applymarker(pytest.mark.xfail(strict=True, reason=case.fault))
    worst, name = strict_device.worst_difference(stores[case.store], case)
    assert worst < (1e-6 if "precision" in case.options else 1e-12), name


def test_a_run_on_the_stand_in_keeps_states(stores, tmp_path):
    case = strict_device.Case("small")
    worst, name = strict_device.worst_difference(stores["small"], case, state=tmp_path / "state")
    assert worst < 1e-12, name


def _imports_of_the_package():
    for path in sorted(HERE.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ncbatch"):
                for alias in node.names:
                    yield pytest.param(node.module, alias.name, id=f"{path.stem}-{alias.name}")


@pytest.mark.parametrize(("module", "name"), list(_imports_of_the_package()))
def test_scripts_import_what_is_there(module, name):
    if not hasattr(importlib.import_module(module), name):
        importlib.import_module(f"{module}.{name}")


def _commands(word):
    script = (HERE / "gpu_first.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    return [line for line in script.splitlines() if word in line]


def test_the_first_run_names_tests_and_scripts_that_are_there():
    (command,) = _commands("-m pytest")
    paths = [word for word in shlex.split(command, comments=True) if word.startswith("tests/")]
    assert len(paths) >= 4
    marked = [
        file
        for path in paths
        for file in ([ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("test_*.py"))
        if re.search(r"each_library|mark\.gpu", file.read_text(encoding="utf-8"))
    ]
    assert len(marked) >= len(paths), f"no test marked gpu in some of {paths}"
    scripts = re.findall(r"\$here/(\w+\.py)", (HERE / "gpu_first.sh").read_text(encoding="utf-8"))
    assert scripts
    assert all((HERE / script).exists() for script in scripts)


def test_the_first_run_names_benchmarks_that_are_there():
    from tests.benchmarks.catalogue import CASES

    (command,) = _commands("tests.benchmarks")
    names = re.findall(r"gpu-[\w-]+", command)
    assert names
    assert set(names) <= set(CASES)


def test_sources_compile_where_the_compiler_is():
    nvrtc = nvrtc_compile.Nvrtc.find()
    if nvrtc is None:
        pytest.skip("no NVRTC")
    for real in ("float", "double"):
        source = nvrtc_compile.kernel_source(real)
        cubin, log = nvrtc.compile(source, real, "--gpu-architecture=sm_90", "--ptxas-options=-v")
        assert cubin
        assert not re.search(r"[1-9]\d* bytes spill", log)
