"""What a judgement says: broken promises, how much there was to judge by, and how to run it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.history.events import Origin

INVARIANTS = ("I1", "I2", "I3", "I4", "I5", "promise", "failed", "history")


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken promise; `events` are positions in the history."""

    invariant: str
    message: str
    events: tuple[int, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was found. `judged` says how much there was to judge each invariant and each level of consistency by;
    `figures` are in ms and counts.
    """

    violations: tuple[Violation, ...]
    judged: Mapping[str, int]
    figures: Mapping[str, float] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    shown: int = 20

    @property
    def ok(self) -> bool:
        return not self.violations

    def __str__(self) -> str:
        counts = Counter(violation.invariant for violation in self.violations)
        verdict = ", ".join(f"{name}: {counts[name]}" for name in INVARIANTS if counts[name]) or "all invariants hold"
        lines = [f"{verdict} (judged {dict(self.judged)}, {dict(self.figures)})"]
        lines += [f"  {v.invariant} {v.message} [events {list(v.events)}]" for v in self.violations[: self.shown]]
        if len(self.violations) > self.shown:
            lines.append(f"  … and {len(self.violations) - self.shown} more")
        if self.violations:
            lines.append(f"  seed {self.origin.seed}; run again: {self.origin.command or '(no command was noted)'}")
        return "\n".join(lines)
