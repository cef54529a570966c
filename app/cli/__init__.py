"""The `tapeout` command: some commands run or keep a box, all others talk to one over HTTP.

Owns arguments, printing and exit codes; what the latter show comes from the public interface alone.
"""

import click

from app.cli.backup import backup as backup_command
from app.cli.backup import restore as restore_command
from app.cli.bench import bench as bench_command
from app.cli.doctor import doctor as doctor_command
from app.cli.keys import keys
from app.cli.launcher import launcher as launcher_command
from app.cli.listings import logs, models, prices, usage
from app.cli.members import members
from app.cli.optimise import optimise as optimise_command
from app.cli.push import push as push_command
from app.cli.receipts import ledger, receipt
from app.cli.reset_password import reset_password
from app.cli.serve import serve as serve_command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="tapeout", prog_name="tapeout")
def main() -> None:
    """Upload a PyTorch model, get a metered endpoint.

    Commands that talk to a box read TAPEOUT_URL (default http://127.0.0.1:8080) and
    TAPEOUT_API_KEY. `serve`, `launcher`, `doctor`, `backup`, `restore` and `reset-password` are for
    the box itself.
    """


for command in (
    serve_command,
    launcher_command,
    push_command,
    optimise_command,
    models,
    logs,
    usage,
    receipt,
    ledger,
    keys,
    members,
    prices,
    bench_command,
    doctor_command,
    backup_command,
    restore_command,
    reset_password,
):
    main.add_command(command)
