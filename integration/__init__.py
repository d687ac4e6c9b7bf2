"""Suites and data that try the plugin against real toolboxes, runtimes and photographs."""
