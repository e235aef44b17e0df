"""Every option of every command: default, unit, help and rule. Imports no torch, so that help is instant."""
