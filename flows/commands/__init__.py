"""Commands of `python -m flows`, a module each: `HELP`, `arguments(parser)`, `run(parsed)`."""
