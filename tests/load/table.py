#!/usr/bin/env python3
"""Prints results of ghz (--format json) as one Markdown table.

usage: table.py RESULT.json...
Status 1 when a call ended otherwise than the recipe's tag "expect" says (OK when there is none). Errors are left out of the
latencies unless the recipe counts them.
"""
import json
import sys


def latency(report, percentage):
    for point in report.get("latencyDistribution") or []:
        if point["percentage"] == percentage:
            return f"{point['latency'] / 1e6:.0f}"
    return "-"


def row(report):
    statuses = report.get("statusCodeDistribution") or {}
    expected = (report.get("tags") or {}).get("expect", "OK")
    unexpected = sum(count for status, count in statuses.items() if status != expected)
    options = report.get("options") or {}
    cells = [
        report.get("name") or "?",
        str(options.get("concurrency", "?")),
        str(report["count"]),
        f"{report['total'] / 1e9:.1f}",
        f"{report['rps']:.2f}",
        latency(report, 50),
        latency(report, 90),
        latency(report, 99),
        ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "none",
    ]
    return cells, unexpected + (report["count"] == 0)


def main(paths):
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    print("| recipe | clients | calls | s | calls/s | p50 ms | p90 ms | p99 ms | ended with |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    wrong = 0
    for path in paths:
        with open(path, encoding="utf-8") as file:
            cells, unexpected = row(json.load(file))
        print("| " + " | ".join(cells) + " |")
        if unexpected:
            print(f"{path}: {unexpected} calls ended otherwise than expected, or there was none", file=sys.stderr)
        wrong += unexpected
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
