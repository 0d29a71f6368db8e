"""Where a command's jobs run: in processes of this machine, or where Dask's workers are."""

from typing import Any

from kdnas.system.engine import Engine
from kdnas.system.errors import UserError, first_line
from kdnas.system.pool import warm_up


def open_engine(workers: int, executor: str | None = None) -> Engine:
    """An engine with ``workers`` slots on this machine, or one slot for each of Dask's workers.

    Args:
        workers: slots; 0: jobs run in this process.
        executor: ``dask://HOST:PORT`` of a scheduler; its workers share the folder of all runs.
    """
    if executor is None:
        if workers > 0:
            warm_up("kdnas.commands.run")
        return Engine(workers)
    kind, _, address = executor.partition("://")
    if kind != "dask":
        raise UserError(f"executor is {executor!r}: give dask://HOST:PORT of a Dask scheduler.")
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(
            f"executor is {executor!r}, and Dask is not installed: pip install '.[dask]'."
        ) from error
    try:
        client: Any = Client(f"tcp://{address}", timeout="10s")  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UserError(f"executor is {executor!r}: {first_line(error)}.") from error
    num_workers = len(client.scheduler_info(n_workers=-1)["workers"])
    if not num_workers:
        client.close()
        raise UserError(f"executor is {executor!r}, which has no workers: start some.")
    return Engine(num_workers, client.get_executor(pure=False), client.close)
