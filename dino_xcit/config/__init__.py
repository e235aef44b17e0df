"""Options of all commands: default, help and rule of each. Imports no torch, so help is instant."""
