"""Facts that hold or do not, counted as they are checked."""

from __future__ import annotations

from typing import Any


class Checks:
    def __init__(self) -> None:
        self.total = 0
        self.failed = 0

    def that(self, what: str, holds: bool, *, wanted: Any = True, got: Any = None) -> bool:
        self.total += 1
        if not holds:
            self.failed += 1
            print(f"FAILED {what}: wanted {wanted}, got {got}", flush=True)
        return holds

    def equal(self, what: str, got: Any, wanted: Any) -> bool:
        return self.that(what, got == wanted, wanted=wanted, got=got)

    def within(self, what: str, got: float, least: float, most: float) -> bool:
        return self.that(what, least <= got <= most, wanted=f"{least} to {most}", got=got)

    def summary(self) -> str:
        return f"{self.total - self.failed} of {self.total} checks hold"
