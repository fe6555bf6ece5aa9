"""The command's frame: verbs by name, one-line errors, exit statuses.

Exit status: 0 done, 1 the work failed, 2 wrong usage, 130 interrupted.
"""

import importlib
import logging
import os
import sys
import traceback
from typing import Any

import click

# verb: the module of edgert.cli that holds it, imported when the verb is run or listed.
_VERBS = {
    "convert": "files",
    "inspect": "files",
    "verify": "files",
    "run": "generate",
    "chat": "generate",
    "bench": "measure",
    "eval": "measure",
    "probe": "device",
    "doctor": "device",
    "warmup": "device",
    "train": "train",
    "cloud": "cloud",
    "certs": "cloud",
    "calibrate": "cloud",
    "demo": "demo",
}


class _Verbs(click.Group):
    """A group whose verbs are imported when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _VERBS:
            return None
        module = importlib.import_module(f"edgert.cli.{_VERBS[cmd_name]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="edgert", message="edgert %(version)s")
@click.option("--debug", is_flag=True, help="Show a traceback with an error.")
def command(debug: bool) -> None:
    """Language models on small computers, exactly and at the speed of the memory bus.

    Convert a model once, on any machine; run the .ert file everywhere. Start with: edgert demo
    """


def main() -> None:
    """Run the command line and leave the process with its exit status."""
    debug = "--debug" in sys.argv[1:]
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]  # it may stand anywhere
    logging.basicConfig(format="edgert: %(message)s", level=logging.WARNING)
    logging.getLogger("edgert").setLevel(logging.INFO)
    try:
        status = command(arguments or ["--help"], prog_name="edgert", standalone_mode=False)
        sys.exit(status if isinstance(status, int) else 0)
    except click.exceptions.Abort:
        _fail("interrupted", 130)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except click.ClickException as error:
        if debug:
            traceback.print_exc()
        _fail(_usage_text(error), 2)
    except BrokenPipeError:
        # The reader of our output left; nothing more can be said to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail_with(error)


def _fail_with(error: Exception) -> None:
    from edgert.errors import EdgertError, UsageError

    if isinstance(error, UsageError):
        _fail(str(error), 2)
    if isinstance(error, EdgertError):
        _fail(str(error), 1)
    if isinstance(error, OSError) and error.strerror:
        _fail(f"{error.filename or 'the system'}: {error.strerror}", 1)
    if isinstance(error, MemoryError):
        _fail("out of memory; give a smaller --context or --chunk, or a smaller model", 1)
    _fail(
        f"unexpected {type(error).__name__}: {error}; this is a fault of edgert: please report it with the "
        "output of the same command with `edgert --debug`",
        1,
    )


def _usage_text(error: click.ClickException) -> str:
    text = error.format_message().rstrip(".")
    context = getattr(error, "ctx", None)
    return f"{text}; see `{context.command_path if context else 'edgert'} --help`"


def _fail(text: str, status: int) -> Any:
    line = " ".join(text.split())
    print(f"edgert: {line}", file=sys.stderr)
    sys.exit(status)
