"""What a plan does to a model, an effect a file; each leaves its undo on an ExitStack."""
