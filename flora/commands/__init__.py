"""One module a command, each with the function `command` that typer reads."""
