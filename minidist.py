"""minidist: dask.distributed in one readable Python file."""
