"""Opens the engine for a command's jobs, which run on this machine or on Dask workers."""

from typing import Any

from kdnas.system.engine import Engine
from kdnas.system.errors import UserError, first_line
from kdnas.system.pool import warm_up


def open_engine(workers: int, executor: str | None = None) -> Engine:
    """Open an engine that runs jobs in processes of this machine, or on the workers of Dask.

    Args:
        workers: number of processes; 0: jobs run in this process, one at a time.
        executor: ``dask://HOST:PORT`` of a scheduler, whose workers must see the folder of all
            runs; ``workers`` is then ignored. None: this machine.

    Raises:
        UserError: the executor is no address of the form ``dask://HOST:PORT``, Dask is not
            installed, or the scheduler does not answer or has no workers.
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
            f"executor is {executor!r}, but Dask is not installed: pip install '.[dask]'."
        ) from error
    try:
        client: Any = Client(f"tcp://{address}", timeout="10s")  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise UserError(
            f"executor is {executor!r}: cannot connect to the scheduler ({first_line(error)}); "
            "start it, or correct the address."
        ) from error
    num_workers = len(client.scheduler_info(n_workers=-1)["workers"])
    if not num_workers:
        client.close()
        raise UserError(f"executor is {executor!r}, which has no workers: start at least one.")
    return Engine(num_workers, client.get_executor(pure=False), client.close)
