"""Analyse runs: tables, plots and replays made from trace files, never from live objects."""
