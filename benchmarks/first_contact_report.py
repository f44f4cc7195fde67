"""What first_contact.py makes of its steps: a line for each, gpu.py's sections among them, and the worst failures.

A remote caller may see only the end of the output, so the whole is at most LIMIT characters, and the table ends it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import gpu_report
from peers_report import table

Found = dict[str, Any]
LIMIT = 11_000  # characters of the report
WORST = ("wrong", "race", "failed", "died", "late")  # the worst first
RESULT = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")


def read(name: str, result: Found, archive: Found, out: Path, scratch: Path) -> None:
    """Take in what a step left behind: `text`, one line of figures, and a state that says more than an exit code."""
    if result["state"] in ("unavailable", "skipped"):
        return
    if name == "tests":
        _tests(result)
    elif name.startswith("prompt_check"):
        _prompts(name, result, archive, scratch)
    elif name == "gpu.py":
        files = sorted(out.glob("*-gpu-*.json"), key=lambda path: path.stat().st_mtime)
        with suppress(OSError, ValueError, IndexError):
            archive["gpu"] = json.loads(files[-1].read_text())
        found = archive.get("gpu") or {"sections": {}}
        states = Counter(section["state"] for section in found["sections"].values())
        result["text"] = ", ".join(f"{count} {state}" for state, count in states.items())
        if states["wrong"]:
            result["state"] = "wrong"


def _tests(result: Found) -> None:
    """Counts, also of a run that was ended: pytest -v prints a line a test."""
    lines = [line for line in result["output"].splitlines() if "::" in line]
    counts = Counter(match[1] for line in lines if (match := RESULT.search(line)) and not line.startswith(match[1]))
    result["text"] = ", ".join(f"{counts[key]} {key.lower()}" for key in ("PASSED", "FAILED", "ERROR", "SKIPPED")
                               if counts[key])
    failed = [line for line in result["output"].splitlines() if line.startswith(("FAILED ", "ERROR "))]
    result["failed"] = failed
    if counts["FAILED"] or counts["ERROR"]:
        result["state"] = "failed"
        result["reason"] = f"{counts['FAILED'] + counts['ERROR']} tests"


def _prompts(name: str, result: Found, archive: Found, scratch: Path) -> None:
    number = sum(other.startswith("prompt_check") for other in archive["steps"]) - 1
    with suppress(OSError, ValueError):
        found = json.loads((scratch / f"prompt-{number}.json").read_text())
        archive.setdefault("prompts", {})[name] = found
        rows = found["rows"]
        states = Counter(row["state"] for row in rows)
        errors = [row["error"] for row in rows if row["error"] is not None]
        result["text"] = (", ".join(f"{count} {state}" for state, count in states.items())
                          + f"; largest error {max(errors, default=0):.2g} of what rounding may do"
                          + ("; time ran out" if found["late"] else "") + f"; {_times(rows)}")
        worst = next((state for state in ("wrong", "race", "died") if states[state]), None)
        if worst:
            result["state"] = "failed" if worst == "died" else worst
        elif found["late"]:
            result["state"] = "late"


def _times(rows: Sequence[Found]) -> str:
    """Attention beside torch's, of the longest prompt that was computed: "2048 tokens: attend_many 1.2 ms, ..."."""
    attention = [row for row in rows if row["ms"] and not row["case"].startswith("linear")
                 and "after" not in row["case"]]
    longest = max((row["tokens"] for row in attention), default=0)
    return f"{longest} tokens: " + ", ".join(f"{row['case']} {row['ms']:.3g} ms" for row in attention
                                             if row["tokens"] == longest)


def exit_code(archive: Found) -> int:
    """0, 1 for wrong results or failed tests, 2 without a card."""
    if archive.get("ended"):
        return 2
    states = {name: step["state"] for name, step in archive["steps"].items()}
    return int(bool({"wrong", "race"} & set(states.values())) or states.get("tests") == "failed")


def markdown(archive: Found) -> str:
    """At most LIMIT characters: failures, as far as there is room, then the table."""
    ends = f"\nEnded: {archive['ended']}." if archive.get("ended") else ""
    rows = table(["step", "state", "s", "result"], [[_cell(part) for part in row] for row in _rows(archive)])
    head = "# First contact" + (" (stand-in: no figure means anything)" if archive.get("stand_in") else "")
    whole = f"{rows[:LIMIT - 200]}\n\n{archive.get('took', 0)} s in all.{ends}"
    room = LIMIT - len(whole) - len(head) - 40
    told = "\n\n".join(_shortened(_failures(archive), room))
    return f"{head}\n\n{told}\n\n{whole}" if told else f"{head}\n\n{whole}"


