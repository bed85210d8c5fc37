"""A check, many ranks' checks as one, the table."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from igpt_ds.text import counted, visible

Status = Literal["OK", "WARN", "FAIL"]
_BAD: tuple[Status, ...] = ("OK", "WARN", "FAIL")  # from good to bad
_NAMED = 4  # ranks, at most, that one line names


@dataclass(frozen=True)
class Check:
    """One line of the table. `name` is stable: scripts look for it in the JSON."""

    name: str
    status: Status
    value: str
    remedy: str = ""  # what to do; empty where all is well


@dataclass(frozen=True)
class Report:
    """All checks of a job, in order; what had nothing to be held against is in `unchecked`, with the reason."""

    checks: list[Check]
    unchecked: list[str]
    ranks: int
    hosts: list[str]

    @property
    def status(self) -> Status:
        """The worst of them."""
        return worst([check.status for check in self.checks])

    def count(self, status: Status) -> int:
        return sum(check.status == status for check in self.checks)

    def figures(self) -> dict[str, Any]:
        """For programs; its keys are stable."""
        return {
            "status": self.status,
            "ranks": self.ranks,
            "hosts": sorted(set(self.hosts)),
            "checks": [asdict(check) for check in self.checks],
            "unchecked": self.unchecked,
        }


def worst(statuses: Sequence[Status]) -> Status:
    """The worst status, OK where there are none."""
    return max(statuses, key=_BAD.index, default="OK")


def attempt(read: Callable[[], Any]) -> Any:
    """What `read` returns, or {"error": ...}: a rank that cannot read something must still meet the others."""
    try:
        return read()
    except Exception as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())}


def is_error(fact: Any) -> bool:
    """Whether `attempt` failed."""
    return isinstance(fact, dict) and "error" in fact


def judged(name: str, fact: Any, judge: Callable[[Any], Check], remedy: str = "mend what the message names") -> Check:
    """The judgement of a fact, or FAIL where it could not be read, or judged."""
    if not is_error(fact):
        verdict = attempt(lambda: judge(fact))
        if isinstance(verdict, Check):
            return verdict
        fact = verdict
    return Check(name, "FAIL", fact["error"], remedy)


def judged_together(
    name: str,
    facts: Sequence[tuple[str, Any]],
    judge: Callable[[Any], Check],
    remedy: str = "mend what the message names",
) -> Check:
    """The judgement of all ranks' facts, (label, fact) each, or FAIL where one could not be read."""
    broken = [(label, fact["error"]) for label, fact in facts if is_error(fact)]
    if broken:
        return Check(name, "FAIL", f"{named([label for label, _ in broken])}: {broken[0][1]}", remedy)
    return judged(name, facts, judge, remedy)


def merged(checks: Sequence[tuple[str, Check]], alike: bool = False) -> Check:
    """One line from the same check on many ranks: the worst, and whose it is.

    Args:
        checks: (label, check) of each rank that looked, at least one.
        alike: the values must be the same everywhere; a difference is a WARN.
    """
    first = checks[0][1]
    if all(check == first for _, check in checks):
        return first
    status = worst([check.status for _, check in checks])
    if status == "OK" and not alike:
        return Check(first.name, "OK", f"{first.value} (on {checks[0][0]}; the others are OK, too)")
    texts: dict[tuple[str, str], list[str]] = {}
    for label, check in checks:
        if check.status == status:
            texts.setdefault((check.value, check.remedy), []).append(label)
    value = "; ".join(f"{named(labels)}: {text}" for (text, _), labels in list(texts.items())[:_NAMED])
    if len(texts) > _NAMED:
        value += f"; and {len(texts) - _NAMED} more"
    if status == "OK":
        return Check(first.name, "WARN", f"not alike: {value}", "make all nodes alike")
    return Check(first.name, status, value, next(remedy for _, remedy in texts))


def named(labels: Sequence[str]) -> str:
    """ "a, b, c, d and 7 more"."""
    text = ", ".join(labels[:_NAMED])
    return text if len(labels) <= _NAMED else f"{text} and {len(labels) - _NAMED} more"


def table(report: Report, paint: Callable[[Status], str] = str) -> str:
    """Aligned lines: status, name, value, and below the value what to do.

    Args:
        paint: gives a status its colour.
    """
    width = max(len(check.name) for check in report.checks)
    lines = []
    for check in report.checks:
        lines.append(
            f"{paint(check.status)}{' ' * (6 - len(check.status))}{check.name:<{width}}  {visible(check.value)}"
        )
        if check.remedy:
            lines.append(f"{'':{width + 8}}-> {visible(check.remedy)}")
    counts = ", ".join(f"{report.count(status)} {status}" for status in _BAD)
    on = f"{counted(report.ranks, 'rank')} on {named(sorted(set(report.hosts)))}"
    lines += [visible(f"not checked: {text}") for text in report.unchecked]
    return "\n".join([*lines, visible(f"{counts} ({on})")])
