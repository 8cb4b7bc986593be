"""The command line, ``headrace``: its commands, and how errors are told.

Importing this costs little, because each command loads what it needs when it runs. The commands lie beside it, in
``cli_*.py``.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

import click

from headrace.gpu.errors import HeadraceError
from headrace.pipeline.cli_bench import bench
from headrace.pipeline.cli_cluster import create, drop, status
from headrace.pipeline.cli_common import Session, debug_option
from headrace.pipeline.cli_demo import demo
from headrace.pipeline.cli_drain import drain
from headrace.pipeline.cli_processes import scheduler, up, worker
from headrace.pipeline.cli_records import ingest, produce, search
from headrace.pipeline.cli_snapshot import restore, snapshot
from headrace.pipeline.cli_verify import verify

__all__ = ["commands", "main"]

INTERRUPTED = 130
"""What a shell calls a program that ended by Ctrl-C."""


@click.group("headrace", context_settings={"help_option_names": ["-h", "--help"]}, no_args_is_help=True)
@click.version_option(package_name="headrace")
@debug_option
def commands() -> None:
    """A Kafka topic becomes a vector index, searchable while the topic is still moving.

    \b
    Examples:
      headrace demo                          see it work, with nothing to set up
      headrace up                            start a cluster
      headrace create docs --encoder minilm
      headrace produce docs docs.jsonl --broker localhost:9092
      headrace ingest docs --broker localhost:9092
      headrace search docs "moving average of a series"
    """


for _command in (
    demo, up, scheduler, worker, create, produce, ingest, search, status, verify, snapshot, restore, drain, drop, bench
):  # fmt: skip
    commands.add_command(_command)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; None takes the process's own.

    Returns
    -------
    int
        Exit code: 0, 1 for what went wrong, 2 for what was typed wrong, 130 after Ctrl-C. What went wrong is one
        sentence on stderr; ``--debug`` or ``HEADRACE_DEBUG=1`` adds the traceback.
    """
    session = Session(debug=os.environ.get("HEADRACE_DEBUG", "") not in ("", "0"))
    try:
        code = commands.main(
            None if argv is None else list(argv), prog_name="headrace", standalone_mode=False, obj=session
        )
    except click.exceptions.NoArgsIsHelpError as help_:
        click.echo(help_.format_message(), err=True)
        return help_.exit_code
    except click.UsageError as error:
        about = error.ctx.command_path if error.ctx else "headrace"
        return _told(session, f"{error.format_message().rstrip('.')} (see {about} --help)", error.exit_code)
    except click.ClickException as error:
        return _told(session, error.format_message(), error.exit_code)
    except HeadraceError as error:
        return _told(session, str(error), 1)
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # `headrace search ... | head`: nobody reads on. Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _told(session, str(error), 1)
    return code if isinstance(code, int) else 0


def _told(session: Session, sentence: str, code: int) -> int:
    if session.debug:
        traceback.print_exc()
    click.echo(f"headrace: {sentence}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
