"""`sdopt`: the table of commands, and the one place where errors become exit codes."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import sys
import traceback
from typing import Any

import rich_click as click

from sdopt._version import __version__
from sdopt.cli.text import neutralise
from sdopt.errors import SdoptError, text_with_trace

_INTERRUPTED = 130
# Set, an error keeps its stack trace, a child's as well.
_TRACE = "SDOPT_TRACE"

_COMMANDS = {
    "convert": "Turn a checkpoint into a verified bundle of engines.",
    "generate": "Draw pictures with a bundle.",
    "bench": "Compare a bundle with torch: speed, memory, pictures.",
    "perf": "Measure each night, and say when something became worse.",
    "adapter": "Write a LoRA for programs that run a bundle with plain ONNX Runtime.",
    "export": "Write a bundle for Triton, ComfyUI or optimum.",
    "check": "Is a bundle whole, and can this machine run it?",
    "inspect": "Say what a file or folder is: bundle, ONNX graph, checkpoint, LoRA.",
    "doctor": "Say which runtimes work here, and how to get the others.",
}


class _LazyGroup(click.RichGroup):
    """Lists commands from the table; imports a command's module only to run it or to show its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return click.Command(cmd_name, help=_COMMANDS[cmd_name]) if cmd_name in _COMMANDS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None:
            command = getattr(importlib.import_module(f"sdopt.cli.{name}"), name)
        return name, command, rest


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdopt")
def cli() -> None:
    """Stable Diffusion engines that are proven faster and proven to draw the same picture."""


def main() -> None:
    """Entry of the console script. Exits with the codes of `sdopt.errors`; 130 when interrupted."""
    # transformers prints, at each import, that torchvision is not installed; nothing here needs it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code: Any = cli.main(standalone_mode=False)
    except SdoptError as error:
        if os.environ.get(_TRACE):
            print(neutralise(traceback.format_exc()), file=sys.stderr)
        _report(type(error).__name__, *(_explain_libraries(text_with_trace(error)) or (error.message, error.hint)))
        sys.exit(error.exit_code)
    except click.ClickException as error:
        if "--json" in sys.argv:
            _print_error("UsageError", error.format_message(), "")
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print("Interrupted. Finished steps are kept: run the same command again to continue.", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    except Exception as error:
        if os.environ.get(_TRACE):
            raise
        _report(type(error).__name__, *(_explain_libraries(str(error)) or _describe_unexpected(error)))
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _explain_libraries(text: str) -> tuple[str, str] | None:
    """(what does not fit, the command that mends it) where a failure comes from two packages that do not fit."""
    from sdopt.machine.library_pairs import explain_failure

    mismatch = explain_failure(text)
    if mismatch is None:
        return None
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
    return f"{mismatch.sentence}, and an import fails by it: {last}", mismatch.command


def _describe_unexpected(error: Exception) -> tuple[str, str]:
    """A sentence for what sdopt did not foresee, and how to see where it comes from."""
    said = " ".join(str(error).split())
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    again = shlex.join(["sdopt", *sys.argv[1:]])
    return f"sdopt did not expect this: {what}", f"please report it, with what this shows: {_TRACE}=1 {again}"


def _report(kind: str, message: str, hint: str) -> None:
    if "--json" in sys.argv:
        _print_error(kind, message, hint)
    for line in [f"error: {message}", *([hint] if hint else [])]:
        print(neutralise(line), file=sys.stderr)


def _print_error(kind: str, message: str, hint: str) -> None:
    print(json.dumps({"error": {"kind": kind, "message": message, "hint": hint}}))
