"""The same start for each of these tests as for unit tests: one seed, one thread, our own loggers."""

from tests.conftest import _loggers_as_python_makes_them, _one_thread_one_seed

__all__ = ["_loggers_as_python_makes_them", "_one_thread_one_seed"]
