"""One file per file of ``workflow/rules``: a stage reads files, calls a room, writes files."""
