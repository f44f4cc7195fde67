"""What gpu.py makes of its sections' results: rooflines, what was met of the targets, Markdown tables.

An archive is what gpu.py writes as JSON: stand_in, command, sections {name: {state, seconds, reason, found}}, where
found has figures, and "rows" with a "what" each: decode, prefill, kernel, format, check or peer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from gpu_roofline import GB, Bandwidths, Bound, Token, bound
from peers_report import table

Found = dict[str, Any]
SLOW_CARD = 1100.0  # GB/s up to which a card's kernels are held to KERNELS; faster ones are only meant to reach AIM
KERNELS, AIM, ROOFLINE, PEER = 0.75, 0.45, 0.60, 10.0
SHOWN = 6000  # characters of what a section said that failed; the JSON has more
MAIN = "24 GB"  # the configuration that targets speak of
PEER_NAME = "transformers + accelerate, bf16"


def found_of(archive: Found, section: str) -> Found:
    return dict(archive["sections"].get(section, {}).get("found", {}))


def rows_of(archive: Found, what: str) -> Iterator[tuple[str, Found]]:
    """(section, row) of all rows of a kind."""
    for name, result in archive["sections"].items():
        for row in result.get("found", {}).get("rows", ()):
            if row.get("what") == what:
                yield name, row


def bandwidths(archive: Found) -> Bandwidths | None:
    """None where they were not all measured. Of copying and reading VRAM the faster counts."""
    found = found_of(archive, "bandwidth")
    try:
        return Bandwidths(max(found["vram"].values()), found["pcie"]["up"], found["cpu"], found["ram"])
    except (KeyError, ValueError):
        return None


def roofline(run: Found, row: Found, machine: Bandwidths | None) -> Bound | None:
    """run: a run's figures; row: one of its rows of decoding."""
    if machine is None or "record_bytes" not in run:
        return None
    record = run["record_bytes"]
    return bound(Token(run["dense_bytes"] + row["kv_bytes"], row["chosen"] * record,
                       min(row["missing"], row["chosen"]) * record, run.get("split", True)), machine)


def verdicts(archive: Found) -> list[Found]:
    """[{"target", "want", "got", "met"}]; met None where it was not measured, or is an aim that was missed."""
    machine = bandwidths(archive)
    found = [_kernels(archive, machine)]
    run = found_of(archive, MAIN)
    rows = [row for row in run.get("rows", ()) if row["what"] == "decode"]
    for row in rows:
        limit = roofline(run, row, machine)
        share = row["rate"] / limit.rate if limit else None
        found.append(_verdict(f"decode with 24 GB at {row['depth']} tokens, share of the roofline", ROOFLINE, share))
    if not rows:
        found.append(_verdict("decode with 24 GB, share of the roofline", ROOFLINE, None))
    peers = [row["rate"] for _, row in rows_of(archive, "peer") if row["peer"] == PEER_NAME]
    ratio = rows[0]["rate"] / peers[0] if rows and peers else None
    found.append(_verdict(f"decode with 24 GB, times as fast as {PEER_NAME}", PEER, ratio))
    return found


def _kernels(archive: Found, machine: Bandwidths | None) -> Found:
    rates = [row["gbps"] for _, row in rows_of(archive, "kernel") if row["heavy"] and "gbps" in row]
    least = min(rates) / machine.vram if rates and machine else None
    slow = machine is None or machine.vram <= SLOW_CARD
    text = "slowest decode kernel of those that move 10 MB or more, share of the memory's bandwidth"
    if slow:
        return _verdict(text, KERNELS, least)
    return _verdict(f"{text} (an aim: this card has more than {SLOW_CARD / 1000} TB/s)", AIM, least)


def _verdict(target: str, want: float, got: float | None) -> Found:
    return {"target": target, "want": want, "got": got, "met": None if got is None else got >= want}


def number(value: Any, digits: int = 2, scale: float = 1.0) -> str:
    return "–" if value is None else f"{value / scale:.{digits}f}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f} %"


def markdown(archive: Found) -> str:
    """The whole report."""
    parts = [_head(archive)]
    for title, made in (("Targets", _targets(archive)), ("Checks", _checks(archive)),
                        ("Bandwidths", _bandwidths(archive)), ("Decoding", _decoding(archive)),
                        ("Where a token's time goes, ms", _times(archive)), ("Prompts", _prompts(archive)),
                        ("Kernels of decoding", _kernel_table(archive)),
                        ("Expert kernels by format (cuda_kernels.py)", _formats(archive)),
                        ("Others", _peers(archive)), ("Sections", _sections(archive)),
                        ("What failed", _failures(archive))):
        if made:
            parts.append(f"## {title}\n\n{made}")
    return "\n\n".join(parts) + "\n"