def _cell(text: Any) -> str:
    return " ".join(str(text).replace("|", "/").split())[:240]


def _rows(archive: Found) -> Iterator[Sequence[Any]]:
    for name, step in archive["steps"].items():
        text = "; ".join(filter(None, (step.get("text"), step.get("reason"))))
        yield name, step["state"], step.get("seconds", 0.0), text
        if name == "gpu.py":
            gpu = archive.get("gpu") or {"sections": {}}
            for section, result in gpu["sections"].items():
                text = result.get("reason") or result.get("left") or headline(result.get("found", {}))
                yield f"- {section}", result["state"], result.get("seconds", ""), text
            for verdict in gpu.get("verdicts", ()):
                if verdict["got"] is not None and not archive.get("stand_in"):
                    yield "target", "met" if verdict["met"] else "missed", "", (
                        f"{verdict['target']}: {verdict['got']:.2f} of {verdict['want']:g}")


def headline(found: Mapping[str, Any]) -> str:
    """The figures of a section of gpu.py, in a line."""
    parts = []
    rows = found.get("rows", ())
    for row in rows:
        if row["what"] == "decode":
            parts.append(f"{row['rate']:.1f} tok/s at {row['depth']} (hit {100 * row['hit_rate']:.0f} %)")
        elif row["what"] == "prefill":
            parts.append(f"prompt {row['tokens']}: {row['rate']:.0f} tok/s")
        elif row["what"] == "peer":
            parts.append(f"{row['rate']:.2f} tok/s")
        elif row["what"] == "check":
            parts.append(f"median {row['median']:.1e}")
        elif row["what"] == "kernel" and row["heavy"] and "gbps" in row:
            parts.append(f"{row['kernel']} {row['gbps']:.0f} GB/s")
        elif row["what"] == "format" and row.get("GB/s"):
            parts.append(f"{row['format']} {row['kernel']} {row['GB/s']} GB/s")
    for key, unit in (("card", ""), ("gbps", " GB/s"), ("cpu", " GB/s by the CPU"), ("ram", " GB/s RAM"),
                      ("bits", " bits a weight"), ("folder", "")):
        if key in found:
            value = found[key]
            parts.append(f"{value:.1f}{unit}" if isinstance(value, float) else f"{value}{unit}")
    for key in ("vram", "pcie"):
        if isinstance(found.get(key), dict):
            parts.append(f"{key} " + ", ".join(f"{name} {value:.0f}" for name, value in found[key].items()))
    return "; ".join(parts)


def _failures(archive: Found) -> list[tuple[str, str]]:
    """(title, text), the worst first."""
    found = [one for name, step in archive["steps"].items() for one in _of_step(name, step, archive)]
    return [(title, text.strip()) for state, title, text in sorted(found, key=lambda one: WORST.index(one[0]))]


def _of_step(name: str, step: Found, archive: Found) -> Iterator[tuple[str, str, str]]:
    """(state, title, text) of what failed in a step; of a step that says no more than that, the end of its output."""
    told = False
    if name == "gpu.py" and (gpu := archive.get("gpu")):
        told = True
        for section, result in gpu["sections"].items():
            if result["state"] == "wrong":
                yield "wrong", section, result["reason"]
        yield from (("failed", title, text) for title, text in gpu_report.failures(gpu))
    elif name == "tests" and step.get("failed"):
        told = True
        yield "failed", name, _first_failure(step["output"]) + "\n" + "\n".join(step["failed"])
    for row in archive.get("prompts", {}).get(name, {}).get("rows", ()):
        if row["state"] in WORST:
            told = True
            yield row["state"], f"{name}: {row['case']}, {row['tokens']} tokens", f"{row['note']}\n{row['traceback']}"
    if step["state"] in WORST and not told:
        yield step["state"], name, step.get("output", "")[-2000:]


def _first_failure(output: str) -> str:
    """The first traceback that pytest printed."""
    start = output.find("= FAILURES =")
    return output[start:start + 2500] if start >= 0 else ""


def _shortened(failures: Sequence[tuple[str, str]], room: int) -> Iterator[str]:
    """As many as there is room for, each in at most a third of what is left: the end of a traceback tells most."""
    for i, (title, text) in enumerate(failures):
        share = max(200, (room - 40) // 3)
        piece = f"## {title[:200]}\n```\n{text[-share:]}\n```"
        if len(piece) + 60 > room:
            yield f"... and {len(failures) - i} more: first-contact.json, .log and gpu.py's files have them"
            return
        room -= len(piece) + 2
        yield piece
