"""`ard loadtest --redraw FOLDER`: fits, tables and page again, from a result that another machine or version measured."""

from pathlib import Path

from pydantic import Field

from ard_serve import console
from ard_serve.settings import Settings
from loadtests.config import LoadConfig
from loadtests.fits import add_fits
from loadtests.output import RESULT, read_result, write_tables


class RedrawConfig(Settings):
    """What is drawn again."""

    result: Path = Field(description="folder that `ard loadtest` wrote; the tables and the page in it are replaced")


def run(config: RedrawConfig) -> int:
    """Draw again beside the result; returns 0.

    Raises:
        DataError: there is no result, or it is not one of this version.
        UsageError: its settings are not those of this version.
    """
    folder = config.result.parent if config.result.name == RESULT else config.result
    result = read_result(folder)
    add_fits(result, LoadConfig.resolve(None, result.settings))
    write_tables(result, folder, with_page=True)
    console.err.print(f"written: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    return 0
