"""The `avalab` command: the notebooks' functions for a shell.

    avalab assets                                   what can be downloaded, and what is here
    avalab quantize --method nf4 --out small        compress a model into an artefact
    avalab prune --method sparsegpt --out sparse    remove weights
    avalab export sparse --to onnx --out there      write it for another engine
    avalab compile --model sparse --out there       compile it into machine code
    avalab show small                               what an artefact is made of
    avalab bench small --json                       what it costs to run
    avalab eval small --tasks bfcl,humaneval        whether it calls functions and writes code
    avalab synthesize --count 400 --out mine        make function-calling examples and check them
    avalab synthesize --source botocore --out real  the same with real tools
    avalab finetune --data mine --out tuned         train an adapter on them and merge it
    avalab align --model tuned --out better         train it to prefer right calls to its own wrong ones
    avalab distill --teacher T --student S --out O  win back what a smaller model lost
    avalab ensemble --models A B --prompt hello     several models answer together
    avalab recover small --out better               train codes and scales of a low-bit model, at the same bytes
    avalab chat tuned                               talk to it; it really calls tools
    avalab serve --models tuned                     answer OpenAI clients over HTTP
    avalab compare small base --task bfcl           whether it does so better or worse than another one
    avalab index docs --out docs.sqlite             read documents into an index
    avalab ask "who knows?" --documents docs.sqlite answer from them, with checked sources
    avalab agent "12 * 31?" --tools calculating     work on a task with tools
    avalab mcp --folder models                      be an MCP server
    avalab plan --memory 4GiB                       which recipe each of many agents gets under one budget
    avalab deploy --memory 4GiB --site site         make them, and serve them by links, in stages
    avalab status --site site                       what is deployed, proven by sha256
    avalab rollback --site site                     back to what was deployed before

Wrong input ends with one line on stderr and exit code 2, before anything heavy is imported.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from typing import Annotated

import typer

from avalab.cli import agent, align, compress, measure, plan, serve, show, talk, train
from avalab.lab import assets
from avalab.lab.errors import LabError

app = typer.Typer(
    help="How small and fast can a language model get before it stops being good?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

COMMANDS = {
    "quantize": compress.quantize,
    "prune": compress.prune,
    "export": compress.export,
    "compile": compress.compile_,
    "tensorrt": compress.tensorrt,
    "recover": compress.recover,
    "synthesize": train.synthesize,
    "finetune": train.finetune,
    "align": align.align,
    "distill": train.distill,
    "show": show.show,
    "bench": measure.bench,
    "eval": measure.evaluate,
    "compare": measure.compare,
    "chat": talk.chat,
    "ensemble": talk.ensemble,
    "serve": serve.serve,
    "index": agent.index,
    "ask": agent.ask,
    "agent": agent.agent,
    "mcp": agent.mcp,
    "plan": plan.plan,
    "deploy": plan.deploy,
    "status": plan.status,
    "rollback": plan.rollback,
}

for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


# What typer raises for options that it cannot read. It has a click of its own and does not export this class.
UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")

STOPPED = 130  # what typer makes of Ctrl-C, too


def main() -> None:
    """Run the command: what a user can mend becomes one line and exit code 2, a failed process or a defect code 1."""
    try:
        code = app(prog_name="avalab", standalone_mode=False) or 0
        if code != STOPPED:
            sys.exit(code)
        raise KeyboardInterrupt
    except UsageError as error:
        if len(sys.argv) == 1:  # help was asked for
            error.show()
            sys.exit(error.exit_code)
        where = error.ctx.command_path if error.ctx else "avalab"
        _end(f"{error.format_message()} ({where} --help lists what there is)", error.exit_code)
    except typer.Abort:
        _end("the input ended before it was complete", 1)
    except KeyboardInterrupt:
        _end("stopped; what was finished is kept, and the same command goes on from there", STOPPED)
    except LabError as error:
        _end(str(error), error.exit_code)
    except OSError as error:  # of the file system: it names the file
        _end(str(error), 2)
    except MemoryError as error:
        _end(f"out of memory {error}; give a smaller model, or close other programs", 1)
    except Exception as error:
        _end(_defect(error), 1)


def _end(line: str, code: int) -> None:
    print("avalab: " + " ".join(line.split()), file=sys.stderr)
    sys.exit(code)


def _defect(error: Exception) -> str:
    """What is said of an exception that nobody foresaw; where it was raised goes to a file."""
    said = (str(error).strip().splitlines() or ["no message"])[0]
    with tempfile.NamedTemporaryFile("w", prefix="avalab-", suffix=".txt", delete=False, encoding="utf-8") as file:
        traceback.print_exc(file=file)
    return f"a defect of avalab, not of your input: {type(error).__name__}: {said} (report it with {file.name})"


@app.command("assets")
def list_or_fetch(name: Annotated[str, typer.Argument(help="Asset to fetch; without it, list them all.")] = "") -> None:
    """List the assets of data/assets.toml, or fetch one and print where it is."""
    if name:
        print(assets.fetch_asset(name))
        return
    for asset in assets.known_assets().values():
        here = "here" if (assets.CACHE / asset.name).exists() else "not fetched"
        print(f"{asset.name:32} {asset.bytes / 1e6:10.1f} MB  {here:12} {asset.licence}")
