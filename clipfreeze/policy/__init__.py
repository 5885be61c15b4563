"""The policy language: files to a Policy. Needs no torch."""
