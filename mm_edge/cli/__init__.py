"""The command line: parse, call, print. One file per command, imported when the command is used."""
