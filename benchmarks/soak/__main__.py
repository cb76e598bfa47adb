"""Is the server after a siege what it was before?

Prints a table and, last, one JSON line. Ends non-zero when a good picture differed from the quiet server's, a request
got no or a wrong answer, resident memory grew by more than 5 %, or descriptors or threads grew at all.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated

import psutil
import typer

from app.client import ApiError, Client, Generated
from benchmarks.report import commit, show, table
from benchmarks.server import SERVE, Server, wait_for
from benchmarks.soak.clients import PATIENCE, Crowd, good_requests
from benchmarks.soak.hostile import rows, running
from benchmarks.soak.wire import exchange, request

GROWTH = 1.05
Held = dict[str, int]
"""By a process at one moment: `resident`, bytes, `descriptors` and `threads`."""
Moments = dict[str, dict[str, Held]]


def main(
    minutes: Annotated[float, typer.Option(help="Of the siege; the quiet server comes before.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the crowd's choices.")] = 0,
    serve: Annotated[str | None, typer.Option(help="Module to run as the server instead of `app serve`.")] = None,
) -> None:
    command = ("-m", serve) if serve else SERVE
    # Requests drawn together differ from the same ones alone by rounding (docs/decisions/batching.md): bytes do not.
    with running(command, LD_MAX_BATCH_SIZE="1") as quiet:
        expected = _drawn(quiet)
    print(f"quiet server: the pictures of {len(expected)} requests", flush=True)
    # What is kept of jobs is bounded low, so that it is full when the first measure is taken.
    kept = {"WAVESPEED_RESULT_SECONDS": "20", "WAVESPEED_RESULT_BYTES": str(2**20), "WAVESPEED_JOBS_FOLDER": "jobs"}
    settings = {"WAVESPEED_QUEUE_SIZE": "8", "LD_MAX_BATCH_SIZE": "1", **kept}
    with running(command, **settings) as server, Client(server.url, timeout=PATIENCE) as client:
        crowd = Crowd(server, client, expected, rows(), seed)
        moments = _besiege(server, crowd, minutes * 60)
        alive = server.process.poll() is None and server.get("/livez").status_code == 200
        traces = server.log.count("Traceback")
    failed, tally = failures(moments, crowd.faults, alive), dict(sorted(Counter(crowd.answers).items()))
    held = (f"{name} | {part} | {_cells(one)}" for name, parts in moments.items() for part, one in parts.items())
    show(table("moment | process | resident MB | descriptors | threads", held))
    show(table("answer | count", (f"{word} | {count}" for word, count in tally.items())))
    show(f"! {sentence}" for sentence in [*crowd.faults[:20], *failed])
    run = {"server": serve or "app serve", "minutes": minutes, "seed": seed, "kills": crowd.kills, "answers": tally}
    told = {"tracebacks_in_log": traces, "moments": moments, "failed": failed}
    print(json.dumps({"benchmark": "soak", "commit": commit(), **run, **told}))
    sys.exit(1 if failed else 0)


def _drawn(server: Server) -> dict[str, Generated]:
    """Each good request once, one after the other; those that this server's models cannot do are left out."""
    found: dict[str, Generated] = {}
    with Client(server.url) as client:
        for name, fields in good_requests().items():
            try:
                found[name] = client.generate(**fields)
            except ApiError as error:
                print(f"left out: {name}: {error}")
    return found


def _besiege(server: Server, crowd: Crowd, seconds: float) -> Moments:
    """Measured in quiet moments: after warming up, when the last killed worker's successor is warm, at the end.

    The worker is compared between the last two, the server between the first and the last.
    """
    moments: Moments = {}
    # Threads of a pool are made when all others are busy, and stay: as many long bodies at once as wake them all.
    long = request(json.dumps({"prompt": "x" * 900_000}))
    for _ in range(3):
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(lambda _: exchange(server.address, [long]), range(24)))
    for name, with_kills, without in (("warm", 0.25, 0.0), ("worker warm", 0.15, 0.25), ("end", 0.0, 0.35)):
        crowd.besiege(seconds * with_kills, killing=True)
        crowd.besiege(seconds * without, killing=False)
        wait_for(server.idle, 120, "an idle server")
        for good in crowd.requests:  # once, alone: after all that, are its bytes what they were?
            crowd.ask(good)
        time.sleep(6)  # longer than idle connections are kept
        worker = int(str(wait_for(server.worker, 120, "a worker")))
        moments[name] = {"server": _settled(server.process.pid), "worker": _settled(worker)}
        print(f"{name}: {len(crowd.answers)} answers, {crowd.kills} kills, {len(crowd.faults)} faults", flush=True)
    return moments


def _settled(pid: int, seconds: float = 3.0) -> Held:
    """The least of each over some seconds: a connection that is being closed is not held."""
    process, seen, until = psutil.Process(pid), [], time.monotonic() + seconds
    while time.monotonic() < until:
        with process.oneshot():
            seen.append((process.memory_info().rss, process.num_fds(), process.num_threads()))
        time.sleep(0.1)
    return dict(zip(("resident", "descriptors", "threads"), map(min, zip(*seen, strict=True)), strict=True))


def _cells(held: Held) -> str:
    return f"{held['resident'] / 1e6:.1f} | {held['descriptors']} | {held['threads']}"


def failures(moments: Mapping[str, Mapping[str, Held]], faults: Sequence[str], alive: bool) -> list[str]:
    failed = [] if alive else ["the server is gone"]
    if faults:
        failed.append(f"{len(faults)} requests were not answered as they should")
    for part, since in (("server", "warm"), ("worker", "worker warm")):
        before, after = moments[since][part], moments["end"][part]
        if after["resident"] > GROWTH * before["resident"]:
            failed.append(f"the {part}'s memory grew by {after['resident'] / before['resident'] - 1:.1%}")
        for what in ("descriptors", "threads"):
            if after[what] > before[what]:
                failed.append(f"the {part}'s {what} went from {before[what]} to {after[what]}")
    return failed


if __name__ == "__main__":
    typer.run(main)
