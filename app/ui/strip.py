"""The strip of a run's steps, a cell each: computed or reused, told by letter and by colour."""

from __future__ import annotations

COMPUTED = ("#0b57d0", "#ffffff")  # ground, letter
REUSED = ("#d7e3f8", "#1b2a41")
LETTERS = {"C": ("computed", *COMPUTED), "R": ("reused", *REUSED)}
_CELL = (
    "display:inline-flex;align-items:center;justify-content:center;width:1.35rem;height:1.6rem;margin:0 2px 3px 0;"
    "border-radius:4px;font:600 .78rem/1 ui-monospace,monospace;background:{};color:{}"
)
_TO_DO = (
    "width:1.35rem;height:1.6rem;margin:0 2px 3px 0;border-radius:4px;border:1px dashed #8a94a6;box-sizing:border-box"
)


def described(decisions: str) -> str:
    """In a sentence, for those who do not see the cells."""
    computed, reused = decisions.count("C"), decisions.count("R")
    return f"{computed + reused} denoiser calls: {computed} computed, {reused} reused"


def html(decisions: str, total: int | None = None) -> str:
    """Cells for each C or R, a gap between runs, and dashed ones for the steps of `total` that are still to come."""
    cells = []
    for number, letter in enumerate(decisions):
        if letter in LETTERS:
            word, ground, ink = LETTERS[letter]
            cells.append(f'<span style="{_CELL.format(ground, ink)}" title="{number + 1}: {word}">{letter}</span>')
        else:
            cells.append('<span style="width:.8rem"></span>')
    done = sum(letter in LETTERS for letter in decisions)
    cells += [f'<span style="{_TO_DO}"></span>'] * max(0, (total or 0) - done)
    return (
        f'<div class="wavespeed-strip" role="img" aria-label="{described(decisions)}" '
        f'data-decisions="{"".join(letter for letter in decisions if letter in "CR ")}" '
        f'style="display:flex;flex-wrap:wrap">{"".join(cells)}</div>'
    )
