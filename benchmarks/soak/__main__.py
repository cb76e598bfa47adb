"""python -m benchmarks.soak --minutes 10: is the server after a siege what it was before?

Prints a table and, last, one JSON line. Ends non-zero when a good picture differed from the quiet server's, a request
got no or a wrong answer, resident memory grew by more than 5 %, or descriptors or threads grew at all.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

from benchmarks.server import wait_for
from benchmarks.soak.clients import Crowd, Pictures, good_requests, pictures
from benchmarks.soak.hostile import rows
from benchmarks.soak.server import SERVE, Held, Server, running
from benchmarks.soak.wire import exchange, request

GROWTH = 1.05
ROUNDING = 2  # levels of 255: what a batch's size may change in a picture


def main() -> None:
    options = _options()
    command = ("-m", options.serve) if options.serve else SERVE
    if options.table:
        sys.exit(_table(command))
    # Requests drawn together differ from the same ones alone by rounding (docs/decisions/batching.md): bytes do not.
    batches: dict[str, str] = {} if options.together else {"LD_MAX_BATCH_SIZE": "1"}
    with running(command, **batches) as quiet:
        expected = _drawn(quiet)
    print(f"quiet server: {sum(map(len, expected.values()))} pictures of {len(expected)} requests", flush=True)
    # What is kept of jobs is bounded low, so that it is full when the first measure is taken.
    kept = {"WAVESPEED_RESULT_SECONDS": "20", "WAVESPEED_RESULT_BYTES": str(2**20), "WAVESPEED_JOBS_FOLDER": "jobs"}
    with running(command, WAVESPEED_QUEUE_SIZE="8", **batches, **kept) as server:
        crowd = Crowd(server, expected, rows(), seed=options.seed, levels=ROUNDING if options.together else 0)
        moments = _besiege(server, crowd, options.minutes * 60)
        crowd.end()
        alive = server.process.poll() is None and server.get("/livez").status_code == 200
        traces = server.log.count("Traceback")
    failed = failures(moments, crowd, alive)
    _show(moments, crowd)
    for sentence in [*crowd.faults[:20], *failed]:
        print(f"! {sentence}")
    result = {
        "server": options.serve or "app serve",
        "minutes": options.minutes,
        "seed": options.seed,
        "together": options.together,
        "kills": crowd.kills,
        "answers": dict(sorted(crowd.tally.items())),
        "faults": len(crowd.faults),
        "tracebacks_in_log": traces,
        "moments": {name: {part: asdict(held) for part, held in parts.items()} for name, parts in moments.items()},
        "failed": failed,
    }
    print(json.dumps(result))
    sys.exit(1 if failed else 0)


def _table(command: Sequence[str]) -> int:
    """Each row of bad input once, as Markdown; the number of those that were not answered as they should."""
    wrong = 0
    print("| input | status | type |\n|---|---|---|")
    with running(command) as server:
        for row in rows():
            answer = exchange(server.address, row.parts(), leave=row.leave)
            status = answer.status if answer else "the client left" if row.leave else "closed"
            print(f"| {row.name} | {status} | {f'`{answer.type}`' if answer and answer.type else ''} |")
            wrong += not row.accepts(answer)
        wait_for(server.idle, 120, "an idle server")
        after = exchange(server.address, [request(json.dumps(good_requests()["deepcache"]))])
        print(f"\n{wrong} wrong; afterwards a good request: {after.status if after else 'no answer'}")
    return wrong


def _drawn(server: Server) -> dict[str, Pictures]:
    """Each good request once, one after the other; those that this server's models cannot do are left out."""
    found: dict[str, Pictures] = {}
    for name, body in good_requests().items():
        answer = exchange(server.address, [request(json.dumps(body))], seconds=240)
        if answer is not None and answer.status == 200:
            found[name] = pictures(answer)
        else:
            print(f"left out: {name}: {answer.body.decode() if answer else 'no answer'}")
    return found


