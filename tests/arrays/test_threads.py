"""Threads: reading ahead keeps order, errors and the number of blocks; limits nest."""

import threading
import time

import pytest
from threadpoolctl import threadpool_info

from ncbatch.arrays.threads import cpu_count, map_threads, read_ahead, thread_limit


def test_blocks_come_in_order_from_another_thread():
    threads = set()

    def numbers():
        for i in range(5):
            threads.add(threading.current_thread().name)
            yield i

    assert list(read_ahead(numbers())) == [0, 1, 2, 3, 4]
    assert threads == {"ncbatch-reader_0"}
    assert list(read_ahead([])) == []


def test_what_reading_raises_is_raised_at_its_place():
    def numbers():
        yield 1
        raise ValueError("bad chunk")

    found = []
    with pytest.raises(ValueError, match="bad chunk"):
        found.extend(read_ahead(numbers()))
    ahead = read_ahead(numbers())
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="bad chunk"):
        next(ahead)


def test_no_more_than_one_block_is_read_ahead():
    begun = []

    def numbers():
        for i in range(10):
            begun.append(i)
            yield i

    for i in read_ahead(numbers()):
        time.sleep(0.02)
        assert max(begun) <= i + 1
    assert begun == list(range(10))


def test_leaving_early_ends_the_reader():
    before = threading.active_count()
    for i in read_ahead(range(1000)):
        if i == 3:
            break
    time.sleep(0.05)
    assert threading.active_count() == before


def blas_threads() -> int:
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max((pool["num_threads"] for pool in pools), default=1)


def test_the_first_sets_the_limit_and_the_last_lifts_it():
    whole = cpu_count()
    blas = blas_threads()
    first, second = thread_limit(1), thread_limit(7)
    with first:
        second.__enter__()
        assert cpu_count() == 1
    assert cpu_count() == 1
    assert blas_threads() == 1
    second.__exit__(None, None, None)
    assert cpu_count() == whole
    assert blas_threads() == blas


def test_results_come_in_the_order_of_the_tasks():
    assert list(map_threads(lambda n: n * n, range(20))) == [n * n for n in range(20)]
