"""What happened? Tables, plots and replays made from trace files, never from live objects."""