def _head(archive: Found) -> str:
    machine = found_of(archive, "machine")
    date, packages = machine.get("date", archive["started"]), machine.get("packages", {})
    lines = [f"# {date[:10]}, {machine.get('card', 'unknown card')}"]
    if archive["stand_in"]:
        lines.append("**No GPU: the CPU stood in for one, with a small model. The run shows that all parts work; no "
                     "figure below means anything.**")
    if wrong := [name for name, result in archive["sections"].items() if result["state"] == "wrong"]:
        lines.append(f"**WRONG RESULTS in {', '.join(wrong)}: the figures are worth nothing until that is mended.**")
    said = ", ".join(f"{name} {version or 'missing'}" for name, version in packages.items())
    if machine.get("cuda"):
        driver = machine.get("nvidia_smi")
        said = f"CUDA {machine['cuda']}, {' / '.join(driver.values()) if isinstance(driver, dict) else driver}, {said}"
    processor, cores, memory, torch, system = (machine.get(key, "?") for key in (
        "processor", "cores", "memory_gib", "torch", "system"))
    lines.append(f"{processor}, {cores} cores, {memory} GiB of RAM; torch {torch}, {said}; {system}. Commit "
                 f"{machine.get('commit') or 'unknown'}. {archive['shape']}")
    lines.append(f"    {archive['command']}")
    return "\n\n".join(lines)


def _targets(archive: Found) -> str:
    met = {True: "met", False: "NOT MET", None: "not measured"}
    if archive["stand_in"]:
        met |= {True: "means nothing", False: "means nothing"}
    return table(["target", "want", "got", ""], [
        [v["target"], f">= {v['want']:g}", number(v["got"]), met[v["met"]]] for v in verdicts(archive)])


def _checks(archive: Found) -> str:
    rows = [[row["case"], number(row["median"], 4), number(row["largest"], 4), percent(row["same_best"]),
             str(row["misses"]), str(row["computed"])] for _, row in rows_of(archive, "check")]
    if not rows:
        return ""
    said = found_of(archive, "check").get("tolerance", "")
    return (f"The demo's model, logits of the device beside those of the CPU, relative error of a token; tolerance: "
            f"{said}.\n\n" + table(["placement", "median", "largest", "same best token", "misses",
                                    "computed by the CPU"], rows))


def _bandwidths(archive: Found) -> str:
    found = found_of(archive, "bandwidth")
    rows = [[f"VRAM, {name}", number(value, 1)] for name, value in found.get("vram", {}).items()]
    rows += [[f"PCIe, page-locked, {name}", number(value, 1)] for name, value in found.get("pcie", {}).items()]
    for key, text in (("ram", "RAM, read"), ("cpu", "experts computed by the CPU")):
        if key in found:
            rows.append([text, number(found[key], 1)])
    return table(["measured in this run", "GB/s"], rows) if rows else ""


DECODE_HEAD = ("placement", "tokens", "context", "slots", "tok/s", "hit rate", "hit or read ahead", "MB up/token",
               "MB down/token", "share of PCIe", "by CPU/token", "waits/token", "launches/token", "prefetch recall",
               "roofline tok/s", "limit", "share of roofline")


def _decoding(archive: Found) -> str:
    machine, rows = bandwidths(archive), []
    for name, row in rows_of(archive, "decode"):
        run = found_of(archive, name)
        limit = roofline(run, row, machine)
        busy = row["bytes_up"] * row["rate"] / GB / machine.pcie if machine else None
        rows.append([name, row["tokens_kind"], str(row["depth"]), f"{run['slots']} of {run['records']}",
                     number(row["rate"]), percent(row["hit_rate"]), percent(row["found_rate"]),
                     number(row["bytes_up"], 1, 1e6), number(row["bytes_down"], 1, 1e6), percent(busy),
                     number(row["computed"], 1), number(row["waits"], 1), number(row["launches"], 1),
                     percent(row["prefetcher"]["recall"]), number(limit and limit.rate), limit.limit if limit else "–",
                     percent(row["rate"] / limit.rate if limit else None)])
    if not rows:
        return ""
    return ("Roofline: tokens/s at most = 1 / the longest of bytes that the GPU reads / VRAM bandwidth, bytes that "
            "come up / PCIe, bytes that the CPU computes / its bandwidth, and the last two together / RAM; the missing "
            "records are divided between bus and CPU as suits best (split off: all by the bus). Bandwidths as measured "
            "in this run, the hit rate as observed (benchmarks/gpu_roofline.py)." + _mixed(archive) + "\n\n"
            + table(DECODE_HEAD, rows))


