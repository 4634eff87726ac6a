"""The command line: one file a verb group; torch is imported inside the verb."""
