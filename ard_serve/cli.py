"""The `ard` command: one subcommand a job, each imported only when it runs."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ard_serve
from ard_serve.errors import EXIT_INTERRUPTED, ArdError, UsageError

if TYPE_CHECKING:
    from ard_serve.settings import Settings
    from loadtests.config import CompareConfig, PredictConfig
    from restore.config import EstimateConfig

# Runs a job on the parsed flags and returns its exit code.
Job = Callable[[argparse.Namespace], int]


@dataclass(frozen=True)
class Command:
    """A subcommand: `configure` adds its flags, having seen the words behind its name, and returns its job."""

    summary: str
    configure: Callable[[argparse.ArgumentParser, Sequence[str]], Job]


class _Parser(argparse.ArgumentParser):
    """argparse with our error style: one line, exit code 2, no abbreviated flags."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> Any:
        raise UsageError(f"{message}; see '{self.prog} --help'")


def _restore(parser: argparse.ArgumentParser, words: Sequence[str]) -> Job:
    from restore.config import EstimateConfig, RestoreConfig

    parser.add_argument(
        "--estimate",
        action="store_true",
        help="say what the run would take, without data and weights, and on which GPU; then end",
    )
    left_out = ("objectives", "evaluation", "gate")
    if "--estimate" in words:
        return _settings(parser, EstimateConfig, _estimate, positional=("model",), left_out=left_out)

    def run(config: RestoreConfig) -> int:
        from restore import job

        return job.run(config)

    return _settings(parser, RestoreConfig, run, positional=("model",), left_out=left_out)


def _estimate(config: "EstimateConfig") -> int:
    from restore import estimate

    return estimate.run(config)


def _eval(parser: argparse.ArgumentParser, _words: Sequence[str]) -> Job:
    from ard_serve.settings import add_flags
    from restore.evaluation.config import EvalConfig

    parser.add_argument("model", help="folder or hub name of a model; an export is compared with what it was made from")
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="folder for evaluation.json and the report")
    parser.add_argument("--against", nargs="+", metavar="MODEL", default=(), help="more models to measure")
    parser.add_argument(
        "--base", metavar="MODEL", help="what the export was restored from, where its manifest's name is not enough"
    )
    parser.add_argument(
        "--stretched",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure the base with the export's RoPE, untouched",
    )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="measure what this server of the model (vLLM, `ard serve`) answers; beside it only what --base and --against name",
    )
    _config_file(parser)
    add_flags(parser, EvalConfig, *EvalConfig.model_fields)

    def run(given: argparse.Namespace) -> int:
        config = EvalConfig.resolve(given.config, _fields(given, EvalConfig))
        if not config.data:
            raise UsageError("--data is required: held-out text to measure on")
        from restore import evaluate

        others = {"against": given.against, "base": given.base, "stretched": given.stretched}
        return evaluate.run(given.model, config, given.out, **others, server=given.server)

    return run


def _export(parser: argparse.ArgumentParser, _words: Sequence[str]) -> Job:
    parser.add_argument("run", type=Path, help="folder of a restoration: the OUT of `ard restore`")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the exported model (default: RUN/model)")
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="evaluation.json of this model, for its card, manifest and limits (default: the run's own, if it was measured)",
    )

    parser.add_argument("--force", action="store_true", help="publish a model that misses its limits, and say so in its card")

    def run(given: argparse.Namespace) -> int:
        from restore import job

        return job.export_run(given.run, given.out, given.evaluation, given.force)

    return run


def _serve(parser: argparse.ArgumentParser, words: Sequence[str]) -> Job:
    from server.config import ServeConfig

    parser.usage = f"{parser.prog} MODEL [flags] [-- vLLM's own flags]"

    def run(config: ServeConfig) -> int:
        from server import app

        return app.run(config)

    job = _settings(parser, ServeConfig, run, positional=("model",), left_out=("engine_args", "engine_command"))
    engine_args = tuple(words[words.index("--") + 1 :]) if "--" in words else None

    def with_engine_args(given: argparse.Namespace) -> int:
        given.engine_args = engine_args
        return job(given)

    return with_engine_args


def _predict(config: "PredictConfig") -> int:
    from loadtests import predict

    return predict.run(config)


def _compare(config: "CompareConfig") -> int:
    from loadtests import compare

    return compare.run(config)


