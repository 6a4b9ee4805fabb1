"""`ard loadtest --redraw RESULT`: fits, tables and page again, from a result that another machine or version measured."""

from pathlib import Path

from pydantic import Field

from ard_serve import console
from ard_serve.settings import Settings
from loadtests.config import LoadConfig
from loadtests.fits import add_fits
from loadtests.output import RESULT, read_result, write_page, write_tables


class RedrawConfig(Settings):
    """What is drawn again."""

    result: Path = Field(
        description="folder that `ard loadtest` wrote, whose tables and page are replaced, or a result by another name: "
        "load-h100.json gets the page load-h100.html beside it"
    )


def run(config: RedrawConfig) -> int:
    """Draw again beside the result; returns 0.

    Raises:
        DataError: there is no result, or it is not one of this version.
        UsageError: its settings are not those of this version.
        ResourceError: the page cannot be written.
    """
    path = config.result
    result = read_result(path)
    add_fits(result, LoadConfig.resolve(None, result.settings))
    if path.is_dir() or path.name == RESULT:
        folder = path if path.is_dir() else path.parent
        write_tables(result, folder, with_page=True)
        page = folder / "report.html"
    else:
        page = path.with_suffix(".html")
        write_page(result, page)
    console.err.print(f"written: {page}", highlight=False, soft_wrap=True)
    return 0