def _besiege(server: Server, crowd: Crowd, seconds: float) -> dict[str, dict[str, Held]]:
    """Measured in quiet moments: after warming up, when the last killed worker's successor is warm, at the end.

    The worker is compared between the last two, the server between the first and the last.
    """
    moments: dict[str, dict[str, Held]] = {}
    _fill_threads(server)
    crowd.start()
    started = time.monotonic()
    for name, share in (("warm", 0.25), ("no more kills", 0.4), ("worker warm", 0.65), ("end", 1.0)):
        while time.monotonic() < started + seconds * share and server.process.poll() is None:
            time.sleep(0.2)
        crowd.pause()
        wait_for(server.idle, 120, "an idle server")
        if name == "no more kills":
            crowd.killing = False
        else:
            _check_quietly(crowd)
            time.sleep(6)  # longer than idle connections are kept
            worker = wait_for(server.worker, 120, "a worker")
            moments[name] = {
                "server": Held.settled(server.process.pid),
                "worker": Held.settled(int(str(worker))),
            }
            counts = f"{sum(crowd.tally.values())} answers, {crowd.kills} kills, {len(crowd.faults)} faults"
            print(f"{name}: {moments[name]}, {counts}", flush=True)
        if name != "end":
            crowd.resume()
    return moments


def _fill_threads(server: Server) -> None:
    """Threads of a pool are made when all others are busy, and stay: as many bodies at once as wake the whole pool."""
    long = request(json.dumps({"prompt": "x" * 900_000}))  # long bodies are parsed in threads
    for _ in range(3):
        with ThreadPoolExecutor(24) as pool:
            list(pool.map(lambda _: exchange(server.address, [long]), range(24)))


def _check_quietly(crowd: Crowd) -> None:
    """Every good request once, alone: after all that, are its bytes what they were?"""
    for name, body in crowd.requests.items():
        crowd.judge(name, exchange(crowd.server.address, [request(json.dumps(body))], seconds=240))


def failures(moments: dict[str, dict[str, Held]], crowd: Crowd, alive: bool) -> list[str]:
    failed = [] if alive else ["the server is gone"]
    if crowd.faults:
        failed.append(f"{len(crowd.faults)} requests were not answered as they should")
    for part, since in (("server", "warm"), ("worker", "worker warm")):
        before, after = moments[since][part], moments["end"][part]
        if after.resident > GROWTH * before.resident:
            failed.append(f"the {part}'s memory grew by {after.resident / before.resident - 1:.1%}")
        for what in ("descriptors", "threads"):
            if getattr(after, what) > getattr(before, what):
                failed.append(f"the {part}'s {what} went from {getattr(before, what)} to {getattr(after, what)}")
    return failed


def _show(moments: dict[str, dict[str, Held]], crowd: Crowd) -> None:
    print(f"\n{'moment':<14} {'process':<8} {'resident MB':>12} {'descriptors':>12} {'threads':>8}")
    for name, parts in moments.items():
        for part, held in parts.items():
            print(f"{name:<14} {part:<8} {held.resident / 1e6:>12.1f} {held.descriptors:>12} {held.threads:>8}")
    print(f"\n{'answer':<44} {'count':>6}")
    for word, count in sorted(crowd.tally.items()):
        print(f"{word:<44} {count:>6}")
    print(f"{'workers killed':<44} {crowd.kills:>6}\n")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="of the siege; the quiet server comes before")
    parser.add_argument("--seed", type=int, default=0, help="of the crowd's choices")
    parser.add_argument(
        "--together",
        action="store_true",
        help="let requests be drawn together, as is the default; their pictures may then differ by rounding",
    )
    parser.add_argument("--serve", help="module to run as the server instead of `app serve`")
    parser.add_argument("--table", action="store_true", help="send each bad input once and print the answers instead")
    return parser.parse_args()


if __name__ == "__main__":
    main()