def _mixed(archive: Found) -> str:
    """What the mixed store is made of."""
    found = found_of(archive, "mixed store")
    if "bytes" not in found:
        return ""
    kinds = ", ".join(" + ".join(kind) for kind in found["kinds"])
    return (f" The mixed store has {found['bits']:.2f} bits a weight of the experts ({found['bytes'] / GB:.1f} GB): "
            f"{kinds}.")


def _times(archive: Found) -> str:
    names = {"device": "waiting for the device", "copies": "waiting for copies", "cpu": "computing on the CPU",
             "rest": "the rest (the host's own work)"}
    rows = [[name, row["tokens_kind"], str(row["depth"]), number(row["ms"]),
             *(number(row["ms_parts"][key]) for key in names)] for name, row in rows_of(archive, "decode")]
    return table(["placement", "tokens", "context", "all", *names.values()], rows) if rows else ""


def _prompts(archive: Found) -> str:
    rows = [[name, str(row["tokens"]), number(row["rate"], 0), number(row["seconds"]), str(row["misses"]),
             number(row["bytes_up"], 2, GB), number(row["stalled"])] for name, row in rows_of(archive, "prefill")]
    head = ["placement", "tokens", "tok/s", "s", "misses", "GB up", "s waiting for records"]
    return table(head, rows) if rows else ""


def _kernel_table(archive: Found) -> str:
    machine = bandwidths(archive)
    rows = [[row["kernel"], number(row["bytes"], 3, 1e6), number(row.get("us"), 1), number(row.get("gbps"), 0),
             percent(row["gbps"] / machine.vram if machine and "gbps" in row else None), f"{row['error']:.1e}"]
            for _, row in rows_of(archive, "kernel")]
    return table(["operation, 1 token", "MB", "µs", "GB/s", "of memory", "error"], rows) if rows else ""


def _formats(archive: Found) -> str:
    rows = [[row["format"], row["kernel"], str(row["tokens"]), number(row["ms"], 4), number(row["GB/s"], 0),
             number(row["TFLOP/s"], 1)] for _, row in rows_of(archive, "format")]
    return table(["format", "kernel", "tokens", "ms", "GB/s", "TFLOP/s"], rows) if rows else ""


def _peers(archive: Found) -> str:
    mine: dict[str, float] = {}
    for name, row in rows_of(archive, "decode"):
        mine.setdefault(name, row["rate"])  # the shortest context

    def times(row: Found) -> float | None:
        own = mine.get(f"{row['vram']} GB" if "vram" in row else MAIN)
        return own / row["rate"] if own else None

    rows = [[row["peer"], str(row["layers"]), str(row.get("on_card", "–")), number(row["rate_measured"], 3),
             number(row["rate"], 3), number(times(row), 1)] for _, row in rows_of(archive, "peer")]
    rows += [[name, "–", "–", "–", "–", f"not available: {result.get('reason', '')}"] for name, result in
             archive["sections"].items() if name.startswith("peer") and result["state"] not in ("done", "running")]
    head = ["program", "layers measured", "layers of 32 on the card", "tok/s of these layers", "tok/s of 32 (scaled)",
            "qmix, with as much VRAM ÷ this"]
    if not rows:
        return ""
    return ("Few layers are measured, of which the same share lies on the card as would of 32 within 24 GB, or what is "
            "named, rounded up; the seconds of a token are scaled to 32 layers (benchmarks/gpu_peers.py).\n\n" +
            table(head, [[cell.replace("|", "/") for cell in row] for row in rows]))


def _sections(archive: Found) -> str:
    rows: list[Sequence[str]] = [[name, result["state"], number(result.get("seconds"), 1),
                                  "yes" if result.get("fresh") else "",
                                  str(result.get("reason") or result.get("left", "")).replace("|", "/")]
                                 for name, result in archive["sections"].items()]
    return table(["section", "state", "s", "new process", "reason"], rows)


def _failures(archive: Found) -> str:
    """Whole tracebacks, and the end of what a section said that gave none."""
    return "\n\n".join(f"{title}:\n\n```\n{text}\n```" for title, text in failures(archive))


def failures(archive: Found) -> Iterator[tuple[str, str]]:
    """(section or case, its traceback or the end of its stderr), of all that failed or were late."""
    for name, result in archive["sections"].items():
        cases = result.get("found", {}).get("failures", ())
        for case in cases:
            yield f"{name}, {case['case']}", case["traceback"].strip()
        if result["state"] in ("failed", "late") and not cases:
            text = str(result.get("traceback") or result.get("stderr", ""))[-SHOWN:].strip()
            if text:
                yield f"{name} ({result['state']})", text
