"""The command line: parse, call, print. Every command is a module that is imported only when it is called."""
