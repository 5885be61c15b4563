"""`clipfreeze VERB ...`: exit code 0 done, 1 the run failed, 2 the input is wrong."""

from __future__ import annotations

import logging
import os
import signal
import sys
from pathlib import Path

import typer

from clipfreeze.cli import (
    apply_policy,
    check_policies,
    diff_policies,
    eval_folder,
    explain_policy,
    export_run,
    list_policies,
    print_schema,
    selftest_model,
    show_policy,
    show_roles,
    survey_data,
    train_policy,
)
from clipfreeze.errors import ClipfreezeError, InterruptedRunError

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Fine-tune open_clip models by policy: which parameters learn, how fast, and what is added.",
)
app.command("list")(list_policies.run)
app.command("show")(show_policy.run)
app.command("roles")(show_roles.run)
app.command("check")(check_policies.run)
app.command("apply")(apply_policy.run)
app.command("explain")(explain_policy.run)
app.command("diff")(diff_policies.run)
app.command("data")(survey_data.run)
app.command("train")(train_policy.run)
app.command("eval")(eval_folder.run)
app.command("export")(export_run.run)
app.command("selftest")(selftest_model.run)
app.command("schema")(print_schema.run)


def main() -> None:
    """The console script. What a user can cause is one message a problem on stderr, never a traceback."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.captureWarnings(True)
    if os.environ.get("RANK", "0") != "0":  # of several processes one prints; errors come from all
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl-C does: nothing half-written
    try:
        app()
    except ClipfreezeError as error:
        if not (isinstance(error, InterruptedRunError) and os.environ.get("RANK", "0") != "0"):  # all say the same
            print(error, file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
