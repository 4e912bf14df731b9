"""The command `deit`: one subcommand a file, its flags beside what it runs."""
