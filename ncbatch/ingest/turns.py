"""Taking turns: of several processes one at a time looks whether it can complete a split."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

from ncbatch.store import FeatureStore

logger = logging.getLogger("ncbatch")

# How long a process that has the turn, and whose end is not known otherwise, may store nothing.
PATIENCE_S = 300.0
_TURN = "finalizing"


def take_turn(store: FeatureStore, split: str) -> str:
    """Wait until it is this process's turn; gives what `give_back` takes.

    The turn of a process that has ended is taken over: at once where it ran on this machine, else
    when nothing in the split has changed for a while. Two that complete a split at once store the
    same; at worst one of them stops with an error.
    """
    own = f"{_machine()} {os.getpid()} {uuid.uuid4()}"
    holder, deadline, kinds = None, 0.0, None
    while not store.claim(split, _TURN, own):
        now = store.claimant(split, _TURN)
        if now != holder:
            holder, deadline, kinds = now, time.monotonic() + PATIENCE_S, None
        elif time.monotonic() > deadline and kinds != (found := store.state_kinds(split)):
            deadline, kinds = time.monotonic() + PATIENCE_S, found
        elif holder is not None and (_has_ended(holder) or time.monotonic() > deadline):
            logger.warning(
                "a process began to complete split '%s' of %s and stopped: this one goes on",
                split, store.path,
            )  # fmt: skip
            give_back(store, split, holder)
            continue
        time.sleep(min(0.1, PATIENCE_S))
    return own


def give_back(store: FeatureStore, split: str, holder: str | None = None) -> None:
    """Let the next one have its turn; with `holder` only if it is that one's."""
    if holder is None or store.claimant(split, _TURN) == holder:
        store.release(split, _TURN)


def _has_ended(holder: str) -> bool:
    """Whether the process ran on this machine and is no more; of others nothing is known."""
    machine, _, rest = holder.partition(" ")
    pid = rest.partition(" ")[0]
    return machine == _machine() and pid.isdecimal() and not psutil.pid_exists(int(pid))


def _machine() -> str:
    """Name the machine, since when it runs, and whose process numbers these are."""
    found = [socket.gethostname()]
    with suppress(OSError):  # neither is there on every system
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(os.readlink("/proc/self/ns/pid"))
    return "/".join(found).replace(" ", "-")
