"""Run every test that injects a row of the fault matrix and print the matrix: row, test, outcome.

make faults
"""

import sys
from collections import defaultdict

import pytest
from rich.console import Console
from rich.table import Table


class Collector:
    """A pytest plugin that notes, for each marked row, its tests and how they ended."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, str]] = defaultdict(dict)
        self._row_of: dict[str, list[str]] = {}

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.get_closest_marker("fault")]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
        for item in items:
            self._row_of[item.nodeid] = [row for mark in item.iter_markers("fault") for row in mark.args]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            for row in self._row_of[report.nodeid]:
                self.rows[row][report.nodeid] = report.outcome


def main() -> int:
    collector = Collector()
    code = pytest.main(["-q", "-m", "not gpu", *sys.argv[1:]], plugins=[collector])
    table = Table("row", "test", "outcome")
    for row, tests in sorted(collector.rows.items(), key=lambda item: (item[0][0], int(item[0][1:]))):
        for name, outcome in tests.items():
            table.add_row(row, name, outcome)
    Console(width=180).print(table)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