def _loadtest(parser: argparse.ArgumentParser, words: Sequence[str]) -> Job:
    if "--predict" in words:
        from loadtests.config import PredictConfig

        parser.add_argument("--predict", action="store_true", help="say what fits, from the model's folder, without a server")
        return _settings(parser, PredictConfig, _predict, positional=("model",))
    if "--compare" in words:
        from loadtests.config import CompareConfig

        parser.add_argument("--compare", action="store_true", help="compare two runs: exit code 7 when the second is worse")
        return _settings(parser, CompareConfig, _compare, positional=("base", "other"))
    if "--cost" in words:
        from loadtests import cost

        parser.add_argument("--cost", action="store_true", help="say what long prompts cost against short ones, from a result")
        return _settings(parser, cost.CostConfig, cost.run, positional=("result",))
    if "--redraw" in words:
        from loadtests import redraw

        parser.add_argument("--redraw", action="store_true", help="draw the report of an earlier run again")
        return _settings(parser, redraw.RedrawConfig, redraw.run, positional=("result",))
    from loadtests.config import LoadConfig

    parser.epilog = (
        "other uses: 'ard loadtest --predict MODEL' says what fits without a server, 'ard loadtest --compare BASE OTHER' "
        "holds two runs against each other, 'ard loadtest --cost RESULT' says what long prompts cost against short ones, "
        "'ard loadtest --redraw RESULT' draws a report again; each has its own --help"
    )

    def run(config: LoadConfig) -> int:
        from loadtests import runner

        return runner.run(config)

    return _settings(parser, LoadConfig, run, positional=("url",))


def _doctor(parser: argparse.ArgumentParser, _words: Sequence[str]) -> Job:
    parser.add_argument("folder", type=Path, help="a checkpoint folder: any model with a config.json")
    parser.add_argument("--fix", action="store_true", help="rewrite config.json; the old one is kept beside it")
    parser.add_argument(
        "--target-length", type=int, metavar="TOKENS", help="what the model was stretched to, where no manifest says so"
    )

    def run(given: argparse.Namespace) -> int:
        from restore import doctor

        return doctor.run(given.folder, given.fix, given.target_length)

    return run


COMMANDS = {
    "restore": Command("stretch a model's context window and repair it", _restore),
    "eval": Command("measure a model beside its native and its merely stretched self", _eval),
    "export": Command("write the merged model of a restoration again", _export),
    "serve": Command("serve a model with vLLM behind a dependable OpenAI-compatible gateway", _serve),
    "loadtest": Command("measure a server's latency, memory and answers over length and concurrency", _loadtest),
    "doctor": Command("check a checkpoint's RoPE configuration, and repair it", _doctor),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit code; a user's mistake is one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    try:
        if not name:
            return _overview(argv)
        parser = _Parser(prog=f"ard {name}", description=COMMANDS[name].summary)
        job = COMMANDS[name].configure(parser, argv[1:])
        own = argv[1 : argv.index("--")] if name == "serve" and "--" in argv else argv[1:]
        given = parser.parse_args(own)
        from ard_serve.console import setup_logging

        setup_logging()
        return job(given)
    except ArdError as error:
        print(f"ard {name}".rstrip() + f": {error}", file=sys.stderr)
        return _ended(error.exit_code)
    except KeyboardInterrupt:
        print(f"ard {name}: interrupted", file=sys.stderr)
        return _ended(EXIT_INTERRUPTED)


def _ended(code: int) -> int:
    """`code`. One of several processes ends here and now: taking its NCCL group down would wait for the others for ever."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _settings(
    parser: argparse.ArgumentParser,
    model: "type[Settings]",
    run: Callable[[Any], int],
    positional: Sequence[str] = (),
    left_out: Sequence[str] = (),
) -> Job:
    """A job whose fields are those of a settings model: some positional, all others flags, all in a config file too."""
    from ard_serve.settings import add_flags

    for name in positional:
        parser.add_argument(name, nargs="?", help=model.model_fields[name].description)
    _config_file(parser)
    add_flags(parser, model, *(name for name in model.model_fields if name not in (*positional, *left_out)))
    return lambda given: run(model.resolve(given.config, _fields(given, model)))


def _config_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML, TOML or JSON file with the same fields; flags win")


def _fields(given: argparse.Namespace, model: "type[Settings]") -> dict[str, Any]:
    return {name: value for name, value in vars(given).items() if name in model.model_fields}


def _overview(argv: Sequence[str]) -> int:
    width = max(map(len, COMMANDS))
    listing = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    parser = _Parser(
        prog="ard",
        usage="ard COMMAND [flags]",
        description=f"{ard_serve.__doc__}\n\ncommands:\n{listing}\n\n'ard COMMAND --help' lists the flags of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ard-serve {ard_serve.__version__}")
    if not argv:
        parser.print_help()
        return 0
    if not argv[0].startswith("-"):
        raise UsageError(f"unknown command '{argv[0]}'; commands: {', '.join(COMMANDS)}")
    parser.parse_args(argv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
