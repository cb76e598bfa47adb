"""One load by Locust, in a process of its own, since Locust replaces the waiting of Python's own library.

Reads one JSON object, as `load.Target.run` writes it, and prints the clock of the beginning, then a line a request.

In an open loop a latency counts from the arrival that was scheduled, not from when the client came to send it: a client
that is held up by a slow server and measures from the sending leaves out the waits that matter ("coordinated omission",
Tene, How NOT to measure latency, 2013). There are as many users as requests may be on their way; each takes the next
arrival. Those of a closed loop ask again as soon as they are answered, and count from the sending.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

import gevent
from gevent.event import Event
from locust import FastHttpUser, task
from locust.env import Environment
from locust.exception import StopUser

from benchmarks.serving.requests import PATH, answer, drawn


def run(order: dict[str, Any]) -> tuple[float, list[dict[str, Any]]]:
    """The clock at the beginning, and what became of each request, in seconds from then on."""
    requests, arrivals = drawn(order["mix"], 0), order["arrivals"]
    due = None if arrivals is None else iter(arrivals)
    found: list[dict[str, Any]] = []
    ready, began = Event(), 0.0

    class Asker(FastHttpUser):
        network_timeout = connection_timeout = order["patience"]

        def on_start(self) -> None:
            ready.wait()

        @task
        def ask(self) -> None:
            at = time.monotonic() - began if due is None else next(due, None)
            if at is None or at >= order["seconds"]:
                raise StopUser
            kind, fields = next(requests)
            gevent.sleep(max(0.0, began + at - time.monotonic()))
            sent = at if due is None else time.monotonic() - began
            got = self.client.post(PATH, json=fields)
            ended = time.monotonic() - began
            told = answer(got.status_code, got.text or repr(got.error), got.headers or {})
            found.append({"kind": kind, "scheduled": at, "sent": sent, "finished": ended, **told})

    runner = Environment(user_classes=[Asker], host=order["url"]).create_local_runner()
    runner.start(order["users"], spawn_rate=order["users"])
    runner.spawning_greenlet.join()
    began = time.monotonic()
    ready.set()
    runner.user_greenlets.join()
    return began, sorted(found, key=lambda one: one["scheduled"])


if __name__ == "__main__":
    logging.getLogger("locust").setLevel(logging.ERROR)
    start, samples = run(json.load(sys.stdin))
    print("\n".join(json.dumps(line) for line in (start, *samples)))
