"""The command line: one file a subcommand, each with a `command`; parse, call, print."""
