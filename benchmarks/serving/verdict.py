"""What the service is held to under load, each with its figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.claim import Claim
from benchmarks.serving.prediction import NAMES, Prediction

FLAT = 0.05  # growth of resident memory that counts as none
NEAR = 0.2  # of a prediction
KEPT = 0.9  # of the capacity, under overload


def of_overload(entry: Mapping[str, Any]) -> list[Claim]:
    """Whether the server, asked for too much, does what it can and refuses the rest at once."""
    found, held, rules = entry["figures"], entry["held"], entry["rules"]
    where = f"batches of {rules['max_batch']}"
    queue, statuses = rules["queue"], found["statuses"]
    others = {status: count for status, count in statuses.items() if status not in ("200", "429")}
    longest, p99 = held["service_longest"], found["latency"]["p99"]
    rounds = longest_wait(rules)
    bound = rounds * longest
    claims = [
        Claim(f"{where}: every request is answered, 200 or 429", _counts(statuses), not others),
        Claim(
            f"{where}: every 429 says when to come back",
            f"{found['without_retry_after']} without `Retry-After`",
            found["without_retry_after"] == 0,
        ),
        Claim(
            f"{where}: never more than {queue} wait",
            f"{held['waiting_most']} at most",
            held["waiting_most"] is not None and held["waiting_most"] <= queue,
        ),
        Claim(
            f"{where}: p99 of accepted requests at most {rounds} times the longest service",
            f"{p99:.2f} s of {bound:.2f} s",
            p99 <= bound,
        ),
        Claim(
            f"{where}: images a second, at least {KEPT:.0%} of the capacity",
            f"{found['finished']:.2f} of {entry['capacity']:.2f}",
            found["finished"] >= KEPT * entry["capacity"],
        ),
    ]
    for part in ("server", "workers"):
        change = held[f"{part}_growth"]
        known = change is not None
        text = f"{change:+.1%}, {held[f'{part}_mb']:.0f} MB at the end" if known else "not seen"
        claims.append(
            Claim(f"{where}: memory of the {part} grows by at most {FLAT:.0%}", text, known and change <= FLAT)
        )
    return claims


def longest_wait(rules: Mapping[str, Any]) -> int:
    """Services until the answer of one that took the last place in a queue of one kind, its own included."""
    return math.ceil(rules["queue"] / rules["max_batch"]) + 1


def of_prediction(name: str, prediction: Prediction) -> list[Claim]:
    return [
        Claim(
            f"{name}: {what} latency predicted within {NEAR:.0%}",
            f"{prediction.model[what]:.3f} s for {prediction.measured[what]:.3f} s, {prediction.error(what):+.0%}; "
            f"replayed, {prediction.replay_error(what):+.0%}",
            abs(prediction.error(what)) <= NEAR,
        )
        for what in NAMES
    ]


def of_closed(entries: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """What batches and caches add to the finished images of busy clients."""
    claims = []
    for name in dict.fromkeys(entry["name"] for entry in entries):
        finished = {
            (entry["rules"]["caches"], entry["rules"]["max_batch"]): entry["figures"]["finished"]
            for entry in entries
            if entry["name"] == name
        }
        alone, largest = finished[False, 1], max(size for _, size in finished)
        for caches, size, label in (
            (False, largest, "batches"),
            (True, 1, "caches"),
            (True, largest, "both"),
        ):
            gain = finished[caches, size] / alone
            claims.append(Claim(f"{name}: images a second with {label} over without", f"{gain:.2f}×"))
    return claims


def _counts(statuses: Mapping[str, int]) -> str:
    return ", ".join(f"{count} × {status}" for status, count in statuses.items())
